"""The rewrites of the weights change nothing but how hard the model is to quantize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.naive import Int8PerTensor, NearestPerBlock
from benchmarks.twins import KINDS, write_twin
from examples.synthetic import held_out_papers
from ramekin import Engine, Paper, SamplingParams, build_prompt
from ramekin.manifest import DEFAULT_PROMPT
from ramekin_export.checkpoint import Checkpoint
from ramekin_export.cli import EXAMPLES
from ramekin_export.config import T5Config
from ramekin_export.fidelity import Fidelity, compare
from ramekin_export.fold import Folded
from ramekin_export.head import Head
from ramekin_export.recipe import RECIPES, Int8Normed, Layers, Recipe
from ramekin_export.rotate import Rotated
from ramekin_export.writer import Writer
from tests.export.variants import VARIANTS

NAIVE = Recipe(
    Layers.alike(Int8PerTensor()), Layers.alike(NearestPerBlock(8)), NearestPerBlock(8), rotated=False, folded=False
)
REWRITTEN = replace(RECIPES["fp32"], rotated=True, folded=True)


def engine(checkpoint: Path, folder: Path, recipe: Recipe) -> Engine:
    folder.mkdir(parents=True)
    Writer(Checkpoint.open(str(checkpoint)), DEFAULT_PROMPT).write(folder, "int8", recipe, lambda _done, _all: None)
    return Engine.load(folder, threads=2)


def rewritten(checkpoint: Path) -> tuple[Folded, list[str]]:
    opened = Checkpoint.open(str(checkpoint))
    config = T5Config.from_json(opened.config)
    names = [name for name in load_file(checkpoint / "model.safetensors") if "embed" not in name and "bias" not in name]
    return Folded(Rotated(opened, config, Head.of(opened, config).weight), config), names


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rotated", "folded"), [(True, False), (False, True), (True, True)])
def test_the_function_is_the_same(
    variant: str, rotated: bool, folded: bool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = engine(checkpoint(variant), tmp_path / "plain", RECIPES["fp32"])
    other = engine(checkpoint(variant), tmp_path / "other", replace(RECIPES["fp32"], rotated=rotated, folded=folded))
    rng = np.random.default_rng(0)
    for length in (1, 40, 200):
        source, target = rng.integers(3, 400, length), rng.integers(3, 400, 12)
        expected = plain.logits(source, target)
        np.testing.assert_allclose(other.logits(source, target), expected, atol=1e-4 * max(1, expected.std()))


@pytest.mark.parametrize("variant", ["flan", "v1.0", "mt5"])
def test_what_leaves_a_norm_is_nearly_gaussian(variant: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The premise of one constant scale, shown where it is hardest: on a twin with huge channels in front of every norm."""
    twin = write_twin(checkpoint(variant), tmp_path / "twin", "none")
    weights = load_file(twin / "model.safetensors")
    for name in weights:
        if name == "shared.weight":
            weights[name][:, :2] *= 100
        elif name.endswith((".o.weight", ".wo.weight")):
            weights[name][:2] *= 100
    save_file(weights, twin / "model.safetensors", {"format": "pt"})
    largest = {}
    for kind, recipe in (("plain", RECIPES["fp32"]), ("rotated", replace(RECIPES["fp32"], rotated=True))):
        engine(twin, tmp_path / kind, recipe)
        largest[kind] = max(float(np.abs(rows).max()) for rows in normed(tmp_path / kind / "encoder.onnx").values())
    assert largest["rotated"] < Int8Normed().largest < largest["plain"]


def normed(graph: Path) -> dict[str, np.ndarray]:
    """What the norms of an encoder make of a prompt, before their gains, by name."""
    import onnxruntime

    model = onnx.load(graph, load_external_data=False)
    names = [node.output[0] for node in model.graph.node if node.op_type == "SkipSimplifiedLayerNormalization"]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    tapped = graph.with_name("tapped.onnx")
    tapped.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(tapped, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"input_ids": np.arange(3, 203)[None]}), strict=True))


def test_a_constant_scale_is_refused_where_gains_vary() -> None:
    with pytest.raises(ValueError, match="rotated"):
        replace(RECIPES["int8"], rotated=False)


@pytest.mark.parametrize("variant", ["flan", "v1.0", "exact-gelu", "mt5"])
@pytest.mark.parametrize("kind", KINDS)
def test_twins_fold_to_the_same_weights(variant: str, kind: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    if variant == "exact-gelu" and kind != "channels":
        pytest.skip("GELU is not homogeneous: without a gate there is no exact rewrite of what wo reads")
    twin = write_twin(checkpoint(variant), tmp_path / "twin", kind)
    before, names = rewritten(checkpoint(variant))
    after, _ = rewritten(twin)
    changed = 0
    raw, moved = load_file(checkpoint(variant) / "model.safetensors"), load_file(twin / "model.safetensors")
    for name in names:
        shape = raw[name].shape
        wanted, found = before.tensor(name, *shape), after.tensor(name, *shape)
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-5 * np.abs(wanted).max())
        changed += not np.allclose(raw[name], moved[name])
    assert changed > 5


def test_channels_that_nobody_reads_are_left_alone(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    dead = write_twin(checkpoint("flan"), tmp_path / "dead", "none")
    weights = load_file(dead / "model.safetensors")
    weights["encoder.block.0.layer.0.layer_norm.weight"][:5] = 0
    weights["decoder.block.1.layer.2.DenseReluDense.wo.weight"][:, 3] = 0
    weights["decoder.block.0.layer.1.EncDecAttention.v.weight"][7] = 0
    save_file(weights, dead / "model.safetensors", {"format": "pt"})
    source, target = np.arange(3, 60), np.arange(5, 20)
    expected = engine(dead, tmp_path / "plain", RECIPES["fp32"]).logits(source, target)
    found = engine(dead, tmp_path / "rewritten", REWRITTEN).logits(source, target)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.fixture(scope="module")
def plain_kl(tmp_path_factory: pytest.TempPathFactory) -> float:
    return divergence(EXAMPLES / "checkpoint", tmp_path_factory.mktemp("plain"), RECIPES["int8"])


def divergence(checkpoint: Path, folder: Path, recipe: Recipe) -> float:
    """Mean KL on the demo task, the float32 graphs of the same checkpoint as reference."""
    exact = engine(checkpoint, folder / "exact", RECIPES["fp32"])
    papers = [Paper(paper.title, paper.abstract, paper.introduction) for paper in held_out_papers(6)]
    sources = [exact.source_ids(build_prompt(paper)) for paper in papers]
    rows = compare(
        exact, engine(checkpoint, folder / "model", recipe), sources, SamplingParams(n=4, max_new_tokens=24, seed=0)
    )
    return Fidelity.of(rows).kl


@pytest.mark.parametrize("kind", KINDS)
def test_recipes_hold_on_twins_where_the_naive_one_fails(kind: str, plain_kl: float, tmp_path: Path) -> None:
    twin = write_twin(EXAMPLES / "checkpoint", tmp_path / "twin", kind)
    ours = divergence(twin, tmp_path / "ours", RECIPES["int8"])
    naive = divergence(twin, tmp_path / "naive", NAIVE)
    assert ours < 2 * plain_kl
    assert naive > 10 * plain_kl
