"""Few samples read the prompt's keys and values in int8: the same as reading what these stand for in float32."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ramekin import Engine, ModelFormatError, SamplingParams, VerificationError, golden
from ramekin.cache import FEW_ROWS, CompactCross, Cross
from ramekin.manifest import COMPACT_DECODER, DECODER, DEFAULT_PROMPT, FileRecord, Manifest, VersionRange
from ramekin.model import COMPACT_RUNTIMES
from ramekin_export.checkpoint import Checkpoint
from ramekin_export.recipe import RECIPES
from ramekin_export.verify import Checks, judge
from ramekin_export.writer import Writer, save
from tests.export.variants import VARIANTS

pytestmark = pytest.mark.skipif(
    onnxruntime.__version__ not in COMPACT_RUNTIMES, reason=f"onnxruntime {onnxruntime.__version__} cannot"
)
SOURCE = np.random.default_rng(0).integers(3, 500, 150)
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


def read_back(cross: Cross) -> Cross:
    """What keys and values in int8 stand for, as floats."""
    small = CompactCross.of(cross, threads=2)
    floats = [array * scale for array, scale in zip(small.arrays, small.scales, strict=True)]
    return Cross(tuple(np.ascontiguousarray(a.swapaxes(2, 3) if i % 2 else a) for i, a in enumerate(floats)))


def run(model: Any, cross: Cross, rows: int, compact_at: int | None) -> np.ndarray:
    """Logits of each step; the prompt is read in int8 from step `compact_at` on (few samples: from step 1 on anyway)."""
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
    """To 1e-4 of logits near 1, for one sample, two, and more than would do that of themselves; and it does differ."""
    model: Any = compact(variant).model
    plain: Any = exported(variant, "fp32").model
    cross = plain.prefill(SOURCE)
    rounded = read_back(cross)
    for rows in (1, 2, 5):
        expected = run(plain, rounded, rows, None)
        np.testing.assert_allclose(run(model, cross, rows, 0), expected, rtol=0, atol=1e-4)
        assert np.abs(expected - run(plain, cross, rows, None)).max() > 2e-4


def test_few_samples_change_over_after_their_first_token(
    compact: Callable[[str], Engine], exported: Callable[[str, str], Engine]
) -> None:
    model: Any = compact("flan").model
    plain: Any = exported("flan", "fp32").model
    cross = plain.prefill(SOURCE)
    for rows in (1, FEW_ROWS, FEW_ROWS + 1):
        exact, found = run(plain, cross, rows, None), run(model, cross, rows, None)
        np.testing.assert_allclose(found[0], exact[0], rtol=0, atol=1e-5)
        assert (np.abs(found[1:] - exact[1:]).max() > 2e-4) == (rows <= FEW_ROWS)


def test_samples_that_are_left_over_change_too(compact: Callable[[str], Engine]) -> None:
    """When so many have ended that few are left; the floats are given back then."""
    model: Any = compact("flan").model
    cache = model.new_cache(model.prefill(SOURCE), 4, 10, 5)
    for alive, kind in ((4, Cross), (3, Cross), (2, CompactCross), (1, CompactCross)):
        cache.keep(range(alive))
        model.step(FED[0][:alive], cache)
        assert isinstance(cache.cross, kind)


def test_an_older_onnxruntime_takes_the_plain_graph(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Writer(Checkpoint.open(str(checkpoint("flan"))), DEFAULT_PROMPT).write(
        tmp_path, "int8", RECIPES["int8"], lambda _done, _all: None
    )
    params = SamplingParams(n=3, max_new_tokens=12, seed=4)  # more than few: both graphs compute the same
    names = {each.name for each in Engine.load(tmp_path).model._decoder.get_inputs()}  # type: ignore[attr-defined]
    assert "compact_key_0" in names
    expected = [sample.token_ids[:1] for sample in Engine.load(tmp_path).generate(SOURCE, params)]
    monkeypatch.setattr("ramekin.model.COMPACT_RUNTIMES", VersionRange(at_least="1.999.0"))
    older = Engine.load(tmp_path)
    names = {each.name for each in older.model._decoder.get_inputs()}  # type: ignore[attr-defined]
    assert "compact_key_0" not in names
    assert [sample.token_ids[:1] for sample in older.generate(SOURCE, params)] == expected


def test_only_quantized_exports_have_it(exported: Callable[[str, str], Engine], checkpoint: Callable[[str], Path]) -> None:
    for precision in ("fp32", "int8", "int4"):
        exported("flan", precision)
        assert (checkpoint("flan").parent / precision / COMPACT_DECODER).exists() == (precision != "fp32")


def test_verification_judges_int8(
    compact: Callable[[str], Engine], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """With float32 weights, what it finds can only come from there."""
    folders = []
    for name, recipe in (("exact", RECIPES["fp32"]), ("compact", replace(RECIPES["fp32"], compact=True))):
        (tmp_path / name).mkdir()
        folders.append(tmp_path / name)
        Writer(Checkpoint.open(str(checkpoint("flan"))), DEFAULT_PROMPT).write(
            tmp_path / name, "fp32", recipe, lambda _done, _all: None
        )
    found = [
        judge(folders[0], folder, Checks().verification_papers(), "", lambda _done, _all: None)["all"]["kl"]
        for folder in folders
    ]
    assert found[0] < 1e-9 < found[1] < 1e-4


def test_a_graph_that_is_not_the_compact_one_is_refused(
    exported: Callable[[str, str], Engine], tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    exported("flan", "int8")
    for path in (checkpoint("flan").parent / "int8").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / COMPACT_DECODER).write_bytes((tmp_path / DECODER).read_bytes())
    manifest = Manifest.load(tmp_path)
    files = {**manifest.files, COMPACT_DECODER: FileRecord.of(tmp_path / COMPACT_DECODER)}
    save(tmp_path, replace(manifest, files=files))
    with pytest.raises(
        ModelFormatError, match=rf"^{COMPACT_DECODER}: does not belong to this manifest .*export the model again"
    ):
        Engine.load(tmp_path)


def test_the_golden_run_knows_both(exported: Callable[[str, str], Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """So a machine with an older onnxruntime is held to what it can repeat, and one with a newer to everything."""
    engine = exported("flan", "int8")
    recorded = dict(engine.manifest.golden)
    assert recorded["few_logprobs"] != recorded["logprobs"]
    assert golden.check(engine, recorded) == 0
    for name in ("few_logprobs", "logprobs"):
        wrong = {**recorded, name: [each - 2 for each in recorded[name]]}
        with pytest.raises(VerificationError, match=r"differ by 2, more than 0\.5"):
            golden.check(engine, wrong)
    older: Any = copy(engine.model)
    older._unused = None
    older._decoder = exported("flan", "fp32").model._decoder  # type: ignore[attr-defined]  # any plain graph
    plain = Engine(older, engine.tokenizer, engine.manifest)
    assert golden.check(plain, {**recorded, "few_logprobs": None}) < 0.5
