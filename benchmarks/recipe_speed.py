"""What our recipes cost next to plain ones: encoder and step of both, in turn, in one process. Prints one JSON object.

    python -m benchmarks.recipe_speed CHECKPOINT [--work FOLDER] [--source 900] [--threads 2]

The plain recipe has one activation scale for a whole tensor in the encoder, and weights rounded to nearest. int4 is written
without calibration, which changes its numbers and not its graph. All keys and values are floats: there are no compact graphs.
Of two engines in one process the one that is loaded first, ours, takes some 8 % longer for that alone (`docs/log.md`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.naive import Int8PerTensor, NearestPerBlock
from ramekin import Engine
from ramekin.manifest import DEFAULT_PROMPT
from ramekin_export.checkpoint import Checkpoint
from ramekin_export.recipe import RECIPES, Layers, Recipe
from ramekin_export.writer import Writer

_PLAIN, _INT8, _INT4 = (Layers.alike(form) for form in (Int8PerTensor(pairs=False), NearestPerBlock(8), NearestPerBlock(4)))
_RECIPES = {
    "int8": (RECIPES["int8"], Recipe(_PLAIN, _INT8, NearestPerBlock(8), rotated=False, folded=False)),
    "int4": (
        replace(RECIPES["int4"], calibrated=False),
        Recipe(_PLAIN, _INT4, NearestPerBlock(8), rotated=False, folded=False),
    ),
}
_KINDS = ("ours", "plain")
_SPINNING = 0.1  # seconds after which the threads of the other engine sleep


def compare(folders: dict[str, Path], source: int, threads: int, repeat: int) -> dict[str, object]:
    """Medians in milliseconds, and the ratio of ours to plain."""
    engines = {kind: Engine.load(folders[kind], threads=threads) for kind in _KINDS}
    vocabulary = engines["ours"].manifest.dims.vocab_size
    ids = np.random.default_rng(0).integers(3, min(32_000, vocabulary), source)
    times: dict[str, dict[str, list[float]]] = {f"encoder, {source} tokens": {kind: [] for kind in _KINDS}}
    cross = {kind: engine.model.prefill(ids[:64]) for kind, engine in engines.items()}
    for _ in range(repeat):
        for kind, engine in engines.items():
            began = time.perf_counter()
            cross[kind] = engine.model.prefill(ids)
            times[f"encoder, {source} tokens"][kind].append(time.perf_counter() - began)
    for n in (1, 4, 16):
        taken = times[f"step, n={n}"] = {kind: [] for kind in _KINDS}
        caches = {kind: engine.model.new_cache(cross[kind], n, 40, 50) for kind, engine in engines.items()}
        for _ in range(6):
            for kind, engine in engines.items():
                time.sleep(_SPINNING)
                for _ in range(6):
                    began = time.perf_counter()
                    engine.model.step([5] * n, caches[kind])
                    taken[kind].append(time.perf_counter() - began)
    result: dict[str, object] = {}
    for what, taken in times.items():
        ours, plain = (float(np.median(taken[kind][1:])) * 1e3 for kind in _KINDS)
        result[what] = {"ours_ms": round(ours, 2), "plain_ms": round(plain, 2), "ratio": round(ours / plain, 3)}
    return result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--work", type=Path, help="keeps the exported models here")
    parser.add_argument("--source", type=int, default=900)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=6)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = {}
        for precision, recipes in _RECIPES.items():
            folders = {kind: (a.work or Path(scratch)) / f"{precision}-{kind}" for kind in _KINDS}
            for kind, recipe in zip(_KINDS, recipes, strict=True):
                if not (folders[kind] / "manifest.json").exists():
                    shutil.rmtree(folders[kind], ignore_errors=True)
                    folders[kind].mkdir(parents=True)
                    Writer(Checkpoint.open(a.checkpoint), DEFAULT_PROMPT).write(
                        folders[kind], precision, recipe, lambda _done, _all: None
                    )
            results[precision] = compare(folders, a.source, a.threads, a.repeat)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
