from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from ramekin_export.graph import GraphBuilder, WeightFile  # noqa: E402
from ramekin_export.quantize import per_channel  # noqa: E402
from ramekin_export.recipe import Int8PerToken, Int8TwoBytes, Linear, project  # noqa: E402

INPUTS, OUTPUTS = 2816, 50


def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((OUTPUTS, INPUTS)).astype(np.float32)


def computed(folder: Path, form: Linear, x: np.ndarray) -> np.ndarray:
    """The projection of `x (n, tokens, in)` in some form, by onnxruntime."""
    with WeightFile(folder / "weights.bin") as file:
        g = GraphBuilder("linear", file)
        project(g, form, g.input("x", np.float32, ["n", "tokens", INPUTS]), "y", weight())
        g.output("y", np.float32, ["n", "tokens", OUTPUTS])
        g.save(folder / "linear.onnx")
    session = ort.InferenceSession(str(folder / "linear.onnx"), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def hard_rows() -> np.ndarray:
    """Plain rows, one with a massive value, a tiny and a huge one, one of zeros, one with a single value."""
    x = np.random.default_rng(1).standard_normal((6, 1, INPUTS)).astype(np.float32)
    x[1, 0, 7] = 1000
    x[2] *= 1e-12
    x[3] *= 1e12
    x[4] = 0
    x[5], x[5, 0, 3] = 0, -5
    return x


def test_two_bytes_lose_next_to_nothing_of_the_activations(tmp_path: Path) -> None:
    x, q = hard_rows(), per_channel(weight())
    exact = x.astype(np.float64) @ (q.values * q.scales).astype(np.float64)
    found = computed(tmp_path, Int8TwoBytes(), x)
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    # Each value is off by half a fine step of its row's norm at most, so a sum of 2,816 of them by about this. One byte
    # would leave 254 times as much.
    step = norms / 127 / 254 / np.sqrt(12) * np.linalg.norm(weight(), axis=1)
    assert (np.abs(found - exact) <= 10 * step + 1e-5 * np.abs(exact)).all()
    assert not found[4].any()


def test_two_bytes_of_a_row_do_not_depend_on_the_others(tmp_path: Path) -> None:
    x = hard_rows()
    together = computed(tmp_path, Int8TwoBytes(), x)
    alone = np.concatenate([computed(tmp_path, Int8TwoBytes(), row[None]) for row in x])
    np.testing.assert_allclose(together, alone, rtol=1e-6, atol=0)


def test_two_bytes_of_what_is_no_number_are_none(tmp_path: Path) -> None:
    x = hard_rows()
    x[0, 0, 0] = np.nan
    assert np.isnan(computed(tmp_path, Int8TwoBytes(), x)[0]).all()


def test_one_byte_with_a_scale_for_each_token(tmp_path: Path) -> None:
    """Off by half a step of its own row's largest value at most, be that positive or negative, tiny or huge."""
    x, q = hard_rows().swapaxes(0, 1), per_channel(weight())
    x[0, 1] *= -1
    exact = x.astype(np.float64) @ (q.values * q.scales).astype(np.float64)
    found = computed(tmp_path, Int8PerToken(), x)
    step = np.abs(x).max(axis=-1, keepdims=True) / 127 / np.sqrt(12) * np.linalg.norm(weight(), axis=1)
    assert (np.abs(found - exact) <= 5 * step + 1e-5 * np.abs(exact)).all()
    assert not found[0, 4].any()
