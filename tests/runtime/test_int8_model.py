"""Keys and values in 8 bits, where neither torch nor onnx can be imported too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from ramekin import Engine, ModelFormatError, SamplingParams, golden
from ramekin.manifest import COMPACT_DECODER, COMPACT_ENCODER
from ramekin.model import COMPACT_RUNTIMES
from tests.runtime.conftest import INT8_MODEL

SOURCE = np.random.default_rng(0).integers(3, 400, 60)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(INT8_MODEL, threads=2)


def test_the_golden_run_repeats(engine: Engine) -> None:
    assert engine.model.compact == (onnxruntime.__version__ in COMPACT_RUNTIMES)
    assert golden.check(engine, engine.manifest.golden) < 0.1


def test_an_older_onnxruntime_computes_with_floats(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is compared with what these graphs computed at export, and not with the others' figures."""
    figures = {**engine.manifest.golden}
    both = {name: figures.pop(name) for name in ("logprobs", "compact_logprobs")}
    monkeypatch.setattr(onnxruntime, "__version__", "1.29.0")
    plain = Engine.load(INT8_MODEL, threads=2)
    assert not plain.model.compact
    for each in (plain, engine):
        own, other = ("compact_logprobs", "logprobs") if each.model.compact else ("logprobs", "compact_logprobs")
        assert golden.check(each, {**figures, own: both[own]}) < 0.1
        with pytest.raises(ModelFormatError, match="no usable golden run"):
            golden.check(each, {**figures, other: both[other]})


def test_one_of_the_pair_is_no_use(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(INT8_MODEL, tmp_path / "model"))
    raw = json.loads((folder / "manifest.json").read_text())
    del raw["files"][COMPACT_ENCODER]
    (folder / "manifest.json").write_text(json.dumps(raw))
    (folder / COMPACT_ENCODER).unlink()
    assert not Engine.load(folder).model.compact


@pytest.mark.parametrize("n", [1, 2, 3])
def test_samples_of_full_length(engine: Engine, n: int) -> None:
    params = SamplingParams(n=n, max_new_tokens=50, min_new_tokens=50, seed=3)
    for source in (SOURCE[:1], SOURCE):
        assert [len(sample.token_ids) for sample in engine.generate(source, params)] == [50] * n


@pytest.mark.parametrize("graph", [COMPACT_ENCODER, COMPACT_DECODER])
@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_graph_is_found_out(damage: bytes | None, graph: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(INT8_MODEL, tmp_path / "model"))
    if damage is None:
        (folder / graph).unlink()
    else:
        (folder / graph).write_bytes(damage)
    with pytest.raises(ModelFormatError, match=rf"{graph}: .*(missing|instead of).*export"):
        Engine.load(folder)


def test_sizes_that_no_memory_holds_are_refused_first(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(INT8_MODEL, tmp_path / "model"))
    raw = json.loads((folder / "manifest.json").read_text())
    raw["dims"].update(num_heads=2**31 - 1, head_dim=2**31 - 1)
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ModelFormatError, match=r"has shape .*but the manifest says"):
        Engine.load(folder)
