"""Files of results: JSON lines, of which the first tells of the machine and each other one of a run, an engine or a call."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

_ROOT = Path(__file__).parents[1]
_SAME = ("machine", "model", "random", "threads")
"""What all runs of a file have in common, else they could not be compared."""

Rows = Sequence[Mapping[str, Any]]
Figure = Callable[[Mapping[str, Any]], float]
"""What is read off a run."""


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file, none if it is not there; lines that are cut are told of on stderr."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.exists() else (), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{path}: line {number} is not whole and left out", file=sys.stderr)
    return rows


class Results:
    """A file that runs are added to, each as soon as it is known.

    Every row that is added has the name of the call that added it: only runs of one call and one round took turns.

    Args:
        path: the file, which may hold rows already. A last line that was cut is taken away.
        head: what its first row has to say.

    Raises:
        SystemExit: it is of another machine, model or number of threads.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend(path)
        self.rows, self._path = read(path), path
        if self.rows and "machine" not in self.rows[0]:
            raise SystemExit(f"{path} does not begin like a file of results; choose another one with --out")
        for name in _SAME if self.rows else ():
            if self.rows[0].get(name) != head[name]:
                raise SystemExit(
                    f"{path} is of another {name} ({self.rows[0].get(name)!r}, not {head[name]!r}); choose another one with --out"
                )
        if not self.rows:
            self._write(head)
        self.call = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._told = False

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row, so that it is there whatever happens next."""
        if not self._told:
            self._write({"call": self.call, **_commit()})
            self._told = True
        self._write({**row, "call": self.call})

    def _write(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _mend(path: Path) -> None:
    """Let a file end with a line's end: what was cut there is not a result, and what is added must not be glued to it."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if content != whole:
        try:
            json.loads(content[len(whole) :])
            whole = content + b"\n"
        except ValueError:
            print(f"{path}: its last line was cut, and is taken away", file=sys.stderr)
        path.write_bytes(whole)


def _commit() -> dict[str, Any]:
    """Which code was measured; nothing outside a clone."""
    code = ("benchmarks/*.py", "benchmarks/engines", "runtime", "export", "pyproject.toml")  # results come and go
    try:
        commit, changed = (
            subprocess.run(["git", *command], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--", *code))
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": f"{commit}-dirty" if changed else commit}


def good_runs(rows: Rows) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The runs that did not fail, by job and engine."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "engine" in row and "error" not in row:
            found.setdefault((row["job"], row["engine"]), []).append(row)
    return found


def job_time(run: Mapping[str, Any]) -> float:
    """Seconds of a whole job."""
    return float(run["job_s"])


def by_round(runs: Rows, figure: Figure) -> dict[tuple[str, int], float]:
    """A figure by call and round, which results of old do not tell."""
    return {(run["call"], run["round"]): figure(run) for run in runs if "call" in run}


def in_turn(runs: Rows, ours: Rows) -> list[float]:
    """How many times as long as ours a job took, in each round in which both took turns."""
    theirs, mine = by_round(runs, job_time), by_round(ours, job_time)
    return [theirs[each] / mine[each] for each in theirs.keys() & mine.keys()]


def times_as_long(runs: Rows, ours: Rows) -> float:
    """The median of what `in_turn` tells; if it tells nothing, the ratio of medians.

    Medians of different rounds would say how slow the machine was in them, too.
    """
    ratios = in_turn(runs, ours)
    return median(ratios) if ratios else median(map(job_time, runs)) / median(map(job_time, ours))
