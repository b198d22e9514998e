"""Several runs side by side: while a GPU computes for one of them, Python chooses tokens for another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from queue import Empty, Queue
from threading import Event, Lock, Thread
from typing import Generic, TypeVar

from ramekin.errors import ProviderError

Told = TypeVar("Told")


class Lanes(Generic[Told]):
    """A few threads that take one run after the other.

    The interpreter's lock is free while onnxruntime waits for the GPU, so that two lanes keep both it and Python busy.
    A lane that finds too little memory beside the others gives its run back and ends; the last one tells the error.
    """

    def __init__(self, runs: Sequence[Callable[[], Iterator[Told]]], lanes: int, at_a_time: int) -> None:
        """Take the runs, and how many of their events are handed over together."""
        self._runs, self._at_a_time = runs, at_a_time
        self._waiting, self._left = list(reversed(range(len(runs)))), min(lanes, len(runs))
        self._lock, self._stop = Lock(), Event()
        self._told: Queue[tuple[int, list[Told]] | BaseException | None] = Queue(maxsize=2 * lanes)

    def __iter__(self) -> Iterator[tuple[int, Told]]:
        """All events of all runs, with the number of the run."""
        threads = [Thread(target=self._work, name=f"ramekin-lane-{lane}", daemon=True) for lane in range(self._left)]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                while told := self._told.get():
                    if isinstance(told, BaseException):
                        raise told
                    number, events = told
                    for event in events:
                        yield number, event
        finally:
            self._stop.set()
            for thread in threads:
                while thread.is_alive():
                    with suppress(Empty):  # it may wait to hand something over
                        self._told.get_nowait()
                    thread.join(0.01)

    def _work(self) -> None:
        try:
            while (number := self._next()) is not None:
                if not self._run(number):
                    break
        except BaseException as error:  # it belongs to whom iterates
            self._told.put(error)
        finally:
            self._told.put(None)

    def _next(self) -> int | None:
        with self._lock:
            if self._waiting and not self._stop.is_set():
                return self._waiting.pop()
            self._left -= 1
            return None

    def _run(self, number: int) -> bool:
        """Hand over a run's events; False if it was given back to the other lanes instead."""
        run, begun = self._runs[number](), False
        try:
            while events := list(islice(run, self._at_a_time)):
                begun = True
                self._told.put((number, events))
                if self._stop.is_set():
                    break
        except ProviderError:
            with self._lock:
                if begun or self._left == 1:
                    raise
                self._left -= 1
                self._waiting.append(number)
                return False
        return True
