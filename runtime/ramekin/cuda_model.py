"""Our graphs for CUDA behind the two verbs of `Model`: several prompts at once, and all but a few rows on the device.

Weights, caches, keys and values never leave the device. A step copies the chosen tokens there and the ranked logits
back: some kilobytes. Memory is lent by a pool and keeps its addresses, so that a decoder step is recorded as a CUDA graph
once for each size of job and only replayed from then on. The same graphs in float32 run on the CPU, where they are tested.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ramekin.errors import ModelFormatError, ProviderError, RamekinError
from ramekin.manifest import (
    DECODER,
    DISTANCES,
    ENCODER,
    INPUT_IDS,
    LOG_SUMS,
    LOGITS,
    PAST_LENGTHS,
    POSITIONS,
    SOURCE_LENGTHS,
    TOKEN_IDS,
    TOP_IDS,
    TOP_K,
    TOP_VALUES,
    UNFOLDED,
    Dims,
    Manifest,
    cross_names,
    past_names,
    present_names,
)
from ramekin.model import Logits, Shapes, check_tensors, run_bound
from ramekin.session import onnxruntime, open_session

FLOAT32, INT64 = 1, 7  # ONNX's numbers for element types
_FLOATS = {"tensor(float)": FLOAT32, "tensor(float16)": 10, "tensor(bfloat16)": 16}
_BYTES = {FLOAT32: 4, INT64: 8, 10: 2, 16: 2}
SOURCE_STEP, CAPACITY_STEP = 64, 8
"""Prompts and caches are as long as a multiple of these, so that jobs of about the same size share memory and graphs."""

Ids = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """Tensors that live on the device together.

    Attributes:
        tensors: name, shape and ONNX element type of each.
    """

    tensors: tuple[tuple[str, tuple[int, ...], int], ...]

    @property
    def bytes(self) -> int:
        """How much memory they take."""
        return sum(prod(shape) * _BYTES[kind] for _, shape, kind in self.tensors)

    @classmethod
    def of_prompts(cls, dims: Dims, floats: int, prompts: int, source: int) -> Plan:
        """What is kept of prompts of `source` tokens, padding included: cross-attention keys and values, and the lengths."""
        inner = dims.num_heads * dims.head_dim
        cross = [(name, (prompts, source, inner), floats) for name in cross_names(dims.decoder_layers)]
        return cls(((SOURCE_LENGTHS, (prompts,), INT64), *cross))

    @classmethod
    def of_samples(cls, dims: Dims, floats: int, rows: int, capacity: int, candidates: int) -> Plan:
        """What `rows` samples need: caches of `capacity` tokens, what is fed at a step, and what comes out."""
        inner = dims.num_heads * dims.head_dim
        past = [(name, (rows, capacity, inner), floats) for name in past_names(dims.decoder_layers)]
        fed = [(TOKEN_IDS, (rows, 1), INT64), (PAST_LENGTHS, (rows,), INT64), (DISTANCES, (capacity,), INT64)]
        predicted = [(LOGITS, (rows, dims.vocab_size), FLOAT32), (LOG_SUMS, (rows, 1), FLOAT32)]
        ranked = [(TOP_VALUES, (rows, candidates), FLOAT32), (TOP_IDS, (rows, candidates), INT64)]
        return cls((*fed, *predicted, *ranked, *past))


@dataclass(frozen=True)
class Memory:
    """A plan's tensors, allocated.

    Attributes:
        values: OrtValues by name.
        number: no other memory of the process's life has it, even at the same address.
    """

    values: Mapping[str, Any]
    number: int


class Pool:
    """Memory on one device. What is lent comes back when its borrower is gone."""

    def __init__(self, ort: Any, device: str) -> None:
        self._ort, self._device, self._made = ort, device, 0
        self._idle: dict[Plan, list[Memory]] = {}

    def lend(self, plan: Plan, borrower: object) -> Memory:
        """Memory of this plan, used before or new.

        Raises:
            ProviderError: there is not enough of it, even after giving up what lies idle.
        """
        idle = self._idle.setdefault(plan, [])
        memory = idle.pop() if idle else self._make(plan)
        weakref.finalize(borrower, idle.append, memory)
        return memory

    def _make(self, plan: Plan) -> Memory:
        for last in (False, True):
            try:
                make = self._ort.OrtValue.ortvalue_from_shape_and_type
                values = {name: make(list(shape), kind, self._device, 0) for name, shape, kind in plan.tensors}
            except Exception as error:  # onnxruntime raises a dozen unrelated types
                if last:
                    raise out_of_memory(error, plan.bytes) from None
                for idle in self._idle.values():
                    idle.clear()
            else:
                break
        for name, shape, kind in plan.tensors:
            if name.startswith("past_"):  # attention multiplies what it masks by 0, and fresh memory may hold NaN
                values[name].update_inplace(np.zeros(shape, np.float32 if kind == FLOAT32 else np.float16))
        self._made += 1
        return Memory(values, self._made)


def out_of_memory(error: Exception, needed: int) -> ProviderError:
    """What to say when the device has no memory left for `needed` bytes more."""
    reason = " ".join(str(error).split())[:200]
    return ProviderError(
        f"too little memory on the GPU: this job needs {needed / 1e9:.1f} GB beside the weights; ask for fewer or shorter "
        f"samples, or for fewer prompts at once ({reason})"
    )


class CudaCross:
    """What is kept of one or more prompts.

    Attributes:
        prompts: how many.
        memory: keys, values and lengths on the device.
    """

    def __init__(self, pool: Pool, plan: Plan, prompts: int) -> None:
        self.prompts, self.memory, self.bytes = prompts, pool.lend(plan, self), plan.bytes


class CudaCache:
    """The samples of one or more prompts. Rows that have finished stay where they are: a GPU has rows to spare.

    Attributes:
        cross: the prompts.
        rows: how many samples there were at first.
        length: how many positions are filled.
        capacity: how many there are.
        active: of each sample that is still running, its row.
    """

    def __init__(self, pool: Pool, plan: Plan, cross: CudaCross, rows: int, capacity: int) -> None:
        self.cross, self.rows, self.capacity, self.length = cross, rows, capacity, 0
        self.memory, self.bytes = pool.lend(plan, self), plan.bytes + cross.bytes
        self.active = np.arange(rows)
        self.fed = np.zeros((rows, 1), np.int64)
        self.binding: Any = None

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all samples but these. Return, for each of the fewer ones, which it was."""
        self.active = self.active[list(rows)]
        return list(rows)


class CudaModel:
    """An encoder and a decoder graph of the layout "cuda" that agree with a manifest."""

    prompts_at_once = 16

    def __init__(self, ort: Any, encoder: Any, decoder: Any, manifest: Manifest, device: str) -> None:
        """Take open sessions; `device` is where their inputs and outputs lie, "cuda" or "cpu"."""
        self.dims = dims = manifest.dims
        self._ort, self._encoder, self._decoder, self._device = ort, encoder, decoder, device
        self._pool = Pool(ort, device)
        self._graphs: dict[tuple[int, int], int] = {}
        layers, inner = dims.decoder_layers, dims.num_heads * dims.head_dim
        prompt: Shapes = {SOURCE_LENGTHS: (None,)}
        cross: Shapes = dict.fromkeys(cross_names(layers), (None, None, inner))
        past: Shapes = dict.fromkeys(past_names(layers), (None, None, inner))
        present: Shapes = dict.fromkeys(present_names(layers), (None, None, inner))
        fed: Shapes = {TOKEN_IDS: (None, 1), PAST_LENGTHS: (None,), DISTANCES: (None,), UNFOLDED: (3,), TOP_K: (1,)}
        ranked: Shapes = {TOP_VALUES: (None, None), TOP_IDS: (None, None), LOG_SUMS: (None, 1)}
        check_tensors(ENCODER, encoder.get_inputs(), {**prompt, INPUT_IDS: (None, None), POSITIONS: (None,)})
        check_tensors(ENCODER, encoder.get_outputs(), cross)
        check_tensors(DECODER, decoder.get_inputs(), {**prompt, **fed, **past, **cross})
        check_tensors(DECODER, decoder.get_outputs(), {LOGITS: (None, dims.vocab_size), **ranked, **present})
        kinds = {each.type for each in [*encoder.get_outputs(), *decoder.get_inputs()] if each.name in {**cross, **past}}
        if len(kinds) != 1 or not kinds <= _FLOATS.keys():
            raise ModelFormatError(f"{DECODER}: caches of {', '.join(sorted(kinds))}; export the model again")
        self._floats = _FLOATS[kinds.pop()]

    @classmethod
    def load(cls, folder: Path, manifest: Manifest, provider: str, threads: int) -> CudaModel:
        """Open both graphs of a model folder.

        Raises:
            ModelFormatError: a graph cannot be loaded, or does not agree with the manifest.
            ProviderError: onnxruntime does not compute it where it should.
            RuntimeVersionError: onnxruntime is missing or of a version that the model does not support.
        """
        ort, files = onnxruntime(manifest.onnxruntime), frozenset(manifest.files)
        encoder = open_session(ort, folder / ENCODER, files, provider, threads, rests=True)
        decoder = open_session(ort, folder / DECODER, files, provider, threads, rests=False, record=True)
        return cls(ort, encoder, decoder, manifest, provider)

    def prefill(self, *prompts: Ids) -> CudaCross:
        """Encode prompts, padded to one length, and project them to each decoder layer's cross-attention keys and values."""
        lengths = np.array([len(each) for each in prompts], np.int64)
        source = _rounded_up(int(lengths.max()), SOURCE_STEP)
        ids = np.zeros((len(prompts), source), np.int64)
        for row, each in zip(ids, prompts, strict=True):
            row[: len(each)] = each
        cross = CudaCross(self._pool, Plan.of_prompts(self.dims, self._floats, len(prompts), source), len(prompts))
        values = cross.memory.values
        values[SOURCE_LENGTHS].update_inplace(lengths)
        binding = self._encoder.io_binding()
        binding.bind_cpu_input(INPUT_IDS, ids)
        binding.bind_cpu_input(POSITIONS, np.arange(source))
        binding.bind_ortvalue_input(SOURCE_LENGTHS, values[SOURCE_LENGTHS])
        for name in cross_names(self.dims.decoder_layers):
            binding.bind_ortvalue_output(name, values[name])
        scratch = len(prompts) * self.dims.num_heads * source**2 * _BYTES[self._floats]
        self._run(self._encoder, binding, cross.bytes + scratch)
        return cross

    def new_cache(self, cross: CudaCross, rows: int, capacity: int, candidates: int) -> CudaCache:
        """An empty cache for `rows` samples, as many of each prompt, of at most `capacity` tokens."""
        held = _rounded_up(capacity, CAPACITY_STEP)
        plan = Plan.of_samples(self.dims, self._floats, rows, held, min(candidates, self.dims.vocab_size))
        return CudaCache(self._pool, plan, cross, rows, held)

    def step(self, token_ids: Ids, cache: CudaCache) -> Logits:
        """Feed one token to each running sample of `cache`, which grows by one position.

        Args:
            token_ids: `(n,)`, the token that each running sample chose last (at first the start token).
            cache: made by `new_cache`; written in place.
        """
        if cache.length >= cache.capacity:
            raise ValueError(f"the cache is full: its capacity is {cache.capacity} tokens")
        values, active = cache.memory.values, cache.active
        cache.fed[active, 0] = token_ids
        values[TOKEN_IDS].update_inplace(cache.fed)
        values[PAST_LENGTHS].update_inplace(np.full(cache.rows, cache.length, np.int64))
        values[DISTANCES].update_inplace(cache.length - np.arange(cache.capacity))
        if cache.binding is None:
            cache.binding = self._bind(cache)
        binding, options, _ = cache.binding
        self._run(self._decoder, binding, cache.bytes, options)
        cache.length += 1
        top_values, top_ids, log_sums = (values[name].numpy()[active] for name in (TOP_VALUES, TOP_IDS, LOG_SUMS))
        return Logits(top_values, top_ids, self.dims.vocab_size, lambda: values[LOGITS].numpy()[active], log_sums[:, 0])

    def _bind(self, cache: CudaCache) -> tuple[Any, Any, Any]:
        """A binding of the decoder to the memory of `cache`, options to run it with, and what must live as long."""
        binding, layers, values = self._decoder.io_binding(), self.dims.decoder_layers, cache.memory.values
        host = {
            UNFOLDED: np.array([cache.cross.prompts, -1, self.dims.num_heads * self.dims.head_dim], np.int64),
            TOP_K: np.array([values[TOP_IDS].shape()[1]], np.int64),
        }
        kept = {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in host.items()}
        fed = {name: values[name] for name in (TOKEN_IDS, PAST_LENGTHS, DISTANCES, *past_names(layers))}
        for name, value in {**kept, **fed, **cache.cross.memory.values}.items():
            binding.bind_ortvalue_input(name, value)
        for name in (LOGITS, LOG_SUMS, TOP_VALUES, TOP_IDS):
            binding.bind_ortvalue_output(name, values[name])
        for name, output in zip(past_names(layers), present_names(layers), strict=True):
            binding.bind_ortvalue_output(output, values[name])
        options = self._ort.RunOptions()
        if self._device == "cuda":  # what was recorded with these addresses is replayed
            key = cache.cross.memory.number, cache.memory.number
            options.add_run_config_entry("gpu_graph_id", str(self._graphs.setdefault(key, len(self._graphs) + 1)))
        return binding, options, (kept, host)

    def _run(self, session: Any, binding: Any, needed: int, options: Any = None) -> None:
        try:
            run_bound(session, binding, options)
        except RamekinError as error:
            if any(sign in str(error).lower() for sign in ("out of memory", "failed to allocate", "alloc_failed")):
                raise out_of_memory(error, needed) from None
            raise


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step
