"""Folders of optimum's exporter: the same tokens as transformers and as our own graphs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from ramekin import CheckpointError, Engine, ModelFormatError, SamplingParams
from ramekin.cli import cli
from ramekin.model import COMPACT_RUNTIMES
from ramekin_export.checkpoint import Checkpoint
from tests.export.conftest import SPIECE
from tests.export.test_parity import load_reference, reference_logits
from tests.export.variants import VARIANTS
from tests.runtime.conftest import TINY_MODEL
from tests.runtime.test_lean import BLOCKED

torch = pytest.importorskip("torch")
optimum = pytest.importorskip("optimum.onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore")  # optimum's exporter traces, and warns of it
LAYOUTS = ("two decoders", "merged", "int8")
SAMPLED = SamplingParams(n=4, seed=5, max_new_tokens=24, temperature=1.5)
Fold = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def folder(checkpoint: Callable[[str], Path]) -> Fold:
    """optimum's export of a variant, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(variant: str, layout: str) -> Path:
        if (variant, layout) not in made:
            out = checkpoint(variant).parent / f"optimum-{layout.replace(' ', '-')}"
            source = make(variant, "two decoders") if layout == "int8" else checkpoint(variant)
            made[variant, layout] = _export(source, out, layout)
        return made[variant, layout]

    return make


def _export(source: Path, out: Path, layout: str) -> Path:
    if layout == "int8":
        out.mkdir()
        settings = optimum.configuration.AutoQuantizationConfig.avx2(is_static=False, per_channel=True)
        for graph in sorted(source.glob("*.onnx")):
            quantizer = optimum.ORTQuantizer.from_pretrained(source, file_name=graph.name)
            quantizer.quantize(quantization_config=settings, save_dir=out)
        for name in ("config.json", "generation_config.json"):
            shutil.copy(source / name, out)
    else:
        model = optimum.ORTModelForSeq2SeqLM.from_pretrained(source, export=True, use_merged=layout == "merged")
        model.save_pretrained(out)
    shutil.copy(SPIECE, out / "spiece.model")
    return out


def _optimums_own(folder: Path) -> Any:
    parts = ("encoder", "decoder", "decoder_with_past")
    names = {f"{part}_file_name": f"{part}_model_quantized.onnx" for part in parts}
    return optimum.ORTModelForSeq2SeqLM.from_pretrained(folder, **names)


def _greedy(model: Any, source: np.ndarray, use_cache: bool = True) -> list[int]:
    settings = {"max_new_tokens": 24, "do_sample": False, "num_beams": 1, "use_cache": use_cache}
    with torch.no_grad():
        output = model.generate(torch.tensor(source[None]), **settings)
    return output[0, 1:].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_those_of_transformers_and_ours(
    variant: str, layout: str, folder: Fold, checkpoint: Callable[[str], Path], exported: Callable[[str, str], Engine]
) -> None:
    engine, ours = Engine.load(folder(variant, layout), threads=1), exported(variant, "fp32")
    assert engine.manifest.dims == ours.manifest.dims
    mine, theirs = engine.manifest.tokens, ours.manifest.tokens
    assert (mine.start, mine.pad, mine.eos) == (theirs.start, theirs.pad, theirs.eos)
    assert theirs.named.items() <= mine.named.items()  # beside int8 graphs optimum saves a tokenizer, with sentinels for mT5
    assert set(theirs.silent) <= set(mine.silent)
    source = np.random.default_rng(3).integers(3, 400, 70)
    target = np.random.default_rng(4).integers(3, 400, 12)
    reference = load_reference(checkpoint(variant))
    expected = reference_logits(reference, source, target)
    found = engine.logits(source, target)
    greedy = SamplingParams(greedy=True, max_new_tokens=24, seed=0)
    tokens = engine.generate(source, greedy)[0].token_ids
    if layout == "int8":  # another arithmetic: near float32, and the same as optimum's own runtime on these graphs
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9
        if onnxruntime.__version__ in COMPACT_RUNTIMES:  # with 1.23.2 they part after some tokens; why was not found out
            assert list(tokens) == _greedy(_optimums_own(folder(variant, layout)), source)
        return
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert list(tokens) == _greedy(reference, source, use_cache=False)
    assert tokens == ours.generate(source, greedy)[0].token_ids
    assert engine.manifest.recipe["prompt"].endswith("shared by all samples")
    for one, other in zip(engine.generate(source, SAMPLED), ours.generate(source, SAMPLED), strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_leave(layout: str, folder: Fold) -> None:
    engine = Engine.load(folder("flan", layout), threads=1)
    tokens = replace(engine.manifest.tokens, eos=tuple(range(1, 60)))  # so that samples end
    engine.manifest = replace(engine.manifest, tokens=tokens)
    four = [each.token_ids for each in engine.generate([5, 9, 1], SAMPLED)]
    assert len({len(ids) for ids in four}) > 1
    assert all(ids[-1] < 60 or len(ids) == SAMPLED.max_new_tokens for ids in four)
    if layout != "int8":  # there one scale for all rows ties the samples to one another
        alone = [engine.generate([5, 9, 1], replace(SAMPLED, n=i + 1))[i].token_ids for i in range(4)]
        assert alone == four


def test_where_the_prompt_is_not_broadcast(folder: Fold, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Engine.load(folder("flan", "merged"), threads=1)
    copied = Engine.load(folder("flan", "merged"), threads=1)
    monkeypatch.setattr(copied.model, "shares_prompt", False)
    assert copied.generate([5, 9, 1], SAMPLED) == shared.generate([5, 9, 1], SAMPLED)


def test_as_on_the_hub(folder: Fold, tmp_path: Path) -> None:
    """The graphs in `onnx/`, several precisions of them."""
    flat, hub = folder("flan", "merged"), tmp_path / "hub"
    (hub / "onnx").mkdir(parents=True)
    for path in flat.iterdir():
        shutil.copy(path, hub / "onnx" if path.suffix == ".onnx" else hub)
    for path in folder("flan", "int8").glob("*.onnx"):
        shutil.copy(path, hub / "onnx")
    assert Engine.load(hub).generate([5, 9, 1], SAMPLED) == Engine.load(flat).generate([5, 9, 1], SAMPLED)


def test_without_torch(folder: Fold) -> None:
    code = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
from ramekin.cli import main
main(["generate", {str(folder("flan", "two decoders"))!r}, "--greedy", "--max-new-tokens", "5"])
"""
    done = subprocess.run([sys.executable, "-c", code], input="a b c", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["info"], ["bench", "-n", "2", "--source", "8", "--tokens", "3", "--repeat", "1"]])
def test_commands(command: list[str], folder: Fold) -> None:
    result = CliRunner().invoke(cli, [*command[:1], str(folder("flan", "merged")), *command[1:]])
    assert result.exit_code == 0, result.output
    if command == ["info"]:
        assert "optimum's, with a merged decoder" in result.output
        assert "shared by all samples" in result.output


def test_there_is_nothing_to_verify(folder: Fold) -> None:
    result = CliRunner().invoke(cli, ["verify", str(folder("flan", "merged"))])
    assert "optimum's own folder; it records neither hashes nor a golden run" in str(result.exception)


def test_whether_texts_are_cleaned_up(folder: Fold, tmp_path: Path) -> None:
    assert not Engine.load(folder("flan", "merged")).tokenizer.cleans_up
    cleaned = Path(shutil.copytree(folder("flan", "merged"), tmp_path / "cleaned"))
    (cleaned / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    assert Engine.load(cleaned).tokenizer.cleans_up


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "its tokenizer files are not as transformers writes them"),
        ({"added_tokens_decoder": {"450": {"content": "\ud800"}}}, "tokenizer_config.json: cannot be read: .*surrogates"),
        ({"extra_ids": 10**12}, "1000000000000 extra_ids; at most 10000 are supported"),
    ],
)
def test_tokenizer_files_that_are_not(changes: dict[str, Any], message: str, folder: Fold, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(folder("flan", "merged"), wrong)
    (wrong / "tokenizer.json").unlink(missing_ok=True)
    (wrong / "tokenizer_config.json").write_text(json.dumps(changes))
    with pytest.raises(CheckpointError, match=message):
        Engine.load(wrong)


@pytest.mark.parametrize("damage", ["shape", "type", "none"])
def test_weights_that_are_none(damage: str, folder: Fold, tmp_path: Path) -> None:
    wrong = Path(shutil.copytree(folder("flan", "two decoders"), tmp_path / "wrong"))
    model = onnx.load(wrong / "decoder_model.onnx")
    (product,) = (node for node in model.graph.node if node.name.endswith("block.0/layer.0/SelfAttention/q/MatMul"))
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == product.input[1])
    if damage == "none":
        del product.input[1:]
    else:
        weight.data_type, weight.dims[0] = (99, weight.dims[0]) if damage == "type" else (weight.data_type, 3)
    onnx.save(model, wrong / "decoder_model.onnx")
    with pytest.raises(CheckpointError, match=r"cannot be read|no tensor 'decoder.block.0.layer.0.SelfAttention.q.weight'"):
        Checkpoint.open(str(wrong)).tensor("decoder.block.0.layer.0.SelfAttention.q.weight", 64, 64)


@pytest.mark.parametrize(
    ("layout", "removed", "message"),
    [
        ("two decoders", "decoder_with_past_model.onnx", "decoder_with_past_model.onnx missing; `optimum-cli export onnx"),
        ("two decoders", "encoder_model.onnx", "encoder_model.onnx missing"),
        ("merged", "decoder_model_merged.onnx", "decoder_model_merged.onnx missing"),
        ("merged", "config.json", "no config.json"),
        ("merged", "spiece.model", "no spiece.model; copy the base model's there"),
    ],
)
def test_half_folders(layout: str, removed: str, message: str, folder: Fold, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(folder("flan", layout), half)
    (half / removed).unlink()
    with pytest.raises((ModelFormatError, CheckpointError), match=message):
        Engine.load(half)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_no_graph(folder: Fold, tmp_path: Path) -> None:
    """Opening it would wait for ever."""
    wrong = tmp_path / "wrong"
    shutil.copytree(folder("flan", "merged"), wrong)
    (wrong / "encoder_model.onnx").unlink()
    os.mkfifo(wrong / "encoder_model.onnx")
    with pytest.raises(ModelFormatError, match=r"encoder_model\.onnx missing"):
        Engine.load(wrong)
    shutil.rmtree(wrong)
    shutil.copytree(folder("flan", "merged"), wrong)
    (wrong / "config.json").unlink()
    os.mkfifo(wrong / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: not a regular file"):
        Engine.load(wrong)


def test_a_decoder_without_past_is_none(folder: Fold, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(folder("flan", "two decoders"), wrong)
    shutil.copy(wrong / "decoder_model.onnx", wrong / "decoder_with_past_model.onnx")
    with pytest.raises(ModelFormatError, match="not those of a T5 with past keys and values"):
        Engine.load(wrong)


def test_logits_of_another_shape(folder: Fold, tmp_path: Path) -> None:
    wrong = Path(shutil.copytree(folder("flan", "two decoders"), tmp_path / "wrong"))
    model = onnx.load(wrong / "decoder_with_past_model.onnx")
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "whole"
    model.graph.node.append(onnx.helper.make_node("Flatten", ["whole"], ["logits"]))
    (output,) = (each for each in model.graph.output if each.name == "logits")
    output.type.tensor_type.ClearField("shape")
    onnx.save(model, wrong / "decoder_with_past_model.onnx")
    with pytest.raises(ModelFormatError, match="two steps of it fail"):
        Engine.load(wrong)


@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_it_is_ours(variant: str, folder: Fold, exported: Callable[[str, str], Engine], tmp_path: Path) -> None:
    """Our graphs, from the weights in optimum's, compute what they do from the checkpoint, bit by bit."""
    layout = "merged" if variant == "flan" else "two decoders"
    command = ["convert", str(folder(variant, layout)), str(tmp_path / "out"), "--precision", "fp32"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    source, target = np.arange(3, 60), np.arange(5, 17)
    expected = exported(variant, "fp32").logits(source, target)
    assert np.array_equal(Engine.load(tmp_path / "out", threads=2).logits(source, target), expected)


def test_the_checkpoints_own_settings(folder: Fold, tmp_path: Path) -> None:
    """Of `generation_config.json` and, without it, of `config.json`."""
    copy = Path(shutil.copytree(folder("flan", "merged"), tmp_path / "model"))
    (copy / "generation_config.json").write_text('{"top_k": 7}')
    assert Engine.load(copy).manifest.generation == {"top_k": 7}
    (copy / "generation_config.json").unlink()
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"top_k": 9}))
    assert Engine.load(copy).manifest.generation == {"top_k": 9}


def test_what_is_quantized_is_not_converted(folder: Fold, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["convert", str(folder("flan", "int8")), str(tmp_path / "out")])
    assert "not a float32 export" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_via_optimum(
    precision: str, checkpoint: Callable[[str], Path], exported: Callable[[str, str], Engine], folder: Fold, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    command = ["export", str(checkpoint("flan")), out, "--via", "optimum", "--precision", precision]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert ("not compared with float32" in result.output) == (precision == "int8")
    assert CliRunner().invoke(cli, ["verify", out]).exit_code == 0
    engine = Engine.load(out)
    assert (engine.manifest.layout, engine.manifest.precision) == ("optimum", precision)
    assert engine.manifest.variant == exported("flan", "fp32").manifest.variant
    if precision == "fp32":
        ours = exported("flan", "fp32").generate([5, 9, 1], SAMPLED)
        assert [each.token_ids for each in engine.generate([5, 9, 1], SAMPLED)] == [each.token_ids for each in ours]
    for graph in folder("flan", "merged").glob("*.onnx"):  # of a precision that would come first; no manifest lists it
        if not (tmp_path / "out" / graph.name).exists():
            shutil.copy(graph, tmp_path / "out")
            (tmp_path / "out" / graph.name).write_bytes(b"altered")
    assert CliRunner().invoke(cli, ["verify", out]).exit_code == 0
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        Engine.load(out)


def test_a_manifest_that_tells_of_graphs_that_are_not_there(tmp_path: Path) -> None:
    raw = json.loads((TINY_MODEL / "manifest.json").read_text())
    shutil.copy(TINY_MODEL / "spiece.model", tmp_path)
    raw |= {"layout": "optimum", "files": {"spiece.model": raw["files"]["spiece.model"]}}
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ModelFormatError, match="there are none"):
        Engine.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"), [(["--precision", "int4"], "fp32 or int8"), (["--no-verify"], "neither calibrates nor verifies")]
)
def test_what_optimum_does_not_do(
    options: list[str], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    command = ["export", str(checkpoint("flan")), str(tmp_path / "out"), "--via", "optimum", *options]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 2
    assert message in result.output
