"""The tokenizer against transformers' T5Tokenizer on the real T5 vocabulary: the same ids, the same text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from ramekin import CheckpointError, Paper, build_prompt
from ramekin.config_files import cleans_up
from ramekin.tokenizer import IncrementalDecoder, Tokenizer
from ramekin_export.vocabulary import write_vocabulary
from tests.export.conftest import SPIECE

transformers = pytest.importorskip("transformers")
Reference = pytest.importorskip("tokenizers").Tokenizer

HARD = [
    "",
    " ",
    "   ",
    "hello world",
    " hello  world ",
    "a\tb\nc\r\nd",
    "a\n\n b",
    "<extra_id_0>",
    "x <extra_id_0> y <extra_id_99>.",
    "x<extra_id_0>y",
    "<extra_id_0><extra_id_1> <extra_id_2>",
    "<extra_id_100>",
    "foo</s>bar",
    "foo </s> bar",
    "<pad>x",
    "<unk> z",
    "<s>",
    "\U0001f600 hi \U0001f1e9\U0001f1ea\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u65e5\u672c\u8a9e \u30c6\u30b9\u30c8 \u4f60\u597d",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\ufb01ne \u2460 \u00bd \u2126",
    "\u00a0x\u200b y\u3000z\ufeff",
    "\u2581x \u2581",
    "e\u0301 vs \u00e9",
    "{a} ~ ^ \\ `",
    "What is it? [SEP] A net. [SEP]",
    "a" * 300,
    "\x00\x01\x1f",
    "<extra_id_0",
    "extra_id_0>",
    "12,345.67 % $5 \u20ac3 \u00df \u0130",
]
CONFIG = {"vocab_size": 32128, "decoder_start_token_id": 0}


def load(folder: Path, out: Path) -> Tokenizer:
    return Tokenizer.load(out, write_vocabulary(folder, CONFIG, {}, out))


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(shared_data / "flan_t5_tokenizer" / "spiece.model", folder)
    reference = getattr(transformers, "T5TokenizerFast", transformers.T5Tokenizer)
    return load(folder, folder / "ours.model"), reference.from_pretrained(folder)


def papers(shared_data: Path) -> Iterator[Paper]:
    for file in sorted((shared_data / "papers").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                yield Paper.from_mapping(json.loads(line))


@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_hard_strings(real: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = real
    ids = theirs(text).input_ids
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_all_papers(real: tuple[Tokenizer, Any], shared_data: Path) -> None:
    ours, theirs = real
    count = 0
    for paper in papers(shared_data):
        for text in (paper.title, paper.abstract, paper.introduction, build_prompt(paper)):
            ids = theirs(text).input_ids
            assert ours.encode(text) == ids
            decoded = ours.decode(ids)
            assert decoded == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            count += 1
    assert count == 4 * 230


def test_every_id_decodes(real: tuple[Tokenizer, Any]) -> None:
    """The ids from 32,100 on have no text, the sentinels before them are silent."""
    ours, theirs = real
    for i in range(3, 32128):
        expected = "" if i >= 32100 else theirs.decode([i, 5], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode([i, 5] if i < 32100 else [i]) == expected, i


def test_incremental_decoding_of_papers(real: tuple[Tokenizer, Any], shared_data: Path) -> None:
    ours, _ = real
    for paper in list(papers(shared_data))[::10]:
        ids, decoder = ours.encode(paper.abstract)[:200], IncrementalDecoder(ours)
        for i in ids:
            decoder.push(i)
        decoder.finish()
        assert decoder.text == ours.decode(ids)


def test_texts_that_are_cleaned_up(shared_data: Path, tmp_path: Path) -> None:
    """If the checkpoint says so, whichever way transformers reads it; with blanks as of tokenized papers."""
    shutil.copy(shared_data / "flan_t5_tokenizer" / "spiece.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    theirs = getattr(transformers, "T5TokenizerFast", transformers.T5Tokenizer).from_pretrained(tmp_path)
    tokens = write_vocabulary(tmp_path, CONFIG, {}, tmp_path / "ours.model")
    ours = Tokenizer.load(tmp_path / "ours.model", tokens, cleans_up(tmp_path))
    changed = 0
    for paper in papers(shared_data):
        text = re.sub(r"(\W)", r" \1 ", paper.abstract) + " Don 't ' you 've , we 're n't"
        ids = theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        changed += ours.decode(ids) != theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert changed == 230


def test_a_checkpoint_with_tokenizer_json_alone(real: tuple[Tokenizer, Any], shared_data: Path, tmp_path: Path) -> None:
    """Its `spiece.model` is made, and agrees with the true one."""
    shutil.copy(shared_data / "flan_t5_tokenizer" / "tokenizer.json", tmp_path)
    made = load(tmp_path, tmp_path / "made.model")
    for text in [*HARD, *(build_prompt(paper) for paper in papers(shared_data))]:
        assert made.encode(text) == real[0].encode(text)
        assert made.decode(made.encode(text)) == real[0].decode(real[0].encode(text))


def as_transformers_5_0_wrote_it(raw: dict[str, Any]) -> dict[str, Any]:
    """And 5.1 and 5.2 (later ones normalize again): without a normalizer, texts are split at any Unicode blank."""
    blanks = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    split = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, blanks]}
    return raw | {"normalizer": None, "pre_tokenizer": split}


def test_a_tokenizer_json_of_transformers_5_0(shared_data: Path, tmp_path: Path) -> None:
    raw = as_transformers_5_0_wrote_it(json.loads((shared_data / "flan_t5_tokenizer" / "tokenizer.json").read_text()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    made, reference = load(tmp_path, tmp_path / "made.model"), Reference.from_file(str(tmp_path / "tokenizer.json"))
    blanks = "".join(f"{chr(i)}x" for i in range(0x110000) if chr(i).isspace() and not 0x1C <= i <= 0x1F)  # Rust's are fewer
    texts = [*HARD, blanks, "caf\u00e9 cafe\u0301 \ufb01ne \u2460", *(build_prompt(paper) for paper in papers(shared_data))]
    for text in texts:
        if "\u2581" not in text:
            assert made.encode(text) == reference.encode(text).ids, text
            assert made.decode(made.encode(text)) == reference.decode(reference.encode(text).ids)


@pytest.mark.parametrize("saved", ["by 5.0", "by 4"])
@pytest.mark.parametrize("rebuilt", [False, True])
def test_blanks_in_front_of_added_tokens_are_told_of(
    saved: str, rebuilt: bool, shared_data: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    raw = json.loads((shared_data / "flan_t5_tokenizer" / "tokenizer.json").read_text())
    if not rebuilt:
        shutil.copy(shared_data / "flan_t5_tokenizer" / "spiece.model", tmp_path)
    new = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    raw["added_tokens"].append({"id": 32100, "content": "<hl>", **new})
    if saved == "by 5.0":
        raw = as_transformers_5_0_wrote_it(raw)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    load(tmp_path, tmp_path / "made.model")
    told = [str(each.message) for each in recwarn]
    if saved == "by 4":
        assert len(told) == 1
        assert "a blank in front of an added token is a token of its own" in told[0]
        assert "'x <hl> y' gives [32100, " in told[0]
    else:
        assert not any("in front of an added token" in each for each in told)


@pytest.mark.parametrize("rebuilt", [False, True])
def test_an_added_token_that_is_any_blank(rebuilt: bool, shared_data: Path, tmp_path: Path) -> None:
    raw = json.loads((shared_data / "flan_t5_tokenizer" / "tokenizer.json").read_text())
    if not rebuilt:
        shutil.copy(shared_data / "flan_t5_tokenizer" / "spiece.model", tmp_path)
    new = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    raw["added_tokens"].append({"id": 32100, "content": "\n", **new})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"its added token '\\n' stands for any blank: .*normalized=False"):
        load(tmp_path, tmp_path / "made.model")


def test_another_eos_token_is_told_of(shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "flan_t5_tokenizer" / "spiece.model", tmp_path)
    for end in ("</s>", {"content": "</s>"}, None):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        load(tmp_path, tmp_path / "made.model")  # warnings are errors here
    for end in ("<END>", {"content": "<END>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        with pytest.warns(UserWarning, match="says eos_token '<END>'; prompts end with '</s>' here all the same"):
            load(tmp_path, tmp_path / "made.model")


def test_a_tokenizer_json_that_sentencepiece_cannot_follow(shared_data: Path, tmp_path: Path) -> None:
    raw = json.loads((shared_data / "flan_t5_tokenizer" / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="no SentencePiece model agrees with it"):
        load(tmp_path, tmp_path / "made.model")
    raw["model"] = {"type": "BPE"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="only Unigram"):
        load(tmp_path, tmp_path / "made.model")


def test_two_tokenizers_that_disagree(shared_data: Path, tmp_path: Path) -> None:
    """transformers reads tokenizer.json by default, so it has to read texts as spiece.model does."""
    folder = shared_data / "flan_t5_tokenizer"
    for name in ("spiece.model", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    load(tmp_path, tmp_path / "made.model")
    raw = json.loads((folder / "tokenizer.json").read_text())
    called = {"padding": {"strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None}}
    called["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    called["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**raw, **called}))  # as training scripts leave it
    load(tmp_path, tmp_path / "made.model")
    new = {"id": 32100, "content": "{", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    for text in ("{", "paper"):  # which the texts that are compared hold
        added = [*raw["added_tokens"], {**new, "content": text, "special": False}]
        (tmp_path / "tokenizer.json").write_text(json.dumps({**raw, "added_tokens": added}))
        with pytest.warns(
            UserWarning, match=f"a blank in front of an added token is a token of its own.*'x {text} y' gives"
        ):
            load(tmp_path, tmp_path / "made.model")
    other = {"type": "Replace", "pattern": {"String": "\u00ef"}, "content": "i"}
    rare = {"type": "Sequence", "normalizers": [other, raw["normalizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**raw, "normalizer": rare}))
    with pytest.warns(UserWarning, match="tokenizer.json differs from spiece.model, which is taken: 'na\u00efve"):
        load(tmp_path, tmp_path / "made.model")
    (tmp_path / "tokenizer.json").write_text(json.dumps({**raw, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(
        CheckpointError, match=r"read texts differently .*take away the one that the model was not trained with"
    ):
        load(tmp_path, tmp_path / "made.model")


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither spiece.model nor tokenizer.json"):
        load(tmp_path, tmp_path / "made.model")


def test_a_tokenizer_json_that_ends_no_text(tmp_path: Path) -> None:
    """Without a post-processor there is no eos: what differs is a token more."""
    pieces = SentencePieceProcessor(model_file=str(SPIECE))
    vocab = [[pieces.id_to_piece(i), pieces.get_score(i)] for i in range(pieces.get_piece_size())]
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": pieces.id_to_piece(i), **special} for i in range(3)]
    blanks = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    model = {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False}
    raw = {"version": "1.0", "added_tokens": added, "pre_tokenizer": blanks, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"gives \[1\] at token \d+, not \[\]"):
        load(tmp_path, tmp_path / "made.model")


def test_a_tokenizer_json_of_which_no_model_can_be_made(tmp_path: Path) -> None:
    """It is named, not a spiece.model that is not there."""
    vocab = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["twice", -1], ["twice", -2]]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "unk_id": 2, "vocab": vocab}}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a SentencePiece model .*twice"):
        load(tmp_path, tmp_path / "made.model")
