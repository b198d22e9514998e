"""The model for CUDA on the CPU: several prompts at once, memory that keeps its place, what does not fit."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ramekin import Completion, Engine, ProviderError, RamekinError, SamplingParams
from ramekin.cuda_model import CudaModel, Plan, Pool
from ramekin.manifest import TOP_K, Dims
from tests.runtime.conftest import CUDA_MODEL

LARGE = Dims(vocab_size=32128, d_model=1024, d_ff=2816, num_heads=16, head_dim=64, encoder_layers=24, decoder_layers=24)
PROMPTS = [list(range(3, 3 + length)) for length in (1, 7, 90, 64, 33)]
PARAMS = SamplingParams(n=3, max_new_tokens=30, seed=11, top_k=20)


@pytest.fixture(scope="module")
def cuda() -> Engine:
    return Engine.load(CUDA_MODEL, provider="cpu", threads=2)


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
def test_many_prompts_in_groups(size: int, cuda: Engine, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaModel, "prompts_at_once", size)
    found = cuda.generate_many(PROMPTS, PARAMS)
    expected = engine.generate_many(PROMPTS, PARAMS)
    assert [[each.token_ids for each in one] for one in found] == [[each.token_ids for each in one] for one in expected]
    assert cuda.generate_many([], PARAMS) == []


def test_a_seed_that_is_drawn_is_one_for_all(cuda: Engine) -> None:
    found = cuda.generate_many(PROMPTS, replace(PARAMS, seed=None))
    assert len({each.seed for one in found for each in one}) == 1
    again = cuda.generate_many(PROMPTS, replace(PARAMS, seed=found[0][0].seed))
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
    with pytest.raises(ProviderError, match=r"too little memory on the GPU: this job needs 0\.0 GB.*fewer or shorter"):
        Pool(Small(10**6), "cuda").lend(plan, Borrower())


def test_idle_memory_is_given_up_first() -> None:
    device, one, other = Small(10**6), Plan((("logits", (200, 1000), 1),)), Plan((("logits", (220, 1000), 1),))
    pool = Pool(device, "cuda")
    borrower = Borrower()
    memory = pool.lend(one, borrower)
    del borrower
    gc.collect()
    idle = pool._idle[one]
    assert idle == [memory]
    with pytest.raises(ProviderError):
        pool.lend(other, Borrower())
    assert idle == []


@pytest.mark.parametrize("text", ["CUDA failure 2: out of memory ; GPU=0", "Failed to allocate memory for requested buffer"])
def test_a_gpu_that_runs_out_of_memory_in_a_step(text: str, cuda: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RamekinError(f"onnxruntime failed: {text}")

    cache = cuda.model.new_cache(cuda.model.prefill([3, 1]), 2, 8, 4)
    monkeypatch.setattr("ramekin.cuda_model.run_bound", fails)
    with pytest.raises(ProviderError, match="too little memory on the GPU"):
        cuda.model.step([0, 0], cache)


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
