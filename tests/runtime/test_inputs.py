"""Files with prompts and papers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ramekin.inputs import read_papers, read_prompts

PAPER = {"title": "T", "abstract": "We propose a parser.", "introduction": "It is new."}


@pytest.mark.parametrize("name", ["many.jsonl", "MANY.JSONL"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])  # Windows writes one at the beginning of a file
def test_many(name: str, mark: bytes, tmp_path: Path) -> None:
    """Lines end with a line feed alone: JSON may hold other separators as they are."""
    prompts = ["one\u2028two", "three\u0085four"]
    (tmp_path / name).write_bytes(mark + "\r\n".join(json.dumps(each, ensure_ascii=False) for each in prompts).encode())
    assert read_prompts(tmp_path / name) == prompts
    papers = [{**PAPER, "title": prompt} for prompt in prompts]
    (tmp_path / name).write_bytes(mark + "\n".join(json.dumps(each, ensure_ascii=False) for each in papers).encode())
    assert len(read_papers(tmp_path / name)) == 2


def test_a_mark_at_the_beginning_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfa text\n")
    assert read_prompts(tmp_path / "prompt.txt") == ["a text"]


def test_blanks_of_a_prompt_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("  a text \n\n")
    assert read_prompts(tmp_path / "prompt.txt") == ["  a text "]
