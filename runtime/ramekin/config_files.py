"""What transformers writes beside a model's weights: configuration, generation defaults, added tokens."""

from __future__ import annotations

import json
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ramekin.errors import CheckpointError, ModelFormatError
from ramekin.manifest import SpecialTokens
from ramekin.sampling import MOST_TOKENS, SamplingParams

CONFIG, GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
FAST = "tokenizer.json"  # of the tokenizers in Rust
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a surrogate pair: alone it is no text
_SENTINELS, _MOST_SENTINELS = 100, 10_000
_SAMPLING = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
_CHOSEN_BY_NOBODY = ("max_length", 20)  # transformers' default, which its oldest releases wrote out
_RULES_WE_LACK = {  # of transformers' `generate`, with the values that change nothing
    "num_beams": 1,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "penalty_alpha": 0,
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "stop_strings": None,
    "max_time": None,
    "watermarking_config": None,
    "dola_layers": None,
    "top_h": None,
}
_ONCE_IN_CONFIG = {  # with the defaults of transformers 4
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "temperature": 1,
    "top_k": 50,
    "top_p": 1,
    "typical_p": 1,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "diversity_penalty": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "remove_invalid_values": False,
    "output_scores": False,
    "return_dict_in_generate": False,
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("not a regular file")  # of which reading might never end
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
        if _HALF.search(text):
            json.dumps(raw, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: not a checkpoint: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return raw


def read_if_there(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    return read_json(path) if path.is_file() else {}


def read_generation(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """How a checkpoint is meant to generate: its `generation_config.json`.

    Where there is none, transformers takes what its `config.json`, `raw`, says; before 4.26 it wrote nothing else. Where one
    says `_from_model_config` transformers 4 takes that, too, if any setting there is not the default.
    """
    path = folder / GENERATION
    own = {name: value for name, value in raw.items() if value is not None}
    if not path.is_file():
        return own
    file = read_json(path)
    chosen = any(own.get(name, default) != default for name, default in _ONCE_IN_CONFIG.items())
    return own if chosen and file.get("_from_model_config") and _written_by(file, 4) else file


def _written_by(raw: Mapping[str, Any], release: int) -> bool:
    return str(raw.get("transformers_version")).startswith(f"{release}.")


def generation_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that `read_generation` found, with a warning of rules that we do not have.

    Raises:
        CheckpointError: one is out of its range, and the checkpoint is meant for sampling.
    """
    lacking = [name for name, nothing in _RULES_WE_LACK.items() if generation.get(name) not in (None, nothing, [], {})]
    if lacking:
        warnings.warn(
            f"the checkpoint asks for {', '.join(lacking)}, which ramekin has not: transformers would write other texts",
            UserWarning,
            stacklevel=2,
        )
    values = {name: generation[name] for name in _SAMPLING if generation.get(name) is not None}
    for name, old in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        length, most = generation.get(old), values.get("max_new_tokens", MOST_TOKENS)
        if name not in values and isinstance(length, int) and length > 1 and (old, length) != _CHOSEN_BY_NOBODY:
            length -= 1  # without the start token, which counts in the old
            values[name] = min(length, most) if isinstance(most, int) else length
    if "top_p" not in values and ("top_p" in generation or generation.get("do_sample") is True):
        values["top_p"] = 1.0  # no limit: files leave it out, and null is the same
    if "top_k" in generation and "top_k" not in values and _written_by(generation, 4):
        values["top_k"] = 0  # null is no limit to transformers 4, and 50 to transformers 5
    least = values.get("min_new_tokens")
    if isinstance(least, int) and least > SamplingParams.max_new_tokens:  # ours must not contradict the checkpoint's
        values.setdefault("max_new_tokens", least)
    try:
        SamplingParams(**values)
    except (TypeError, ValueError) as error:
        if generation.get("do_sample"):
            raise CheckpointError(f"{GENERATION} or {CONFIG}: {error}") from None
    else:
        return values
    kept: dict[str, Any] = {}
    for name, value in values.items():  # greedy checkpoints carry values such as temperature 0 that mean nothing
        with suppress(TypeError, ValueError):
            SamplingParams(**{**kept, name: value})
            kept[name] = value
    return kept


def feed_forward_of(raw: Mapping[str, Any]) -> str:
    """The feed-forward block's kind in a `config.json`, as transformers names it; `gated-` has two products in front."""
    return str(raw.get("feed_forward_proj", "gated-gelu" if raw.get("model_type") == "mt5" else "relu"))


def variant_of(raw: Mapping[str, Any]) -> str:
    """The member of the family in a `config.json`, for people."""
    kind = str(raw["model_type"])
    gated = raw.get("is_gated_act", feed_forward_of(raw).startswith("gated-"))
    return kind if kind != "t5" else "t5-v1.1" if gated else "t5-v1.0"


def special_tokens(folder: Path, raw: Mapping[str, Any], generation: Mapping[str, Any], pieces: Any) -> SpecialTokens:
    """The ids with a meaning of their own.

    Args:
        folder: where the tokenizer's files lie.
        raw: the `config.json`.
        generation: what `read_generation` found.
        pieces: the SentencePiece model.

    Raises:
        CheckpointError: the files contradict each other, or are not as transformers writes them.
    """
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
        if i >= vocab and not text.startswith("<extra_id_"):  # of which T5 has a hundred, whatever the model has
            warnings.warn(
                f"{folder}: the added token {text!r} has id {i}, but the model has {vocab} tokens, so it is read as plain "
                "text; `resize_token_embeddings` makes room for it",
                UserWarning,
                stacklevel=2,
            )
        if 0 <= i < vocab and text:
            named[text] = i
            if special:
                silent.append(i)
    try:
        return SpecialTokens(
            start=either("decoder_start_token_id", either("bos_token_id", pad)),
            pad=pad,
            eos=eos,
            named=named,
            silent=tuple(silent),
        )
    except ModelFormatError as error:
        raise CheckpointError(f"{folder}: {CONFIG}, {GENERATION} or the tokenizer's files: {error}") from None


def cleans_up(folder: Path) -> bool:
    """Whether a checkpoint's texts are cleaned up: if it says so (to transformers before 4.45: unless it says no).

    Raises:
        CheckpointError: `tokenizer_config.json` cannot be read.
    """
    return bool(read_if_there(folder / _TOKENIZER).get("clean_up_tokenization_spaces"))


def _added_tokens(folder: Path, raw: Mapping[str, Any], pieces: Any) -> Iterator[tuple[str, int, bool]]:
    """Texts that stand for one id each, and whether they are left out of decoded text.

    From `tokenizer.json`, `tokenizer_config.json`, or `added_tokens.json` (transformers before 4.34) and T5's own rule.
    """
    for i in (pieces.pad_id(), pieces.eos_id(), pieces.unk_id()):
        if i >= 0:
            yield pieces.id_to_piece(i), i, True
    settings = read_if_there(folder / _TOKENIZER)
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if end and isinstance(end, str) and pieces.eos_id() >= 0 and end != pieces.id_to_piece(pieces.eos_id()):
        warnings.warn(
            f"{folder}: tokenizer_config.json says eos_token {end!r}; prompts end with "
            f"{pieces.id_to_piece(pieces.eos_id())!r} here all the same",
            UserWarning,
            stacklevel=2,
        )
    if settings.get("legacy") is False and not _written_by(raw, 5):  # which does not follow it
        warnings.warn(
            f"{folder}: tokenizer_config.json says legacy: false; a text right behind a special token is read as with true",
            UserWarning,
            stacklevel=2,
        )
    added = read_if_there(folder / FAST).get("added_tokens")
    if added is None and settings.get("added_tokens_decoder"):
        added = [{**each, "id": int(i)} for i, each in settings["added_tokens_decoder"].items()]
    if added:
        for each in added:
            if each.get("single_word"):
                raise CheckpointError(f"{folder}: added token {each.get('content')!r} is a single_word token: not supported")
            yield str(each["content"]), int(each["id"]), bool(each.get("special"))
        return
    names = read_if_there(folder / "special_tokens_map.json").values()
    special = {str(each.get("content") if isinstance(each, dict) else each) for group in names for each in _several(group)}
    for text, i in read_if_there(folder / "added_tokens.json").items():
        yield text, int(i), text in special
    count = int(settings.get("extra_ids", 0 if raw.get("model_type") == "mt5" else _SENTINELS))
    if count > _MOST_SENTINELS:
        raise CheckpointError(f"{folder}: tokenizer_config.json: {count} extra_ids; at most {_MOST_SENTINELS} are supported")
    for i in range(count):
        yield f"<extra_id_{i}>", pieces.get_piece_size() + count - 1 - i, True


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
