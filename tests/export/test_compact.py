"""Keys and values in int8: the same as computing with what they stand for in float32."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import load_file, save_file

from ramekin import Engine, ModelFormatError, SamplingParams, VerificationError, golden
from ramekin.cache import FEW_ROWS, WORTH_STEPS, CompactCross, Cross
from ramekin.manifest import (
    COMPACT_DECODER,
    DECODER,
    DEFAULT_PROMPT,
    FileRecord,
    Manifest,
    VersionRange,
    past_names,
    present_names,
)
from ramekin.model import COMPACT_RUNTIMES
from ramekin_export.checkpoint import Checkpoint
from ramekin_export.compact import add_compact
from ramekin_export.decoder import self_attention_at
from ramekin_export.kv_scales import REACH, SAMPLING, measured_scales
from ramekin_export.pipeline import export
from ramekin_export.recipe import RECIPES, Recipe
from ramekin_export.verify import Checks, judge, prompts
from ramekin_export.writer import Writer, save
from tests.export.variants import VARIANTS

pytestmark = pytest.mark.skipif(
    onnxruntime.__version__ not in COMPACT_RUNTIMES, reason=f"onnxruntime {onnxruntime.__version__} cannot"
)
SOURCE = np.random.default_rng(0).integers(3, 500, 150)
FED = np.random.default_rng(1).integers(3, 500, (12, 5))
PAPERS = Checks().calibration_papers()


def write(checkpoint: Path, folder: Path, precision: str, recipe: Recipe) -> Path:
    folder.mkdir(exist_ok=True)
    Writer(Checkpoint.open(str(checkpoint)), DEFAULT_PROMPT).write(folder, precision, recipe, lambda _done, _all: None)
    return folder


def scales_of(folder: Path) -> np.ndarray:
    return measured_scales(folder, PAPERS, lambda _done, _all: None)


def with_compact(folder: Path, scales: np.ndarray) -> Path:
    save(folder, add_compact(folder, Manifest.load(folder), scales))
    return folder


def own_in_floats(folder: Path) -> Path:
    """Let the compact decoder keep samples' own keys and values in floats: the prompt's are all that is rounded."""
    model = onnx.load(folder / COMPACT_DECODER, load_external_data=False)
    own = {*past_names(64), *present_names(64)}
    for value in (*model.graph.input, *model.graph.output):
        if value.name in own:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention" and own & {*node.input}:
            del node.input[11:]
            for each in [each for each in node.attribute if "quant_type" in each.name or each.name == "kv_cache_bit_width"]:
                node.attribute.remove(each)
    (folder / COMPACT_DECODER).write_bytes(model.SerializeToString())
    recorded(folder)
    return folder


def recorded(folder: Path) -> None:
    """Bring the manifest up to date with the graph."""
    manifest = Manifest.load(folder)
    files = {**manifest.files, COMPACT_DECODER: FileRecord.of(folder / COMPACT_DECODER)}
    save(folder, replace(manifest, files=files))


def rounding(exact: Path, folder: Path, scales: np.ndarray) -> Path:
    """The model of `exact`, whose decoder rounds its own keys and values in plain float32 nodes."""
    shutil.copytree(exact, folder)
    (folder / COMPACT_DECODER).unlink(missing_ok=True)
    model = onnx.load(folder / DECODER, load_external_data=False)
    nodes, layers = [], len(scales) // 2
    attention = {f"{self_attention_at(i)}.heads": i for i in range(layers)}
    for node in model.graph.node:
        if node.output[0] in attention:
            i, at = attention[node.output[0]], node.output[0]
            nodes.append(helper.make_node("Split", [node.input[0]], [f"{at}.{x}" for x in "qkv"], axis=2, num_outputs=3))
            for part, scale in zip("kv", scales[2 * i : 2 * i + 2], strict=True):
                name = f"{at}.{part}"
                model.graph.initializer.extend(
                    numpy_helper.from_array(np.asarray(value, np.float32), f"{name}.{what}")
                    for what, value in (("scale", scale.reshape(1, 1, -1)), ("least", -128), ("most", 127))
                )
                nodes += [
                    helper.make_node("Div", [name, f"{name}.scale"], [f"{name}.units"]),
                    helper.make_node("Round", [f"{name}.units"], [f"{name}.whole"]),
                    helper.make_node("Clip", [f"{name}.whole", f"{name}.least", f"{name}.most"], [f"{name}.cut"]),
                    helper.make_node("Mul", [f"{name}.cut", f"{name}.scale"], [f"{name}.read"]),
                ]
            nodes.append(helper.make_node("Concat", [f"{at}.q", f"{at}.k.read", f"{at}.v.read"], [f"{at}.packed"], axis=2))
            node.input[0] = f"{at}.packed"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (folder / DECODER).write_bytes(model.SerializeToString())
    manifest = Manifest.load(folder)
    files = {name: record for name, record in manifest.files.items() if name != COMPACT_DECODER}
    save(folder, replace(manifest, files={**files, DECODER: FileRecord.of(folder / DECODER)}))
    return folder


@pytest.fixture(scope="module")
def engines(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, float], tuple[Engine, Engine]]:
    """An engine with weights in float32 and keys and values in int8, and one that computes the same in floats.

    The second argument multiplies the scales: a small one cuts much.
    """
    made: dict[tuple[str, float], tuple[Engine, Engine]] = {}

    def make(variant: str, times: float = 1.0) -> tuple[Engine, Engine]:
        if (variant, times) not in made:
            base = tmp_path_factory.mktemp(variant)
            folder = write(checkpoint(variant), base / "compact", "fp32", RECIPES["fp32"])
            scales = scales_of(folder) * np.float32(times)
            reference = rounding(folder, base / "reference", scales)
            compact = with_compact(folder, scales)
            made[variant, times] = Engine.load(compact, threads=2), Engine.load(reference, threads=2)
        return made[variant, times]

    return make


@pytest.fixture
def compact(engines: Callable[[str], tuple[Engine, Engine]]) -> Callable[[str], Engine]:
    return lambda variant: engines(variant)[0]


@pytest.fixture(scope="module")
def prompt_only(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Engine]:
    """An engine whose only difference from float32 is the prompt in int8."""

    def make(variant: str) -> Engine:
        folder = write(checkpoint(variant), tmp_path_factory.mktemp(variant), "fp32", RECIPES["fp32"])
        return Engine.load(own_in_floats(with_compact(folder, scales_of(folder))), threads=2)

    return make


def read_back(cross: Cross) -> Cross:
    """What keys and values in int8 stand for, as floats."""
    small = CompactCross.of(cross, threads=2)
    floats = [array * scale for array, scale in zip(small.arrays, small.scales, strict=True)]
    return Cross(tuple(np.ascontiguousarray(a.swapaxes(2, 3) if i % 2 else a) for i, a in enumerate(floats)))


def run(model: Any, cross: Cross, rows: int, compact_at: int | None) -> np.ndarray:
    """Logits of each step; the prompt is read in int8 from step `compact_at` on."""
    cache, steps = model.new_cache(cross, rows, len(FED), 5), []
    for number, tokens in enumerate(FED):
        if number == compact_at:
            model.compact(cache)
        steps.append(model.step(tokens[:rows], cache).full.copy())
    return np.array(steps)


def agree(found: np.ndarray, expected: np.ndarray) -> None:
    """To 1e-4 of logits near 1 in the mean; a single value that lies between two integers may be rounded either way."""
    difference = np.abs(found - expected)
    assert difference.mean() < 1e-4
    assert difference.max() < 5e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_in_int8_means_the_floats_it_was_rounded_to(
    variant: str, prompt_only: Callable[[str], Engine], exported: Callable[[str, str], Engine]
) -> None:
    """To 1e-4 of logits near 1, for one sample, two, and more than would do that of themselves; and floats do differ."""
    model: Any = prompt_only(variant).model
    plain: Any = exported(variant, "fp32").model
    cross = plain.prefill(SOURCE)
    rounded = read_back(cross)
    for rows in (1, 2, 5):
        expected = run(plain, rounded, rows, None)
        np.testing.assert_allclose(run(model, cross, rows, 0), expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(run(model, cross, rows, None), run(plain, cross, rows, None), rtol=0, atol=1e-5)
        assert np.abs(expected - run(plain, cross, rows, None)).max() > 2e-4


@pytest.mark.parametrize("times", [1.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_in_int8_means_the_floats_it_was_rounded_to(
    variant: str,
    times: float,
    engines: Callable[[str, float], tuple[Engine, Engine]],
    exported: Callable[[str, str], Engine],
) -> None:
    """For one sample, two, and more than would read the prompt so of themselves; and floats differ by far more."""
    compact, reference = engines(variant, times)
    model: Any = compact.model
    rounds: Any = reference.model
    plain: Any = exported(variant, "fp32").model
    cross = plain.prefill(SOURCE)
    rounded = read_back(cross)
    for rows in (1, 2, 5):
        expected = run(rounds, rounded, rows, None)
        agree(run(model, cross, rows, 0), expected)
        own = run(rounds, cross, rows, None)
        agree(run(model, cross, rows, None), own)
        for difference in (expected - own, own - run(plain, cross, rows, None)):
            assert np.abs(difference).mean() > 5e-4


@pytest.mark.parametrize("own", ["floats", "int8"])
def test_leaving_samples_change_nothing(
    own: str,
    engines: Callable[[str], tuple[Engine, Engine]],
    prompt_only: Callable[[str], Engine],
    exported: Callable[[str, str], Engine],
) -> None:
    """Rows 1 and 3 of four go on in int8, as they would have alone; the floats are given back."""
    pair = engines("flan") if own == "int8" else (prompt_only("flan"), exported("flan", "fp32"))
    model, reference = (engine.model for engine in pair)
    cross = reference.prefill(SOURCE)
    caches = [model.new_cache(cross, 4, 12, 5), reference.new_cache(cross, 4, 12, 5)]
    for engine, cache in zip((model, reference), caches, strict=True):
        engine.step(FED[0][:4], cache)
        cache.keep([1, 3])
    caches[1].cross, caches[1].binding = read_back(cross), None
    model.compact(caches[0])
    for tokens in FED[1:]:
        found, expected = (
            engine.step(tokens[:2], cache).full for engine, cache in zip((model, reference), caches, strict=True)
        )
        if own == "int8":
            agree(found, expected)
        else:
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    floats = weakref.ref(cross)
    del cross
    assert floats() is None


def test_a_run_leaves_int8_as_it_is(compact: Callable[[str], Engine]) -> None:
    """The graph gives back what it reads, in the same memory: it must not write there."""
    model: Any = compact("flan").model
    cache = model.new_cache(model.prefill(SOURCE), 2, 12, 5)
    model.step(FED[0][:2], cache)
    assert not any(array.any() for array in model._unused.arrays)
    model.compact(cache)
    before = [array.copy() for array in cache.cross.arrays]
    for tokens in FED[1:]:
        model.step(tokens[:2], cache)
    np.testing.assert_array_equal(before, cache.cross.arrays)


@pytest.mark.parametrize(
    ("n", "tokens", "asked"),
    [
        (1, WORTH_STEPS + 1, 1),
        (1, WORTH_STEPS, None),
        (1, 2, None),
        (2, 2 * WORTH_STEPS + 1, 1),
        (2, 2 * WORTH_STEPS, None),
        (FEW_ROWS, 100, 1),
        (FEW_ROWS + 1, 200, None),
    ],
)
def test_few_samples_change_over_after_their_first_token(
    n: int, tokens: int, asked: int | None, compact: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = compact("flan")
    calls: list[int] = []
    monkeypatch.setattr(engine.model, "compact", lambda cache: calls.append(cache.length))
    engine.generate(SOURCE, SamplingParams(n=n, min_new_tokens=tokens, max_new_tokens=tokens, seed=0))
    assert (calls[0] if calls else None) == asked


@pytest.mark.parametrize("source", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_short_prompts(source: int, n: int, compact: Callable[[str], Engine]) -> None:
    """The operator takes no more rows than the prompt has tokens."""
    engine = compact("flan")
    params = SamplingParams(n=n, max_new_tokens=40, min_new_tokens=40, seed=0)
    assert [len(sample.token_ids) for sample in engine.generate(SOURCE[:source], params)] == [40] * n
    model: Any = engine.model
    cache = model.new_cache(model.prefill(SOURCE[:source]), n, 2, 1)
    model.compact(cache)
    assert isinstance(cache.cross, CompactCross) == (n <= source)
    model.step(FED[0][:n], cache)


def older(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if onnxruntime could not compute the graph."""
    for module in ("ramekin.model", "ramekin_export.pipeline"):
        monkeypatch.setattr(f"{module}.COMPACT_RUNTIMES", VersionRange(at_least="1.999.0"))


def test_an_older_onnxruntime_takes_the_plain_graph(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose keys and values are floats: near to int8, and the very tokens of a newer one that keeps floats too."""
    folder = write(checkpoint("flan"), tmp_path / "model", "int8", RECIPES["int8"])
    newer = Engine.load(with_compact(folder, scales_of(folder)))
    older(monkeypatch)
    plain = Engine.load(folder)
    assert (newer.model.compacts, plain.model.compacts) == (True, False)
    difference = np.abs(newer.logits(SOURCE, FED[:, 0]) - plain.logits(SOURCE, FED[:, 0])).max()
    assert 0 < difference < 0.2
    monkeypatch.undo()
    newer, params = Engine.load(own_in_floats(folder)), SamplingParams(n=3, max_new_tokens=12, min_new_tokens=12, seed=4)
    assert newer.model.compacts
    expected, found = ([sample.token_ids for sample in each.generate(SOURCE, params)] for each in (newer, plain))
    assert found == expected


def test_nothing_is_written_that_cannot_be_looked_at(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export of an older onnxruntime would come without proof of what newer ones run."""
    older(monkeypatch)
    manifest = export(str(checkpoint("flan")), tmp_path / "model", "int8", checks=Checks(verify=False))
    assert COMPACT_DECODER not in manifest.files
    assert "few_logprobs" not in manifest.golden


def test_only_quantized_exports_have_it(exported: Callable[[str, str], Engine]) -> None:
    assert [exported("flan", precision).model.compacts for precision in ("fp32", "int8", "int4", "fp32-cuda")] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("own", ["floats", "int8"])
@pytest.mark.parametrize("broken", [None, "FusedMatMul", "GroupQueryAttention"])
def test_verification_judges_both_ways(
    broken: str | None, own: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """With float32 weights all it finds comes from rounding; keys of the wrong layer are found out in either form."""
    exact = write(checkpoint("flan"), tmp_path / "exact", "fp32", RECIPES["fp32"])
    folder = write(checkpoint("flan"), tmp_path / "compact", "fp32", RECIPES["fp32"])
    with_compact(folder, scales_of(folder))
    if own == "floats":
        own_in_floats(folder)
    if broken:
        model = onnx.load(folder / COMPACT_DECODER, load_external_data=False)
        names = {f"{kind}_key_1": f"{kind}_key_0" for kind in ("cross", "compact")}
        for node in model.graph.node:
            if node.op_type == broken:
                node.input[:] = [names.get(name, name) for name in node.input]
        (folder / COMPACT_DECODER).write_bytes(model.SerializeToString())
        recorded(folder)
    found = judge(exact, folder, Checks().verification_papers(), "", lambda _done, _all: None)["all"]["kl"]
    assert found > (1e-4 if own == "floats" else 1e-3) if broken else 1e-9 < found < (1e-5 if own == "floats" else 1e-4)


def test_a_graph_that_is_not_the_compact_one_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with_compact(write(checkpoint("flan"), tmp_path, "int8", RECIPES["int8"]), np.ones((4, 4, 1, 24), np.float32))
    (tmp_path / COMPACT_DECODER).write_bytes((tmp_path / DECODER).read_bytes())
    recorded(tmp_path)
    with pytest.raises(
        ModelFormatError, match=rf"^{COMPACT_DECODER}: does not belong to this manifest .*export the model again"
    ):
        Engine.load(tmp_path)


def test_the_golden_run_knows_every_form(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a machine with an older onnxruntime is held to what it can repeat, and one with a newer to what that computes."""
    manifest = export(str(checkpoint("flan")), tmp_path / "model", "int8", checks=Checks(verify=False))
    known = dict(manifest.golden)
    newer, forms = Engine.load(tmp_path / "model"), ("logprobs", "compact_logprobs", "few_logprobs")
    assert len({tuple(known[name]) for name in forms}) == 3
    for odd in ([10**6], ["a"], [[1]], [], [-1]):
        with pytest.raises(ModelFormatError, match="no usable golden run"):
            golden.check(newer, {**known, "target_ids": odd})
    older(monkeypatch)
    for engine, read in ((newer, forms[1:]), (Engine.load(tmp_path / "model"), forms[:1])):
        assert golden.check(engine, known) == 0
        for name in forms:
            changed = {**known, name: [each - 2 for each in known[name]]}
            if name in read:
                with pytest.raises(VerificationError, match=r"differ by 2, more than 0\.5"):
                    golden.check(engine, changed)
            else:
                assert golden.check(engine, changed) == 0


def test_scales_are_what_each_channel_reaches(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The same samples again, token by token: the largest size of every channel over all of them becomes `REACH` units."""
    folder = write(checkpoint("flan"), tmp_path / "model", "int8", RECIPES["int8"])
    scales, engine = scales_of(folder), Engine.load(folder)
    model: Any = engine.model
    largest = np.zeros((4, 4, 1, 24), np.float32)
    sources = prompts(engine.tokenizer, engine.manifest, PAPERS, whole=True)
    assert len(sources) > 1
    for source in sources:
        samples = engine.generate(source, SAMPLING)
        assert [len(sample.token_ids) for sample in samples] == [48] * 8
        cache = model.new_cache(model.prefill(source), 8, 48, 1)
        for step in range(48):
            model.step([(engine.manifest.tokens.start, *sample.token_ids)[step] for sample in samples], cache)
        for found, array in zip(largest, cache.past, strict=True):
            np.maximum(found, np.abs(array).max(axis=(0, 2))[:, None], out=found)
    np.testing.assert_allclose(scales * REACH, largest, rtol=1e-5)


def test_a_model_that_ends_at_once_is_asked_for_more(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Nearly every token is an end, and still what other parameters make of it is not cut."""
    source = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(1, 480))}))
    folder = write(source, tmp_path / "model", "fp32", RECIPES["fp32"])
    plain = Engine.load(folder)
    assert max(len(sample.token_ids) for sample in plain.generate(SOURCE, SamplingParams(n=4, seed=0))) < 5
    expected = plain.logits(SOURCE, FED[:, 0])
    found = Engine.load(with_compact(folder, scales_of(folder))).logits(SOURCE, FED[:, 0])
    assert np.abs(found - expected).mean() < 0.05


def test_channels_of_zeros(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    weights = load_file(source / "model.safetensors")
    weights["decoder.block.0.layer.0.SelfAttention.v.weight"][:] = 0
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    folder = write(source, tmp_path / "model", "fp32", RECIPES["fp32"])
    expected, scales = Engine.load(folder).logits(SOURCE, FED[:, 0]), scales_of(folder)
    assert (scales[1] > 0).all()
    assert (scales[1] < 1e-20).all()
    found = Engine.load(with_compact(folder, scales)).logits(SOURCE, FED[:, 0])
    assert np.abs(found - expected).mean() < 0.05


def test_scales_want_a_cache_of_floats(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write(checkpoint("flan"), tmp_path / "model", "int8", RECIPES["int8"])
    with_compact(folder, scales_of(folder))
    with pytest.raises(ValueError, match="int8 already"):
        scales_of(folder)
