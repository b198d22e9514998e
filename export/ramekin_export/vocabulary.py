"""The tokenizer of a checkpoint: its `spiece.model`, made from `tokenizer.json` if need be, and its special tokens."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from ramekin.errors import CheckpointError, ModelFormatError
from ramekin.manifest import DEFAULT_PROMPT, SpecialTokens
from ramekin.tokenizer import Tokenizer
from ramekin_export.checkpoint import read_json

_SENTINELS = 100
_PROBES = (
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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: its tokenizer files are not as transformers writes them ({error!r})") from None


def _write_vocabulary(folder: Path, raw: Mapping[str, Any], generation: Mapping[str, Any], out: Path) -> SpecialTokens:
    rebuilt = not (folder / "spiece.model").is_file()
    if rebuilt:
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder}: no spiece.model and no tokenizer.json; save the tokenizer with the model")
        out.write_bytes(_spiece_of(read_json(folder / "tokenizer.json"), folder))
    else:
        out.write_bytes((folder / "spiece.model").read_bytes())
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(out.read_bytes())
    except RuntimeError:
        raise CheckpointError(f"{folder}/spiece.model: not a SentencePiece model") from None
    tokens = _special_tokens(folder, raw, generation, pieces)
    if rebuilt:
        _check_against_tokenizers(folder, Tokenizer(pieces, tokens))
    return tokens


def _special_tokens(folder: Path, raw: Mapping[str, Any], generation: Mapping[str, Any], pieces: Any) -> SpecialTokens:
    vocab = raw.get("vocab_size", 32128)
    if pieces.get_piece_size() > vocab:
        raise CheckpointError(f"{folder}: the tokenizer has {pieces.get_piece_size()} pieces, but the model {vocab} tokens")

    def either(name: str, default: Any) -> Any:
        value = generation.get(name, raw.get(name))
        return default if value is None else value

    pad, eos = either("pad_token_id", 0), either("eos_token_id", 1)
    eos = tuple(eos) if isinstance(eos, list) else (eos,)
    named, silent = {}, []
    for text, i, special in _added_tokens(folder, raw, pieces):
        if 0 <= i < vocab and text:
            named[text] = i
            if special:
                silent.append(i)
    try:
        return SpecialTokens(
            start=either("decoder_start_token_id", pad), pad=pad, eos=eos, named=named, silent=tuple(silent)
        )
    except ModelFormatError as error:
        raise CheckpointError(f"{folder}: config.json: {error}") from None


def _added_tokens(folder: Path, raw: Mapping[str, Any], pieces: Any) -> Iterator[tuple[str, int, bool]]:
    """Texts that stand for one id each, and whether they are left out of decoded text.

    From `tokenizer.json`, `tokenizer_config.json`, or by T5's own rule.
    """
    for i in (pieces.pad_id(), pieces.eos_id(), pieces.unk_id()):
        if i >= 0:
            yield pieces.id_to_piece(i), i, True
    settings = _read_if_there(folder / "tokenizer_config.json")
    added = _read_if_there(folder / "tokenizer.json").get("added_tokens")
    if added is None and settings.get("added_tokens_decoder"):
        added = [{**each, "id": int(i)} for i, each in settings["added_tokens_decoder"].items()]
    if added:
        for each in added:
            if each.get("single_word"):
                raise CheckpointError(f"{folder}: added token {each.get('content')!r} is a single_word token: not supported")
            yield str(each["content"]), int(each["id"]), bool(each.get("special"))
        return
    count = int(settings.get("extra_ids", 0 if raw.get("model_type") == "mt5" else _SENTINELS))
    for i in range(count):
        yield f"<extra_id_{i}>", pieces.get_piece_size() + count - 1 - i, True


def _spiece_of(raw: Mapping[str, Any], folder: Path) -> bytes:
    """A SentencePiece unigram model with the pieces, scores and normalization of a `tokenizer.json`."""
    from sentencepiece import sentencepiece_model_pb2 as pb  # noqa: PLC0415  # slow, and rarely needed

    model = raw.get("model") or {}
    vocab = model.get("vocab")
    if model.get("type") != "Unigram" or not isinstance(vocab, list):
        raise CheckpointError(f"{folder}/tokenizer.json: a {model.get('type')} tokenizer; only Unigram ones are supported")
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
            return base64.b64decode(each["precompiled_charsmap"] or "")
    return b""


def _check_against_tokenizers(folder: Path, ours: Tokenizer) -> None:
    from tokenizers import Tokenizer as Reference  # noqa: PLC0415

    try:
        reference = Reference.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more exact
        raise CheckpointError(f"{folder}/tokenizer.json: cannot be read: {error}") from None
    for text in _PROBES:
        expected, found = reference.encode(text).ids, ours.encode(text)
        if expected != found:
            raise CheckpointError(
                f"{folder}/tokenizer.json: no SentencePiece model agrees with it ({text!r} gives {found}, not {expected}); "
                "put the spiece.model of the base model into the folder"
            )


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
