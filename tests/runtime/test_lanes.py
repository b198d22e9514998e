"""Runs side by side: everything is told once, errors arrive, nothing runs on when nobody listens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from ramekin import ProviderError
from ramekin.lanes import Lanes


def counting(run: int, events: int) -> Callable[[], Iterator[str]]:
    return lambda: (f"{run}.{event}" for event in range(events))


def none_is_left() -> bool:
    return not any(thread.name.startswith("ramekin-lane") for thread in threading.enumerate())


@pytest.mark.parametrize("lanes", [1, 2, 5])
@pytest.mark.parametrize("at_a_time", [1, 3, 100])
def test_every_event_is_told_once_and_in_order(lanes: int, at_a_time: int) -> None:
    lengths = [4, 0, 7, 1, 3, 6, 2]
    told = list(Lanes([counting(run, events) for run, events in enumerate(lengths)], lanes, at_a_time))
    for run, events in enumerate(lengths):
        assert [event for number, event in told if number == run] == [f"{run}.{event}" for event in range(events)]
    assert len(told) == sum(lengths)
    assert none_is_left()


def test_nothing_to_do() -> None:
    assert not list(Lanes([], 2, 1))


def test_two_run_at_once() -> None:
    meet = threading.Barrier(2, timeout=10)

    def run() -> Iterator[int]:
        meet.wait()
        yield 1

    assert len(list(Lanes([run, run], 2, 1))) == 2


def test_an_error_arrives_where_events_are_read() -> None:
    def broken() -> Iterator[str]:
        yield "first"
        raise ValueError("here")

    told: list[str] = []
    with pytest.raises(ValueError, match="here"):
        told.extend(event for _, event in Lanes([broken, counting(1, 10_000)], 2, 1))
    assert none_is_left()


@pytest.mark.parametrize("lanes", [1, 2])
def test_who_stops_reading_stops_the_runs(lanes: int) -> None:
    closed = threading.Semaphore(0)

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.release()

    events = iter(Lanes([endless] * 5, lanes, 2))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert none_is_left()
    for _ in range(lanes):
        assert closed.acquire(timeout=10)


def test_too_little_memory_for_two() -> None:
    """One lane less, and the run is taken up again by another."""
    room, tries = threading.Semaphore(1), 0

    def run() -> Iterator[str]:
        nonlocal tries
        tries += 1
        if not room.acquire(blocking=False):
            raise ProviderError("too little memory")
        yield "told"
        room.release()

    told = list(Lanes([run] * 6, 3, 1))
    assert sorted(number for number, _ in told) == list(range(6))
    assert 6 <= tries <= 8
    assert none_is_left()


def test_too_little_memory_for_one() -> None:
    def run() -> Iterator[str]:
        raise ProviderError("too little memory")
        yield ""

    with pytest.raises(ProviderError, match="too little"):
        list(Lanes([run] * 4, 2, 1))
    assert none_is_left()


def test_memory_that_runs_out_later_is_told() -> None:
    """What was told cannot be told again."""

    def run() -> Iterator[str]:
        yield "told"
        raise ProviderError("too little memory")

    with pytest.raises(ProviderError, match="too little"):
        list(Lanes([run, counting(1, 1000)], 2, 1))
