"""What people see on stderr while a command works."""

from __future__ import annotations

import codecs
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from io import RawIOBase, TextIOWrapper
from typing import Any, TypeVar

import click

from ramekin.stopping import Stopping

Item = TypeVar("Item")
_LONGEST = 2_000  # characters of a line on stderr: what it quotes may have megabytes
_CONTROLS = {code: "?" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


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
    """One line on stderr; that nobody can read it must not cost the results."""
    with suppress(OSError):
        line = printable(" ".join(str(problem).split()))
        click.echo(f"ramekin: {line[:_LONGEST]}{'...' if len(line) > _LONGEST else ''}", err=True)


def write(text: str = "", end: str = "\n") -> None:
    """Results, on stdout: as they are, but for what would move a terminal's cursor; a signal does not cut them.

    Raises:
        OSError: stdout cannot be written to.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed; the results have nowhere to go")
    with whole():
        if is_terminal(sys.stdout):
            click.echo(f"{text}{end}".translate(_CONTROLS), nl=False)
        elif isinstance(sys.stdout, TextIOWrapper) and isinstance(sys.stdout.buffer, RawIOBase):
            _write_all(sys.stdout, f"{text}{end}")
        else:
            click.echo(f"{text}{end}", nl=False, color=True)  # else it drops what looks like colour from texts in a pipe


def whole() -> AbstractContextManager[None]:
    """All results that are written in here are written before a signal stops the command."""
    context = click.get_current_context(silent=True)
    stopping = context.find_object(Stopping) if context else None
    return stopping.whole() if stopping else nullcontext()


def _write_all(stream: TextIOWrapper, text: str) -> None:
    """Every byte to an unbuffered stream (`PYTHONUNBUFFERED`), which drops the rest of what a signal interrupts."""
    encoding = "utf-8" if codecs.lookup(stream.encoding).name == "ascii" else stream.encoding  # as click's `echo` does
    rest = text.replace("\n", os.linesep).encode(encoding, stream.errors or "strict")
    raw: Any = stream.buffer
    while rest:
        rest = rest[raw.write(rest) or 0 :]


def json_text(value: object, indent: int | None = None) -> str:
    """JSON, on one line unless indented: letters as they are where stdout is UTF-8, escaped where they would be spoilt."""
    return json.dumps(value, indent=indent, ensure_ascii="utf" not in (getattr(sys.stdout, "encoding", None) or "").lower())
