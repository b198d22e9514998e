"""How a command stops when it is asked to: once, and never in the middle of a line of results."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = "SIGINT", "SIGTERM", "SIGHUP"  # the last is not known to Windows
_PATIENCE = 1.0  # s for clearing away, in which further signals are not heard; after that, one ends the process


class Stopping:
    """The handler of the signals that ask a command to stop.

    The first raises `KeyboardInterrupt` or `SystemExit`, so that what was begun is cleared away. A person who hammers at
    Ctrl-C, or a supervisor that sends two signals, must not interrupt that.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._since: float | None = None
        self._waiting: int | None = None
        self._whole = False

    def __enter__(self) -> Stopping:
        """Handle all signals that nobody else handles."""
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        """Be as before; deaf if the process is about to end, since Python's own end must not be interrupted either."""
        for number, handler in self._before.items():
            signal.signal(number, handler if self._since is None else signal.SIG_IGN)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            if not self._whole:
                _stop(number)
            self._waiting = number
        elif time.monotonic() - self._since > _PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What is written in here is written to its end before the command stops."""
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
            if self._waiting is not None:
                number, self._waiting = self._waiting, None
                _stop(number)


def _stop(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
