"""CUDA graphs on the CPU: a device that, once it has recorded a step, runs that one again whatever it is told to run."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ramekin import Completion, Engine, SamplingParams
from ramekin.cuda_model import CudaModel
from ramekin.errors import ProviderError
from tests.runtime.conftest import CUDA_MODEL, RUNS_CUDA_GRAPHS

pytestmark = RUNS_CUDA_GRAPHS

PARAMS = SamplingParams(n=3, max_new_tokens=30, seed=11, top_k=20)


class Replaying:
    """A decoder's session that replays: the same memory is read and written as when a number was first told."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.recorded: dict[str, Any] = {}
        self.replayed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        if number != "-1":
            self.replayed += number in self.recorded
            binding = self.recorded.setdefault(number, binding)
        self._session.run_with_iobinding(binding)


@pytest.fixture
def gpu() -> Iterator[Engine]:
    engine = Engine.load(CUDA_MODEL, provider="cpu", threads=2)
    model: Any = engine.model
    assert isinstance(model, CudaModel)
    model._decoder = Replaying(model._decoder)
    model._device, model._records, model.prompts_at_once = "cuda", True, 16
    yield engine
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
