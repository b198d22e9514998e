"""The graphs for CUDA, where there is no GPU: float32 and float16 on the CPU, bfloat16 by its float32 twin."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from benchmarks.twins import write_twin
from ramekin import Engine, SamplingParams
from ramekin.errors import ProviderError
from ramekin.manifest import DECODER, ENCODER, MANIFEST, Manifest
from ramekin.sampling import log_probabilities
from ramekin_export.formats import FORMATS
from ramekin_export.pipeline import export
from ramekin_export.verify import Checks
from tests.export.test_parity import SOURCES, cases, load_reference, reference_logits
from tests.export.variants import VARIANTS
from tests.runtime.conftest import RUNS_CUDA_GRAPHS

torch = pytest.importorskip("torch")
pytestmark = RUNS_CUDA_GRAPHS

# What the graphs are made of, and the types for which onnxruntime-gpu 1.31.1 has CUDA kernels (the kernels' classes in its
# library; "any" moves elements without looking at them).
KERNELS = {
    "Add": "int64",
    "Cast": "any",
    "Clip": "int64",
    "FastGelu": "float float16 bfloat16",
    "Gather": "any",
    "GatherElements": "any",
    "Gelu": "float float16 bfloat16",
    "Identity": "any",
    "LogSoftmax": "float",
    "MatMul": "float float16 bfloat16",
    "Mul": "float float16 bfloat16",
    "MultiHeadAttention": "float float16 bfloat16",
    "RMSNormalization": "float float16 bfloat16",
    "Relu": "float float16 bfloat16",
    "Reshape": "any",
    "SkipSimplifiedLayerNormalization": "float float16 bfloat16",
    "Split": "any",
    "Squeeze": "any",
    "Sub": "int64",
    "TensorScatter": "any",
    "TopK": "float",
    "Unsqueeze": "any",
}
PARAMS = SamplingParams(n=4, max_new_tokens=20, seed=3)


def on_cpu(folder: Path) -> Engine:
    """An engine on the CPU, though onnxruntime has to insert casts there."""
    manifest = replace(Manifest.load(folder), providers=("cpu",))
    (folder / MANIFEST).write_text(manifest.to_json())
    return Engine.load(folder, threads=2)


def made(checkpoint: Path, folder: Path, precision: str) -> Path:
    export(str(checkpoint), folder, precision, checks=Checks(verify=False))
    return folder


def float32_twin(folder: Path) -> Path:
    """The same graphs and the same weights, all bfloat16 in them called float32."""
    manifest = Manifest.load(folder)
    for name in (ENCODER, DECODER):
        model = onnx.load(folder / name)
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.BFLOAT16:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
        for value in [*model.graph.input, *model.graph.output]:
            if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                    attribute.i = TensorProto.FLOAT
        onnx.save(model, folder / name)
    files = {name: type(record).of(folder / name) for name, record in manifest.files.items()}
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json())
    return folder


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean KL of rows of logits."""
    wanted, given = (
        x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (expected.astype(float), found.astype(float))
    )
    return float((np.exp(wanted) * (wanted - given)).sum(axis=1).mean())


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_equal_those_of_the_graphs_for_the_cpu(variant: str, exported: Callable[[str, str], Engine]) -> None:
    """Several prompts of different lengths at once as well."""
    cuda = exported(variant, "fp32-cuda")
    cuda.model.prompts_at_once = 4
    assert_same_samples(exported(variant, "fp32"), cuda, variant)


def assert_same_samples(expected: Engine, found: Engine, variant: str) -> None:
    """Token by token, whether prompts are computed together or alone."""
    sources = [source for source, _ in cases(VARIANTS[variant]["vocab_size"])]
    for source, together in zip(sources, found.generate_many(sources, PARAMS), strict=True):
        wanted = expected.generate(source, PARAMS)
        for samples in (together, found.generate(source, PARAMS)):
            assert [each.token_ids for each in samples] == [each.token_ids for each in wanted]
            for one, other in zip(samples, wanted, strict=True):
                np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rules", [{"repetition_penalty": 1.3}, {"top_k": 0}, {"min_new_tokens": 15}, {"greedy": True}])
def test_rules_that_need_all_logits(rules: dict[str, float], exported: Callable[[str, str], Engine]) -> None:
    source, _ = next(cases(512))
    params = replace(PARAMS, **rules)
    expected = exported("flan", "fp32").generate(source, params)
    found = exported("flan", "fp32-cuda").generate(source, params)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_float32_with_rounded_weights(variant: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The graph's arithmetic apart, which only a GPU can show: logits within 1e-4 of a T5 with bfloat16 weights.

    But for its head, which is not rounded.
    """
    engine = on_cpu(float32_twin(made(checkpoint(variant), tmp_path / "model", "bf16")))
    reference = load_reference(checkpoint(variant))
    exact = [reference_logits(reference, *case) for case in cases(VARIANTS[variant]["vocab_size"])]
    reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())  # where it was tied
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            weight.copy_(weight if name == "lm_head.weight" else weight.bfloat16().float())
    for case, unrounded in zip(cases(VARIANTS[variant]["vocab_size"]), exact, strict=True):
        expected = reference_logits(reference, *case)
        assert np.abs(expected - unrounded).max() > 1e-3
        np.testing.assert_allclose(engine.logits(*case), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float16_on_the_cpu(variant: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    engine = on_cpu(made(checkpoint(variant), tmp_path / "model", "fp16"))
    reference = load_reference(checkpoint(variant))
    for case in cases(VARIANTS[variant]["vocab_size"]):
        expected = reference_logits(reference, *case)
        found = engine.logits(*case)
        assert np.abs(found - expected).max() < 0.03
        assert divergence(expected, found) < 1e-5


def test_float16_survives_massive_activations(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Activations before `wo` of more than float16 can hold; all else as before."""
    twin = write_twin(checkpoint("flan"), tmp_path / "twin", "wo")
    from safetensors.numpy import load_file, save_file

    state = load_file(twin / "model.safetensors")
    for name in [each for each in state if each.endswith(".wi_1.weight")]:
        state[name] = state[name] * np.float32(100)
        state[name.replace("wi_1", "wo")] = state[name.replace("wi_1", "wo")] / np.float32(100)
    save_file(state, twin / "model.safetensors", {"format": "pt"})
    reference, largest = load_reference(twin), []
    for layer in [each for name, each in reference.named_modules() if name.endswith(".wo")]:
        layer.register_forward_pre_hook(lambda _, inputs: largest.append(float(inputs[0].abs().max())))
    engine = on_cpu(made(twin, tmp_path / "model", "fp16"))
    for case in cases(512):
        assert divergence(reference_logits(reference, *case), engine.logits(*case)) < 1e-5
    assert max(largest) > 65_504


@pytest.mark.parametrize("variant", ["flan", "v1.0"])
def test_float16_leaves_out_wo(variant: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """On the CPU, which computes in float32 anyway, massive activations survive in whatever the graph says."""
    folder = made(checkpoint(variant), tmp_path / "model", "fp16")
    for name, layers in ((ENCODER, VARIANTS[variant]["num_layers"]), (DECODER, VARIANTS[variant]["num_decoder_layers"])):
        weights = onnx.load(folder / name, load_external_data=False).graph.initializer
        found = {part: [w.data_type for w in weights if w.name.endswith(f".{part}.weight")] for part in ("wo", "o")}
        assert found["wo"] == [TensorProto.FLOAT] * layers
        assert set(found["o"]) == {TensorProto.FLOAT16}


@pytest.mark.parametrize("precision", ["fp32-cuda", "bf16", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_node_has_a_cuda_kernel(
    variant: str, precision: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """As far as a library without a GPU tells; and no shape is computed, which would be done on the CPU."""
    folder = made(checkpoint(variant), tmp_path / "model", precision)
    for name in (ENCODER, DECODER):
        onnx.checker.check_model(str(folder / name))
        graph = onnx.shape_inference.infer_shapes_path(str(folder / name), str(tmp_path / name))
        graph = onnx.load(tmp_path / name, load_external_data=False).graph
        types = {each.name: each.type.tensor_type.elem_type for each in [*graph.input, *graph.value_info, *graph.output]}
        types |= {each.name: each.data_type for each in graph.initializer}
        known = 0
        for node in graph.node:
            assert node.op_type in KERNELS, node.name
            kind = types.get(node.input[0])
            if kind and KERNELS[node.op_type] != "any":
                known += 1
                assert TensorProto.DataType.Name(kind).lower() in KERNELS[node.op_type].split(), node.name
        assert known > 5
        assert all(dim.dim_value >= 0 for each in graph.input for dim in each.type.tensor_type.shape.dim)


def test_one_operator_stands_for_every_attention(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    graph = onnx.load(made(checkpoint("flan"), tmp_path / "model", "bf16") / DECODER, load_external_data=False).graph
    layers = VARIANTS["flan"]["num_decoder_layers"]
    assert sum(node.op_type == "MultiHeadAttention" for node in graph.node) == 2 * layers
    assert sum(node.op_type == "TensorScatter" for node in graph.node) == 2 * layers
    assert not any(node.op_type in ("Transpose", "Shape", "Concat", "Expand", "Range") for node in graph.node)


def test_what_formats_tell_of_themselves() -> None:
    """To the manifest, and to the check of an export."""
    assert {name: each.most_divergence for name, each in FORMATS.items()} == {"fp32-cuda": 1e-6, "bf16": 0.02, "fp16": 0.002}
    half = FORMATS["fp16"]
    assert half.describe() == {"products": "float16", "stream": "float32"}
    forms = [each.form for each in (half.inward, half.outward, half.gates, half.wo, half.head)]
    assert forms == ["float16"] * 3 + ["float32"] * 2


def test_half_precision_is_not_for_the_cpu(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The golden run is float32's, so that `verify` can tell on the GPU what the export could not."""
    folder = made(checkpoint("flan"), tmp_path / "model", "bf16")
    manifest = Manifest.load(folder)
    assert (manifest.providers, manifest.layout, manifest.onnxruntime.at_least) == (("cuda",), "cuda", "1.31.1")
    assert len(manifest.golden["logprobs"]) == 8
    assert not manifest.quality
    with pytest.raises(ProviderError, match=r"bf16 graphs are for CUDA only.*--precision int8"):
        Engine.load(folder)
    exact = Engine.load(made(checkpoint("flan"), tmp_path / "exact", "fp32"))
    golden = exact.score(manifest.golden["source_ids"], manifest.golden["target_ids"])
    np.testing.assert_allclose(golden, manifest.golden["logprobs"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["encoder.block.0.layer.0.SelfAttention.o", "decoder.block.0.layer.0.SelfAttention.k"])
def test_a_weight_beyond_float16_is_told(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """By its own name, also where several become one product."""
    from safetensors.numpy import load_file, save_file

    from ramekin.errors import CheckpointError

    broken = Path(shutil.copytree(checkpoint("flan"), tmp_path / "broken"))
    state = load_file(broken / "model.safetensors")
    state[f"{name}.weight"][0, 0] = 1e6
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: 1e\+06.*float16.*--precision bf16"):
        made(broken, tmp_path / "model", "fp16")
    assert not (tmp_path / "model").exists()


def test_log_probabilities_are_the_logits_own(exported: Callable[[str, str], Engine]) -> None:
    engine = exported("flan", "fp32-cuda")
    cache = engine.model.new_cache(engine.model.prefill(np.arange(3, 3 + SOURCES[2])), 3, 8, 20)
    logits = engine.model.step([0, 0, 0], cache)
    assert logits.top_logprobs is not None
    for place in (0, 19):
        expected = log_probabilities(logits.full, logits.top_ids[:, place])
        np.testing.assert_allclose(logits.top_logprobs[:, place], expected, rtol=0, atol=1e-5)
