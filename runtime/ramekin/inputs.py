"""Files with prompts and papers: one, or many as JSON Lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ramekin.errors import InputError, PaperError
from ramekin.paper import Paper, valid_text


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file: its text (`-`: standard input) or, of a `.jsonl` file, a text or `{"prompt": ...}` per line.

    Raises:
        InputError: the file cannot be read, or a prompt is empty or no text.
    """
    if str(file) == "-":
        return [_prompt("standard input", _read_stdin().rstrip("\n"))]
    text = _read(file)
    if file.suffix.lower() != ".jsonl":
        return [_prompt(str(file), text.rstrip("\n"))]
    prompts = []
    for number, raw in _json_lines(file, text):
        prompt = raw.get("prompt") if isinstance(raw, dict) else raw
        if not isinstance(prompt, str):
            raise InputError(f'{file}, line {number}: expected a text or an object with "prompt"')
        prompts.append(_prompt(f"{file}, line {number}", valid_text(prompt)))
    if not prompts:
        raise InputError(f"{file}: no prompts in it")
    return prompts


def _prompt(place: str, text: str) -> str:
    if not text.strip():
        raise InputError(f"{place}: an empty prompt, which a model would continue with anything")
    return text


def read_papers(file: Path) -> list[Paper]:
    """The papers of a file: one, as `Paper.read` takes it (`-`: standard input) or, of a `.jsonl` file, one per line.

    Raises:
        InputError: the file cannot be read, or a line is not a paper.
    """
    if str(file) == "-":
        return [Paper.parse(_read_stdin())]
    if file.suffix.lower() != ".jsonl":
        return [Paper.read(file)]
    papers = []
    for number, raw in _json_lines(file, _read(file)):
        try:
            papers.append(Paper.from_mapping(raw))
        except PaperError as error:
            raise PaperError(f"{file}, line {number}: {error}") from None
    if not papers:
        raise InputError(f"{file}: no papers in it")
    return papers


def _json_lines(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}, line {number}: not JSON ({error})") from None


def _read_stdin() -> str:
    if sys.stdin is None:
        raise InputError("standard input is closed; name a file")
    return _utf8(sys.stdin.buffer.read(), "standard input")


def _read(file: Path) -> str:
    try:
        return _utf8(file.read_bytes(), str(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
