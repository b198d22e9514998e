"""Our graphs for CUDA behind the two verbs of `Model`: several prompts at once, and all but a few rows on the device.

Weights, caches, keys and values never leave the device. A step copies the chosen tokens there and the ranked logits
back: some kilobytes. Memory is lent by a pool and keeps its addresses, so that a decoder step is recorded as a CUDA graph
once for each size of job and only replayed from then on. The same graphs in float32 run on the CPU, where they are tested.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ramekin.cache import Floats
from ramekin.device_memory import BYTES, FLOATS, Plan, Pool, device_errors
from ramekin.device_thread import DeviceThread, one_at_a_time
from ramekin.errors import ModelFormatError, ProviderError, RamekinError
from ramekin.manifest import DECODER, ENCODER, Manifest
from ramekin.model import Logits, Shapes, check_tensors
from ramekin.session import onnxruntime, open_session
from ramekin.tensors import (
    DISTANCES,
    INPUT_IDS,
    LOGITS,
    PAST_LENGTHS,
    POSITIONS,
    SOURCE_LENGTHS,
    TOKEN_IDS,
    TOP_IDS,
    TOP_K,
    TOP_LOGPROBS,
    TOP_VALUES,
    UNFOLDED,
    cross_names,
    past_names,
    present_names,
)

SOURCE_STEP, CAPACITY_STEP = 64, 8
"""Prompts and caches are as long as a multiple of these, so that jobs of about the same size share memory and recordings."""
_TOGETHER = 16  # prompts
_MOST_RECORDED = 32
_NOT_RECORDED = "steps are not recorded as CUDA graphs, and slower"
RECORDED = {"enable_cuda_graph": "1"}  # runs with the same `gpu_graph_id` replay what the first one launched

Ids = Sequence[int] | npt.NDArray[np.int64]
Result = TypeVar("Result")


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
        recording: the number of the CUDA graph that its steps are replayed from; -1: each is launched anew.
    """

    def __init__(self, pool: Pool, plan: Plan, cross: CudaCross, rows: int, capacity: int) -> None:
        self.cross, self.rows, self.capacity, self.length = cross, rows, capacity, 0
        self.memory, self.bytes = pool.lend(plan, self), plan.bytes + cross.bytes
        self.active = np.arange(rows)
        self.fed = np.zeros((rows, 1), np.int64)
        self.binding: Any = None
        self.recording = -1

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all samples but these. Return, for each of the fewer ones, which it was."""
        self.active = self.active[list(rows)]
        return list(rows)


class CudaModel:
    """An encoder and a decoder graph of the layout "cuda" that agree with a manifest. One thread at a time computes."""

    compact = False

    def __init__(self, ort: Any, encoder: Any, decoder: Any, manifest: Manifest, device: str, records: bool = True) -> None:
        """Take open sessions.

        Args:
            ort: the onnxruntime module.
            encoder: a session of `encoder.onnx`.
            decoder: a session of `decoder.onnx`.
            manifest: what the graphs have to agree with.
            device: where their inputs and outputs lie, "cuda" or "cpu".
            records: whether the decoder can record its steps on a GPU.
        """
        self.dims = dims = manifest.dims
        self.prompts_at_once = _TOGETHER if device == "cuda" else 1
        self._ort, self._encoder, self._decoder, self._device = ort, encoder, decoder, device
        self._pool, self._records = Pool(ort, device), records and device == "cuda"
        self._thread = DeviceThread(device)
        self._recordings: dict[tuple[int, int], int] = {}
        layers, inner = dims.decoder_layers, dims.inner
        prompt: Shapes = {SOURCE_LENGTHS: (None,)}
        cross: Shapes = dict.fromkeys(cross_names(layers), (None, None, inner))
        past: Shapes = dict.fromkeys(past_names(layers), (None, None, inner))
        present: Shapes = dict.fromkeys(present_names(layers), (None, None, inner))
        fed: Shapes = {TOKEN_IDS: (None, 1), PAST_LENGTHS: (None,), DISTANCES: (None,), UNFOLDED: (3,), TOP_K: (1,)}
        ranked: Shapes = dict.fromkeys((TOP_VALUES, TOP_IDS, TOP_LOGPROBS), (None, None))
        check_tensors(ENCODER, encoder.get_inputs(), {**prompt, INPUT_IDS: (None, None), POSITIONS: (None,)})
        check_tensors(ENCODER, encoder.get_outputs(), cross)
        check_tensors(DECODER, decoder.get_inputs(), {**prompt, **fed, **past, **cross})
        check_tensors(DECODER, decoder.get_outputs(), {LOGITS: (None, dims.vocab_size), **ranked, **present})
        kinds = {each.type for each in [*encoder.get_outputs(), *decoder.get_inputs()] if each.name in {**cross, **past}}
        if len(kinds) != 1 or not kinds <= FLOATS.keys():
            raise ModelFormatError(f"{DECODER}: caches of {', '.join(sorted(kinds))}; export the model again")
        self._floats = FLOATS[kinds.pop()]

    @classmethod
    def load(cls, folder: Path, manifest: Manifest, provider: str, threads: int) -> CudaModel:
        """Open both graphs of a model folder.

        Raises:
            ModelFormatError: a graph cannot be loaded, or does not agree with the manifest.
            ProviderError: onnxruntime does not compute it where it should.
            RuntimeVersionError: onnxruntime is missing or of a version that the model does not support.
        """
        ort, files = onnxruntime(manifest.onnxruntime), frozenset(manifest.files)
        settings = _settings(manifest)
        open_decoder = partial(open_session, ort, folder / DECODER, files, provider, threads, rests=False)
        problem = None
        with one_at_a_time() if provider == "cuda" else nullcontext():
            encoder = open_session(ort, folder / ENCODER, files, provider, threads, rests=True, settings=settings)
            try:
                decoder = open_decoder(settings={**settings, **RECORDED})
            except ModelFormatError as error:
                if not _about_recording(error):
                    raise
                problem, decoder = error, open_decoder(settings=settings)
        if problem:
            warnings.warn(f"{_NOT_RECORDED}: {problem}", RuntimeWarning, stacklevel=2)
        return cls(ort, encoder, decoder, manifest, provider, records=problem is None)

    def prefill(self, *prompts: Ids) -> CudaCross:
        """Encode prompts, padded to one length, and project them to each decoder layer's cross-attention keys and values."""
        lengths = np.array([len(each) for each in prompts], np.int64)
        source = _rounded_up(int(lengths.max()), SOURCE_STEP)
        ids = np.zeros((len(prompts), source), np.int64)
        for row, each in zip(ids, prompts, strict=True):
            row[: len(each)] = each
        plan = Plan.of_prompts(self.dims, self._floats, len(prompts), source)
        scratch = len(prompts) * self.dims.num_heads * source**2 * BYTES[self._floats]
        return self._twice(lambda: self._encode(ids, lengths, plan), plan.bytes + scratch)

    def _encode(self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], plan: Plan) -> CudaCross:
        cross = CudaCross(self._pool, plan, len(lengths))
        values = cross.memory.values
        values[SOURCE_LENGTHS].update_inplace(lengths)
        binding = self._encoder.io_binding()
        binding.bind_cpu_input(INPUT_IDS, ids)
        binding.bind_cpu_input(POSITIONS, np.arange(ids.shape[1]))
        binding.bind_ortvalue_input(SOURCE_LENGTHS, values[SOURCE_LENGTHS])
        for name in cross_names(self.dims.decoder_layers):
            binding.bind_ortvalue_output(name, values[name])
        self._encoder.run_with_iobinding(binding)
        return cross

    def new_cache(self, cross: CudaCross, rows: int, capacity: int, candidates: int) -> CudaCache:
        """An empty cache for `rows` samples, as many of each prompt, of at most `capacity` tokens."""
        held = _rounded_up(capacity, CAPACITY_STEP)
        plan = Plan.of_samples(self.dims, self._floats, rows, held, min(candidates, self.dims.vocab_size))
        cache = self._twice(lambda: CudaCache(self._pool, plan, cross, rows, held), plan.bytes)
        cache.recording = self._recording(cache)
        return cache

    def step(self, token_ids: Ids, cache: CudaCache) -> Logits:
        """Feed one token to each running sample of `cache`, which grows by one position.

        Args:
            token_ids: `(n,)`, the token that each running sample chose last (at first the start token).
            cache: made by `new_cache`; written in place.
        """
        if cache.length >= cache.capacity:
            raise ValueError(f"the cache is full: its capacity is {cache.capacity} tokens")
        cache.fed[cache.active, 0] = token_ids
        try:
            logits = self._twice(lambda: self._decode(cache), cache.bytes)
        except RamekinError as error:
            if cache.recording < 0 or not _about_recording(error):
                raise
            is_news, self._records = self._records, False  # other jobs may find the same at the same time
            if is_news:
                warnings.warn(f"{_NOT_RECORDED}: {error}", RuntimeWarning, stacklevel=2)
            cache.recording, cache.binding = -1, None
            logits = self._twice(lambda: self._decode(cache), cache.bytes)
        cache.length += 1
        return logits

    def _decode(self, cache: CudaCache) -> Logits:
        """One step; doing it again changes nothing."""
        values, active = cache.memory.values, cache.active
        values[TOKEN_IDS].update_inplace(cache.fed)
        values[PAST_LENGTHS].update_inplace(np.full(cache.rows, cache.length, np.int64))
        values[DISTANCES].update_inplace(cache.length - np.arange(cache.capacity))
        if cache.binding is None:
            cache.binding = self._bind(cache)
        binding, options, _ = cache.binding
        self._decoder.run_with_iobinding(binding, options)
        top_values, top_ids, logprobs = (values[name].numpy() for name in (TOP_VALUES, TOP_IDS, TOP_LOGPROBS))
        if np.isnan(logprobs).any():  # the next job would find NaN in the caches, and masked NaN is NaN
            self._pool.spoil(cache.memory)
        fetch = partial(self._fetch, cache, active)
        return Logits(top_values[active], top_ids[active], self.dims.vocab_size, fetch, logprobs[active])

    def _fetch(self, cache: CudaCache, active: npt.NDArray[np.intp]) -> Floats:
        """All logits of the last step of `cache`, whose memory is its own as long as somebody may ask."""
        rows: Floats = self._twice(lambda: cache.memory.values[LOGITS].numpy()[active], cache.bytes)
        return rows

    def _bind(self, cache: CudaCache) -> tuple[Any, Any, Any]:
        """A binding of the decoder to the memory of `cache`, options to run it with, and what must live as long."""
        binding, layers, values = self._decoder.io_binding(), self.dims.decoder_layers, cache.memory.values
        host = {
            UNFOLDED: np.array([cache.cross.prompts, -1, self.dims.inner], np.int64),
            TOP_K: np.array([values[TOP_IDS].shape()[1]], np.int64),
        }
        kept = {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in host.items()}
        fed = {name: values[name] for name in (TOKEN_IDS, PAST_LENGTHS, DISTANCES, *past_names(layers))}
        for name, value in {**kept, **fed, **cache.cross.memory.values}.items():
            binding.bind_ortvalue_input(name, value)
        for name in (LOGITS, TOP_VALUES, TOP_IDS, TOP_LOGPROBS):
            binding.bind_ortvalue_output(name, values[name])
        for name, output in zip(past_names(layers), present_names(layers), strict=True):
            binding.bind_ortvalue_output(output, values[name])
        options = self._ort.RunOptions()  # what was recorded with these addresses is replayed; -1: nothing is
        options.add_run_config_entry("gpu_graph_id", str(cache.recording))
        return binding, options, (kept, host)

    def _recording(self, cache: CudaCache) -> int:
        """The number of the recording for these addresses; -1 for none. A session keeps its recordings, so they are few."""
        key = cache.cross.memory.number, cache.memory.number
        with self._thread.alone():
            if not self._records:
                return -1
            if key in self._recordings or len(self._recordings) < _MOST_RECORDED:
                return self._recordings.setdefault(key, len(self._recordings) + 1)
        told = f"steps of more than {_MOST_RECORDED} different jobs are not recorded as CUDA graphs, and slower"
        warnings.warn(f"{told}; jobs of few different sizes share theirs", RuntimeWarning, stacklevel=3)
        return -1

    def _twice(self, run: Callable[[], Result], needed: int) -> Result:
        """Run something on the device; once more without idle memory, if there was too little."""
        return self._thread.run(partial(self._run_twice, run, needed))

    def _run_twice(self, run: Callable[[], Result], needed: int) -> Result:
        try:
            with device_errors(self._device, needed):
                return run()
        except ProviderError:
            self._pool.give_up_idle()
            with device_errors(self._device, needed):
                return run()


def _settings(manifest: Manifest) -> dict[str, str]:
    """Options for CUDA, which the CPU overlooks: memory grows by what is asked for, and float32 means float32.

    But not in half precision, where few products are in float32: there tensor cores round what these read to 10 bits (TF32).
    """
    exact = manifest.precision == "fp32-cuda"
    return {"device_id": "0", "use_tf32": str(int(not exact)), "arena_extend_strategy": "kSameAsRequested"}


def _about_recording(error: Exception) -> bool:
    return "captur" in str(error.__cause__ or error).lower()  # what we quote of a long text may be cut before that


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step
