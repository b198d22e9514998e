"""ramekin with its levers off, to be switched on one by one: where the gain over a plain loop comes from.

The graphs are ours. Without `shared`, every sample gets a copy of the prompt's keys and values, as in a batch that
`generate` makes. Without `in_place`, the cache is copied into new memory at each step, as graphs that concatenate do.
Without `leaving`, finished samples stay until the last one ends. With `padded`, the prompt is filled up first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines import Clock
from benchmarks.engines.ours import Ours
from ramekin.cache import Cache, Cross
from ramekin.manifest import DECODER, Manifest
from ramekin.session import onnxruntime, open_session
from ramekin.tensors import cross_names

_UNSHARED = "decoder.unshared.onnx"


class Levers(Ours):
    """One combination of levers."""

    def __init__(self, precision: str, shared: bool, in_place: bool, leaving: bool, padded: int) -> None:
        super().__init__(precision)
        self._shared, self._in_place, self._leaving, self._padded = shared, in_place, leaving, padded

    def load(self, checkpoint: Path, folder: Path, threads: int) -> None:
        super().load(checkpoint, folder, threads)
        assert self._engine
        self._engine.manifest = replace(self._engine.manifest, max_source_tokens=1 << 16)
        model: Any = self._engine.model
        if not self._shared:
            assert not model.compact  # nor is float32: its decoder can be put in another's place
            model._decoder = _unshared(folder, self._engine.manifest, threads)
        self._engine.model = _Slow(model, self._shared, self._in_place)  # type: ignore[assignment]

    def run(self, prompt: Sequence[int], lengths: Sequence[int], clock: Clock) -> None:
        padding = [0] * max(0, self._padded - len(prompt))
        super().run([*prompt, *padding], lengths if self._leaving else [max(lengths)] * len(lengths), clock)


class _Slow:
    """A model without some of its levers."""

    def __init__(self, model: Any, shared: bool, in_place: bool) -> None:
        self._model, self._shared, self._in_place = model, shared, in_place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def new_cache(self, cross: Cross, rows: int, capacity: int, candidates: int) -> Cache:
        if not self._shared:
            cross = {name: np.repeat(array, rows, axis=0) for name, array in cross.items()}
        cache: Cache = self._model.new_cache(cross, rows, capacity, candidates)
        return cache

    def step(self, token_ids: Any, cache: Cache) -> Any:
        if not self._in_place:
            grown = tuple(np.empty_like(array) for array in cache.past)
            for new, old in zip(grown, cache.past, strict=True):
                new[:, :, : cache.length] = old[:, :, : cache.length]
            cache._past = cache.past = grown
            cache.binding = None
        return self._model.step(token_ids, cache)


def _unshared(folder: Path, manifest: Manifest, threads: int) -> Any:
    """The decoder, with keys and values of the prompt for each sample."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(folder / DECODER, load_external_data=False)
    for tensor in graph.graph.initializer:
        if tensor.name == "fold":  # the samples become queries of one sample: now they stay samples
            heads, width = numpy_helper.to_array(tensor)[2:].tolist()
            tensor.CopyFrom(numpy_helper.from_array(np.array([-1, 1, heads, width]), "fold"))
    for value in graph.graph.input:
        if value.name in cross_names(manifest.dims.decoder_layers):
            value.type.tensor_type.shape.dim[0].dim_param = "n"
    (folder / _UNSHARED).write_bytes(graph.SerializeToString())
    files = frozenset(manifest.files)
    return open_session(onnxruntime(manifest.onnxruntime), folder / _UNSHARED, files, "cpu", threads, rests=False)


def make(**settings: Any) -> Levers:
    """One combination."""
    return Levers(**settings)
