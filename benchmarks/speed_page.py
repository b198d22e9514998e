"""`docs/speed.md` and its plots, from the results of `speed.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import best_of, cell, in_seconds, is_ours, job_s, length, next_to, ratio
from benchmarks.engines import ENGINES, LEVERS
from benchmarks.goals import section as goals
from benchmarks.jobs import JOBS, QUICK
from benchmarks.kernels_page import plot as kernels_plot
from benchmarks.kernels_page import profiled
from benchmarks.kernels_page import section as kernels_section
from benchmarks.results import Rows, good_runs, read
from benchmarks.speed_plots import jobs_plot, levers_plot

_INTRODUCTION = """# Speed

Made by `python -m benchmarks report`; what is timed, what is not and how to repeat it: [benchmarks/README.md](../benchmarks/README.md).
Every figure is the median of as many runs as its table or line says, each in a fresh process; the engines of one call take
turns{turns}. "±" is half the distance between the fastest and the slowest run. `~` marks a job that was cut after {limit} s: its time is extrapolated from its last steps.

- Model: **{model}**{random}.
- Machine: {processor}, {cores} cores, {extensions}; {threads} threads for every engine.
- In the same run the machine read {bandwidth:.1f} GB/s and did {int8:,.0f} G int8 and {float32:,.0f} G float32 operations per second
  in large matrix products ({bandwidth_range}, {int8_range}, {float32_range} over the rounds).
"""


def page(results: Path, plots: Path | None = None) -> str:
    """The page.

    Args:
        results: what `run` wrote; beside it, if they are there, with `-levers` in the name what `run --levers` wrote, and with
            `-own` what `ramekin bench --json` told of prompts of several lengths, and with `-kernels` what `run --kernels` wrote.
        plots: a folder for the plots; None: none.
    """
    rows, found = _ran(results)
    jobs = [job for job in {**JOBS, **QUICK} if any(job == each for each, _ in found)]
    engines = [engine for engine in ENGINES if any(engine == each for _, each in found)]
    lever_rows = read(results.with_name(f"{results.stem}-levers.jsonl"))
    levers = good_runs(lever_rows)
    parts = [_introduction(rows[0], rows)]
    if plots:
        jobs_plot(plots / f"{results.stem}-jobs.svg", engines, found)
        parts.append(f"![How long each engine takes next to ours]({plots.name}/{results.stem}-jobs.svg)\n")
    own = [row for row in read(results.with_name(f"{results.stem}-own.jsonl")) if "engine" in row]
    kernels = read(results.with_name(f"{results.stem}-kernels.jsonl"))
    kernels = kernels if profiled(kernels) else []
    if own:
        parts.append(goals(found, own, "which kernels stand in the way: [below](#kernel-by-kernel)" if kernels else ""))
    parts += [_job(job, [(engine, found[job, engine]) for engine in engines if (job, engine) in found]) for job in jobs]
    if levers:
        parts.append(_levers(levers))
        if plots:
            levers_plot(plots / f"{results.stem}-levers.svg", levers)
            parts.append(f"![Where the gain comes from]({plots.name}/{results.stem}-levers.svg)\n")
    if kernels:
        parts.append(kernels_section(kernels))
        if plots:
            kernels_plot(plots / f"{results.stem}-kernels.svg", kernels)
            parts.append(f"![Kernels of a step]({plots.name}/{results.stem}-kernels.svg)\n")
    parts += [_sizes(rows, engines, found), _failures(rows, found)]
    return "\n".join(part for part in parts if part)


def _ran(results: Path) -> tuple[Rows, Mapping[tuple[str, str], Rows]]:
    """All rows of a file, and the runs among them.

    Raises:
        ValueError: there are none.
    """
    rows = read(results)
    found = good_runs(rows)
    if not found or "machine" not in rows[0] or not any("ceiling" in row for row in rows):
        raise ValueError(
            f"{results} has nothing that ran, or is no file of results; measure with `python -m benchmarks run`"
        )
    return rows, found


def _introduction(head: Mapping[str, Any], rows: Rows) -> str:
    ceilings = {
        name: [row["ceiling"][name] / 1e9 for row in rows if "ceiling" in row] for name in ("bandwidth", "int8", "float32")
    }
    machine, limits = head["machine"], {row.get("limit_s", head["limit_s"]) for row in rows if row.get("cut")}
    return _INTRODUCTION.format(
        turns=_turns(rows),
        limit=" or ".join(f"{limit:.0f}" for limit in sorted(limits) or [head["limit_s"]]),
        model=head["model"],
        random=", random weights" if head["random"] else "",
        processor=machine["processor"],
        cores=machine["cores"],
        extensions=", ".join(machine["extensions"]),
        threads=head["threads"],
        **{name: float(np.median(values)) for name, values in ceilings.items()},
        **{f"{name}_range": f"{min(values):,.0f} to {max(values):,.0f}" for name, values in ceilings.items()},
    )


def _turns(rows: Rows) -> str:
    """In how many calls the runs were made, and of which commits."""
    runs = [row for row in rows if "engine" in row and "error" not in row]
    calls = {row.get("call") for row in runs}
    if None in calls:
        return ', and which were measured in one call stands in the [log](log.md). "Next to" compares medians'
    commits = sorted({row["commit"] for row in rows if row.get("call") in calls and "commit" in row})
    days = sorted({call[:10] for call in calls})
    called = "one call" if len(calls) == 1 else f"{len(calls)} calls"
    return (
        f" ({called}, {' and '.join(dict.fromkeys((days[0], days[-1])))}, commit {', '.join(commits) or 'not known'}). "
        '"In turn with" is how many times as long a job\ntakes as ours in the same rounds: a machine is not as fast in every hour, '
        "so medians of other rounds cannot be divided by one another"
    )


def _job(job: str, entries: Sequence[tuple[str, Rows]]) -> str:
    best = best_of([entry for entry in entries if is_ours(entry[0])])
    requests = {**JOBS, **QUICK}[job]
    tokens = sum(sum(request.lengths) for request in requests)
    most = max(len(runs) for _, runs in entries)
    lines = [
        f"## {job}\n",
        f"{most} run{'s'[: most > 1]} of each engine where its line says nothing else.\n",
        f"| | job | {next_to(best)} | first token | step p50 / p95 | tokens/s | cold start | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for engine, runs in sorted(entries, key=lambda entry: length(entry[1], best)):
        fewer = f" ({len(runs)} run{'s'[: len(runs) > 1]})" if len(runs) < most else ""
        steps = [step for run in runs for ends in run["requests"] for step in np.diff(ends) * 1e3]
        p50, p95 = np.percentile(steps, (50, 95)) if steps else (np.nan, np.nan)
        first = np.median([run["requests"][0][0] for run in runs])
        lines.append(
            f"| {engine}{fewer} | {cell(runs)} "
            f"| {ratio(runs, best)} | {in_seconds(first)} | {p50:.0f} / {p95:.0f} ms "
            f"| {tokens / job_s(runs):.1f} | {np.median([run['cold_start_s'] for run in runs]):.2f} s "
            f"| {np.median([run['peak_mb'] for run in runs]):,.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def summary(results: Path) -> str:
    """The README's table: job time of each engine on each job after 900 tokens."""
    rows, found = _ran(results)
    machine = rows[0]["machine"]
    engines = [engine for engine in ENGINES if ("900 n=16", engine) in found]
    jobs = {
        "900 n=16": "16 x 100 tokens",
        "900 n=16 natural": "16 of natural lengths",
        "900 n=4": "4 x 100",
        "900 n=1": "1 x 100",
    }
    shape = f"random weights of {rows[0]['model']}'s shape" if rows[0]["random"] else rows[0]["model"]
    forced = next(iter(jobs))
    best = best_of([(engine, found[forced, engine]) for engine in engines if is_ours(engine)])
    lines = [
        f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['extensions'])}), {rows[0]['threads']} threads, "
        f'{shape}, 900 tokens in; a run, or the median of several where there is a "±", each in a fresh process:\n',
        f"| | {jobs[forced]} | {next_to(best)} | {' | '.join(list(jobs.values())[1:])} | first token, n=16 | peak memory, n=16 |",
        "|---" * (len(jobs) + 4) + "|",
    ]
    for engine in sorted(engines, key=lambda each: length(found[forced, each], best)):
        cells = [cell(found[job, engine]) if (job, engine) in found else "" for job in jobs]
        runs = found[forced, engine]
        cells.insert(1, ratio(runs, best))
        first = np.median([run["requests"][0][0] for run in runs])
        peak = np.median([run["peak_mb"] for run in runs])
        lines.append(f"| {engine} | {' | '.join(cells)} | {in_seconds(first)} | {peak:,.0f} MB |")
    return "\n".join(lines) + "\n"


def _sizes(rows: Rows, engines: Sequence[str], found: Mapping[tuple[str, str], Rows]) -> str:
    about = {row["about"]: row for row in rows if "about" in row and "error" not in row}
    lines = [
        "## Sizes and versions\n",
        "| | on disk | installed, with all it requires | import | load | versions |",
        "|---|---|---|---|---|---|",
    ]
    for engine, row in ((engine, about[engine]) for engine in engines if engine in about):
        runs = [run for (_, each), group in found.items() if each == engine for run in group]
        imports, loads = (np.median([run[name] for run in runs]) for name in ("import_s", "load_s"))
        versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
        lines.append(
            f"| {engine} | {row['disk_bytes'] / 1e6:,.0f} MB | {row['bytes'] / 1e6:,.0f} MB | {imports:.2f} s "
            f"| {loads:.2f} s | {versions} |"
        )
    return "\n".join(lines) + "\n"


def _failures(rows: Rows, found: Mapping[tuple[str, str], Rows]) -> str:
    """What failed and was not done again: engines that could not be prepared, and jobs."""
    failed = {(row.get("engine") or row["about"], row.get("job", "")): row["error"] for row in rows if "error" in row}
    ran = {engine for _, engine in found}
    lines = [
        f"- {engine}{job and f', {job}'}: {error}"
        for (engine, job), error in failed.items()
        if (job, engine) not in found and (job or engine not in ran)
    ]
    return "## Did not run\n\n" + "\n".join(lines) + "\n" if lines else ""


def _levers(found: Mapping[tuple[str, str], Rows]) -> str:
    """Where the gain comes from: each lever on top of the ones before."""
    lines = [
        "## Where the gain comes from\n",
        "Our own graphs, first with every lever off, then with one thing more in each line: 16 samples that end at natural lengths "
        "after 900 tokens, on a day of its own.\n",
        "| | job | times as fast as the line before | as the first line |",
        "|---|---|---|---|",
    ]
    rows = [(name, job_s(runs), cell(runs)) for name in LEVERS for (_, each), runs in found.items() if each == name]
    for place, (name, seconds, shown) in enumerate(rows):
        before = rows[max(0, place - 1)][1]
        lines.append(f"| {name} | {shown} | {before / seconds:.2f} | {rows[0][1] / seconds:.2f} |")
    return "\n".join(lines) + "\n"
