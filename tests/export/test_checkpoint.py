"""Checkpoints of every kind that `save_pretrained` has ever written, and of kinds that it has not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import load_file, save_file

from benchmarks.random_checkpoint import write_checkpoint
from ramekin import CheckpointError, Engine
from ramekin.manifest import FileRecord
from ramekin_export.checkpoint import Checkpoint
from ramekin_export.config import T5Config
from ramekin_export.head import Head
from ramekin_export.hub import wanted
from ramekin_export.pipeline import export
from tests.export.conftest import SPIECE
from tests.export.variants import VARIANTS

SOURCE, TARGET = list(range(3, 40)), list(range(50, 62))


def logits_of(folder: Path) -> np.ndarray:
    out = folder.parent / f"{folder.name}.model"
    export(str(folder), out, "fp32", force=True)
    return Engine.load(out, threads=2).logits(SOURCE, TARGET)


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda variant: Path(shutil.copytree(checkpoint(variant), tmp_path / "checkpoint"))


def edit_config(folder: Path, **changes: Any) -> None:
    """None removes a key."""
    raw = json.loads((folder / "config.json").read_text())
    raw.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# Files


def test_shards_are_one_checkpoint(tmp_path: Path, exported: Callable[[str, str], Engine]) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", VARIANTS["flan"], SPIECE, shards=3)
    assert not (folder / "model.safetensors").exists()
    files = {path.name: FileRecord.of(path).sha256 for path in folder.glob("model-*.safetensors")}
    assert len(files) == 3
    assert Checkpoint.open(str(folder)).source["weights"] == files
    np.testing.assert_array_equal(logits_of(folder), exported("flan", "fp32").logits(SOURCE, TARGET))


def test_the_index_says_which_shard_holds_a_tensor(tmp_path: Path, exported: Callable[[str, str], Engine]) -> None:
    """A stale copy in another shard does not matter, and a shard that lacks its tensor is told."""
    folder = write_checkpoint(tmp_path / "checkpoint", VARIANTS["flan"], SPIECE, shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    one, other = sorted(set(weight_map.values()))
    name = next(tensor for tensor, file in weight_map.items() if file == one)
    shard = load_file(folder / other)
    save_file({**shard, name: np.full_like(load_file(folder / one)[name], -7)}, folder / other, {"format": "pt"})
    np.testing.assert_array_equal(logits_of(folder), exported("flan", "fp32").logits(SOURCE, TARGET))
    save_file(shard, folder / other, {"format": "pt"})
    index.write_text(json.dumps({"weight_map": {**weight_map, name: other}}))
    with pytest.raises(CheckpointError, match="which does not hold it"):
        Checkpoint.open(str(folder))


def test_one_file_of_safetensors_comes_first(tmp_path: Path) -> None:
    """Whatever else lies beside it: transformers reads it, too."""
    folder = write_checkpoint(tmp_path / "checkpoint", VARIANTS["flan"], SPIECE)
    for other in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json"):
        (folder / other).write_text("rubbish")
    assert list(Checkpoint.open(str(folder)).source["weights"]) == ["model.safetensors"]


def test_a_shard_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    """Though it is there, and holds what the index says."""
    folder = write_checkpoint(tmp_path / "checkpoint", VARIANTS["flan"], SPIECE)
    weights = (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    for name in ("../model.safetensors", str(weights)):
        index = {"weight_map": dict.fromkeys(load_file(weights), name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"model\.safetensors' that is not in the folder"):
            Checkpoint.open(str(folder))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_an_embedding_that_is_not_finite(bad: float, copy: Callable[[str], Path]) -> None:
    folder, dims = copy("flan"), VARIANTS["flan"]

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["shared.weight"][3, 3] = bad

    edit_weights(folder, spoil)
    with pytest.raises(CheckpointError, match=r"'shared\.weight' holds numbers that are not finite"):
        Checkpoint.open(str(folder)).tensor("shared.weight", dims["vocab_size"], dims["d_model"])


def test_the_name_of_a_folder(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the one that one is in; and a name that is no UTF-8 does not keep the manifest from being written."""
    folder = copy("flan")
    monkeypatch.chdir(folder)
    assert Checkpoint.open(".").source["folder"] == "checkpoint"
    try:
        odd = folder.rename(folder.with_name("odd\udcff"))
    except OSError:
        pytest.skip("names of files are UTF-8 here")
    assert Checkpoint.open(str(odd)).source["folder"] == "odd?"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.05), ("bfloat16", 0.4)])
def test_half_precision(tmp_path: Path, exported: Callable[[str, str], Engine], dtype: str, tolerance: float) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", VARIANTS["flan"], SPIECE, dtype=dtype)
    expected = exported("flan", "fp32").logits(SOURCE, TARGET)
    np.testing.assert_allclose(logits_of(folder), expected, atol=tolerance)


def test_double_precision(copy: Callable[[str], Path], exported: Callable[[str, str], Engine]) -> None:
    folder = copy("flan")
    edit_weights(folder, lambda weights: weights.update({name: array.astype(float) for name, array in weights.items()}))
    np.testing.assert_array_equal(logits_of(folder), exported("flan", "fp32").logits(SOURCE, TARGET))


def test_pickled_weights(copy: Callable[[str], Path], exported: Callable[[str, str], Engine]) -> None:
    torch = pytest.importorskip("torch")
    folder = copy("flan")
    weights = {name: torch.tensor(array) for name, array in load_file(folder / "model.safetensors").items()}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(logits_of(folder), exported("flan", "fp32").logits(SOURCE, TARGET))


def test_old_pickles_and_parameters(copy: Callable[[str], Path], exported: Callable[[str, str], Engine]) -> None:
    torch = pytest.importorskip("torch")
    folder = copy("flan")
    weights = {n: torch.nn.Parameter(torch.tensor(a)) for n, a in load_file(folder / "model.safetensors").items()}
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(logits_of(folder), exported("flan", "fp32").logits(SOURCE, TARGET))


def test_pickled_code_is_not_run(copy: Callable[[str], Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder, trace = copy("flan"), tmp_path / "trace"

    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(trace), "w"))

    (folder / "model.safetensors").unlink()
    for content in ({"shared.weight": Malice()}, {"shared.weight": 3}, [1]):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="not a file of tensors alone; download it again"):
            Checkpoint.open(str(folder))
    assert not trace.exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "content", [b"", b".", b"\x80\x02h\x05.", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x04."]
)
def test_files_that_are_no_pickles(content: bytes, copy: Callable[[str], Path]) -> None:
    """torch's own text advises to run what the file says."""
    pytest.importorskip("torch")
    folder = copy("flan")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a file of tensors alone; download it again"):
        Checkpoint.open(str(folder))


def test_tensors_that_numpy_does_not_know(copy: Callable[[str], Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_tensors = pytest.importorskip("safetensors.torch").save_file
    folder, name = copy("flan"), "encoder.final_layer_norm.weight"
    tensors = {key: torch.from_numpy(value) for key, value in load_file(folder / "model.safetensors").items()}
    save_tensors({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}' cannot be read .*; save it as float32, float16 or bfloat16"):
        export(str(folder), tmp_path / "model", "fp32")
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, name: tensors[name].to_sparse()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"{name}' cannot be read"):
        export(str(folder), tmp_path / "model", "fp32")


@pytest.mark.filterwarnings("error")
def test_weights_that_overflow(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("flan")

    def grow(tensors: dict[str, np.ndarray]) -> None:
        tensors["decoder.final_layer_norm.weight"] *= np.float32(1e30)
        tensors["lm_head.weight"] *= np.float32(1e20)

    edit_weights(folder, grow)
    with pytest.raises(CheckpointError, match="too large for float32 arithmetic"):
        export(str(folder), tmp_path / "model", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_pickled_weights_without_torch(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("flan")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="need torch: pip install torch, or save the checkpoint as safetensors"):
        Checkpoint.open(str(folder))


def test_the_export_needs_no_torch(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("torch", "transformers", "optimum"):
    sys.modules[name] = None
from pathlib import Path
from ramekin_export.pipeline import export
print(export({str(checkpoint("flan"))!r}, Path({str(tmp_path / "model")!r})).variant)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "t5-v1.1\n"


# Which head, at which scale


def head_of(folder: Path) -> Head:
    c = Checkpoint.open(str(folder))
    return Head.of(c, T5Config.from_json(c.config))


def tie(weights: dict[str, np.ndarray]) -> None:
    weights["lm_head.weight"] = weights["shared.weight"].copy()


def drop_head(weights: dict[str, np.ndarray]) -> None:
    weights.pop("lm_head.weight", None)


SCALED, PLAIN = 64**-0.5, 1.0
TIED_BY_4 = {"tie_word_embeddings": True, "transformers_version": "4.57.6"}


@pytest.mark.parametrize(
    ("variant", "config", "weights", "expected"),
    [
        # transformers 4: tie_word_embeddings decides
        ("flan", {}, None, Head("lm_head.weight", PLAIN)),
        ("v1.0", {}, None, Head("shared.weight", SCALED)),
        ("v1.0", {"tie_word_embeddings": None}, None, Head("shared.weight", SCALED)),
        ("v1.0", {"tie_word_embeddings": None}, tie, Head("shared.weight", SCALED)),
        ("flan", {}, tie, Head("shared.weight", PLAIN)),
        # transformers 5: tie_word_embeddings is always true, scale_decoder_outputs decides
        ("flan", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, None, Head("lm_head.weight", PLAIN)),
        ("flan", {"tie_word_embeddings": None, "scale_decoder_outputs": False}, None, Head("lm_head.weight", PLAIN)),
        ("v1.0", {"scale_decoder_outputs": True}, None, Head("shared.weight", SCALED)),
        ("v1.0", {"tie_word_embeddings": None, "scale_decoder_outputs": True}, tie, Head("shared.weight", SCALED)),
        ("v1.0", {"scale_decoder_outputs": False}, None, Head("shared.weight", PLAIN)),
        # mT5's class says False by itself
        ("mt5", {"tie_word_embeddings": None}, None, Head("lm_head.weight", PLAIN)),
        # transformers 5 writes true for it all the same, and never scales it; transformers 4 does if it is tied
        ("mt5", {"tie_word_embeddings": True, "transformers_version": "5.23.0"}, None, Head("lm_head.weight", PLAIN)),
        ("mt5", {"tie_word_embeddings": True, "transformers_version": "5.23.0"}, tie, Head("shared.weight", PLAIN)),
        ("mt5", {"tie_word_embeddings": True, "transformers_version": "4.57.6"}, drop_head, Head("shared.weight", SCALED)),
        ("mt5", TIED_BY_4 | {"scale_decoder_outputs": True}, drop_head, Head("shared.weight", SCALED)),
    ],
)
def test_heads(copy: Callable[[str], Path], variant: str, config: dict[str, Any], weights: Any, expected: Head) -> None:
    folder = copy(variant)
    edit_config(folder, **config)
    if weights:
        edit_weights(folder, weights)
    assert head_of(folder) == expected


@pytest.mark.parametrize("tied", [True, None])
def test_ambiguous_heads_are_refused(copy: Callable[[str], Path], tied: bool | None) -> None:
    """As early versions of transformers 5 wrote a FLAN-T5: tied by the config, untied by the weights."""
    folder = copy("flan")
    edit_config(folder, tie_word_embeddings=tied)
    with pytest.raises(CheckpointError, match=r'versions of transformers disagree.*"scale_decoder_outputs": false'):
        head_of(folder)


def test_a_tied_mt5_of_unknown_origin_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("mt5")
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(folder, tie)
    with pytest.raises(CheckpointError, match="does not tell whether the head of an mT5 is scaled"):
        head_of(folder)


def test_an_embedding_of_another_name(copy: Callable[[str], Path], exported: Callable[[str, str], Engine]) -> None:
    folder = copy("flan")
    edit_weights(folder, lambda weights: weights.update({"encoder.embed_tokens.weight": weights.pop("shared.weight")}))
    np.testing.assert_array_equal(logits_of(folder), exported("flan", "fp32").logits(SOURCE, TARGET))


def test_what_was_exported_already(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a model folder of ramekin's; export the checkpoint"):
        Checkpoint.open(str(tmp_path))


def test_embeddings_that_differ_are_refused(copy: Callable[[str], Path]) -> None:
    """transformers 4 takes one of them for all, transformers 5 each for its own."""
    folder = copy("flan")
    edit_weights(folder, lambda weights: weights.update({"decoder.embed_tokens.weight": weights["shared.weight"].copy()}))
    logits_of(folder)

    def differ(weights: dict[str, np.ndarray]) -> None:
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"].copy()
        weights["decoder.embed_tokens.weight"][-1, -1] += 1

    edit_weights(folder, differ)
    with pytest.raises(CheckpointError, match=r"'shared.weight' and 'decoder.embed_tokens.weight' differ"):
        logits_of(folder)


@pytest.mark.parametrize("tied_by", [{}, TIED_BY_4 | {"transformers_version": "5.23.0"}])
def test_an_mt5_that_wants_to_be_scaled_is_refused(tied_by: dict[str, Any], copy: Callable[[str], Path]) -> None:
    folder = copy("mt5")
    edit_config(folder, scale_decoder_outputs=True, **tied_by)
    with pytest.raises(CheckpointError, match="scale_decoder_outputs is true, but transformers scales no mT5's"):
        head_of(folder)


@pytest.mark.parametrize("variant", ["flan", "v1.0", "mt5"])
def test_what_this_transformers_saves(variant: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A round trip through the installed transformers, whichever it is, changes nothing."""
    transformers = pytest.importorskip("transformers")
    kind = transformers.MT5ForConditionalGeneration if variant == "mt5" else transformers.T5ForConditionalGeneration
    folder = tmp_path / "checkpoint"
    kind.from_pretrained(checkpoint(variant)).save_pretrained(folder)
    shutil.copy(SPIECE, folder)
    (tmp_path / "plain").mkdir()
    plain = Path(shutil.copytree(checkpoint(variant), tmp_path / "plain" / "checkpoint"))
    np.testing.assert_array_equal(logits_of(folder), logits_of(plain))


# What cannot be exported


def no_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def weights(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, change)


def infinite(tensors: dict[str, np.ndarray]) -> None:
    tensors["decoder.block.1.layer.2.DenseReluDense.wo.weight"][3, 3] = np.inf


def integers(tensors: dict[str, np.ndarray]) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    tensors[name] = (tensors[name] * 100).astype(np.int8)


def adapt(tensors: dict[str, np.ndarray]) -> None:
    tensors["decoder.block.0.layer.0.SelfAttention.q.lora_A.default.weight"] = np.ones((2, 64), np.float32)


def count_on(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"encoder.block.{'9' * 5000}.weight"] = np.ones((2, 64), np.float32)


def without_end(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


def spoil_a_piece(folder: Path) -> None:
    path = folder / "spiece.model"
    path.write_bytes(path.read_bytes().replace("\u2581we".encode(), b"\xffs we", 1))


def drop_norm(tensors: dict[str, np.ndarray]) -> None:
    del tensors["decoder.final_layer_norm.weight"]


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def unigram(unk_id: int | None = 0, **parts: object) -> str:
    """A `tokenizer.json` of one piece."""
    model = {"type": "Unigram", "unk_id": unk_id, "vocab": [["a", 0]]}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts})


def index(content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (no_file("config.json"), "not a checkpoint: it has no config.json"),
        (no_file("model.safetensors"), "no model.safetensors and no pytorch_model.bin"),
        (no_file("spiece.model"), "neither spiece.model nor tokenizer.json.*ByT5, CodeT5 and other relatives are not"),
        (text("config.json", "{"), "config.json: cannot be read"),
        (text("config.json", "[]"), "expected a JSON object"),
        (
            text("generation_config.json", '{"top_p": 7, "do_sample": true}'),
            "generation_config.json or config.json: top_p must be",
        ),
        (text("tokenizer.json", '{"added_tokens":[{"id":1}]}'), "its tokenizer files are not as transformers writes them"),
        (text("tokenizer_config.json", '{"extra_ids": "many"}'), "its tokenizer files are not"),
        (text("tokenizer_config.json", "{"), "tokenizer_config.json: cannot be read"),
        (config(vocab_size=300), "the tokenizer has 400 pieces, but the model 300 tokens"),
        (config(quantization_config={"load_in_8bit": True}), "quantized already"),
        (weights(integers), "is int8, not a floating-point one"),
        (text("spiece.model", "rubbish"), "spiece.model: not a SentencePiece model"),
        (config(model_type="bart"), "model_type 'bart'; only mt5 and t5"),
        (config(model_type="umt5"), "model_type 'umt5'"),
        (config(model_type=[]), r"model_type \[\]; only mt5 and t5"),
        (config(num_decoder_layers=10**9), "dims.decoder_layers must be at most 1024"),
        (config(relative_attention_num_buckets=float("inf")), "cannot convert float infinity"),
        (config(layer_norm_epsilon=10**400), "config.json: int too large"),
        (text("tokenizer_config.json", '{"extra_ids": Infinity}'), "its tokenizer files are not"),
        (text("tokenizer.json", '{"added_tokens":[{"id":Infinity,"content":"x"}]}'), "its tokenizer files are not"),
        (config(feed_forward_proj="gated-silu"), "'gated-silu' is not supported"),
        (config(dense_act_fn="silu"), "dense_act_fn 'silu' is not supported; only relu, gelu, gelu_new"),
        (config(is_gated_act="yes"), "is_gated_act must be true or false"),
        (config(d_kv=12), "d_kv 12: onnxruntime wants a multiple of 8"),
        (config(d_kv=0), "dims.head_dim must be a positive integer"),
        (config(d_model="64"), "dims.d_model must be a positive integer"),
        (config(num_layers=None), "no tensor 'encoder.block.3.layer.0."),
        (config(d_ff=81), r"has shape \(80, 64\), but config.json implies \(81, 64\)"),
        (config(eos_token_id=-1), "tokens must name"),
        (config(tie_word_embeddings="no"), "tie_word_embeddings must be true or false"),
        (config(layer_norm_epsilon=0), "out of range"),
        (config(relative_attention_max_distance=1 << 62), "out of range"),
        (config(relative_attention_max_distance=16), "out of range"),
        (config(relative_attention_num_buckets=3), "out of range"),
        (weights(drop_head), r"no tensor 'lm_head.weight', and config.json says .*tie_word_embeddings: false"),
        (config(num_layers=2), "is of a block that config.json does not have: 2 in the encoder"),
        (config(num_decoder_layers=1), "is of a block that config.json does not have: 1 in the decoder"),
        (weights(adapt), "lora_A.default.weight' is an adapter's; merge them with peft"),
        (text("adapter_config.json", "{}"), "adapter_config.json tells of weights to add; merge them with peft"),
        (weights(drop_norm), "no tensor 'decoder.final_layer_norm.weight'"),
        (config(architectures=["T5ForQuestionAnswering"]), "a T5ForQuestionAnswering, which writes no text"),
        (weights(count_on), "is of a block that config.json does not have"),
        (without_end, "it has no config.json"),
        (spoil_a_piece, "spiece.model: not a SentencePiece model .*can't decode byte 0xff"),
        (text("tokenizer.json", unigram(unk_id=None)), "tokenizer.json: cannot be read: .*`unk_id` is missing"),
        (text("tokenizer.json", unigram(pre_tokenizer={"type": "FixedLength", "length": 0})), "cannot be read: chunk size"),
        (weights(infinite), "numbers that are not finite"),
        (truncate, "not a safetensors file"),
        (text("model.safetensors", "rubbish"), "not a safetensors file"),
        (index("{}"), "no weight_map"),
        (index('{"weight_map": {"shared.weight": "model-1.safetensors"}}'), "not in the folder"),
        (index('{"weight_map": {"shared.weight": 3}}'), "not in the folder"),
        (index('{"weight_map": {"shared.weight": ["x"]}}'), "not in the folder"),
        (index('{"weight_map": {"shared.weight": "../model.safetensors"}}'), "not in the folder"),
    ],
)
def test_broken_checkpoints(copy: Callable[[str], Path], tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    folder = copy("flan")
    damage(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        export(str(folder), tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize("told", [{}, {"num_layers": 3}, {"num_layers": 3, "num_decoder_layers": None}])
def test_what_a_config_leaves_out(told: dict[str, Any]) -> None:
    """As T5's first configs do with the largest distance, of which no tensor tells: transformers' defaults."""
    reference = pytest.importorskip("transformers").T5Config(**told)
    found = T5Config.from_json({"model_type": "t5", **told})
    theirs = {"head_dim": "d_kv", "encoder_layers": "num_layers", "decoder_layers": "num_decoder_layers"}
    assert asdict(found.dims) == {name: getattr(reference, theirs.get(name, name)) for name in asdict(found.dims)}
    buckets, distance = (getattr(reference, f"relative_attention_{name}") for name in ("num_buckets", "max_distance"))
    assert (found.buckets, found.max_distance, found.epsilon) == (buckets, distance, reference.layer_norm_epsilon)
    assert (found.activation, found.gated) == (reference.dense_act_fn, reference.is_gated_act)


@pytest.mark.parametrize("source", ["", "someone/flan-t5-lora"])
def test_an_adapter_alone(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("ramekin_export.checkpoint.from_hub", lambda *_: tmp_path)
    with pytest.raises(CheckpointError, match="an adapter without its model; merge them with peft"):
        Checkpoint.open(source or str(tmp_path))


@pytest.mark.parametrize(
    ("activation", "gated"), [("relu", True), ("gelu", True), ("gelu_new", True), ("gelu", False), ("relu", False)]
)
def test_the_activation_that_the_config_names_last(copy: Callable[[str], Path], activation: str, gated: bool) -> None:
    """transformers derives it from `feed_forward_proj`, and then takes `dense_act_fn` and `is_gated_act` from the file."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folder = copy("flan")
    edit_config(folder, dense_act_fn=activation, is_gated_act=gated)
    if not gated:

        def rename(tensors: dict[str, np.ndarray]) -> None:
            for name in [name for name in tensors if ".wi_" in name]:
                tensor = tensors.pop(name)
                if "wi_0" in name:
                    tensors[name.replace("wi_0", "wi")] = tensor

        edit_weights(folder, rename)
    reference = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        fed = torch.tensor([[0, *TARGET[:-1]]])
        expected = reference(input_ids=torch.tensor([SOURCE]), decoder_input_ids=fed).logits[0].numpy()
    np.testing.assert_allclose(logits_of(folder), expected, atol=1e-4)


# The Hub


def hub_cache(folder: Path, checkpoint: Path) -> None:
    """A cache as huggingface_hub keeps it, with one repository in it."""
    repository = folder / "hub" / "models--someone--tiny-t5"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(checkpoint, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)


@pytest.mark.parametrize("revision", [[], ["--revision", "main"], ["--revision", "a" * 40]])
def test_a_hub_id_offline_from_its_cache(checkpoint: Callable[[str], Path], tmp_path: Path, revision: list[str]) -> None:
    hub_cache(tmp_path, checkpoint("flan"))
    done = run_export(tmp_path, "someone/tiny-t5", *revision)
    assert done.returncode == 0, done.stderr
    assert "cannot be reached" not in done.stderr  # nobody wanted to
    source = json.loads((tmp_path / "model" / "manifest.json").read_text())["source"]
    assert source["repository"] == "someone/tiny-t5"
    assert source["commit"] == "a" * 40
    assert source["weights"]["model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["someone/other"],
            "someone/other: no such folder, and the Hub cannot be reached and its cache does not have it",
        ),
        (["someone/tiny-t5", "--revision", "old"], "the Hub cannot be reached and its cache"),
        (["./none"], "./none: neither a folder nor a Hub id"),
        (["a/b/c"], "neither a folder nor a Hub id"),
        ([".", "--revision", "main"], "a folder has no revisions"),
        (["."], "not a checkpoint: it has no config.json"),
    ],
)
def test_hub_ids_that_are_not_to_be_had(
    checkpoint: Callable[[str], Path], tmp_path: Path, arguments: list[str], says: str
) -> None:
    hub_cache(tmp_path, checkpoint("flan"))
    done = run_export(tmp_path, *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.startswith("ramekin: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "model").exists()


class StandIn:
    """For the Hub: what it lists, or how it fails, and what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str]) -> None:
        self.folder, self.names, self.asked = folder, names, list[Any]()
        self.failure: Exception | None = None
        self.broken: Exception | None = None
        self.revisions, self.elsewhere = set[str | None](), dict[str, Path]()
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self._listed)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self._download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self._cached)

    def _listed(self, repository: str, *, revision: str | None, timeout: float) -> Any:
        self.asked.append((repository, revision))
        self.patience = timeout
        if self.failure:
            raise self.failure
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def _download(self, repository: str, name: str, *, revision: str | None) -> str:
        self.asked.append(name)
        self.revisions.add(revision)
        if self.broken:
            raise self.broken
        return str(self.elsewhere.get(name, self.folder) / name)

    def _cached(self, repository: str, name: str, *, revision: str | None) -> str | None:
        self.revisions.add(revision)
        return str(self.folder / name) if self.folder.exists() else None


@pytest.fixture
def stand_in(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> StandIn:
    names = ["model.safetensors", "pytorch_model.bin", "spiece.model", "config.json", "runs/x.json"]
    return StandIn(monkeypatch, checkpoint("flan"), names)


def refusal(kind: str, status: int) -> Exception:
    """One of huggingface_hub's errors, whose releases do not agree on how they are made."""
    base = getattr(errors, kind)

    class Refusal(base):
        response = SimpleNamespace(status_code=status)

        def __init__(self) -> None:
            Exception.__init__(self, f"{status} Client Error. (Request ID: x)\n\nmore of it")

        def __str__(self) -> str:
            return str(self.args[0])

    return Refusal()


def test_the_hub_is_asked_for_what_is_needed(stand_in: StandIn) -> None:
    """Which revision, which files, and the weights last: so weights in the cache say that all is there."""
    opened = Checkpoint.open("someone/t5", "v2")
    assert stand_in.asked == [("someone/t5", "v2"), "config.json", "spiece.model", "model.safetensors"]
    assert stand_in.revisions == {"v2"}
    assert 0 < stand_in.patience < 60
    assert (opened.source["repository"], opened.source["revision"]) == ("someone/t5", "v2")
    assert "shared.weight" in opened
    assert Checkpoint.open("someone/t5").source["revision"] == "main"


def test_files_of_two_commits_are_no_checkpoint(stand_in: StandIn, tmp_path: Path) -> None:
    """Somebody pushed while the config was there and the weights were not."""
    stand_in.elsewhere["model.safetensors"] = tmp_path
    with pytest.raises(CheckpointError, match=r"^someone/t5: it was changed on the Hub meanwhile; try again$"):
        Checkpoint.open("someone/t5")


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (refusal("GatedRepoError", 403), "someone/t5: it is gated: ask for access on its page, and log in .*HF_TOKEN$"),
        (refusal("RepositoryNotFoundError", 401), "no such folder, and no such repository on the Hub, or a private one"),
        (refusal("RevisionNotFoundError", 404), "it has no revision 'v2' on the Hub$"),
        (errors.HFValidationError("Cannot have -- in repo_id"), "it cannot be downloaded: Cannot have -- in repo_id$"),
        (refusal("HfHubHTTPError", 429), r"it cannot be downloaded: 429 Client Error\. \(Request ID: x\)$"),
    ],
)
def test_what_the_hub_refuses(stand_in: StandIn, failure: Exception, says: str) -> None:
    """At once or when it comes to files, whatever the cache holds: it may not be what was asked for."""
    stand_in.broken = failure
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open("someone/t5", "v2")
    stand_in.failure = failure
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open("someone/t5", "v2")


@pytest.mark.parametrize("failure", [TimeoutError(), refusal("HfHubHTTPError", 503)])
def test_without_the_hub_its_cache_is_taken_with_a_warning(stand_in: StandIn, failure: Exception, tmp_path: Path) -> None:
    stand_in.failure = failure
    with pytest.warns(RuntimeWarning, match="someone/t5: the Hub cannot be reached; this is commit .* from its cache"):
        assert "shared.weight" in Checkpoint.open("someone/t5")
    stand_in.folder = tmp_path  # of which only the first file has arrived
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the Hub cannot be reached and its cache does not have it"):
        Checkpoint.open("someone/t5")


@pytest.mark.parametrize("broken", [RuntimeError("peer closed connection\nand more"), OSError("peer closed connection")])
def test_a_download_that_breaks_is_one_line(stand_in: StandIn, broken: Exception) -> None:
    """Of any kind: httpx's errors are not the system's."""
    stand_in.broken = broken
    with pytest.raises(CheckpointError, match=r"^someone/t5: it cannot be downloaded: peer closed connection$"):
        Checkpoint.open("someone/t5")


def test_a_download_can_be_interrupted(stand_in: StandIn) -> None:
    stand_in.broken = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        Checkpoint.open("someone/t5")
    assert stand_in.asked[1:] == ["config.json"]


def test_nothing_is_downloaded_for_nothing(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.names = ["config.json", "spiece.model", "tf_model.h5"]
    with pytest.raises(CheckpointError, match="TensorFlow or Flax have to be saved anew"):
        Checkpoint.open("someone/t5")
    stand_in.names = ["config.json", "spiece.model", "pytorch_model.bin"]
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"^someone/t5: pickled weights need torch"):
        Checkpoint.open("someone/t5")
    assert not [each for each in stand_in.asked if isinstance(each, str)]
    stand_in.names = ["config.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match=r"^someone/t5: it has neither spiece.model nor tokenizer.json"):
        Checkpoint.open("someone/t5")
    assert stand_in.asked.pop() == "config.json"
    stand_in.folder = tmp_path
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="model_type 'bert'; only mt5 and t5"):
        Checkpoint.open("someone/t5")
    assert [each for each in stand_in.asked if isinstance(each, str)] == ["config.json"]


def test_only_what_is_needed_is_downloaded() -> None:
    everything = [
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "spiece.model",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "training_args.bin",
        "tf_model.h5",
        "checkpoint-500/model.safetensors",
        "checkpoint-500/config.json",
    ]
    needed = ["config.json", "generation_config.json", "spiece.model", "tokenizer.json", "model.safetensors"]
    assert wanted(everything) == needed
    for shard in ("model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin"):
        kept = ["config.json", shard.replace("-00001-of-00002", "") + ".index.json", shard]
        assert wanted([shard, "training_args.bin", *kept[:2]]) == kept


@pytest.mark.parametrize("prefix", ["model.", "module."])
def test_names_of_a_larger_model(prefix: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Such as Lightning's or DataParallel's."""
    source = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    weights = load_file(source / "model.safetensors")
    save_file({f"{prefix}{name}": each for name, each in weights.items()}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"names of tensors begin with '{prefix}'; save the T5 model"):
        export(str(source), tmp_path / "model", "fp32")


def test_what_lies_beside_a_checkpoint_is_told_of(copy: Callable[[str], Path]) -> None:
    """A file of it, or a folder that it lies in: a Trainer's, or that of a repository in the Hub's cache."""
    folder = copy("flan")
    with pytest.raises(CheckpointError, match=r"model.safetensors: a file; give the folder that it is in"):
        Checkpoint.open(str(folder / "model.safetensors"))
    with pytest.raises(CheckpointError, match=rf"it has no config.json; give {folder}, or another that has one"):
        Checkpoint.open(str(folder.parent))
    older = folder.parent / "z"
    shutil.copytree(folder, older)
    os.utime(older, (0, 0))
    with pytest.raises(CheckpointError, match=rf"it has no config.json; give {folder}, or another that has one"):
        Checkpoint.open(str(folder.parent))
    commit = folder.parent / "models--a--b" / "snapshots" / "5f9e"
    shutil.copytree(folder, commit)
    with pytest.raises(CheckpointError, match=rf"it has no config.json; give {commit}, or another that has one"):
        Checkpoint.open(str(commit.parent.parent))


def test_no_quantization_is_none(copy: Callable[[str], Path]) -> None:
    folder = copy("flan")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": None}))
    assert "shared.weight" in Checkpoint.open(str(folder))


def run_export(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    command = [sys.executable, "-m", "ramekin", "export", *arguments[:1], "model", *arguments[1:]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("told", "start"), [({"bos_token_id": 4}, 4), ({"bos_token_id": 4, "decoder_start_token_id": 6}, 6), ({}, 0)]
)
def test_where_samples_start(told: dict[str, int], start: int, copy: Callable[[str], Path]) -> None:
    """Source: transformers' `generate`, which begins with `bos_token_id` where no `decoder_start_token_id` is told."""
    folder = copy("flan")
    edit_config(folder, decoder_start_token_id=None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0, **told}))
    assert export(str(folder), folder.parent / "model", "fp32").tokens.start == start
