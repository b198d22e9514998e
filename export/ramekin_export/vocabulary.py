"""The tokenizer of a checkpoint: its `spiece.model`, made from `tokenizer.json` if need be, and its special tokens."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from ramekin.config_files import read_json, special_tokens
from ramekin.errors import CheckpointError
from ramekin.manifest import DEFAULT_PROMPT, SpecialTokens
from ramekin.tokenizer import Tokenizer

_PLAIN = "Generate Question, Answer pair correspond to the following research paper. We propose a parser. Question, Answer:"
_PROBES = (
    _PLAIN,
    DEFAULT_PROMPT,
    "",
    "Hello  world \t\n 12,345.6 (x)",
    "na\u00efve caf\u00e9 \ufb01ne \u2460 e\u0301 \u3000x\u200by",
    "\u65e5\u672c\u8a9e \u043c\u0438\u0440 \U0001f600",
    "<extra_id_0>a</s><pad>b",
)
# Blanks at the ends of a text and beside special tokens are left out: there re-saved tokenizer.json files differ from
# SentencePiece, and from one another.


def write_vocabulary(folder: Path, raw: Mapping[str, Any], generation: Mapping[str, Any], out: Path) -> SpecialTokens:
    """Write `spiece.model` and return the special tokens.

    Args:
        folder: the checkpoint.
        raw: its `config.json`.
        generation: its `generation_config.json`.
        out: the file to write.

    Raises:
        CheckpointError: there is no tokenizer, or one that SentencePiece cannot stand in for.
    """
    try:
        return _write_vocabulary(folder, raw, generation, out)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: its tokenizer files are not as transformers writes them ({error!r})") from None


def _write_vocabulary(folder: Path, raw: Mapping[str, Any], generation: Mapping[str, Any], out: Path) -> SpecialTokens:
    spiece, fast = folder / "spiece.model", folder / "tokenizer.json"
    rebuilt = not spiece.is_file()
    if rebuilt and not fast.is_file():
        raise CheckpointError(
            f"{folder}: no spiece.model and no tokenizer.json, the tokenizers of T5; save the tokenizer with the model"
        )
    out.write_bytes(_spiece_of(fast) if rebuilt else spiece.read_bytes())
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(out.read_bytes())
    except RuntimeError as error:
        raise CheckpointError(f"{fast if rebuilt else spiece}: not a SentencePiece model ({error})") from None
    tokens = special_tokens(folder, raw, generation, pieces)
    ours = Tokenizer(pieces, tokens)
    if rebuilt:
        wrong = _difference(fast, ours, _PROBES)
        if wrong:
            raise CheckpointError(
                f"{fast}: no SentencePiece model agrees with it ({wrong}); "
                "put the spiece.model of the base model into the folder"
            )
    elif fast.is_file():  # which transformers reads by default
        wrong = _difference(fast, ours, [_PLAIN])
        if wrong and not any(text in _PLAIN for text in tokens.named):
            raise CheckpointError(
                f"{folder}: spiece.model and tokenizer.json read texts differently ({wrong}); "
                "take away the one that the model was not trained with"
            )
        wrong = wrong or _difference(fast, ours, _PROBES[1:-1])
        if wrong:
            warnings.warn(f"{folder}: tokenizer.json differs from spiece.model, which is taken: {wrong}", stacklevel=2)
    return tokens


def _spiece_of(fast: Path) -> bytes:
    """A SentencePiece unigram model with the pieces, scores and normalization of a `tokenizer.json`."""
    from sentencepiece import sentencepiece_model_pb2 as pb  # noqa: PLC0415  # slow, and rarely needed

    raw = read_json(fast)
    model = raw.get("model") or {}
    vocab = model.get("vocab")
    if model.get("type") != "Unigram" or not isinstance(vocab, list):
        raise CheckpointError(f"{fast}: a {model.get('type')} tokenizer; only Unigram ones are supported")
    added = {each["id"]: each["content"] for each in raw.get("added_tokens", [])}
    last = len(vocab)
    while last and last - 1 in added and added[last - 1].startswith("<extra_id_"):
        last -= 1  # the sentinels above the pieces are not SentencePiece's
    proto = pb.ModelProto()
    unknown = model.get("unk_id", 2)
    for i, (text, score) in enumerate(vocab[:last]):
        kind = pb.ModelProto.SentencePiece
        piece_type = kind.UNKNOWN if i == unknown else kind.CONTROL if i in added else kind.NORMAL
        proto.pieces.add(piece=text, score=score, type=piece_type)
    proto.trainer_spec.model_type = pb.TrainerSpec.UNIGRAM
    proto.trainer_spec.vocab_size = last
    by_text = {text: i for i, text in added.items()}
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id = unknown, -1
    proto.trainer_spec.pad_id, proto.trainer_spec.eos_id = by_text.get("<pad>", -1), by_text.get("</s>", -1)
    proto.trainer_spec.pad_piece, proto.trainer_spec.eos_piece = "<pad>", "</s>"
    proto.normalizer_spec.name = "nmt_nfkc"
    proto.normalizer_spec.precompiled_charsmap = _charsmap(raw.get("normalizer") or {})
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = True
    proto.normalizer_spec.escape_whitespaces = True
    return bytes(proto.SerializeToString())


def _charsmap(normalizer: Mapping[str, Any]) -> bytes:
    for each in [normalizer, *normalizer.get("normalizers", [])]:
        if each.get("type") == "Precompiled":
            return base64.b64decode(each["precompiled_charsmap"] or "", validate=True)
    return b""


def _difference(fast: Path, ours: Tokenizer, probes: Sequence[str]) -> str:
    """A text that the `tokenizer.json` `fast` reads differently, and how; empty if there is none."""
    from tokenizers import Tokenizer as Reference  # noqa: PLC0415

    try:
        reference = Reference.from_file(str(fast))
        reference.no_padding()  # how a training script called it last is saved, too
        reference.no_truncation()
    except Exception as error:  # tokenizers raises nothing more exact
        raise CheckpointError(f"{fast}: cannot be read: {error}") from None
    for text in probes:
        expected, found = reference.encode(text).ids, ours.encode(text)
        if expected != found:
            differ = (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
            place = next(differ, min(len(expected), len(found)))  # one is the other's beginning
            return f"{text!r} gives {found[place:][:4]} at token {place}, not {expected[place:][:4]}"
    return ""
