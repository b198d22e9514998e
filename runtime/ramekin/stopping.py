"""How a command stops when it is asked to: in order, and not in the middle of a line of results."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = "SIGINT", "SIGTERM", "SIGHUP"  # the last is not known to Windows
_PATIENCE = 1.0  # s in which further signals are not heard: a person hammers at Ctrl-C, a supervisor sends two
_LATER = 0.05  # s after which a signal is raised again that came while a module was loading
_END = 10  # s that Python may take to end


class Stopping:
    """The handler of the signals that ask a command to stop.

    The first raises `KeyboardInterrupt` or `SystemExit`, so that what was begun is cleared away. A line that is being
    written is finished before, and so is a module that is being loaded: exceptions get lost in there. Who asks again a
    second later is heard again, and the third time, or while a line waits for its reader, the process ends at once.

    Args:
        ends: the process ends with the command.
    """

    def __init__(self, *, ends: bool) -> None:
        self._ends = ends
        self._before: dict[int, Any] = {}
        self._heard: list[float] = []
        self._waiting: int | None = None
        self._depth = 0
        self._outside: FrameType | None = None
        self._later: tuple[threading.Timer, int] | None = None
        self._again = False

    def __enter__(self) -> Stopping:
        """Handle all signals that nobody else handles; none in a thread that cannot."""
        self._outside = sys._getframe(1)  # a host may be loading itself all the while
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)
                if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        """Be as before; deaf if the process was stopped and ends now, so that Python's own end is not disturbed either."""
        later, self._later, self._outside = self._later, None, None
        over = self._ends and bool(self._heard)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if over else handler)
        if over and hasattr(signal, "alarm"):
            signal.alarm(_END)
        if later:
            timer, number = later
            timer.cancel()
            if not self._ends and failed is None:  # a process that ends is as good as stopped
                _stop(number)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again, self._again = self._again, False
        if not again:
            if self._heard and now - self._heard[-1] < _PATIENCE:
                return
            self._heard.append(now)
            if len(self._heard) > 2 or self._waiting is not None:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        self._later = None
        if self._depth:
            self._waiting = number
        elif _loads(frame, self._outside):
            self._defer(number)
        else:
            _stop(number)

    def _defer(self, number: int) -> None:
        timer = threading.Timer(_LATER, self._raise_again, [number])
        timer.daemon = True
        self._later = timer, number
        try:
            timer.start()
        except RuntimeError:  # there are no more threads
            self._later = None
            _stop(number)

    def _raise_again(self, number: int) -> None:
        """In a thread: wake the main one, which may wait for something."""
        if not self._later:  # the command is over, and its host has heard of it
            return
        self._again = True
        main = threading.main_thread().ident
        if main and hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main, number)
        else:
            signal.raise_signal(number)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What is written in here is written to its end before the command stops."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._waiting is not None and not self._depth:
            number, self._waiting = self._waiting, None
            _stop(number)


def _loads(frame: FrameType | None, outside: FrameType | None) -> bool:
    """Whether a module is being imported, whose own code may drop what is raised, or take it for an ImportError."""
    while frame and frame is not outside:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _stop(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
