"""What people see on stderr while a command works."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import click

Item = TypeVar("Item")


def progress(items: list[Item], what: str) -> Iterator[Item]:
    """The items, with a progress bar on stderr if there are several and a person watches it, and not the results."""
    if len(items) < 2 or not is_terminal(sys.stderr) or is_terminal(sys.stdout):
        yield from items
        return
    with click.progressbar(items, label=what, file=sys.stderr, show_pos=True) as bar:
        yield from bar


def is_terminal(stream: Any) -> bool:
    """Whether a person is at the other end; a closed stream is None."""
    return stream is not None and bool(stream.isatty())


def say(problem: object) -> None:
    """One line on stderr."""
    click.echo(f"ramekin: {' '.join(str(problem).split())}", err=True)
