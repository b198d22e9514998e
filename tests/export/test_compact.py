"""Few samples read the prompt's keys and values in int8: the same as reading what these stand for in float32."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from ramekin import Engine, ModelFormatError, SamplingParams, VerificationError, golden
from ramekin.cache import FEW_ROWS, WORTH_STEPS, CompactCross, Cross
from ramekin.manifest import COMPACT_DECODER, DECODER, DEFAULT_PROMPT, FileRecord, Manifest, VersionRange
from ramekin.model import COMPACT_RUNTIMES
from ramekin_export.checkpoint import Checkpoint
from ramekin_export.pipeline import export
from ramekin_export.recipe import RECIPES, Recipe
from ramekin_export.verify import Checks, judge
from ramekin_export.writer import Writer, save
from tests.export.variants import VARIANTS

pytestmark = pytest.mark.skipif(
    onnxruntime.__version__ not in COMPACT_RUNTIMES, reason=f"onnxruntime {onnxruntime.__version__} cannot"
)
SOURCE = np.random.default_rng(0).integers(3, 500, 150)
EXACT = replace(RECIPES["fp32"], compact=True)
FED = np.random.default_rng(1).integers(3, 500, (12, 5))


@pytest.fixture(scope="module")
def compact(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Engine]:
    """An engine whose weights are float32, so that rounded keys and values are its only difference from the reference."""

    def make(variant: str) -> Engine:
        folder = tmp_path_factory.mktemp(variant)
        recipe = replace(RECIPES["fp32"], compact=True)
        Writer(Checkpoint.open(str(checkpoint(variant))), DEFAULT_PROMPT).write(
            folder, "fp32", recipe, lambda _done, _all: None
        )
        return Engine.load(folder, threads=2)

    return make


def write(checkpoint: Path, folder: Path, precision: str, recipe: Recipe) -> Path:
    folder.mkdir(exist_ok=True)
    Writer(Checkpoint.open(str(checkpoint)), DEFAULT_PROMPT).write(folder, precision, recipe, lambda _done, _all: None)
    return folder


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_int8_means_the_floats_it_was_rounded_to(
    variant: str, compact: Callable[[str], Engine], exported: Callable[[str, str], Engine]
) -> None:
    """To 1e-4 of logits near 1, for one sample, two, and more than would do that of themselves; and floats do differ."""
    model: Any = compact(variant).model
    plain: Any = exported(variant, "fp32").model
    cross = plain.prefill(SOURCE)
    rounded = read_back(cross)
    for rows in (1, 2, 5):
        expected = run(plain, rounded, rows, None)
        np.testing.assert_allclose(run(model, cross, rows, 0), expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(run(model, cross, rows, None), run(plain, cross, rows, None), rtol=0, atol=1e-5)
        assert np.abs(expected - run(plain, cross, rows, None)).max() > 2e-4


def test_leaving_samples_change_nothing(compact: Callable[[str], Engine], exported: Callable[[str, str], Engine]) -> None:
    """Rows 1 and 3 of four go on in int8, as they would have alone; the floats are given back."""
    model: Any = compact("flan").model
    plain: Any = exported("flan", "fp32").model
    cross = plain.prefill(SOURCE)
    caches = [model.new_cache(cross, 4, 12, 5), plain.new_cache(cross, 4, 12, 5)]
    for engine, cache in zip((model, plain), caches, strict=True):
        engine.step(FED[0][:4], cache)
        cache.keep([1, 3])
    caches[1].cross, caches[1].binding = read_back(cross), None
    model.compact(caches[0])
    for tokens in FED[1:]:
        found, expected = (engine.step(tokens[:2], cache).full for engine, cache in zip((model, plain), caches, strict=True))
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
    [(1, WORTH_STEPS + 1, 1), (FEW_ROWS, 40, 1), (FEW_ROWS + 1, 40, None), (1, WORTH_STEPS, None), (1, 2, None)],
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
    """Which computes for more than few samples what the other does."""
    write(checkpoint("flan"), tmp_path, "int8", RECIPES["int8"])
    params = SamplingParams(n=3, max_new_tokens=12, min_new_tokens=12, seed=4)
    newer = Engine.load(tmp_path)
    older(monkeypatch)
    plain = Engine.load(tmp_path)
    assert (newer.model.compacts, plain.model.compacts) == (True, False)
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


@pytest.mark.parametrize("broken", [None, "FusedMatMul", "GroupQueryAttention"])
def test_verification_judges_both_ways(broken: str | None, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """With float32 weights all it finds comes from rounding; keys of the wrong layer are found out in either form."""
    exact = write(checkpoint("flan"), tmp_path / "exact", "fp32", RECIPES["fp32"])
    folder = write(checkpoint("flan"), tmp_path / "compact", "fp32", EXACT)
    if broken:
        model = onnx.load(folder / COMPACT_DECODER, load_external_data=False)
        names = {f"{kind}_key_1": f"{kind}_key_0" for kind in ("cross", "compact")}
        for node in model.graph.node:
            if node.op_type == broken:
                node.input[:] = [names.get(name, name) for name in node.input]
        (folder / COMPACT_DECODER).write_bytes(model.SerializeToString())
        recorded(folder)
    found = judge(exact, folder, Checks().verification_papers(), "", lambda _done, _all: None)["all"]["kl"]
    assert found > 1e-4 if broken else 1e-9 < found < 1e-5


def recorded(folder: Path) -> None:
    """Bring the manifest up to date with the graph."""
    manifest = Manifest.load(folder)
    files = {**manifest.files, COMPACT_DECODER: FileRecord.of(folder / COMPACT_DECODER)}
    save(folder, replace(manifest, files=files))


def test_a_graph_that_is_not_the_compact_one_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    write(checkpoint("flan"), tmp_path, "int8", RECIPES["int8"])
    (tmp_path / COMPACT_DECODER).write_bytes((tmp_path / DECODER).read_bytes())
    recorded(tmp_path)
    with pytest.raises(
        ModelFormatError, match=rf"^{COMPACT_DECODER}: does not belong to this manifest .*export the model again"
    ):
        Engine.load(tmp_path)


def test_the_golden_run_knows_both(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a machine with an older onnxruntime is held to what it can repeat, and one with a newer to everything."""
    manifest = export(str(checkpoint("flan")), tmp_path / "model", "int8", checks=Checks(verify=False))
    known = dict(manifest.golden)
    assert known["few_logprobs"] != known["logprobs"]
    engine = Engine.load(tmp_path / "model")
    assert golden.check(engine, known) == 0
    for name in ("few_logprobs", "logprobs"):
        with pytest.raises(VerificationError, match=r"differ by 2, more than 0\.5"):
            golden.check(engine, {**known, name: [each - 2 for each in known[name]]})
    for odd in ([10**6], ["a"], [[1]], [], [-1]):
        with pytest.raises(ModelFormatError, match="no usable golden run"):
            golden.check(engine, {**known, "target_ids": odd})
    older(monkeypatch)
    assert golden.check(Engine.load(tmp_path / "model"), {**known, "few_logprobs": None}) == 0
