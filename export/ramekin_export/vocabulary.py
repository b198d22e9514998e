"""The tokenizer of a checkpoint: its `spiece.model`, made from `tokenizer.json` if need be, and its special tokens."""

from __future__ import annotations

import base64
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from ramekin.config_files import FAST, read_json, special_tokens
from ramekin.errors import CheckpointError
from ramekin.manifest import DEFAULT_PROMPT, TOKENIZER, SpecialTokens
from ramekin.tokenizer import Tokenizer

NO_TOKENIZER = (
    f"it has neither {TOKENIZER} nor {FAST}, the tokenizers of T5 and mT5; save the tokenizer with the model "
    "(those of ByT5, CodeT5 and other relatives are not supported)"
)
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
_BLANKS = zlib.decompress(
    base64.b64decode(
        "eNol02VM1VEYx/HfvcMXV0TxhW+cgU7FADs2YyYqJqJiKwaK3V03uNywwUBUwBZbwcZuZ3cHGHO7ig0W+v3rf/vsnLP/s53zPM858pMUJFlKS4WL"
        "S/4lpCIWKSBAxmd1FpKS/cyyNmERa5Yt2qzUKswDzSpGQFEjqJdk6yfZu0iO7lJcuOTsKMU3l1xhknu65JktecdLJYlnK5VCWZRBuf9HUNoSqTxj"
        "RVRAMCqB7VQZ1VAVoQhBDVRHLdREHdRGPdRFA9THlu9S+m+pEfOGIBU1RlPseiVxTDVDS7QAR1YrtEFrkI7aoj3agdTUAZ3RCaStCHRFJCiBuqEH"
        "okB51BN90BuUSn0xAP0xENEYjEGIwRAMw1AMRyxGYgRGYxTGYgwoq8ZhIiZgMiZhKqaA8msaZmIGaIVmYS7mwGb0EA7Y4UQcXIiHB27MgxcLMB+L"
        "sBC0TYuRiAQsw1KswHKsRBJWIRlrsBqpSMFao/dYj3XYiA3YjE1IN3qIbdiKHdhu9A47sQe7kYG92IdMHMB+HMJBHMFhHEUWjuMYTuIETuMUzuIM"
        "zuMcLuKC8S/IpEuMV3AZ13AVN3Adt3ATd3Ab93AXD3Afj/AQT/AYz/AUL/AcOcgGV1Iv8Qav8daI8ZmUbTUpJ8mkd6x9yMV7fMQHfMYnfMUX5OEb"
        "uP7Kx0/8AE9Bv/AHBf/e3l/HPpV4"
    )
)
"""The map of characters that makes a blank of every Unicode one and leaves all others, as SentencePiece compiles it."""


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
    spiece, fast = folder / TOKENIZER, folder / FAST
    rebuilt = not spiece.is_file()
    if rebuilt and not fast.is_file():
        raise CheckpointError(f"{folder}: {NO_TOKENIZER}")
    out.write_bytes(_spiece_of(fast) if rebuilt else spiece.read_bytes())
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(out.read_bytes())
        pieces.id_to_piece(list(range(pieces.get_piece_size())))  # each must be UTF-8
    except (RuntimeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{fast if rebuilt else spiece}: not a SentencePiece model ({error})") from None
    tokens = special_tokens(folder, raw, generation, pieces)
    ours = Tokenizer(pieces, tokens)
    if fast.is_file():
        _compare(fast, ours, tokens, rebuilt)
    return tokens


def _compare(fast: Path, ours: Tokenizer, tokens: SpecialTokens, rebuilt: bool) -> None:
    """Refuse a `tokenizer.json`, transformers' default, that reads texts differently; if only rare ones, warn."""
    added = [text for text, i in tokens.named.items() if i >= ours.piece_count and not text.startswith("<extra_id_")]

    def free(*probes: str) -> list[str]:
        return [probe for probe in probes if not any(text in probe for text in added if text.strip())]

    if rebuilt:
        wrong = _difference(fast, ours, free(*_PROBES))
        if wrong:
            remedy = _blank_token(fast) or "put the spiece.model of the base model into the folder"
            raise CheckpointError(f"{fast}: no SentencePiece model agrees with it ({wrong}); {remedy}")
    else:
        wrong = _difference(fast, ours, free(_PLAIN))
        if wrong:
            remedy = _blank_token(fast) or "take away the one that the model was not trained with"
            raise CheckpointError(
                f"{fast.parent}: spiece.model and tokenizer.json read texts differently ({wrong}); {remedy}"
            )
        wrong = _difference(fast, ours, free(*_PROBES[1:-1]))
        if wrong:
            told = f"{fast.parent}: tokenizer.json differs from spiece.model, which is taken: {wrong}"
            warnings.warn(told, stacklevel=2)
            return
    wrong = _difference(fast, ours, [f"x {text} y" for text in added])
    if wrong:
        warnings.warn(
            f"{fast}: to transformers 4's fast tokenizers a blank in front of an added token is a token of its own, but not "
            f"to its slow ones, to transformers 5 and here: {wrong}",
            stacklevel=2,
        )


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
    proto.normalizer_spec.precompiled_charsmap = _charsmap(raw)
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = True
    proto.normalizer_spec.escape_whitespaces = True
    return bytes(proto.SerializeToString())


def _charsmap(raw: Mapping[str, Any]) -> bytes:
    normalizer = raw.get("normalizer") or {}
    for each in _parts(normalizer, "normalizers"):
        if each.get("type") == "Precompiled":
            return base64.b64decode(each["precompiled_charsmap"] or "", validate=True)
    splits = any(each.get("type") == "WhitespaceSplit" for each in _parts(raw.get("pre_tokenizer") or {}, "pretokenizers"))
    return _BLANKS if splits else b""  # transformers 5.0 to 5.2 wrote no map


def _parts(step: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A step of a tokenizer, and the steps that it is a sequence of."""
    return [step, *step.get(name, [])]


def _blank_token(fast: Path) -> str:
    """What is wrong with an added token that stands for every blank; empty if there is none."""
    for each in read_json(fast).get("added_tokens", []):
        if each.get("normalized") and each["content"] and not each["content"].strip():
            text = each["content"]
            return (
                f"its added token {text!r} stands for any blank: if the model was trained with a slow tokenizer, take "
                f"{FAST} away, else train it with AddedToken({text!r}, normalized=False)"
            )
    return ""


def _difference(fast: Path, ours: Tokenizer, probes: Sequence[str]) -> str:
    """A text that the `tokenizer.json` `fast` reads differently, and how; empty if there is none."""
    from tokenizers import Tokenizer as Reference  # noqa: PLC0415

    try:
        reference = Reference.from_file(str(fast))
        reference.no_padding()  # how a training script called it last is saved, too
        reference.no_truncation()
        references = [reference.encode(text).ids for text in probes]
    except BaseException as error:  # tokenizers raises nothing more exact, and a panic of Rust's is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{fast}: cannot be read: {error}") from None
    for text, expected in zip(probes, references, strict=True):
        found = ours.encode(text)
        if expected != found:
            differ = (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
            place = next(differ, min(len(expected), len(found)))  # one is the other's beginning
            return f"{text!r} gives {found[place:][:4]} at token {place}, not {expected[place:][:4]}"
    return ""
