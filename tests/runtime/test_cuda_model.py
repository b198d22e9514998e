"""The model for CUDA on the CPU: several prompts at once, what stays on the device, what does not fit."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ramekin import Completion, Engine, ModelFormatError, ProviderError, RamekinError
from ramekin.cuda_model import RECORDED, CudaModel
from ramekin.device_memory import Plan
from ramekin.device_thread import one_at_a_time
from ramekin.manifest import DECODER, ENCODER, Manifest
from ramekin.session import open_session
from ramekin.tensors import TOP_K, UNFOLDED, past_names
from tests.runtime.conftest import CUDA_MODEL, OUT_OF_MEMORY, RUNS_CUDA_GRAPHS, Failing
from tests.runtime.conftest import CUDA_PARAMS as PARAMS

pytestmark = RUNS_CUDA_GRAPHS

PROMPTS = [list(range(3, 3 + length)) for length in (1, 7, 90, 64, 33)]


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


def test_a_full_cache(cuda: Engine) -> None:
    cache = cuda.model.new_cache(cuda.model.prefill([5, 1]), rows=1, capacity=8, candidates=1)
    for _ in range(8):
        cuda.model.step([0], cache)
    with pytest.raises(ValueError, match="the cache is full: its capacity is 8 tokens"):
        cuda.model.step([0], cache)


def test_more_candidates_than_tokens(cuda: Engine, engine: Engine) -> None:
    params = replace(PARAMS, top_k=10**6)
    found, expected = cuda.generate(PROMPTS[1], params), engine.generate(PROMPTS[1], params)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]


def test_what_a_job_needs_is_its_memory_and_its_scratch(cuda: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the errors tell it."""
    model: Any = cuda.model
    twice, needed = model._twice, []

    def watched(run: Any, size: int) -> Any:
        needed.append(size)
        return twice(run, size)

    monkeypatch.setattr(model, "_twice", watched)
    cross = model.prefill([3, 1], [3] * 70)
    prompts = Plan.of_prompts(model.dims, model._floats, 2, 128).bytes
    assert needed == [prompts + 2 * model.dims.num_heads * 128 * 128 * 4]
    model.step([0] * 4, model.new_cache(cross, 4, 8, 4))
    samples = Plan.of_samples(model.dims, model._floats, 4, 8, 4).bytes
    assert needed[1:] == [samples, samples + prompts]


@pytest.mark.parametrize("rules", [{}, {"greedy": True}, {"min_new_tokens": 5}, {"top_k": 50}])
def test_all_logits_stay_on_the_device(rules: dict[str, Any], cuda: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: object) -> Any:
        raise AssertionError("all logits were copied")

    monkeypatch.setattr(cuda.model, "_fetch", fetched)
    cuda.generate_many(PROMPTS[:3], replace(PARAMS, **rules))


def test_all_logits_outlive_the_job(cuda: Engine) -> None:
    """Their memory is not lent to the next one as long as somebody may ask."""
    model: Any = cuda.model
    params = replace(PARAMS, n=2, max_new_tokens=8)
    cache = model.new_cache(model.prefill([3, 1]), 2, 8, params.candidates)
    logits = model.step([0, 0], cache)
    del cache
    gc.collect()
    cuda.generate([3, 1], params)
    k = params.candidates
    np.testing.assert_array_equal(np.sort(logits.full, axis=1)[:, : -k - 1 : -1], logits.top_values)


def test_all_logits_of_rows_that_have_left(cuda: Engine) -> None:
    model: Any = cuda.model
    cache = model.new_cache(model.prefill([3, 1]), 2, 8, 4)
    logits = model.step([0, 5], cache)
    cache.keep([1])
    assert len(logits.full) == 2


def test_numbers_that_are_none_stay_with_the_job(cuda: Engine, engine: Engine) -> None:
    """Attention multiplies what it masks by 0, and 0 times NaN is NaN: caches that a job left so are not lent again."""
    model: Any = cuda.model
    expected = [each.token_ids for each in engine.generate(PROMPTS[1], PARAMS)]
    cuda.generate(PROMPTS[1], PARAMS)
    gc.collect()
    for plan, memory in model._pool._idle:
        for name, shape, _ in plan.tensors:
            if name.startswith(("past_key", "past_value")):
                memory.values[name].update_inplace(np.full(shape, np.nan, np.float32))
    with pytest.raises(RamekinError, match="logits that are not numbers"):
        cuda.generate(PROMPTS[1], PARAMS)
    gc.collect()
    assert [each.token_ids for each in cuda.generate(PROMPTS[1], PARAMS)] == expected


def test_numbers_that_are_none_in_a_row_that_has_left(cuda: Engine) -> None:
    """It is computed on, and would leave them as well. Memory that is cleared keeps its place, and its recording."""
    model: Any = cuda.model
    cache = model.new_cache(model.prefill([3, 1]), 2, 8, 4)
    model.step([0, 0], cache)
    number = cache.memory.number
    cache.keep([0])
    value = cache.memory.values["past_value_0"]
    value.update_inplace(np.stack([value.numpy()[0], np.full_like(value.numpy()[1], np.nan)]))
    assert np.isfinite(model.step([0], cache).top_logprobs).all()
    del cache
    gc.collect()
    memory = model.new_cache(model.prefill([3, 1]), 2, 8, 4).memory
    assert memory.number == number
    assert not any(memory.values[name].numpy().any() for name in past_names(model.dims.decoder_layers))


def test_what_lies_in_the_hosts_memory(cuda: Engine) -> None:
    """Shapes are read by the host; bound there, onnxruntime has nothing to copy back and forth."""
    model: Any = cuda.model
    made: list[tuple[list[int], tuple[object, ...]]] = []

    class Value:
        @staticmethod
        def ortvalue_from_numpy(array: np.ndarray, *where: object) -> Any:
            made.append((array.tolist(), where))
            return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    model._ort = SimpleNamespace(OrtValue=Value, RunOptions=onnxruntime.RunOptions)
    cache = model.new_cache(model.prefill([3, 1]), 2, 8, 4)
    model._device = "cuda"
    model.step([0, 0], cache)
    assert made == [([1, -1, model.dims.inner], ()), ([4], ())]
    _, _, (kept, host) = cache.binding
    assert kept.keys() == host.keys() == {UNFOLDED, TOP_K}  # the arrays are kept as long as what points at them


class Opened:
    """How sessions are opened as on a GPU: what was asked for, and with what success."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, manifest: Manifest, failure: str = "") -> None:
        self.asked: list[tuple[str, str, int, bool, dict[str, str]]] = []
        self._failure = failure
        monkeypatch.setattr("ramekin.cuda_model.open_session", self.open)
        self.model: Any = CudaModel.load(CUDA_MODEL, manifest, "cuda", 1)

    def open(
        self, ort: Any, path: Path, files: Any, provider: str, threads: int, rests: bool, settings: dict[str, str]
    ) -> Any:
        self.asked.append((path.name, provider, threads, rests, settings))
        assert one_at_a_time()._is_owned()
        if self._failure and "enable_cuda_graph" in settings:
            raise ModelFormatError(f"{path}: onnxruntime cannot load this graph") from RuntimeError(self._failure)
        return open_session(ort, path, files, "cpu", threads, rests=rests)


@pytest.mark.parametrize(("precision", "tf32"), [("fp32-cuda", "0"), ("bf16", "1"), ("fp16", "1")])
def test_how_sessions_are_opened(precision: str, tf32: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all is float32 it is exact; the decoder's steps are recorded."""
    opened = Opened(monkeypatch, replace(Manifest.load(CUDA_MODEL), precision=precision))
    plain = {"device_id": "0", "use_tf32": tf32, "arena_extend_strategy": "kSameAsRequested"}
    assert opened.asked == [(ENCODER, "cuda", 1, True, plain), (DECODER, "cuda", 1, False, {**plain, **RECORDED})]
    model = opened.model
    assert (model._records, model.prompts_at_once) == (True, 16)
    assert {model._device, model._pool._device, model._thread._device} == {"cuda"}


def test_a_session_that_cannot_record(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(RuntimeWarning, match="steps are not recorded as CUDA graphs, and slower: .*cannot load"):
        opened = Opened(monkeypatch, Manifest.load(CUDA_MODEL), "This session cannot use the graph capture feature")
    (*_, settings), (*other, with_recording), (*last, without) = opened.asked
    assert other == last == [DECODER, "cuda", 1, False]
    assert without == settings
    assert with_recording == {**settings, **RECORDED}
    assert not opened.model._records


def test_a_session_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFormatError, match="cannot load this graph"):
        Opened(monkeypatch, Manifest.load(CUDA_MODEL), "no such operator")


def test_memory_lies_on_the_gpu(cuda: Engine) -> None:
    made: list[tuple[str, int]] = []

    def make(shape: list[int], _: int, device: str, number: int) -> Any:
        made.append((device, number))
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, 1, "cpu", 0)

    ort = SimpleNamespace(OrtValue=SimpleNamespace(ortvalue_from_shape_and_type=make))
    model: Any = cuda.model
    model = CudaModel(ort, model._encoder, model._decoder, cuda.manifest, "cuda")
    plan = Plan.of_samples(model.dims, 1, 2, 8, 4)
    model._pool.lend(plan, model)
    assert made == [("cuda", 0)] * len(plan.tensors)


def test_the_chosen_provider_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    load = CudaModel.load

    def watched(folder: Path, manifest: Manifest, provider: str, threads: int) -> CudaModel:
        given.append(provider)
        return load(folder, manifest, "cpu", threads)

    monkeypatch.setattr("ramekin.engine.choose_provider", lambda *_: ("cuda", ""))
    monkeypatch.setattr(CudaModel, "load", watched)
    assert Engine.load(CUDA_MODEL, provider="cuda").provider == "cuda"
    assert given == ["cuda"]


@pytest.mark.parametrize("kinds", [("float16", "float"), ("int8", "int8")])
def test_caches_of_strange_types(kinds: tuple[str, str], cuda: Engine) -> None:
    class Retyped:
        def __init__(self, session: Any, kind: str) -> None:
            self._session, self._type = session, f"tensor({kind})"

        def get_inputs(self) -> list[Any]:
            return [self._retyped(each) for each in self._session.get_inputs()]

        def get_outputs(self) -> list[Any]:
            return [self._retyped(each) for each in self._session.get_outputs()]

        def _retyped(self, tensor: Any) -> Any:
            is_cache = tensor.name.startswith(("cross", "past_key", "past_value"))
            return SimpleNamespace(name=tensor.name, shape=tensor.shape, type=self._type if is_cache else tensor.type)

    model: Any = cuda.model
    encoder, decoder = (Retyped(each, kind) for each, kind in zip((model._encoder, model._decoder), kinds, strict=True))
    with pytest.raises(ModelFormatError, match="caches of tensor"):
        CudaModel(onnxruntime, encoder, decoder, cuda.manifest, "cpu")
