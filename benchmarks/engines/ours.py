"""ramekin."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ramekin
from benchmarks.engines import Clock
from ramekin.cache import Cache, Cross
from ramekin.model import Logits

_CERTAIN = np.float32(1e4)


class Ours:
    """A model folder of `ramekin export`, or of optimum's exporter."""

    def __init__(self, precision: str) -> None:
        self._precision = precision
        self._engine: ramekin.Engine | None = None

    def prepare(self, checkpoint: Path, folder: Path) -> None:
        if self._precision == "optimum":
            from benchmarks.engines.hf import make as theirs

            theirs(kind="optimum").prepare(checkpoint, folder)
            return
        from ramekin_export.pipeline import export
        from ramekin_export.verify import Checks

        # The weights may be random: what they predict proves nothing, and quality has benchmarks of its own.
        export(str(checkpoint), folder, self._precision, checks=Checks(verify=False))

    def load(self, checkpoint: Path, folder: Path, threads: int) -> None:
        self._engine = ramekin.Engine.load(folder, threads=threads)

    def run(self, prompt: Sequence[int], lengths: Sequence[int], clock: Clock) -> None:
        engine = self._engine
        assert engine
        ending: Any = _Ending(engine.model, lengths, engine.manifest.tokens.eos)
        params = ramekin.SamplingParams(n=len(lengths), max_new_tokens=max(lengths), top_k=50, top_p=0.95, seed=1)
        timed, told = ramekin.Engine(ending, engine.tokenizer, engine.manifest), 0
        running = ending.running
        for event in timed.stream(list(prompt), params):
            if isinstance(event, ramekin.Token):
                told += 1
                if told == running:
                    if clock.tick():
                        return
                    told, running = 0, ending.alive_after_this_step
            elif len(event.token_ids) != lengths[event.index]:
                raise RuntimeError(f"sample {event.index} has {len(event.token_ids)} tokens, not {lengths[event.index]}")


class _Ending:
    """A model that lets sample i end after exactly `lengths[i]` tokens, whatever its weights say.

    It stands between the loop and the model, so the loop drops samples as it always does.
    """

    def __init__(self, model: Any, lengths: Sequence[int], eos: Sequence[int]) -> None:
        self._model, self._lengths, self._eos = model, np.array(lengths), eos
        self._samples = np.arange(len(lengths))
        self.running = self.alive_after_this_step = len(lengths)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def new_cache(self, cross: Cross, rows: int, capacity: int, candidates: int) -> Cache:
        cache: Cache = self._model.new_cache(cross, rows, capacity, candidates)
        keep, owner = type(cache).keep, weakref.proxy(cache)  # no cycle: the memory has to go when the prompt is done

        def kept(stay: Sequence[int]) -> list[int]:
            order = keep(owner, stay)
            self._samples = self._samples[order]
            return order

        cache.keep = kept  # type: ignore[method-assign]
        return cache

    def step(self, token_ids: Any, cache: Cache) -> Logits:
        logits: Logits = self._model.step(token_ids, cache)
        ends = self._lengths[self._samples] == cache.length
        if cache.length < self._lengths.max():  # the longest ones end because they are as long as was asked for
            top_ids, top_values = logits.top_ids, logits.top_values
            top_values[np.isin(top_ids, self._eos)] -= _CERTAIN
            top_ids[ends, 0], top_values[ends, 0] = self._eos[0], _CERTAIN
            order = np.argsort(-top_values, axis=1, kind="stable")
            top_values[:] = np.take_along_axis(top_values, order, axis=1)
            top_ids[:] = np.take_along_axis(top_ids, order, axis=1)
            self.alive_after_this_step = int((~ends).sum())
        return logits


def make(precision: str) -> Ours:
    """One precision, or "optimum" for its fp32 graphs."""
    return Ours(precision)
