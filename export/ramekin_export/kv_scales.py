"""The scales that samples' own keys and values are kept with in int8: how far these reach while a model writes samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ramekin.cache import Cache, Floats
from ramekin.engine import Engine
from ramekin.model import Logits
from ramekin.paper import Paper
from ramekin_export.calibrate import SAMPLING as _FREE
from ramekin_export.verify import prompts

SAMPLING = replace(_FREE, min_new_tokens=_FREE.max_new_tokens)
"""A model that would end its answers early is let on: other prompts and other parameters may want more of it."""
REACH = 84
"""So many of 127 units the largest value takes that was seen: other texts may go half as far again before anything is cut.
With 64, twice as far, the larger model's divergence rises by 15 % instead of 4 to 7 %: `docs/log.md`."""
_LEAST = np.float32(1e-30)  # of a channel that is zero everywhere


def measured_scales(folder: Path, papers: Sequence[Paper], progress: Callable[[int, int], None]) -> Floats:
    """Let a model with a float cache write samples, and look at what it keeps.

    Args:
        folder: the model, without a compact decoder yet.
        papers: what it is asked to continue.
        progress: called after each prompt.

    Returns:
        What one unit of int8 stands for, for each channel of keys and values by turns: `(2 * layers, heads, 1, head_dim)`.

    Raises:
        RamekinError: the model computes no numbers that a sample could be drawn from.
    """
    engine = Engine.load(folder)
    if engine.model.compacts:
        raise ValueError(f"{folder}: its cache is in int8 already")
    watch: Any = _Watch(engine.model)
    watched = Engine(watch, engine.tokenizer, engine.manifest)
    sources = prompts(engine.tokenizer, engine.manifest, papers, whole=True)
    for source in sources:
        watched.generate(source, SAMPLING)
        progress(1, len(sources))
    scales: Floats = np.maximum(watch.largest[:, :, None] * np.float32(1 / REACH), _LEAST)
    return scales


class _Watch:
    """A model that remembers the largest size of each channel, `(2 * layers, heads, head_dim)`."""

    def __init__(self, model: Any) -> None:
        self._model, dims = model, model.dims
        self.largest = np.zeros((2 * dims.decoder_layers, dims.num_heads, dims.head_dim), np.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def step(self, token_ids: Sequence[int] | npt.NDArray[np.int64], cache: Cache) -> Logits:
        """The model's own step; all rows of the cache are running."""
        logits: Logits = self._model.step(token_ids, cache)
        for largest, array in zip(self.largest, cache.past, strict=True):
            np.maximum(largest, np.abs(array[:, :, cache.length - 1]).max(axis=0), out=largest)
        return logits
