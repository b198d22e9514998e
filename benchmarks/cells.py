"""How runs are told of in tables and plots: seconds, spreads, and ratios of rounds in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.results import Rows, in_turn, times_as_long


def is_ours(engine: str) -> bool:
    """Whether it is ramekin, in whatever precision."""
    return engine.startswith("ramekin")


def best_of(entries: Sequence[tuple[str, Rows]]) -> tuple[str, Rows]:
    """The entry of the shortest job."""
    return min(entries, key=lambda entry: job_s(entry[1]), default=("", ()))


def length(runs: Rows, ours: tuple[str, Rows]) -> float:
    """How long a job takes next to ours, or in seconds if there are none of ours."""
    return times_as_long(runs, ours[1]) if ours[1] else job_s(runs)


def next_to(ours: tuple[str, Rows]) -> str:
    """What stands over `ratio`."""
    name, runs = ours
    return name and f"{'in turn with' if _tells_turns(runs) else 'next to'} {name}"


def ratio(runs: Rows, ours: tuple[str, Rows]) -> str:
    """How many times as long as ours; nothing where results tell of turns, but of none that both took."""
    known = ours[1] and (in_turn(runs, ours[1]) or not _tells_turns(ours[1]))
    return f"{length(runs, ours):.2f} x" if known else ""


def _tells_turns(runs: Rows) -> bool:
    return all("call" in run for run in runs)


def cut(runs: Rows) -> str:
    """What marks jobs of which the end was not seen."""
    return "~" if any(run["cut"] for run in runs) else ""


def cell(runs: Rows) -> str:
    """The job's time, whether it was cut, and how far its runs are apart."""
    spread = f" ± {_spread(runs):.0%}" if len(runs) > 1 else ""
    return f"{cut(runs)}{in_seconds(job_s(runs))}{spread}"


def in_seconds(value: float) -> str:
    """Three digits."""
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def job_s(runs: Rows) -> float:
    """The median of the job's seconds."""
    return float(np.median([run["job_s"] for run in runs]))


def _spread(runs: Rows) -> float:
    times = [run["job_s"] for run in runs]
    return (max(times) - min(times)) / 2 / job_s(runs)
