"""The command `ramekin bench`: how fast a model is on this machine, and how far from what the machine could do."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ramekin.bench import Job, Timing, forget_peak_memory, peak_memory_mb, run
from ramekin.ceiling import Ceiling, Work
from ramekin.engine import Engine
from ramekin.options import PATH, hush, open_engine, provider_option
from ramekin.provider import AUTO
from ramekin.session import MOST_THREADS, usable_cores
from ramekin.terminal import progress, write

_SHORT = Job(n=4, source=128, tokens=16)
"""What the number of threads is chosen by."""


@click.command(short_help="Time a model on this machine.")
@click.argument("model", type=PATH)
@click.option("-n", "ns", type=click.IntRange(1, 1024), multiple=True, help="Samples; may be repeated.  [default: 1, 4, 16]")
@click.option("--source", type=click.IntRange(1, 1 << 15), default=900, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", type=click.IntRange(2, 1 << 12), default=100, show_default=True, help="Tokens of each sample.")
@click.option("--repeat", type=click.IntRange(1, 100), default=3, show_default=True, help="Runs; the medians are shown.")
@click.option("--json", "as_json", is_flag=True, help="All figures as one JSON object.")
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="Threads that compute.  [default: the fastest of 1, 2, 4 ...]"
)
@provider_option
def bench(
    model: Path,
    ns: tuple[int, ...],
    source: int,
    tokens: int,
    repeat: int,
    as_json: bool,
    threads: int | None,
    provider: str | None,
) -> None:
    """Time MODEL on this machine, with nothing else running: first token, step, tokens per second, memory.

    The prompt is random and every sample is forced to its length, so that runs can be compared. On a CPU, without --threads,
    a short job is tried with 1, 2, 4 ... threads, and the fastest number is taken. "of the ceiling" is the time that the job
    would take if it did nothing but read its weights at this machine's memory bandwidth, or multiply at the rate of its
    fastest large matrix product, whichever is slower, as a share of the time that it took; of a GPU it is not told.

    \b
    Examples:
      ramekin bench model
      ramekin bench model -n 16 --source 512 --json
    """
    tried = {} if threads else _try_threads(model, provider)
    threads = threads or min(tried, key=lambda count: tried[count], default=usable_cores())
    forget_peak_memory()
    began = time.perf_counter()
    engine = open_engine(model, provider, threads, source)
    loaded = time.perf_counter() - began
    jobs = [Job(n, source, tokens) for n in sorted(set(ns)) or (1, 4, 16)]
    timings: dict[Job, list[Timing]] = {job: [] for job in jobs}
    peaks: dict[Job, float] = {}
    run(engine, Job(1, min(source, 16), 2))  # the first run of a session allocates
    for job in progress(jobs * repeat, "runs"):
        timings[job].append(run(engine, job))
        peaks.setdefault(job, peak_memory_mb())
    ceiling = Ceiling.measure(threads) if engine.provider == "cpu" else None  # last, since it needs memory of its own
    rows = []
    for job, runs in timings.items():
        times = [timing.job_s for timing in runs]
        median, least = Timing.median(runs), Work(engine.manifest, source, job.n, tokens)
        extra = {
            "job_spread": (max(times) - min(times)) / median.job_s,
            "of_the_ceiling": least.job_s(ceiling) / median.job_s if ceiling else math.nan,
            "first_token_of_the_ceiling": least.first_token_s(ceiling) / median.first_token_s if ceiling else math.nan,
            "peak_mb": peaks[job],
        }
        rows.append({**asdict(job), **asdict(median), **extra})
    result = {
        "model": {"precision": engine.manifest.precision, "source": engine.manifest.source},
        "provider": engine.provider,
        "threads": threads,
        "threads_tried_s": tried,
        "repeat": repeat,
        "load_s": loaded,
        "ceiling": asdict(ceiling) if ceiling else None,
        "jobs": rows,
    }
    if as_json:
        write(json.dumps(_rounded(result), allow_nan=False))
        return
    for line in _page(result):
        write(line)


def _try_threads(model: Path, provider: str | None) -> dict[int, float]:
    """Seconds of a short job by number of threads; none on a GPU, where they do not matter."""
    cores = usable_cores()
    one, where = _short_job(model, provider, 1)
    if where != "cpu":
        return {}
    counts = sorted({*(1 << i for i in range(1, cores.bit_length())), cores} - {1})
    return {1: one, **{count: _short_job(model, provider, count)[0] for count in progress(counts, "threads")}}


def _short_job(model: Path, provider: str | None, threads: int) -> tuple[float, str]:
    """Seconds, and where it was computed; the engine is gone when this returns, so that no two hold memory at once."""
    hush()
    engine = Engine.load(model, provider or AUTO, threads)
    return min(run(engine, _SHORT).job_s for _ in range(3)), engine.provider


def _page(result: dict[str, Any]) -> Iterator[str]:
    ceiling, tried = result["ceiling"], result["threads_tried_s"]
    why = ", ".join(f"{count}: {seconds:.2f} s" for count, seconds in tried.items())
    yield f"threads        {result['threads']}" + (f"  (tried {why})" if len(tried) > 1 else "")
    if ceiling:
        yield (
            f"this machine   {ceiling['bandwidth'] / 1e9:.1f} GB/s, {ceiling['int8'] / 1e9:,.0f} G int8 and "
            f"{ceiling['float32'] / 1e9:,.0f} G float32 operations per second"
        )
    yield f"load           {result['load_s']:.2f} s ({result['model']['precision']})"
    first = result["jobs"][0]
    yield f"jobs           {first['source']} tokens in, n times {first['tokens']} out; medians of {result['repeat']}"
    yield ""
    yield "    n  first token   step p50   step p95   tokens/s        job  spread  of the ceiling  peak memory"
    for row in result["jobs"]:
        peak = "-" if math.isnan(row["peak_mb"]) else f"{row['peak_mb']:,.0f} MB"
        share = "-" if math.isnan(row["of_the_ceiling"]) else f"{row['of_the_ceiling']:.0%}"
        yield (
            f"{row['n']:5}{row['first_token_s']:11.2f} s{row['step_p50_ms']:8.1f} ms{row['step_p95_ms']:8.1f} ms"
            f"{row['tokens_per_s']:11.1f}{row['job_s']:9.2f} s{row['job_spread']:7.0%}{share:>15}"
            f"{peak:>13}"
        )


def _rounded(value: Any) -> Any:
    """Six digits are more than a timing has; what is not a number is null, as JSON has no name for it."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value
