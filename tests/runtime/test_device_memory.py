"""Memory on a device: how much a job takes, what is lent again, and what is said where there is too little."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ramekin import ProviderError
from ramekin.device_memory import BYTES, Plan, Pool
from ramekin.manifest import Dims

LARGE = Dims(vocab_size=32128, d_model=1024, d_ff=2816, num_heads=16, head_dim=64, encoder_layers=24, decoder_layers=24)


def of_width(width: int) -> Plan:
    return Plan((("logits", (1, width), 1),))


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
    del many
    kept = [*pool._idle, *pool._returned]
    assert sum(4 * memory.values["logits"].shape()[1] for _, memory in kept) <= 4 * 30  # at once, not at the next job
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


def test_gigabytes_are_of_ten_to_the_nine() -> None:
    with pytest.raises(ProviderError, match=r"needs 4\.0 GB"):
        Pool(Small(0), "cuda").lend(of_width(10**9), Borrower())


def test_bytes_of_half_precision() -> None:
    assert BYTES == {1: 4, 7: 8, 10: 2, 16: 2}


def test_the_memory_used_last_is_lent_first() -> None:
    pool, borrowers = Pool(onnxruntime, "cpu"), [Borrower(), Borrower()]
    numbers = [pool.lend(of_width(1), each).number for each in borrowers]
    del borrowers[0], borrowers[0]
    gc.collect()
    assert pool.lend(of_width(1), Borrower()).number == numbers[1]


def test_memory_is_looked_for_by_one_thread() -> None:
    held: list[bool] = []

    def make(shape: list[int], *_: object) -> Any:
        held.append(pool._lock.locked())
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, 1, "cpu", 0)

    pool = Pool(SimpleNamespace(OrtValue=SimpleNamespace(ortvalue_from_shape_and_type=make)), "cpu")
    pool.lend(of_width(1), Borrower())
    assert held == [True]


@pytest.mark.parametrize(("give_up", "number"), [(False, 1), (True, 2)])
def test_memory_that_came_back_meanwhile(give_up: bool, number: int) -> None:
    """While another thread has the pool's lock."""
    pool, borrower = Pool(onnxruntime, "cpu"), Borrower()
    pool.lend(of_width(1), borrower)
    with pool._lock:
        del borrower
    if give_up:
        pool.give_up_idle()
    assert pool.lend(of_width(1), Borrower()).number == number


def test_spoiled_memory_is_cleared_once() -> None:
    """In its place, with its number, so that what was recorded holds."""
    pool, plan = Pool(onnxruntime, "cpu"), Plan((("past_key_0", (1, 8, 4), 1),))
    for spoils, left in ((True, 0), (False, 5), (True, 0)):
        borrower = Borrower()
        memory = pool.lend(plan, borrower)
        memory.values["past_key_0"].update_inplace(np.full((1, 8, 4), 5, np.float32))
        if spoils:
            pool.spoil(memory)
        del borrower
        borrower = Borrower()
        again = pool.lend(plan, borrower)
        assert again.number == 1
        assert (again.values["past_key_0"].numpy() == left).all()
        del borrower
