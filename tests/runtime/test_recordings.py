"""CUDA graphs on the CPU: a device that, once it has recorded a step, runs that one again whatever it is told to run."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ramekin import Completion, Engine, ProviderError, RamekinError
from ramekin.device_thread import DeviceThread
from tests.runtime.conftest import CUDA_PARAMS as PARAMS
from tests.runtime.conftest import RUNS_CUDA_GRAPHS, Failing

pytestmark = RUNS_CUDA_GRAPHS


class Replaying:
    """A decoder's session that replays: the same memory is read and written as when a number was first told.

    Recordings are a thread's own, as onnxruntime's are.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self.recorded: dict[tuple[int, str], Any] = {}
        self.replayed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        key = threading.get_ident(), options.get_run_config_entry("gpu_graph_id")
        if key[1] != "-1":
            self.replayed += key in self.recorded
            binding = self.recorded.setdefault(key, binding)
        self._session.run_with_iobinding(binding)


@pytest.fixture
def gpu(cuda: Engine) -> Iterator[Engine]:
    model: Any = cuda.model
    model._decoder, model._records, model._thread = Replaying(model._decoder), True, DeviceThread("cuda")
    yield cuda
    assert model._decoder.replayed > len(model._decoder.recorded)  # else nothing was shown


def prompts(rng: np.random.Generator, count: int) -> list[list[int]]:
    return [rng.integers(3, 500, rng.integers(1, 200)).tolist() for _ in range(count)]


def assert_same(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    assert [[each.token_ids for each in one] for one in found] == [[each.token_ids for each in one] for one in expected]


@pytest.mark.parametrize("idle", [0, 10**6, 4 << 30])
def test_a_server_of_jobs_of_every_size(idle: int, gpu: Engine, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, samples, lengths and rankings of many sizes, with memory that is kept, and that is given up and made anew."""
    monkeypatch.setattr("ramekin.device_memory._MOST_IDLE", idle)
    rng = np.random.default_rng(idle)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "steps of more than 32 different jobs")
        for number in range(40):
            params = replace(
                PARAMS, n=int(rng.integers(1, 4)), max_new_tokens=int(rng.choice([5, 8, 30])), top_k=int(rng.choice([1, 20]))
            )
            sources = prompts(rng, int(rng.choice([1, 1, 2, 5])))
            assert_same(gpu.generate_many(sources, params), engine.generate_many(sources, params))
            if number % 9 == 8:
                gpu.model._pool.give_up_idle()  # type: ignore[attr-defined]
            gc.collect()


def test_streams_side_by_side_and_one_that_is_left(gpu: Engine, engine: Engine) -> None:
    """Jobs of one size at once have memory of their own, which the next ones may have when they are gone."""
    sources = prompts(np.random.default_rng(1), 12)
    sources = [source[:60] for source in sources]  # one size
    expected = engine.generate_many(sources, PARAMS)
    for first in range(0, 12, 3):
        left = gpu.stream(sources[first], PARAMS)
        for _ in range(7):
            next(left)
        del left
        streams = {number: gpu.stream(sources[number], PARAMS) for number in range(first, first + 3)}
        found: dict[int, dict[int, list[int]]] = {number: {} for number in streams}
        while streams:
            for number in list(streams):
                event = next(streams[number], None)
                if event is None:
                    del streams[number]
                elif isinstance(event, Completion):
                    found[number][event.index] = event.token_ids
        for number, samples in found.items():
            assert [samples[index] for index in range(PARAMS.n)] == [each.token_ids for each in expected[number]]
    assert len(gpu.model._decoder.recorded) <= 9  # type: ignore[attr-defined]


def test_a_job_without_memory_between_others(gpu: Engine, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was given up for it is not taken for the old one, wherever the new one lies."""
    sources = prompts(np.random.default_rng(2), 2)
    expected = engine.generate_many(sources, PARAMS)
    pool: Any = gpu.model._pool  # type: ignore[attr-defined]
    make = pool._make
    for _ in range(4):
        assert_same(gpu.generate_many(sources, PARAMS), expected)
        gc.collect()

        def fails(plan: Any) -> Any:
            raise ProviderError(f"too little memory (cuda): {plan.bytes}")

        monkeypatch.setattr(pool, "_make", fails)
        with pytest.raises(ProviderError, match="too little memory"):
            gpu.generate(sources[0], replace(PARAMS, n=50))
        monkeypatch.setattr(pool, "_make", make)


def test_a_thread_for_each_request(gpu: Engine, engine: Engine) -> None:
    sources = [source[:60] for source in prompts(np.random.default_rng(3), 12)]  # one size
    expected = engine.generate_many(sources, PARAMS)
    for _ in range(2):
        for first in range(0, 12, 4):
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(lambda source: gpu.generate(source, PARAMS), sources[first : first + 4]))
            assert_same(found, expected[first : first + 4])
    assert len(gpu.model._decoder.recorded) <= 16  # type: ignore[attr-defined] # at most four at once, of each four lendings


def test_jobs_of_many_prompt_lengths_share_their_recordings(cuda: Engine) -> None:
    """A server sees every length: each size is recorded once, and never again."""
    model: Any = cuda.model
    model._records = True
    rng = np.random.default_rng(0)
    for size in rng.permutation(np.repeat(np.arange(1, 17), 4)):  # all there are, to 1024 tokens
        model.new_cache(model.prefill(np.arange(3, 3 + size * 64 - 5) % 500), 2, 8, 4)
    assert len(model._recordings) == 16


def test_recordings_have_a_number_for_each_size_of_job(cuda: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """-1 means that nothing is recorded, which is what a failure leads to."""
    model: Any = cuda.model
    model._records, model._decoder = True, Failing(model._decoder)
    caches = [model.new_cache(model.prefill([3, 1]), rows, 8, 4) for rows in (2, 3)]
    for cache in (*caches, *caches):
        model.step([0] * cache.rows, cache)
    assert model._decoder.ids == ["1", "2", "1", "2"]
    monkeypatch.setattr("ramekin.cuda_model._MOST_RECORDED", 2)  # a session never gives a recording back
    with pytest.warns(RuntimeWarning, match="more than 2 different jobs are not recorded"):
        other = model.new_cache(caches[0].cross, 4, 8, 4)
    for cache in (other, *caches):
        model.step([0] * cache.rows, cache)
    assert model._decoder.ids[4:] == ["-1", "1", "2"]
    failure = "Graph capture did not complete after 2 runs"
    model._decoder = Failing(model._decoder._session, failure)
    with pytest.warns(RuntimeWarning, match="steps are not recorded as CUDA graphs, and slower: .*did not complete"):
        model.step([0, 0], caches[0])
    model._decoder._texts = [failure]  # of a job that had begun before: it goes on too, and says nothing
    model.step([0, 0, 0], caches[1])
    for cache in caches:
        model.step([0] * cache.rows, cache)
    assert model._decoder.ids == ["1", "-1", "2", "-1", "-1", "-1"]
    assert [cache.length for cache in caches] == [5, 5]
    assert model.new_cache(caches[0].cross, 2, 8, 4).recording == -1


def test_two_jobs_never_get_one_number(cuda: Engine) -> None:
    model: Any = cuda.model
    model._records = True
    cache = model.new_cache(model.prefill([3, 1]), 2, 8, 4)
    with ThreadPoolExecutor(1) as pool:
        with model._thread.alone():
            number = pool.submit(model._recording, cache)
            assert not wait([number], timeout=0.2).done
        assert number.result() == cache.recording == 1


# In the form of what nodes fail with: what matters stands behind hundreds of characters.
LONG = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running MatMul node. "
    "Name:'decoder.block.0.layer.0.SelfAttention.qkv' Status Message: /onnxruntime_src/onnxruntime/core/providers/cuda/"
    "cuda_call.cc:129 std::conditional_t<THRW, void, onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const "
    "char*, const char*, SUCCTYPE, const char*, const char*, int) [with ERRTYPE = cudaError; bool THRW = true; SUCCTYPE = "
    "cudaError] CUDA failure 900: operation not permitted when stream is capturing ; GPU=0"
)


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        "CUDAGraph::CaptureEnd: graph_ is NULL",
        "CUDA failure 901: operation failed due to a previous error during capture",
    ],
)
def test_what_says_that_recording_failed(text: str, cuda: Engine) -> None:
    model: Any = cuda.model
    model._records, model._decoder = True, Failing(model._decoder, text)
    cache = model.new_cache(model.prefill([3, 1]), 2, 8, 4)
    with pytest.warns(RuntimeWarning, match="steps are not recorded"):
        model.step([0, 0], cache)
    assert model._decoder.ids == ["1", "-1"]


@pytest.mark.parametrize(
    ("records", "text"),
    [
        (False, "CUDA failure 900: operation not permitted when stream is capturing"),
        (True, "CUDA failure 700: illegal access"),
    ],
)
def test_failures_that_have_nothing_to_do_with_recording(records: bool, text: str, cuda: Engine) -> None:
    model: Any = cuda.model
    model._records, model._decoder = records, Failing(model._decoder, text)
    cache = model.new_cache(model.prefill([3, 1]), 2, 8, 4)
    with pytest.raises(RamekinError, match="onnxruntime failed: CUDA failure"):
        model.step([0, 0], cache)
    assert model._records == records
    assert cache.length == 0


@pytest.mark.parametrize("failure", [(), ("Graph capture failed",)])
def test_warnings_as_errors(failure: tuple[str, ...], cuda: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are raised as what they are, and the next job runs."""
    model: Any = cuda.model
    model._records, model._decoder = True, Failing(model._decoder, *failure)
    if not failure:
        monkeypatch.setattr("ramekin.cuda_model._MOST_RECORDED", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="not recorded as CUDA graphs"):
            cuda.generate([3, 1], PARAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(cuda.generate([3, 1], PARAMS)) == PARAMS.n
