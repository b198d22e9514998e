"""The two graphs as two verbs: `prefill` reads a prompt once, `step` feeds one token to every running sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ramekin.cache import Cache, Cross, Floats
from ramekin.errors import ModelFormatError, RamekinError
from ramekin.manifest import COMPACT_DECODER, COMPACT_ENCODER, DECODER, ENCODER, Dims, Manifest, VersionRange
from ramekin.session import LIMITS, about_limits, failure, onnxruntime, open_session
from ramekin.tensors import (
    INPUT_IDS,
    LOGITS,
    PAST_LENGTHS,
    TOKEN_IDS,
    TOP_IDS,
    TOP_K,
    TOP_VALUES,
    Size,
    compact_shapes,
    compact_type,
    cross_shapes,
    past_names,
    present_names,
)

Shapes = Mapping[str, tuple[int | None, ...]]
_NUMBERS = {f"tensor({name})" for name in ("float", "float16", "bfloat16", "int8", "uint8", "int32", "int64")}
COMPACT_RUNTIMES = VersionRange(at_least="1.30.0")
"""Versions of onnxruntime that have the operators of the compact graphs. Others compute with floats, which is slower."""


@dataclass(frozen=True)
class Logits:
    """What the model predicts for the next token of n samples. The arrays are overwritten by the next step.

    Attributes:
        top_values: the k largest in falling order, `(n, k)` float32.
        top_ids: their tokens, `(n, k)` int64.
        vocab_size: how many logits there are.
        fetch: gets all of them, `(n, vocab)` float32, which may have to come from another device.
        top_logprobs: their log-probabilities, `(n, k)` float32, where the graph computes them.
    """

    top_values: Floats
    top_ids: npt.NDArray[np.int64]
    vocab_size: int
    fetch: Callable[[], Floats]
    top_logprobs: Floats | None = None

    @classmethod
    def of(cls, full: Floats, top_values: Floats, top_ids: npt.NDArray[np.int64]) -> Logits:
        """Of all logits, where they are at hand."""
        return cls(top_values, top_ids, full.shape[1], lambda: full)

    @cached_property
    def full(self) -> Floats:
        """All logits, `(n, vocab)` float32."""
        return self.fetch()


class Steps(Protocol):
    """What the loop asks of a model: `prefill` prompts, then `step` through a cache that `new_cache` made.

    Attributes:
        dims: sizes of the network.
        prompts_at_once: how many prompts `prefill` takes.
        compact: whether keys and values are kept in 8 bits.
    """

    dims: Dims
    prompts_at_once: int
    compact: bool

    def prefill(self, *prompts: Sequence[int] | npt.NDArray[np.int64]) -> Any:
        """Encode prompts, token ids each."""

    def new_cache(self, cross: Any, rows: int, capacity: int, candidates: int) -> Any:
        """An empty cache, with `length` and `keep` as those of `Cache`; the rows of each prompt stand side by side."""

    def step(self, token_ids: Sequence[int] | npt.NDArray[np.int64], cache: Any) -> Logits:
        """Feed one token to each sample."""


class Model:
    """An encoder and a decoder graph that agree with a manifest."""

    prompts_at_once = 1  # several would only be padded to the longest: one fills every core

    def __init__(self, ort: Any, encoder: Any, decoder: Any, manifest: Manifest, compact: bool = False) -> None:
        """Check sessions of the two graphs.

        Args:
            ort: the onnxruntime module.
            encoder: a session of `encoder.onnx`, or of `encoder_compact.onnx` ...
            decoder: a session of `decoder.onnx`, or of `decoder_compact.onnx` ...
            manifest: what the graphs have to agree with.
            compact: ... in which keys and values are of other types and shapes.
        """
        self.dims, self.compact = manifest.dims, compact
        self._ort, self._encoder, self._decoder = ort, encoder, decoder
        layers, heads, width = self.dims.decoder_layers, self.dims.num_heads, self.dims.head_dim
        self._past, self._present = past_names(layers), present_names(layers)
        cached: Shapes = dict.fromkeys(self._past, (None, heads, None, width))
        written: Shapes = dict.fromkeys(self._present, (None, heads, None, width))
        small: Shapes = {TOKEN_IDS: (None, 1), PAST_LENGTHS: (None,), TOP_K: (1,)}
        ranked: Shapes = {LOGITS: (None, self.dims.vocab_size), TOP_VALUES: (None, None), TOP_IDS: (None, None)}
        crossed: Shapes = self._crossed(None)
        encodes, decodes = graphs(compact)
        check_tensors(encodes, encoder.get_inputs(), {INPUT_IDS: (1, None)})
        check_tensors(encodes, encoder.get_outputs(), crossed)
        check_tensors(decodes, decoder.get_inputs(), {**small, **cached, **crossed})
        check_tensors(decodes, decoder.get_outputs(), {**ranked, **written})

    @classmethod
    def load(cls, folder: Path, manifest: Manifest, provider: str, threads: int) -> Model:
        """Open both graphs of a model folder.

        Raises:
            ModelFormatError: a graph cannot be loaded, or does not agree with the manifest.
            RuntimeVersionError: onnxruntime is missing or of a version that the model does not support.
            RamekinError: there are no threads, files or memory for it.
        """
        ort, files = onnxruntime(manifest.onnxruntime), frozenset(manifest.files)
        compact = reads_compact(ort, manifest)
        encodes, decodes = graphs(compact)
        # Opening a graph packs its weights with one thread, so both are opened at once.
        try:
            with ThreadPoolExecutor(2) as pool:
                encoder = pool.submit(open_session, ort, folder / encodes, files, provider, threads, rests=True)
                decoder = pool.submit(open_session, ort, folder / decodes, files, provider, threads, rests=False)
        except RuntimeError as error:
            if about_limits(error):
                raise RamekinError(f"{folder}: {LIMITS} ({error})") from error
            raise
        return cls(ort, encoder.result(), decoder.result(), manifest, compact)

    def prefill(self, *prompts: Sequence[int] | npt.NDArray[np.int64]) -> Cross:
        """Encode one prompt of S tokens and project it to every decoder layer's cross-attention keys and values."""
        (source_ids,) = prompts
        ids = np.asarray(source_ids, np.int64).reshape(1, -1)
        shapes = self._crossed(ids.shape[1]).items()
        cross = {name: np.empty(shape, compact_type(name) if self.compact else "float32") for name, shape in shapes}
        binding = self._encoder.io_binding()
        binding.bind_ortvalue_input(INPUT_IDS, self._value(ids))
        for name, array in cross.items():
            binding.bind_ortvalue_output(name, self._value(array))
        options = self._ort.RunOptions()
        # The scratch memory of a long prompt (heads * S * S floats and more) goes back before decoding starts.
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        _run(self._encoder, binding, options)
        return cross

    def new_cache(self, cross: Cross, rows: int, capacity: int, candidates: int) -> Cache:
        """An empty cache for `rows` samples of at most `capacity` tokens; `candidates` is how many logits are ranked."""
        candidates = min(candidates, self.dims.vocab_size)
        return Cache(self.dims, cross, rows, capacity, candidates, "int8" if self.compact else "float32")

    def step(self, token_ids: Sequence[int] | npt.NDArray[np.int64], cache: Cache) -> Logits:
        """Feed one token to each of the n samples of `cache`, which grows by one position.

        Args:
            token_ids: `(n,)`, the token that each sample chose last (at first the start token).
            cache: made by `new_cache`; written in place.
        """
        if cache.length >= cache.capacity:
            raise ValueError(f"the cache is full: its capacity is {cache.capacity} tokens")
        cache.token_ids[:, 0] = token_ids
        cache.past_lengths[:] = cache.length
        if cache.binding is None:
            cache.binding = self._bind(cache)
        _run(self._decoder, cache.binding[0])
        cache.length += 1
        return Logits.of(cache.logits, cache.top_values, cache.top_ids)

    def _bind(self, cache: Cache) -> tuple[Any, Any]:
        """A binding of the decoder to the arrays of `cache`, and what must live as long as it."""
        binding = self._decoder.io_binding()
        past = [self._value(array) for array in cache.past]
        inputs = [
            (TOKEN_IDS, self._value(cache.token_ids)),
            (PAST_LENGTHS, self._value(cache.past_lengths)),
            (TOP_K, self._value(np.array([cache.candidates], np.int64))),
            *((name, self._value(array)) for name, array in cache.cross.items()),
            *zip(self._past, past, strict=True),
        ]
        outputs = [
            (LOGITS, self._value(cache.logits)),
            (TOP_VALUES, self._value(cache.top_values)),
            (TOP_IDS, self._value(cache.top_ids)),
            *zip(self._present, past, strict=True),
        ]
        for name, value in inputs:
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs:
            binding.bind_ortvalue_output(name, value)
        return binding, (inputs, outputs)

    def _crossed(self, source: Size) -> Mapping[str, tuple[int | Size, ...]]:
        """The shapes of keys and values of a prompt, by name."""
        return (compact_shapes if self.compact else cross_shapes)(self.dims, source)

    def _value(self, array: npt.NDArray[Any]) -> Any:
        """An OrtValue on the array's own memory: what the graph writes is in the array, and the other way round."""
        return self._ort.OrtValue.ortvalue_from_numpy(array)


def reads_compact(ort: Any, manifest: Manifest) -> bool:
    """Whether a folder has compact graphs that this onnxruntime can run."""
    return manifest.compact and ort.__version__ in COMPACT_RUNTIMES


def graphs(compact: bool) -> tuple[str, str]:
    """The names of the two graphs, compact or not."""
    return (COMPACT_ENCODER, COMPACT_DECODER) if compact else (ENCODER, DECODER)


def _run(session: Any, binding: Any, options: Any = None) -> None:
    """Run a graph on what is bound to it.

    Raises:
        RamekinError: onnxruntime failed.
    """
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise failure(error) from error


def check_tensors(graph: str, found: Sequence[Any], expected: Shapes) -> None:
    """Compare a graph's inputs or outputs with names and shapes; None stands for any size. All must be numbers.

    Raises:
        ModelFormatError: they differ.
    """
    shapes = {each.name: each.shape for each in found}
    for name in sorted(shapes.keys() | expected.keys()):
        wanted, given = expected.get(name), shapes.get(name)
        if wanted is None or given is None or len(wanted) != len(given):
            raise ModelFormatError(f"{graph}: does not belong to this manifest (tensor {name!r}); export the model again")
        if any(size not in (None, actual) for size, actual in zip(wanted, given, strict=True)):
            raise ModelFormatError(f"{graph}: tensor {name!r} has shape {given}, but the manifest says {list(wanted)}")
    for each in found:
        if each.type not in _NUMBERS:
            raise ModelFormatError(f"{graph}: tensor {each.name!r} is of type {each.type}; export the model again")
