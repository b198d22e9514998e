"""Text to token ids and back: SentencePiece with T5's sentinels, in agreement with transformers' `T5Tokenizer`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from ramekin.errors import ModelFormatError
from ramekin.manifest import SpecialTokens


class Tokenizer:
    """A SentencePiece model and the special tokens around it."""

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor, tokens: SpecialTokens) -> None:
        self._pieces, self._tokens = pieces, tokens
        self._count: int = pieces.get_piece_size()
        self._silent = {tokens.start, tokens.pad, *tokens.eos, *tokens.named.values(), pieces.unk_id()}
        self._has_bytes = pieces.piece_to_id("<0x00>") != pieces.unk_id()
        names = sorted(tokens.named, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    @classmethod
    def load(cls, path: Path, tokens: SpecialTokens) -> Tokenizer:
        """Read a `spiece.model`.

        Raises:
            ModelFormatError: the file is not a SentencePiece model.
        """
        pieces = sentencepiece.SentencePieceProcessor()
        try:
            pieces.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise ModelFormatError(f"{path}: not a SentencePiece model ({error}); export the model again") from None
        return cls(pieces, tokens)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, an eos id at the end. Special tokens such as `<extra_id_0>` in the text count as such."""
        ids: list[int] = []
        for part in self._split.split(text) if self._split else [text]:
            named = self._tokens.named.get(part)
            ids.extend(self._pieces.encode(part) if named is None else [named])
        return [*ids, self._tokens.eos[0]]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special tokens, unknown pieces and ids without any text are passed over."""
        kept = [int(i) for i in ids if 0 <= i < self._count and i not in self._silent]
        if self._has_bytes:
            return str(self._pieces.decode(kept))
        return "".join(map(self._pieces.id_to_piece, kept)).replace("\u2581", " ").removeprefix(" ")


class IncrementalDecoder:
    """Text as tokens come: the parts that `push` and `finish` return add up to `Tokenizer.decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = ""

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._tell(text)

    def finish(self) -> str:
        """What is left."""
        return self._tell(self._tokenizer.decode(self._ids))

    @property
    def text(self) -> str:
        """All that was told so far."""
        return self._told

    def _tell(self, text: str) -> str:
        new = text[len(self._told) :]
        self._told = text
        return new


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where in `text` the first of the stop strings begins; None if there is none."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return min(places, default=None)
