"""Which thread asks a device for something: one at a time, and on a GPU no new one for each job."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import RLock, Thread, current_thread
from typing import Any, TypeVar

Result = TypeVar("Result")
_LOCKS: dict[int, Any] = {}


def one_at_a_time() -> Any:
    """A lock of this process, held by whoever asks anything of CUDA but to free what it has.

    While a thread records a CUDA graph, an allocation in another fails and spoils it (onnxruntime records with
    `cudaStreamCaptureModeGlobal`). A forked child has another lock: its parent's may be held by a thread that it has not.
    """
    return _LOCKS.setdefault(os.getpid(), RLock())


class DeviceThread:
    """The thread that computes a model.

    On a GPU the one that asks first computes in itself. Once another one asks, a thread of the model's own computes for all:
    onnxruntime keeps recordings for the thread that made them as long as the session lives (its
    `CUDAExecutionProvider::PerThreadContext`), so that a service with a thread for each request would record each size of
    job in each. Not from the beginning, since handing over takes some 0.1 ms of each step. On a CPU whoever asks computes.
    """

    def __init__(self, device: str) -> None:
        self._device, self._lock = device, RLock()
        self._first: Thread | None = None
        self._own: ThreadPoolExecutor | None = None

    def alone(self) -> Any:
        """A lock: who has it is alone with the device, or on a CPU with the model."""
        return one_at_a_time() if self._device == "cuda" else self._lock

    def run(self, function: Callable[[], Result]) -> Result:
        """What a function returns or raises, which is alone then."""
        with self.alone():
            running = self._hand_over(function)
            if not running:
                return function()
        try:
            return running.result()
        finally:
            del running  # an error's traceback would keep it, it the error, and both the job's memory

    def _hand_over(self, function: Callable[[], Result]) -> Future[Result] | None:
        """What the model's own thread is going to compute; None where the one that asks has to."""
        self._first = self._first or current_thread()
        if self._device != "cuda" or (self._first is current_thread() and not self._own):
            return None
        try:
            if not self._own:
                own = ThreadPoolExecutor(1, "ramekin-cuda")
                own.submit(int)  # starts it
                self._own = own
            return self._own.submit(self._run_alone, function)
        except RuntimeError:  # there are no more threads, or Python is about to end
            return None

    def _run_alone(self, function: Callable[[], Result]) -> Result:
        with self.alone():
            return function()
