"""Time every engine on every job: each run in a fresh process, the engines in turn, round after round.

Results are appended to a file of JSON lines as they come, so a run can be stopped and taken up again: what is in the file
is not done again. An engine that fails leaves its error there and does not stop the others.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.engines import EXTRAPOLATED_FROM, entry
from benchmarks.environments import installed, interpreter
from benchmarks.jobs import FORCED, NATURAL, Request
from benchmarks.machine import machine
from benchmarks.results import Results
from ramekin.ceiling import Ceiling, Work
from ramekin.manifest import Manifest

_ROOT = Path(__file__).parents[1]
OWN_SOURCES = (256, 512, 900)
"""Prompt lengths of `run_own`."""
PROFILED = (16, 1)
"""Numbers of samples of `run_kernels`."""
_HEARD = 5  # lines of what a worker said that are passed on
_FAILURES = (OSError, subprocess.SubprocessError, RuntimeError, ValueError)
_WHOLE_S = 3600  # the longest that a run may take whose job is not cut


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        model: what the results call the checkpoint.
        random: whether its weights mean nothing.
        checkpoint: its folder.
        work: where converted models and environments are kept.
        engines: names of engines or levers.
        jobs: by name.
        rounds: how often each engine does each job.
        threads: how many threads each engine gets.
        limit_s: a job of equal lengths that takes longer is cut, and its time extrapolated from its steps.
        pythons: interpreters to use for environments, instead of making these.
    """

    model: str
    random: bool
    checkpoint: Path
    work: Path
    engines: Sequence[str]
    jobs: Mapping[str, tuple[Request, ...]]
    rounds: int
    threads: int
    limit_s: float
    pythons: Mapping[str, Path]

    def python(self, engine: str) -> Path:
        """The interpreter for an engine."""
        name = entry(engine).environment
        return self.pythons.get(name) or interpreter(name, self.work / "environments")

    def folder(self, engine: str) -> Path:
        """What the engine reads: its converted model, or the checkpoint."""
        name = entry(engine).folder
        return self.work / self.model / name if name else self.checkpoint


def run(plan: Plan, out: Path) -> None:
    """Measure what `out` does not hold yet."""
    results = Results(out, {**_head(plan), "limit_s": plan.limit_s})
    done = {(row["engine"], row["job"], row["round"]) for row in results.rows if "engine" in row and "error" not in row}
    ready = [engine for engine in plan.engines if _prepared(plan, engine, results)]
    for number in range(plan.rounds):
        todo = [(job, engine) for job in plan.jobs for engine in ready if (engine, job, number) not in done]
        if todo:
            results.add({"round": number, "ceiling": asdict(Ceiling.measure(plan.threads))})
        for job, engine in todo:
            ran = _run(plan, engine, plan.jobs[job])
            row = {"engine": engine, "job": job, "round": number, "limit_s": plan.limit_s, **ran}
            results.add(row)
            print(_line(row), file=sys.stderr, flush=True)


def _head(plan: Plan) -> dict[str, Any]:
    return {"machine": machine(), "model": plan.model, "random": plan.random, "threads": plan.threads}


def run_own(plan: Plan, out: Path) -> None:
    """Add to `out` what `ramekin bench` tells of each of our engines, and the least that some jobs could take."""
    results = Results(out, _head(plan))
    done = {(row["engine"], row["source"]) for row in results.rows if "engine" in row}
    for engine, source in product(plan.engines, OWN_SOURCES):
        if (engine, source) in done or not _prepared(plan, engine):
            continue
        folder = plan.folder(engine)
        options = ["--source", str(source), "--threads", str(plan.threads), "--json"]
        command = [str(plan.python(engine)), "-m", "ramekin", "bench", str(folder), *options]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        results.add({"engine": engine, "source": source, **found, **_least(folder, source, Ceiling(**found["ceiling"]))})
        print(f"{engine}, prompt of {source} tokens", file=sys.stderr, flush=True)


def run_kernels(plan: Plan, out: Path) -> None:
    """Add to `out` where the time of a job of each of our engines goes."""
    results = Results(out, _head(plan))
    done = {(row["engine"], row["n"]) for row in results.rows if "engine" in row and "error" not in row}
    for n, engine in product(PROFILED, plan.engines):
        if (engine, n) in done or not _prepared(plan, engine):
            continue
        options = ["-n", str(n), "--source", str(max(OWN_SOURCES)), "--tokens", str(FORCED), "--threads", str(plan.threads)]
        command = [str(plan.python(engine)), "-m", "benchmarks.kernels", str(plan.folder(engine)), *options]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
        failed = {"error": (ran.stderr.splitlines() or [f"exit status {ran.returncode}"])[-1]}
        results.add({"engine": engine, "n": n, **(failed if ran.returncode else json.loads(ran.stdout))})
        told = f" failed: {failed['error']}" if ran.returncode else ""
        print(f"{engine}, {n} sample{'s'[: n > 1]}{told}", file=sys.stderr, flush=True)


def _least(folder: Path, source: int, ceiling: Ceiling) -> dict[str, float]:
    """What this machine could do: seconds of 16 samples of natural lengths, and bytes that 16 samples of 100 tokens have to hold."""
    manifest = Manifest.load(folder)
    natural = Work(manifest, source, 1, 1).prefill_s(ceiling)
    for position in range(max(NATURAL)):
        running = sum(length > position for length in NATURAL)
        natural += Work(manifest, source, running, 2 * position).step_s(ceiling)
    weights = sum(file.bytes for name, file in manifest.files.items() if name in ("encoder.bin", "decoder.bin"))
    held = weights + Work(manifest, source, len(NATURAL), FORCED).cached_bytes(FORCED)
    return {"natural_ceiling_s": natural, "held_bytes": held}


def _prepared(plan: Plan, engine: str, results: Results | None = None) -> bool:
    """Convert the checkpoint for an engine, and write down what it is; False if that fails."""
    folder, about = plan.folder(engine), entry(engine)
    try:
        if about.folder and not (folder / "done").exists():
            print(f"{engine}: converting", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.parent.mkdir(parents=True, exist_ok=True)
            _order(plan, engine, {"task": "prepare", "folder": str(part)}, limit=3600)
            part.rename(folder)
            (folder / "done").touch()
        if results and not any(row.get("about") == engine and "error" not in row for row in results.rows):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            results.add({"about": engine, "disk_bytes": size, **installed(plan.python(engine), about.packages)})
    except _FAILURES as error:
        if results:
            results.add({"about": engine, "error": str(error)[-600:]})
        print(f"{engine}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _run(plan: Plan, engine: str, requests: Sequence[Request]) -> dict[str, Any]:
    vocabulary = json.loads((plan.checkpoint / "config.json").read_text("utf-8"))["vocab_size"]
    # Steps become shorter as samples leave: what is left of such a job cannot be told from its last steps.
    cut = all(len(set(each.lengths)) == 1 for each in requests)
    order = {
        "task": "run",
        "folder": str(plan.folder(engine)),
        "limit_s": plan.limit_s if cut else _WHOLE_S,
        "requests": [{"prompt": each.prompt(vocabulary), "lengths": each.lengths} for each in requests],
    }
    try:
        result = _order(plan, engine, order, limit=4 * plan.limit_s + 300 if cut else _WHOLE_S)
    except _FAILURES as error:
        return {"error": str(error)[-600:]}
    return {**result, **_job_time(result["requests"], requests)}


def _job_time(ends: Sequence[Sequence[float]], requests: Sequence[Request]) -> dict[str, Any]:
    """Seconds of the whole job; of a job that was cut what it would have taken, if its later steps were like its last ones."""
    total, cut = 0.0, False
    for done, request in zip(ends, requests, strict=False):
        missing = max(request.lengths) - len(done)
        total += done[-1]
        if missing:
            recent = done[-EXTRAPOLATED_FROM:]
            total, cut = total + missing * (recent[-1] - recent[0]) / max(1, len(recent) - 1), True
    return {"job_s": total * len(requests) / len(ends), "cut": cut or len(ends) < len(requests)}


def _order(plan: Plan, engine: str, order: dict[str, Any], limit: float) -> dict[str, Any]:
    """Have a worker do something; its answer.

    Raises:
        RuntimeError: it failed; the text is the end of what it said.
    """
    common = {"engine": engine, "checkpoint": str(plan.checkpoint), "threads": plan.threads}
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= {name: str(plan.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    text = json.dumps({**common, **order, "spawned": time.monotonic()})
    done = subprocess.run(
        [str(plan.python(engine)), "-m", "benchmarks.worker"],
        input=text,
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env=environment,
        timeout=limit,
        check=False,
    )
    said = list(dict.fromkeys(line for line in done.stderr.splitlines() if line.strip()))
    if done.returncode < 0:
        raise RuntimeError(f"it was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise RuntimeError((said or [f"exit status {done.returncode}"])[-1])
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError("it ended without a result") from None
    heard = said[-_HEARD:] if order["task"] == "run" else []
    for line in heard:  # warnings: a peer may tell that it does without its fast kernels
        print(f"   {engine}: {line[:300]}", file=sys.stderr, flush=True)
    return answer


def _line(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"{row['round']}  {row['job']:22} {row['engine']:26} failed: {row['error']}"
    first, cut = row["requests"][0][0], " (extrapolated)" if row["cut"] else ""
    return f"{row['round']}  {row['job']:22} {row['engine']:26} job {row['job_s']:8.2f} s{cut}, first token {first:.2f} s"
