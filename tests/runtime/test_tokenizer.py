"""The tokenizer on the tiny model; `tests/export/test_tokenizer_parity.py` compares it with transformers."""

from __future__ import annotations

import numpy as np
import pytest

from ramekin import Engine
from ramekin.tokenizer import IncrementalDecoder, first_stop
from tests.runtime.conftest import TINY_MODEL

TOKENIZER = Engine.load(TINY_MODEL, threads=1).tokenizer


def test_sentinels_are_single_ids() -> None:
    ids = TOKENIZER.encode("a <extra_id_0> b<extra_id_1></s>")
    assert [i for i in ids if i >= 400] == [499, 498]
    assert ids[-2:] == [1, 1]


def test_round_trip() -> None:
    text = "We propose a new approach to neural parsing."
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("seed", range(20))
def test_any_ids_decode_and_incremental_text_adds_up(seed: int) -> None:
    ids = np.random.default_rng(seed).integers(-5, 600, 60).tolist()
    decoder = IncrementalDecoder(TOKENIZER)
    parts = [decoder.push(i) for i in ids]
    assert "".join([*parts, decoder.finish()]) == TOKENIZER.decode(ids) == decoder.text


@pytest.mark.parametrize("seed", range(20))
def test_any_text_encodes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    planes = [(0, 128), (128, 0x3000), (0x3000, 0xD800), (0xE000, 0x11000)]
    text = "".join(chr(int(rng.integers(*planes[int(rng.integers(4))]))) for _ in range(100))
    ids = TOKENIZER.encode(text)
    assert ids[-1] == 1
    assert all(0 <= i < 512 for i in ids)


def test_first_stop() -> None:
    assert first_stop("abcabc", ("ca", "bc")) == 1
    assert first_stop("abc", ("x",)) is None
    assert first_stop("abc", ()) is None
