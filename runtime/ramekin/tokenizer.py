"""Text to token ids and back: SentencePiece with T5's sentinels, in agreement with transformers' `T5Tokenizer`."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from ramekin.errors import ModelFormatError
from ramekin.manifest import SpecialTokens

_CLEAN_UP = {
    " .": ".",
    " ?": "?",
    " !": "!",
    " ,": ",",
    " ' ": "'",
    " n't": "n't",
    " 'm": "'m",
    " 's": "'s",
    " 've": "'ve",
    " 're": "'re",
}
"""What transformers' `clean_up_tokenization` replaces, one after the other."""
_OPEN = re.compile(r" [ 'n]*(?:' ?[vr])?\Z")
"""The end of a text that the next characters may make one of these, or what an earlier replacement makes one of them."""


class Tokenizer:
    """A SentencePiece model and the special tokens around it.

    Attributes:
        cleans_up: whether blanks before punctuation and English contractions are no part of decoded text.
    """

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor, tokens: SpecialTokens, cleans_up: bool = False) -> None:
        self._pieces, self._named, self.cleans_up = pieces, dict(tokens.named), cleans_up
        self._count: int = pieces.get_piece_size()
        self._end: int = pieces.eos_id() if pieces.eos_id() >= 0 else tokens.eos[0]
        self._texts = {i: text.encode() for text, i in tokens.named.items()}
        self._texts.update(dict.fromkeys((*tokens.silent, pieces.pad_id(), pieces.eos_id(), pieces.unk_id()), b""))
        names = sorted(tokens.named, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    @classmethod
    def load(cls, path: Path, tokens: SpecialTokens, cleans_up: bool = False) -> Tokenizer:
        """Read a `spiece.model`.

        Raises:
            ModelFormatError: the file is not a SentencePiece model.
        """
        pieces = sentencepiece.SentencePieceProcessor()
        try:
            pieces.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise ModelFormatError(f"{path}: not a SentencePiece model ({error}); export the model again") from None
        return cls(pieces, tokens, cleans_up)

    @property
    def piece_count(self) -> int:
        """How many pieces SentencePiece knows; ids from here on are added tokens, or have no text."""
        return self._count

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, an eos id at the end. Special tokens such as `<extra_id_0>` in the text count as such."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text: it becomes "?"
        ids: list[int] = []
        for part in self._split.split(text) if self._split else [text]:
            named = self._named.get(part)
            ids.extend(self._pieces.encode(part) if named is None else [named])
        return [*ids, self._end]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special tokens, unknown pieces and ids without any text are passed over."""
        text = b"".join(map(self.text_of, ids)).decode("utf-8", "replace").removeprefix(" ")
        return clean_up(text) if self.cleans_up else text

    def text_of(self, token_id: int) -> bytes:
        """What one token adds to a text, in UTF-8: a piece may be one byte of a character. A word begins with a blank."""
        known = self._texts.get(token_id)
        if known is None:
            known = self._texts[token_id] = self._piece(int(token_id)) if 0 <= token_id < self._count else b""
        return known

    def _piece(self, token_id: int) -> bytes:
        try:
            piece: str = self._pieces.id_to_piece(token_id)
        except UnicodeDecodeError:
            raise ModelFormatError(f"piece {token_id} of the tokenizer is not UTF-8; export the model again") from None
        if self._pieces.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return b"" if self._pieces.is_control(token_id) else piece.replace("\u2581", " ").encode()


class IncrementalDecoder:
    """Text as tokens come: after `finish` it is what `Tokenizer.decode` makes of all tokens.

    Attributes:
        text: what is certain so far; the bytes of an incomplete character are not, nor is a blank that may be cleaned up.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.text = ""
        self._tokenizer, self._utf8 = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        self._began, self._held = False, ""

    def push(self, token_id: int) -> None:
        """Add a token."""
        self._add(self._utf8.decode(self._tokenizer.text_of(token_id)))

    def finish(self) -> None:
        """There are no more tokens."""
        self._add(self._utf8.decode(b"", final=True))
        self.text += clean_up(self._held)
        self._held = ""

    def _add(self, new: str) -> None:
        self._held += new if self._began else new.removeprefix(" ")
        self._began = self._began or bool(new)
        if not self._tokenizer.cleans_up:
            self.text, self._held = self.text + self._held, ""
            return
        uncertain = _OPEN.search(self._held)
        certain = uncertain.start() if uncertain else len(self._held)
        self.text, self._held = self.text + clean_up(self._held[:certain]), self._held[certain:]


def clean_up(text: str) -> str:
    """A text without the blanks that tokenizing English leaves before punctuation and contractions.

    As transformers' `clean_up_tokenization` does it.
    """
    for found, instead in _CLEAN_UP.items():
        text = text.replace(found, instead)
    return text


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where in `text` the first of the stop strings begins; None if there is none."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return min(places, default=None)
