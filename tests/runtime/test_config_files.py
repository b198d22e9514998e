"""What a checkpoint's JSON files say; `tests/export` reads them as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ramekin.config_files import generation_defaults, special_tokens
from tests.runtime.test_tokenizer import Bytes

RAW = {"vocab_size": 400, "decoder_start_token_id": 2, "pad_token_id": 3, "eos_token_id": [1, 5]}


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, (2, 3, (1, 5))),
        ({"top_k": 7, "eos_token_id": 6}, (2, 3, (6,))),
        ({"decoder_start_token_id": 0, "pad_token_id": 0}, (0, 0, (1, 5))),
    ],
)
def test_what_one_file_does_not_say_the_other_does(generation: dict[str, Any], expected: object, tmp_path: Path) -> None:
    tokens = special_tokens(tmp_path, RAW, generation, Bytes())
    assert (tokens.start, tokens.pad, tokens.eos) == expected


def test_an_added_token_without_a_text_is_none(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps({"": 300, "[SEP]": 301}))
    assert special_tokens(tmp_path, RAW, {}, Bytes()).named["[SEP]"] == 301


def test_settings_that_contradict_each_other_are_not_all_kept() -> None:
    """Of a checkpoint that is not meant for sampling; else its model could not be loaded."""
    assert generation_defaults({"max_new_tokens": 10, "min_new_tokens": 50, "top_k": 3}) == {
        "max_new_tokens": 10,
        "top_k": 3,
    }
