"""Keys and values in 8 bits: the same as computing with what they stand for in float32."""

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
from ramekin.cache import Cross
from ramekin.manifest import (
    COMPACT_DECODER,
    COMPACT_ENCODER,
    DECODER,
    DEFAULT_PROMPT,
    Dims,
    FileRecord,
    Manifest,
    VersionRange,
)
from ramekin.model import COMPACT_RUNTIMES
from ramekin.tensors import compact_shapes, compact_type, past_names, present_names
from ramekin_export.checkpoint import Checkpoint
from ramekin_export.compact import OPSET, REACH, SHARES, Units, _attention, add_compact
from ramekin_export.decoder import CROSS_ATTENTION, cross_attention_at, self_attention_at
from ramekin_export.graph import GraphBuilder
from ramekin_export.pipeline import export
from ramekin_export.reach import SAMPLING, measured_reach
from ramekin_export.recipe import RECIPES, Layers, PerBlock, Recipe
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


def units_of(folder: Path) -> Units:
    return Units.of(measured_reach(folder, PAPERS, lambda _done, _all: None))


def with_compact(folder: Path, units: Units) -> Path:
    save(folder, add_compact(folder, Manifest.load(folder), units))
    return folder


def recorded(folder: Path) -> None:
    """Bring the manifest up to date with the graph."""
    manifest = Manifest.load(folder)
    files = {**manifest.files, COMPACT_DECODER: FileRecord.of(folder / COMPACT_DECODER)}
    save(folder, replace(manifest, files=files))


class Plain:
    """A decoder graph that gets further nodes in front of and behind its own, in float32 and of plain operators."""

    def __init__(self, folder: Path) -> None:
        self.model = onnx.load(folder / DECODER, load_external_data=False)
        self.nodes = list(self.model.graph.node)
        del self.model.graph.node[:]

    def array(self, name: str, value: Any) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.model.graph.node.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def whole(self, x: str, unit: np.ndarray | str) -> str:
        """How many units `x` is, rounded to even and cut."""
        divisor = unit if isinstance(unit, str) else self.array(f"{x}.unit", unit)
        rounded = self.node("Round", [self.node("Div", [x, divisor], f"{x}.units")], f"{x}.whole")
        ends = self.array(f"{x}.least", -128), self.array(f"{x}.most", 127)
        return self.node("Clip", [rounded, *ends], f"{x}.cut")


def rounding(exact: Path, folder: Path, units: Units) -> Path:
    """The model of `exact`, whose decoder computes in floats what the compact one does, of what `read_back` gives."""
    shutil.copytree(exact, folder)
    g, layers = Plain(folder), range(len(units.step))
    owns = {f"{self_attention_at(i)}.heads": i for i in layers}
    crosses = {f"{cross_attention_at(i)}.{part}": i for i in layers for part in CROSS_ATTENTION}
    for node in g.nodes:
        result = node.output[0]
        at, _, part = result.rpartition(".")
        i = owns.get(result, crosses.get(result))
        if result in owns:
            g.model.graph.node.append(
                helper.make_node("Split", [node.input[0]], [f"{result}.{x}" for x in "qkv"], axis=2, num_outputs=3)
            )
            read = [f"{result}.q"]
            for x, unit in (("k", units.own_keys[i]), ("v", units.own_values[i])):
                name, flat = f"{result}.{x}", unit.reshape(1, 1, -1)
                read.append(g.node("Mul", [g.whole(name, flat), f"{name}.unit"], f"{name}.read"))
            node.input[0] = g.node("Concat", read, f"{result}.packed", axis=2)
        elif i is not None and part == "folded":
            node.input[0] = g.whole(node.input[0], units.queries[i].reshape(-1))
        elif i is not None and part == "shares":
            node.input[0] = g.node("Mul", [node.input[0], g.array(f"{at}.step", units.step[i])], f"{at}.scaled")
        elif i is not None and part == "mixed":
            last = numpy_helper.from_array(np.array([-1]), f"{at}.last")
            g.model.graph.initializer.append(last)
            largest = g.node("ReduceMax", [node.input[0], last.name], f"{at}.largest")
            unit = g.node("Div", [largest, g.array(f"{at}.most", SHARES)], f"{at}.share")
            node.input[0] = g.node("Mul", [g.whole(node.input[0], unit), unit], f"{at}.shares.read")
        elif i is not None and part == "heads":
            node.output[0] = f"{at}.flat"
        g.model.graph.node.append(node)
        if i is not None and part == "heads" and result in crosses:
            g.node("Add", [f"{at}.flat", g.array(f"{at}.means", units.means[i].reshape(-1))], result)
    (folder / DECODER).write_bytes(g.model.SerializeToString())
    manifest = Manifest.load(folder)
    save(folder, replace(manifest, files={**manifest.files, DECODER: FileRecord.of(folder / DECODER)}))
    return folder


def read_back(cross: Cross) -> Cross:
    """What keys and values of a compact encoder stand for, as they were moved and stretched."""
    floats = {}
    for name in [name for name in cross if not name.endswith(("_scale", "_zero"))]:
        small, scale, zero = (cross[name + end] for end in ("", "_scale", "_zero"))
        exact = ((small.astype(np.float64) - zero) * scale).astype(np.float32)
        floats[name] = np.ascontiguousarray(exact.swapaxes(1, 2))[None]  # from either layout to that of floats
    return floats


@pytest.fixture(scope="module")
def engines(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Engine, Engine, Units]]:
    """An engine with weights in float32 and keys and values in 8 bits, one that computes the same in floats, and the units.

    The second argument multiplies the units that are constant: small ones cut much.
    """
    made: dict[tuple[str, float], tuple[Engine, Engine, Units]] = {}

    def make(variant: str, times: float = 1.0) -> tuple[Engine, Engine, Units]:
        if (variant, times) not in made:
            base = tmp_path_factory.mktemp(variant)
            folder = write(checkpoint(variant), base / "compact", "fp32", RECIPES["fp32"])
            units = units_of(folder)
            constant = ("own_keys", "own_values", "queries", "step")
            units = replace(units, **{name: getattr(units, name) * np.float32(times) for name in constant})
            reference = rounding(folder, base / "reference", units)
            compact = with_compact(folder, units)
            made[variant, times] = Engine.load(compact, threads=2), Engine.load(reference, threads=2), units
        return made[variant, times]

    return make


def run(model: Any, cross: Cross, rows: int) -> np.ndarray:
    """Logits of each step."""
    cache = model.new_cache(cross, rows, len(FED), 5)
    return np.array([model.step(tokens[:rows], cache).full.copy() for tokens in FED])


def agree(found: np.ndarray, expected: np.ndarray) -> None:
    """To the last bits of logits near 1. A value between two integers may be rounded either way, and moves others."""
    difference = np.abs(found - expected)
    assert np.median(difference) < 2e-6
    assert difference.mean() < 1e-4
    assert difference.max() < 5e-3


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_and_values_are_within_half_a_unit(
    variant: str, precision: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of what the plain encoder gives, for whatever prompt; and units are no larger than 8 bits need."""
    folder = write(checkpoint(variant), tmp_path / "model", precision, RECIPES[precision])
    plain: Any = Engine.load(folder).model
    units = units_of(folder)
    model: Any = Engine.load(with_compact(folder, units)).model
    assert (model.compact, plain.compact) == (True, False)
    for source in (SOURCE, SOURCE[:1]):
        found, exact = model.prefill(source), plain.prefill(source)
        for name, array in read_back(found).items():
            part, i = name.split("_")[1:]
            moved = (units.centres, units.factors) if part == "key" else (units.means, 1 / units.widths)
            centre, factor = (each[int(i)][None, :, None] for each in moved)
            expected, got = (each if part == "key" else each.swapaxes(2, 3) for each in (exact[name], array))
            stretched = (expected - centre) * factor
            unit = found[f"{name}_scale"]
            if part == "value":
                got, unit = got * factor, (unit * factor[0]).mean()  # without the widths
            assert np.abs(got - stretched).max() <= unit * (0.5 if precision == "fp32" else 0.51) + 1e-5
            reach = max(stretched.max(), 0) - min(stretched.min(), 0)
            np.testing.assert_allclose(unit, reach / 255, rtol=0.02)


@pytest.mark.parametrize("times", [1.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_compact_graphs_mean_what_they_round_to(
    variant: str,
    times: float,
    engines: Callable[..., tuple[Engine, Engine, Units]],
    exported: Callable[[str, str], Engine],
) -> None:
    """For one sample, two and five; and plain floats differ by far more."""
    compact, reference, _ = engines(variant, times)
    model: Any = compact.model
    rounds: Any = reference.model
    plain: Any = exported(variant, "fp32").model
    cross = model.prefill(SOURCE)
    found, expected, floats = (
        np.concatenate([run(each, prompt, rows) for rows in (1, 2, 5)], axis=1)
        for each, prompt in ((model, cross), (rounds, read_back(cross)), (plain, plain.prefill(SOURCE)))
    )
    agree(found, expected)
    assert np.abs(expected - floats).mean() > 3e-3


def test_leaving_samples_change_nothing(engines: Callable[..., tuple[Engine, Engine, Units]]) -> None:
    """Rows 1 and 3 of four go on as the float reference does; the prompt's memory is given back."""
    model, reference = (engine.model for engine in engines("flan")[:2])
    cross = model.prefill(SOURCE)
    caches = [model.new_cache(cross, 4, 12, 5), reference.new_cache(read_back(cross), 4, 12, 5)]
    for engine, cache in zip((model, reference), caches, strict=True):
        engine.step(FED[0][:4], cache)
        cache.keep([1, 3])
    for tokens in FED[1:]:
        agree(*(engine.step(tokens[:2], cache).full for engine, cache in zip((model, reference), caches, strict=True)))
    kept = weakref.ref(cross["cross_key_0"])
    del cross, caches, cache
    assert kept() is None


@pytest.mark.parametrize("source", [1, 2, 3, 7, 1500])
@pytest.mark.parametrize("n", [1, 4])
def test_short_and_long_prompts(source: int, n: int, engines: Callable[..., tuple[Engine, Engine, Units]]) -> None:
    compact, reference, _ = engines("flan")
    model: Any = compact.model
    cross = model.prefill(np.resize(SOURCE, source))
    agree(run(model, cross, n), run(reference.model, read_back(cross), n))


def test_shares_too_small_for_a_unit_are_not_lost(
    engines: Callable[..., tuple[Engine, Engine, Units]], tmp_path: Path
) -> None:
    """One token with half of all attention leaves each of 400 others less than half a unit: they count as the mean."""
    units, heads, width, length = engines("flan")[2], 4, 24, 401
    dims = Dims(vocab_size=9, d_model=96, d_ff=9, num_heads=heads, head_dim=width, encoder_layers=1, decoder_layers=1)
    rng = np.random.default_rng(0)
    means = rng.normal(size=(1, heads, width)).astype(np.float32) * 3
    g = GraphBuilder("attention", None, OPSET)
    query = g.input("query", np.float32, ["n", 1, heads * width])
    for name, shape in compact_shapes(dims, "source").items():
        g.input(name, compact_type(name), shape)
    ones = np.ones_like(means)
    _attention(g, dims, replace(units, queries=ones, step=np.ones(1, np.float32), means=means), 0, query)
    result = f"{cross_attention_at(0)}.heads"
    g.output(result, np.float32, ["n", 1, heads * width])
    values = rng.integers(-100, 100, (heads, length, width)).astype(np.int8)
    keys = np.zeros((heads, width, length), np.uint8)
    keys[:, :, 0] = 1
    feed = {
        "query": np.ones((2, 1, heads * width), np.float32),
        "cross_key_0": keys,
        "cross_key_0_scale": np.array(np.log(length - 1) / width, np.float32),
        "cross_key_0_zero": np.array(0, np.uint8),
        "cross_value_0": values,
        "cross_value_0_scale": np.full((heads, 1, width), 0.01, np.float32),
        "cross_value_0_zero": np.array(0, np.int8),
    }
    g.save(tmp_path / "attention.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "attention.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run([result], feed)
    expected = means[0] + 0.01 * (0.5 * values[:, 0] + 0.5 * values[:, 1:].mean(axis=1))
    np.testing.assert_allclose(found[1].reshape(heads, width), expected, atol=0.06)


def older(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if onnxruntime could not compute the graphs."""
    for module in ("ramekin.model", "ramekin_export.pipeline"):
        monkeypatch.setattr(f"{module}.COMPACT_RUNTIMES", VersionRange(at_least="1.999.0"))


def test_an_older_onnxruntime_takes_the_plain_graph(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose keys and values are floats: near to int8, and what the folder gave before it had compact graphs."""
    folder = write(checkpoint("flan"), tmp_path / "model", "int8", RECIPES["int8"])
    before = Engine.load(folder)
    newer = Engine.load(with_compact(folder, units_of(folder)))
    older(monkeypatch)
    plain = Engine.load(folder)
    assert (newer.model.compact, plain.model.compact) == (True, False)
    difference = np.abs(newer.logits(SOURCE, FED[:, 0]) - plain.logits(SOURCE, FED[:, 0])).max()
    assert 0 < difference < 0.2
    np.testing.assert_array_equal(before.logits(SOURCE, FED[:, 0]), plain.logits(SOURCE, FED[:, 0]))


@pytest.mark.parametrize("missing", [COMPACT_ENCODER, COMPACT_DECODER])
def test_half_a_pair_is_none(missing: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """As in folders of an earlier form, which had a compact decoder only: the plain graphs are there."""
    folder = write(checkpoint("flan"), tmp_path / "model", "int8", RECIPES["int8"])
    manifest = add_compact(folder, Manifest.load(folder), units_of(folder))
    save(folder, replace(manifest, files={name: record for name, record in manifest.files.items() if name != missing}))
    assert not Engine.load(folder).model.compact


def test_nothing_is_written_that_cannot_be_looked_at(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export of an older onnxruntime would come without proof of what newer ones run."""
    older(monkeypatch)
    manifest = export(str(checkpoint("flan")), tmp_path / "model", "int8", checks=Checks(verify=False))
    assert not {COMPACT_ENCODER, COMPACT_DECODER} & manifest.files.keys()
    assert "compact_logprobs" not in manifest.golden


def test_only_quantized_exports_have_it(exported: Callable[[str, str], Engine]) -> None:
    assert [exported("flan", precision).model.compact for precision in ("fp32", "int8", "int4")] == [False, True, True]


@pytest.mark.parametrize("broken", [None, "MatMulIntegerToFloat", "GroupQueryAttention"])
def test_verification_judges_it(broken: str | None, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """With float32 weights all it finds comes from rounding; keys of the wrong layer are found out."""
    exact = write(checkpoint("flan"), tmp_path / "exact", "fp32", RECIPES["fp32"])
    folder = write(checkpoint("flan"), tmp_path / "compact", "fp32", RECIPES["fp32"])
    with_compact(folder, units_of(folder))
    if broken:
        model = onnx.load(folder / COMPACT_DECODER, load_external_data=False)
        for node in model.graph.node:
            if node.op_type == broken:
                node.input[:] = [name.replace("_key_1", "_key_0") for name in node.input]
        (folder / COMPACT_DECODER).write_bytes(model.SerializeToString())
        recorded(folder)
    found = judge(exact, folder, Checks().verification_papers(), "", lambda _done, _all: None)["all"]["kl"]
    assert found > 1e-3 if broken else 1e-9 < found < 1e-4


def test_a_graph_that_is_not_the_compact_one_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write(checkpoint("flan"), tmp_path, "int8", RECIPES["int8"])
    with_compact(folder, units_of(folder))
    (tmp_path / COMPACT_DECODER).write_bytes((tmp_path / DECODER).read_bytes())
    recorded(tmp_path)
    with pytest.raises(
        ModelFormatError, match=rf"^{COMPACT_DECODER}: does not belong to this manifest .*export the model again"
    ):
        Engine.load(tmp_path)


def test_the_golden_run_knows_both_pairs(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a machine with an older onnxruntime is held to what it can repeat, and one with a newer to what that computes."""
    manifest = export(str(checkpoint("flan")), tmp_path / "model", "int8", checks=Checks(verify=False))
    known = dict(manifest.golden)
    newer, forms = Engine.load(tmp_path / "model"), ("logprobs", "compact_logprobs")
    assert len({tuple(known[name]) for name in forms}) == 2
    for odd in ([10**6], ["a"], [[1]], [], [-1]):
        with pytest.raises(ModelFormatError, match="no usable golden run"):
            golden.check(newer, {**known, "target_ids": odd})
    older(monkeypatch)
    for engine, read in ((newer, forms[1]), (Engine.load(tmp_path / "model"), forms[0])):
        assert golden.check(engine, known) == 0
        for name in forms:
            changed = {**known, name: [each - 2 for each in known[name]]}
            if name == read:
                with pytest.raises(VerificationError, match=r"differ by 2, more than 0\.5"):
                    golden.check(engine, changed)
            else:
                assert golden.check(engine, changed) == 0


def test_units_are_what_each_channel_reaches(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The same samples again, token by token: the largest size of every channel over all of them becomes `REACH` units."""
    folder = write(checkpoint("flan"), tmp_path / "model", "int8", RECIPES["int8"])
    reach, engine = measured_reach(folder, PAPERS, lambda _done, _all: None), Engine.load(folder)
    model: Any = engine.model
    largest, prompt = np.zeros((4, 4, 24), np.float32), []
    sources = prompts(engine.tokenizer, engine.manifest, PAPERS, whole=True)
    assert len(sources) > 1
    for number, source in enumerate(sources):
        samples = engine.generate(source, replace(SAMPLING, seed=number))
        assert [len(sample.token_ids) for sample in samples] == [48] * 8
        cache = model.new_cache(model.prefill(source), 8, 48, 1)
        for step in range(48):
            model.step([(engine.manifest.tokens.start, *sample.token_ids)[step] for sample in samples], cache)
        for found, array in zip(largest, cache.past, strict=True):
            np.maximum(found, np.abs(array).max(axis=(0, 2)), out=found)
        prompt.append([a[0].swapaxes(1, 2) if i % 2 else a[0] for i, a in enumerate(cache.cross.values())])
    np.testing.assert_allclose(reach.own_keys, largest[::2], rtol=1e-5)
    np.testing.assert_allclose(reach.own_values, largest[1::2], rtol=1e-5)
    units = Units.of(reach)
    np.testing.assert_allclose(units.own_keys * REACH, largest[::2], rtol=1e-5)
    for i in range(2):
        keys, values = (np.concatenate([each[2 * i + part] for each in prompt], axis=1) for part in (0, 1))
        np.testing.assert_allclose(reach.keys[:, i], [keys.min(axis=1), keys.max(axis=1)], rtol=1e-5)
        np.testing.assert_allclose(reach.mean_values[i], values.mean(axis=1), atol=1e-5)
        np.testing.assert_allclose(units.widths[i], np.abs(values - values.mean(axis=1)[:, None]).max(axis=1), rtol=1e-4)
        evened = (keys - units.centres[i][:, None]) * units.factors[i][:, None]
        asked = reach.queries[i] / units.factors[i]
        np.testing.assert_allclose(np.abs(evened).max(axis=1), asked, rtol=1e-3)
        np.testing.assert_allclose((reach.queries[i] / units.queries[i]).max(), REACH, rtol=1e-5)


def test_units_come_from_the_papers_to_calibrate_with(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """And not from those that the model is judged on."""
    own, other = (tmp_path / name for name in ("own.txt", "other.txt"))
    own.write_text("# Abstract\n\nWe propose a parser.\n\n# Introduction\n\nIt reads texts.\n")
    other.write_text("# Abstract\n\nNets learn.\n\n# Introduction\n\nThey forget, too.\n")
    graphs = []
    for number, (calibrate, papers) in enumerate(((own, own), (own, other), (other, other))):
        checks = Checks(calibrate=calibrate, papers=papers, verify=False)
        manifest = export(str(checkpoint("flan")), tmp_path / str(number), "int8", checks=checks)
        graphs.append(manifest.files[COMPACT_DECODER].sha256)
    assert graphs[0] == graphs[1] != graphs[2]


def test_queries_reach_as_far_as_was_seen(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Of the same samples again, by a decoder of its own: the largest size of every channel."""
    folder = write(checkpoint("flan"), tmp_path / "model", "fp32", RECIPES["fp32"])
    reach, engine = measured_reach(folder, PAPERS, lambda _done, _all: None), Engine.load(folder)
    model, queries = onnx.load(folder / DECODER, load_external_data=False), [f"{cross_attention_at(i)}.q" for i in (0, 1)]
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in queries)
    (folder / "queries.onnx").write_bytes(model.SerializeToString())
    decoder = onnxruntime.InferenceSession(folder / "queries.onnx", providers=["CPUExecutionProvider"])
    largest = np.zeros((2, 4, 24), np.float32)
    for number, source in enumerate(prompts(engine.tokenizer, engine.manifest, PAPERS, whole=True)):
        cross: Any = engine.model.prefill(source)
        samples = engine.generate(source, replace(SAMPLING, seed=number))
        fed = np.array([(engine.manifest.tokens.start, *sample.token_ids)[:48] for sample in samples])
        past = {name: np.zeros((8, 4, 48, 24), np.float32) for name in past_names(2)}
        for step in range(48):
            feed = {"token_ids": fed[:, [step]], "past_lengths": np.full(8, step, np.int32), "top_k": np.array([1])}
            found = decoder.run([*present_names(2), *queries], {**feed, **past, **cross})
            past = dict(zip(past, found[:4], strict=True))
            for i, query in enumerate(found[4:]):
                largest[i] = np.maximum(largest[i], np.abs(query.reshape(8, 4, 24)).max(axis=0))
    np.testing.assert_allclose(reach.queries, largest, rtol=1e-5)


def test_a_channel_may_be_large_because_another_is_small(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Keys a million times as large in one channel, with queries as much smaller: the same scores, as good in 8 bits."""
    source = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    weights = load_file(source / "model.safetensors")
    for part, factor in (("q", 1e-6), ("k", 1e6)):
        weights[f"decoder.block.0.layer.1.EncDecAttention.{part}.weight"][3] *= factor
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    manifest = export(str(source), tmp_path / "model", "int8")
    assert COMPACT_DECODER in manifest.files
    assert manifest.quality["all"]["kl"] < 1e-3


def test_a_recipe_whose_projections_have_no_place_for_an_offset(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Such as an encoder with weights in blocks: further nodes do what the projection cannot."""
    recipe = replace(RECIPES["int8"], encoder=Layers.alike(PerBlock(8)))
    exact = write(checkpoint("flan"), tmp_path / "exact", "fp32", RECIPES["fp32"])
    folder = write(checkpoint("flan"), tmp_path / "model", "int8", recipe)
    with_compact(folder, units_of(folder))
    assert judge(exact, folder, Checks().verification_papers(), "", lambda _done, _all: None)["all"]["kl"] < 1e-3


def test_a_model_that_ends_at_once_is_asked_for_more(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Nearly every token is an end, and still what other parameters make of it is not cut."""
    source = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(1, 480))}))
    folder = write(source, tmp_path / "model", "fp32", RECIPES["fp32"])
    plain = Engine.load(folder)
    assert max(len(sample.token_ids) for sample in plain.generate(SOURCE, SamplingParams(n=4, seed=0))) < 5
    expected = plain.logits(SOURCE, FED[:, 0])
    found = Engine.load(with_compact(folder, units_of(folder))).logits(SOURCE, FED[:, 0])
    assert np.abs(found - expected).mean() < 0.015


def test_channels_of_zeros(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    weights = load_file(source / "model.safetensors")
    weights["decoder.block.0.layer.0.SelfAttention.v.weight"][:] = 0
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    folder = write(source, tmp_path / "model", "fp32", RECIPES["fp32"])
    expected, units = Engine.load(folder).logits(SOURCE, FED[:, 0]), units_of(folder)
    assert (units.own_values[0] > 0).all()
    assert (units.own_values[0] < 1e-20).all()
    found = Engine.load(with_compact(folder, units)).logits(SOURCE, FED[:, 0])
    assert np.abs(found - expected).mean() < 0.015


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_channels_that_attend_to_nothing(part: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Zeros for a whole layer, or for half of its channels, are no scale to divide by."""
    source = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    weights = load_file(source / "model.safetensors")
    weights[f"decoder.block.0.layer.1.EncDecAttention.{part}.weight"][:] = 0
    weights[f"decoder.block.1.layer.1.EncDecAttention.{part}.weight"][:48] = 0
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    folder = write(source, tmp_path / "model", "fp32", RECIPES["fp32"])
    expected = Engine.load(folder).logits(SOURCE, FED[:, 0])
    found = Engine.load(with_compact(folder, units_of(folder))).logits(SOURCE, FED[:, 0])
    assert np.abs(found - expected).mean() < 0.015
