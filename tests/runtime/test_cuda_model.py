"""The model for CUDA on the CPU: several prompts at once, memory that keeps its place, what does not fit."""

from __future__ import annotations

import contextlib
import gc
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ramekin import Completion, Engine, ModelFormatError, ProviderError, RamekinError, SamplingParams
from ramekin.cuda_model import CudaModel
from ramekin.device_memory import BYTES, Plan, Pool
from ramekin.manifest import DECODER, ENCODER, Dims, Manifest
from ramekin.session import open_session
from ramekin.tensors import TOP_K
from tests.runtime.conftest import CUDA_MODEL, RUNS_CUDA_GRAPHS

pytestmark = RUNS_CUDA_GRAPHS

LARGE = Dims(vocab_size=32128, d_model=1024, d_ff=2816, num_heads=16, head_dim=64, encoder_layers=24, decoder_layers=24)
PROMPTS = [list(range(3, 3 + length)) for length in (1, 7, 90, 64, 33)]
PARAMS = SamplingParams(n=3, max_new_tokens=30, seed=11, top_k=20)


@pytest.fixture
def cuda() -> Engine:
    """On the CPU, in groups as on a GPU."""
    engine = Engine.load(CUDA_MODEL, provider="cpu", threads=2)
    assert engine.model.prompts_at_once == 1
    engine.model.prompts_at_once = 16
    return engine


def test_the_same_samples_as_the_graphs_for_the_cpu(cuda: Engine, engine: Engine) -> None:
    assert isinstance(cuda.model, CudaModel)
    for prompt in PROMPTS:
        expected, found = engine.generate(prompt, PARAMS), cuda.generate(prompt, PARAMS)
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        assert [each.finish_reason for each in found] == [each.finish_reason for each in expected]
    ends = {each.finish_reason for prompt in PROMPTS for each in cuda.generate(prompt, PARAMS)}
    assert ends == {"eos", "length"}  # else nothing is shown of samples that leave


def test_prompts_do_not_see_each_other(cuda: Engine) -> None:
    alone = [cuda.generate(prompt, PARAMS) for prompt in PROMPTS]
    for prompts in (PROMPTS, PROMPTS[::-1]):
        together = cuda.generate_many(prompts, PARAMS)
        expected = alone if prompts is PROMPTS else alone[::-1]
        assert [[each.token_ids for each in one] for one in together] == [
            [each.token_ids for each in one] for one in expected
        ]


@pytest.mark.parametrize("size", [1, 2, 16])
def test_many_prompts_in_groups(size: int, cuda: Engine, engine: Engine) -> None:
    cuda.model.prompts_at_once = size
    found = cuda.generate_many(PROMPTS, PARAMS)
    expected = engine.generate_many(PROMPTS, PARAMS)
    assert [[each.token_ids for each in one] for one in found] == [[each.token_ids for each in one] for one in expected]
    assert cuda.generate_many([], PARAMS) == []


def test_seeds_that_are_drawn_are_each_prompts_own(cuda: Engine) -> None:
    found = cuda.generate_many(PROMPTS, replace(PARAMS, seed=None))
    assert len({each.seed for one in found for each in one}) == len(PROMPTS)
    again = cuda.generate_many(PROMPTS, replace(PARAMS, seed=found[2][0].seed))
    assert [each.token_ids for each in again[2]] == [each.token_ids for each in found[2]]


def test_streams_can_be_interleaved(cuda: Engine) -> None:
    """Two jobs of one size at once have memory of their own."""
    expected = [cuda.generate(prompt, PARAMS) for prompt in PROMPTS[:2]]
    streams = [cuda.stream(prompt, PARAMS) for prompt in PROMPTS[:2]]
    found: list[list[Completion]] = [[], []]
    while any(streams):
        for number, stream in enumerate(streams):
            event = next(stream, None) if stream else None
            if event is None:
                streams[number] = None  # type: ignore[call-overload]
            elif isinstance(event, Completion):
                found[number].append(event)
    for one, wanted in zip(found, expected, strict=True):
        assert {each.index: each.token_ids for each in one} == {each.index: each.token_ids for each in wanted}


def test_jobs_of_one_size_share_memory(cuda: Engine) -> None:
    """Which is what lets a GPU replay what it recorded."""

    def places(source: int, rows: int, capacity: int) -> tuple[int, int]:
        cross = cuda.model.prefill(np.arange(3, 3 + source))
        cache = cuda.model.new_cache(cross, rows, capacity, 20)
        cuda.model.step([0] * rows, cache)
        return cross.memory.number, cache.memory.number

    first = places(50, 5, 41)
    gc.collect()
    assert places(64, 5, 48) == first  # rounded up to the same sizes
    assert places(65, 5, 48)[0] != first[0]
    assert places(64, 6, 48)[1] != first[1]
    assert places(50, 5, 41) == first


def test_fresh_caches_are_zero_and_nothing_else_is_touched() -> None:
    """NaN times 0 is NaN; lengths are named as caches are, but hold integers."""
    written: list[tuple[str, tuple[int, ...]]] = []

    class Value:
        def __init__(self, shape: list[int], kind: int, *_: object) -> None:
            self.shape, self.kind = tuple(shape), kind

        def update_inplace(self, array: Any) -> None:
            assert array.shape == self.shape
            assert array.itemsize == BYTES[self.kind]
            assert not array.any()
            written.append(self.shape)

    plan = Plan.of_samples(LARGE, floats=16, rows=64, capacity=104, candidates=4)
    Pool(SimpleNamespace(OrtValue=SimpleNamespace(ortvalue_from_shape_and_type=Value)), "cuda").lend(plan, Borrower())
    assert written == [(64, 104, 1024)] * 48


def test_what_a_job_of_flan_t5_large_takes() -> None:
    """Two bytes for each of 24 layers' keys and values; the logits and all else are small beside them."""
    prompts = Plan.of_prompts(LARGE, floats=16, prompts=4, source=1024)
    assert prompts.bytes == 4 * 1024 * 24 * 2 * 1024 * 2 + 4 * 8
    samples = Plan.of_samples(LARGE, floats=16, rows=64, capacity=104, candidates=64)
    caches = 64 * 104 * 24 * 2 * 1024 * 2
    assert caches < samples.bytes < 1.02 * caches


class Small:
    """A device with so much memory."""

    def __init__(self, limit: int) -> None:
        self.limit, self.OrtValue = limit, SimpleNamespace(ortvalue_from_shape_and_type=self.make)

    def make(self, shape: list[int], *_: object) -> Any:
        size = 4 * int(np.prod(shape))
        if size > self.limit:
            raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 8")
        self.limit -= size
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, 1, "cpu", 0)


class Borrower:
    """Somebody who needs memory."""


def test_too_little_memory_is_one_clear_line() -> None:
    plan = Plan((("logits", (1000, 1000), 1),))
    with pytest.raises(ProviderError, match=r"too little memory \(cuda\): this job needs 0\.0 GB.*fewer or shorter samples"):
        Pool(Small(10**6), "cuda").lend(plan, Borrower())


def test_some_memory_is_kept_for_the_next_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramekin.device_memory._MOST_IDLE", 4 * 30)  # bytes
    pool, borrowers = Pool(onnxruntime, "cpu"), [Borrower() for _ in range(9)]
    plans = [Plan((("logits", (1, width), 1),)) for width in range(1, 10)]
    lent = [pool.lend(plan, borrower) for plan, borrower in zip(plans, borrowers, strict=True)]
    while borrowers:
        del borrowers[0]
    again = [pool.lend(plan, Borrower()) for plan in plans[-3:]]  # 7, 8 and 9 numbers of 4 bytes are the last that fit
    assert again == lent[-3:]
    assert pool.lend(plans[0], Borrower()).number == 10
    pool.give_up_idle()
    assert pool.lend(plans[-1], Borrower()).number == 11
    pool.give_up_idle()
    many = [pool.lend(plan, Borrower()) for plan in plans]
    assert sum(4 * memory.values["logits"].shape()[1] for _, memory in pool._idle) <= 4 * 30  # at once, not at the next job
    del many
    large = [Plan((("logits", (1, width), 1),)) for width in (1000, 2000)]
    numbers = [pool.lend(plan, Borrower()).number for plan in large]
    assert [pool.lend(plan, Borrower()).number for plan in large] == numbers  # a prompt's and its samples' in any case


def test_memory_that_comes_back_while_memory_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector may free a borrower at any moment; what is lent then must still be of the plan that was asked for."""
    plans = [Plan((("logits", (1, width), 1),)) for width in (1, 2)]
    borrowers = [Borrower() for _ in range(20)]

    class Interrupting(Plan):
        def __eq__(self, other: object) -> bool:
            if borrowers:
                borrowers.pop()
            return isinstance(other, Plan) and self.tensors == other.tensors

        __hash__ = Plan.__hash__

    pool = Pool(onnxruntime, "cpu")
    for place, borrower in enumerate(borrowers):
        pool.lend(plans[place % 2], borrower)
    del borrower
    borrowers[10:] = []
    while borrowers:
        memory = pool.lend(Interrupting(plans[0].tensors), Borrower())
        assert memory.values["logits"].shape() == [1, 1]


def test_jobs_of_many_prompt_lengths_share_their_recordings(cuda: Engine) -> None:
    """A server sees every length: each size is recorded once, and never again."""
    model: Any = cuda.model
    model._records = True
    rng = np.random.default_rng(0)
    for size in rng.permutation(np.repeat(np.arange(1, 17), 4)):  # all there are, to 1024 tokens
        cache = model.new_cache(model.prefill(np.arange(3, 3 + size * 64 - 5) % 500), 2, 8, 4)
        model._recording(cache)
        del cache
    assert len(model._recordings) == 16


# As onnxruntime 1.31.1 words it: what matters stands behind hundreds of characters.
OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running MultiHeadAttention node. "
    "Name:'decoder.block.0.layer.0.SelfAttention.heads/MultiHeadAttention' Status Message: /onnxruntime_src/onnxruntime/"
    "core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*) "
    "Failed to allocate "
    "memory for requested buffer of size 1099511627776"
)


class Failing:
    """A session that fails some times before it works."""

    def __init__(self, session: Any, *texts: str) -> None:
        self._session, self._texts = session, list(texts)
        self.ids: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        with contextlib.suppress(RuntimeError):  # it has none
            self.ids.append(options.get_run_config_entry("gpu_graph_id"))
        if self._texts:
            raise RuntimeError(self._texts.pop(0))
        self._session.run_with_iobinding(binding, options)


@pytest.mark.parametrize("text", [OUT_OF_MEMORY, "CUDA failure 2: out of memory ; GPU=0", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_a_step_without_memory(text: str, cuda: Engine) -> None:
    """Idle memory is given up and the step tried once more; then it is told."""
    model: Any = cuda.model
    cuda.generate([9, 9, 1], PARAMS)
    cache = model.new_cache(model.prefill([3, 1]), 2, 8, 4)
    session = model._decoder
    model._decoder = Failing(session, text, text)
    with pytest.raises(ProviderError, match=r"too little memory \(cpu\).*fewer or shorter samples"):
        model.step([0, 0], cache)
    assert not model._pool._idle
    cache.binding = None
    model._decoder = Failing(session, text)
    model.step([0, 0], cache)
    assert cache.length == 1


def test_other_failures_are_one_line_too(cuda: Engine) -> None:
    model: Any = cuda.model
    cache = model.new_cache(model.prefill([3, 1]), 2, 8, 4)
    model._decoder = Failing(model._decoder, "CUDA failure 700:\n an illegal memory access was encountered")
    with pytest.raises(RamekinError, match="onnxruntime failed: CUDA failure 700: an illegal memory access"):
        model.step([0, 0], cache)


def test_recordings_have_a_number_for_each_size_of_job(cuda: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the copies; -1 means that nothing is recorded, which is what a failure leads to."""
    model: Any = cuda.model
    model._records, model._decoder = True, Failing(model._decoder)
    bind = model._bind

    def recorded(cache: Any) -> Any:
        model._device = "cuda"
        try:
            return bind(cache)
        finally:
            model._device = "cpu"

    model._bind = recorded
    caches = [model.new_cache(model.prefill([3, 1]), rows, 8, 4) for rows in (2, 3)]
    for cache in (*caches, *caches):
        model.step([0] * cache.rows, cache)
    assert model._decoder.ids == ["1", "2", "1", "2"]
    monkeypatch.setattr("ramekin.cuda_model._MOST_RECORDED", 2)  # a session never gives a recording back
    for cache in (model.new_cache(caches[0].cross, 4, 8, 4), *caches):
        cache.binding = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if cache.rows == 4 else "error")
            model.step([0] * cache.rows, cache)
    assert model._decoder.ids[4:] == ["-1", "1", "2"]
    failure = "Graph capture did not complete after 2 runs"
    model._decoder = Failing(model._decoder._session, failure)
    caches[0].binding, caches[1].binding = None, recorded(caches[1])
    with pytest.warns(RuntimeWarning, match="steps are not recorded as CUDA graphs: .*did not complete"):
        model.step([0, 0], caches[0])
    model._decoder._texts = [failure]  # of a job that had begun before: it goes on too, and says nothing
    model.step([0, 0, 0], caches[1])
    for cache in caches:
        model.step([0] * cache.rows, cache)
    assert model._decoder.ids == ["1", "-1", "2", "-1", "-1", "-1"]
    assert [cache.length for cache in caches] == [5, 5]


def opened_as_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, manifest: Manifest, records: bool
) -> list[tuple[str, dict[str, str]]]:
    """With what settings both sessions are opened."""
    opened: list[tuple[str, dict[str, str]]] = []

    def open_it(ort: Any, path: Path, *arguments: Any, settings: dict[str, str], **options: Any) -> Any:
        opened.append((path.name, settings))
        if "enable_cuda_graph" in settings and not records:
            raise ModelFormatError("This session cannot use the graph capture feature as requested by the user")
        return open_session(ort, path, *arguments, **options)

    monkeypatch.setattr("ramekin.cuda_model.open_session", open_it)
    CudaModel.load(CUDA_MODEL, manifest, "cpu", 1)
    return opened


@pytest.mark.parametrize(("precision", "tf32"), [("fp32-cuda", "0"), ("bf16", "1"), ("fp16", "1")])
def test_settings_of_cuda(precision: str, tf32: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all is float32 it is exact; the decoder's steps are recorded."""
    opened = opened_as_on_a_gpu(monkeypatch, replace(Manifest.load(CUDA_MODEL), precision=precision), records=True)
    expected = {"device_id": "0", "use_tf32": tf32, "arena_extend_strategy": "kSameAsRequested"}
    assert opened == [(ENCODER, expected), (DECODER, {**expected, "enable_cuda_graph": "1"})]


def test_a_session_that_cannot_record(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opened_as_on_a_gpu(monkeypatch, Manifest.load(CUDA_MODEL), records=False)
    assert [(name, "enable_cuda_graph" in settings) for name, settings in opened] == [
        (ENCODER, False),
        (DECODER, True),
        (DECODER, False),
    ]


def test_all_logits_outlive_the_job(cuda: Engine) -> None:
    model: Any = cuda.model
    logits = model.step([0, 0], model.new_cache(model.prefill([3, 1]), 2, 8, 4))
    gc.collect()
    cuda.generate([3, 1], replace(PARAMS, n=2, max_new_tokens=8))
    np.testing.assert_array_equal(np.sort(logits.full, axis=1)[:, :-5:-1], logits.top_values)


def test_an_altered_graph_is_told(cuda: Engine) -> None:
    """Tokens that repeat, and tokens that there are not."""
    model: Any = cuda.model
    step = model.step

    def altered(ids: Any) -> Any:
        def changed(*arguments: Any) -> Any:
            logits = step(*arguments)
            return replace(logits, top_ids=np.full_like(logits.top_ids, ids))

        return changed

    model.step = altered(5)
    assert {token for each in cuda.generate([3, 1], replace(PARAMS, max_new_tokens=3)) for token in each.token_ids} == {5}
    for strange in (10**6, -1):
        model.step = altered(strange)
        with pytest.raises(RamekinError, match="ranked tokens that there are not"):
            cuda.generate([3, 1], PARAMS)


def test_what_lies_in_the_hosts_memory(cuda: Engine) -> None:
    """Shapes are read by the host; bound there, onnxruntime has nothing to copy back and forth."""
    cache = cuda.model.new_cache(cuda.model.prefill([3, 1]), 2, 8, 4)
    cuda.model.step([0, 0], cache)
    _, _, (kept, host) = cache.binding
    assert all(value.device_name() == "cpu" for value in kept.values())
    assert host[TOP_K].tolist() == [4]


def test_a_full_cache(cuda: Engine) -> None:
    cache = cuda.model.new_cache(cuda.model.prefill([5, 1]), rows=1, capacity=8, candidates=1)
    for _ in range(8):
        cuda.model.step([0], cache)
    with pytest.raises(ValueError, match="the cache is full: its capacity is 8 tokens"):
        cuda.model.step([0], cache)
