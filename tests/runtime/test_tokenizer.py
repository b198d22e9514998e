"""The tokenizer on the tiny model; `tests/export/test_tokenizer_parity.py` compares it with transformers."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from ramekin import Engine
from ramekin.manifest import SpecialTokens
from ramekin.tokenizer import IncrementalDecoder, Tokenizer, clean_up, first_stop
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
    assert as_it_comes(TOKENIZER, ids) == TOKENIZER.decode(ids)


def as_it_comes(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of tokens that come one by one, of which nothing is taken back that was told."""
    decoder = IncrementalDecoder(tokenizer)
    for i in ids:
        told = decoder.text
        decoder.push(i)
        assert decoder.text.startswith(told)
    decoder.finish()
    return decoder.text


class Bytes:
    """A SentencePiece model with byte fallback, as far as the tokenizer asks."""

    pieces: ClassVar = ["<pad>", "</s>", "<unk>", "\u2581a", *(f"<0x{byte:02X}>" for byte in range(256))]

    def get_piece_size(self) -> int:
        return len(self.pieces)

    def pad_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return 1

    def unk_id(self) -> int:
        return 2

    def id_to_piece(self, i: int) -> str:
        return self.pieces[i]

    def is_byte(self, i: int) -> bool:
        return i > 3

    def is_control(self, i: int) -> bool:
        return i < 2


def test_characters_of_several_bytes() -> None:
    tokens = SpecialTokens(start=0, pad=0, eos=(1,), named={"[SEP]": 300, "<extra_id_0>": 301}, silent=(301,))
    tokenizer = Tokenizer(Bytes(), tokens)
    ids = [3, *(byte + 4 for byte in "\u20ac".encode()), 300, 301, 3, 4 + 0xFF, 2, 1, 0]
    assert tokenizer.decode(ids) == "a\u20ac[SEP] a\ufffd"
    decoder, told = IncrementalDecoder(tokenizer), []
    for i in ids:
        decoder.push(i)
        told.append(decoder.text)
    assert told[:4] == ["a", "a", "a", "a\u20ac"]
    decoder.finish()
    assert decoder.text == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Which one ? A net , trained .", "Which one? A net, trained."),
        ("it 's no 'so' , I 'm , we 've , you 're , don n't !", "it's no'so', I'm, we've, you're, donn't!"),
        ("a ' b ' c", "a'b'c"),
        ("a ' .", "a '."),  # the period's blank goes first, and the apostrophe's pair is none then
        ("a  ' s , n ' t", "a's,n't"),  # what one replacement makes the next one finds
        ("a  . b", "a . b"),  # but none finds its own
        ("a 'd 'll - nothing", "a 'd 'll - nothing"),
    ],
)
def test_blanks_that_are_cleaned_up(text: str, expected: str) -> None:
    tokens = SpecialTokens(start=0, pad=0, eos=(1,))
    ids = [4 + byte for byte in text.encode()]
    assert Tokenizer(Bytes(), tokens, cleans_up=True).decode(ids) == expected
    assert Tokenizer(Bytes(), tokens).decode(ids) == text


@pytest.mark.parametrize("seed", range(50))
def test_text_that_is_cleaned_up_as_it_comes(seed: int) -> None:
    """It adds up to what all of it becomes at once, and what was told stays."""
    rng = np.random.default_rng(seed)
    tokenizer = Tokenizer(Bytes(), SpecialTokens(start=0, pad=0, eos=(1,)), cleans_up=True)
    for _ in range(100):
        text = "".join(rng.choice(list("    ''.,ntmsverx"), 30))
        ids = [4 + byte for byte in text.encode()]
        assert as_it_comes(tokenizer, ids) == tokenizer.decode(ids) == clean_up(text.removeprefix(" ")), text


def test_a_word_is_told_when_it_is_one() -> None:
    """Only what may still be cleaned up waits: a blank, an apostrophe behind it, the beginning of a contraction."""
    decoder = IncrementalDecoder(Tokenizer(Bytes(), SpecialTokens(start=0, pad=0, eos=(1,)), cleans_up=True))
    told = []
    for byte in b"we 've no 'vow' .":
        decoder.push(4 + byte)
        told.append(len(decoder.text))
    assert told == [1, 2, 2, 2, 2, 5, 5, 5, 8, 8, 8, 8, 12, 13, 14, 14, 15]


def test_one_blank_at_the_beginning_is_taken_away() -> None:
    """That of the first word; more are the text's own."""
    tokenizer, ids = Tokenizer(Bytes(), SpecialTokens(start=0, pad=0, eos=(1,))), [4 + 0x20, 3, 3]
    assert as_it_comes(tokenizer, ids) == tokenizer.decode(ids) == " a a"


def test_the_longest_added_token_is_taken() -> None:
    tokens = SpecialTokens(start=0, pad=0, eos=(1,), named={"C": 400, "C++": 401, "C+": 402})
    tokenizer = Tokenizer(TOKENIZER._pieces, tokens)
    assert [tokenizer.encode(text) for text in ("C++", "C+", "C")] == [[401, 1], [402, 1], [400, 1]]


def test_a_prompt_ends_with_the_tokenizers_own_eos() -> None:
    """Whatever else ends a sample."""
    tokens = SpecialTokens(start=0, pad=0, eos=(7, 1))
    assert Tokenizer(TOKENIZER._pieces, tokens).encode("a")[-1] == 1


def test_half_a_surrogate_pair_is_a_question_mark() -> None:
    assert TOKENIZER.encode("a \ud800") == TOKENIZER.encode("a ?")


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
