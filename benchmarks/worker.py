"""One run of one engine, in a process of its own: reads an order from stdin, prints one JSON object as its last line.

Run by `speed.py` with the interpreter of the engine's environment. It imports nothing but the standard library before the
engine's own packages, whose import is timed.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engines import Clock, entry


def work(order: dict[str, Any]) -> dict[str, Any]:
    """Import, load, run. Times in seconds; the order's `spawned` is when this process was asked for."""
    about = entry(order["engine"])
    checkpoint, folder = Path(order["checkpoint"]), Path(order["folder"])
    began = time.perf_counter()
    for name in about.imports:
        importlib.import_module(name)
    imported = time.perf_counter()
    engine = about.make()
    engine.load(checkpoint, folder, order["threads"])
    loaded = time.perf_counter()
    result: dict[str, Any] = {"import_s": imported - began, "load_s": loaded - imported, "requests": []}
    for request in order["requests"]:
        left = order["limit_s"] - (time.perf_counter() - loaded)
        start, clock = time.monotonic(), Clock(left)
        engine.run(request["prompt"], request["lengths"], clock)
        result.setdefault("cold_start_s", start - order["spawned"] + clock.ends[0])
        result["requests"].append([round(end, 5) for end in clock.ends])
        if len(clock.ends) < max(request["lengths"]):
            break
    return {**result, "peak_mb": _peak_mb()}


def _peak_mb() -> float:
    """As `ramekin.bench.peak_memory_mb`, which engines in other environments do not have."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` begins with what the parent process held
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def main() -> None:
    """Prepare a folder, or run."""
    order = json.load(sys.stdin)
    if order["task"] == "prepare":
        entry(order["engine"]).make().prepare(Path(order["checkpoint"]), Path(order["folder"]))
        print("{}")
    else:
        print(json.dumps(work(order)))


if __name__ == "__main__":
    main()
