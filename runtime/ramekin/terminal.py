"""What people see on stderr while a command works."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import click

Item = TypeVar("Item")


def progress(items: list[Item], what: str) -> Iterator[Item]:
    """The items, with a progress bar on stderr if there are several and a person watches it, and not the results."""
    for (item,) in progress_in_groups([[each] for each in items], what):
        yield item


def progress_in_groups(groups: list[list[Item]], what: str) -> Iterator[list[Item]]:
    """Groups of items, with such a bar that counts items."""
    total = sum(map(len, groups))
    if total < 2 or not is_terminal(sys.stderr) or is_terminal(sys.stdout):
        yield from groups
        return
    with click.progressbar(length=total, label=what, file=sys.stderr, show_pos=True) as bar:
        for group in groups:
            yield group
            bar.update(len(group))


def is_terminal(stream: Any) -> bool:
    """Whether a person is at the other end; a closed stream is None."""
    return stream is not None and bool(stream.isatty())


def printable(text: str) -> str:
    """The text without control characters: a model folder may hold what moves a terminal's cursor."""
    return "".join(each if each.isprintable() else "?" for each in text)


def say(problem: object) -> None:
    """One line on stderr."""
    click.echo(f"ramekin: {printable(' '.join(str(problem).split()))}", err=True)


def json_line(value: object) -> str:
    """JSON on one line: with every letter as it is where stdout is UTF-8, escaped where it would be lost or spoilt."""
    return json.dumps(value, ensure_ascii="utf" not in (getattr(sys.stdout, "encoding", None) or "").lower())
