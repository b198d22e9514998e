"""How far keys, values and queries reach while a model writes samples: what they are kept with in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ramekin.cache import Floats
from ramekin.manifest import Manifest
from ramekin.paper import Paper
from ramekin.tensors import cross_names
from ramekin_export.calibrate import SAMPLING as _FREE
from ramekin_export.calibrate import sampled
from ramekin_export.decoder import cross_attention_at

SAMPLING = replace(_FREE, min_new_tokens=_FREE.max_new_tokens)
"""A model that would end its answers early is let on: other prompts and other parameters may want more of it."""


@dataclass(frozen=True)
class Reach:
    """What was seen of each channel; all arrays are `(layers, heads, head_dim)` float32.

    Attributes:
        own_keys: the largest size of samples' own keys.
        own_values: the largest size of their own values.
        queries: the largest size of the queries to the prompt.
        keys: the least and the largest of the prompt's keys, `(2, layers, heads, head_dim)`.
        values: the least and the largest of its values, as `keys`.
        mean_values: the mean of its values.
    """

    own_keys: Floats
    own_values: Floats
    queries: Floats
    keys: Floats
    values: Floats
    mean_values: Floats


def measured_reach(folder: Path, papers: Sequence[Paper], progress: Callable[[int, int], None]) -> Reach:
    """Let a model with float keys and values write samples, and look at what it keeps and what it asks for.

    Args:
        folder: the model; a graph with more outputs is written there and deleted.
        papers: what it is asked to continue.
        progress: called after each step.

    Raises:
        RamekinError: the model computes no numbers that a sample could be drawn from.
    """
    dims = Manifest.load(folder).dims
    layers, shape = range(dims.decoder_layers), (dims.decoder_layers, dims.num_heads, dims.head_dim)
    own_keys, own_values, queries = (np.zeros(shape, np.float32) for _ in range(3))
    keys, values = (np.stack([np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32)]) for _ in range(2))
    sums, tokens = np.zeros(shape, np.float32), 0
    names = cross_names(dims.decoder_layers)
    for seen in sampled(folder, papers, [f"{cross_attention_at(i)}.q" for i in layers], SAMPLING, progress):
        for i in layers:
            for largest, past in zip((own_keys, own_values), seen.past[2 * i : 2 * i + 2], strict=True):
                largest[i] = np.maximum(largest[i], np.abs(past[:, :, seen.step]).max(axis=0))
            queries[i] = np.maximum(queries[i], np.abs(seen.tapped[i].reshape(-1, *shape[1:])).max(axis=0))
        if seen.step:  # the prompt was looked at
            continue
        for i in layers:
            prompt = seen.cross[names[2 * i]][0], seen.cross[names[2 * i + 1]][0].swapaxes(1, 2)
            for (least, largest), array in zip((keys, values), prompt, strict=True):  # (heads, source, head_dim)
                least[i] = np.minimum(least[i], array.min(axis=1))
                largest[i] = np.maximum(largest[i], array.max(axis=1))
            sums[i] += prompt[1].sum(axis=1)
        tokens += seen.cross[names[0]].shape[2]
    return Reach(own_keys, own_values, queries, keys, values, sums / np.float32(tokens))
