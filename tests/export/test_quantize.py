from __future__ import annotations

import numpy as np
import pytest

from ramekin_export.quantize import Quantized, per_block, per_channel


def weights(outputs: int, inputs: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((outputs, inputs)) * rng.uniform(0.01, 10, (outputs, 1))).astype(np.float32)


def restored(q: Quantized, outputs: int, bits: int, block: int) -> np.ndarray:
    """The weights that the integers stand for, padding included."""
    values = q.values
    if bits == 4:
        values = np.stack([q.values & 15, q.values >> 4], axis=-1).reshape(outputs, -1, block)
    return ((values.astype(int) - (1 << (bits - 1))) * q.scales.reshape(outputs, -1, 1)).reshape(outputs, -1)


def nearest(weight: np.ndarray, block: int) -> np.ndarray:
    """int4 the plain way: the largest weight of a block at the end of the range, the others rounded to nearest."""
    blocks = weight.reshape(len(weight), -1, block)
    step = np.abs(blocks).max(axis=2, keepdims=True) / 7
    return (np.rint(blocks / step) * step).reshape(weight.shape)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("inputs", [1, 2, 50, 51])
def test_per_channel_error_is_half_a_step(inputs: int, pairs: bool) -> None:
    weight = weights(20, inputs)
    q = per_channel(weight, pairs)
    assert q.values.dtype == np.int8
    assert q.values.shape == (inputs, 20)
    error = np.abs((q.values * q.scales).T - weight)
    assert (error <= q.scales[:, None] * 0.5001).all()
    if not pairs:
        assert (np.abs(q.values).max(axis=0) == 127).all()


def test_no_sum_saturates_on_any_processor() -> None:
    """The worst activations for each output, against exact integers; on x86 without VNNI this fails for plain int8."""
    onnxruntime, helper = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx.helper")
    q = per_channel(weights(64, 512))
    sums = q.values[0::2].astype(int) + q.values[1::2]
    assert np.abs(sums).max() <= 128
    worst = np.where(np.repeat(np.maximum(sums, 0), 2, axis=0).T > 0, 255, 0).astype(np.uint8)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", 2, list(worst.shape))],
        [helper.make_tensor_value_info("y", 6, None)],
        [helper.make_tensor("w", 3, q.values.shape, q.values.tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": worst})[0], worst.astype(int) @ q.values.astype(int))


@pytest.mark.parametrize("inputs", [32, 128, 130, 192, 512])
def test_int8_error_is_half_a_step(inputs: int) -> None:
    weight, block = weights(10, inputs), 128
    q = per_block(weight, 8, block)
    blocks = -(-inputs // block)
    assert q.values.shape == (10, blocks, block)
    found = restored(q, 10, 8, block)
    assert not found[:, inputs:].any()
    step = np.repeat(q.scales.reshape(10, blocks), block, axis=1)[:, :inputs]
    assert (np.abs(found[:, :inputs] - weight) <= 0.5001 * step).all()


@pytest.mark.parametrize("inputs", [32, 128, 130, 192, 512])
def test_int4_lies_in_two_halves_of_a_byte(inputs: int) -> None:
    q = per_block(weights(10, inputs), 4, 128)
    assert q.values.shape == (10, -(-inputs // 128), 64)
    assert q.scales.shape == (10 * -(-inputs // 128),)
    assert not restored(q, 10, 4, 128)[:, inputs:].any()


def test_the_best_int4_scale_beats_the_largest_weight_s() -> None:
    weight = weights(50, 512)
    found = np.square(restored(per_block(weight, 4, 128), 50, 4, 128) - weight).sum()
    assert found < 0.85 * np.square(nearest(weight, 128) - weight).sum()


@pytest.mark.parametrize("extreme", [8, -8])
def test_int4_scales_serve_either_sign(extreme: int) -> None:
    """The outermost of sixteen levels stands on one side only: a weight that lies there is exact, and so are all others."""
    weight = np.random.default_rng(0).integers(-7, 8, (5, 64)).astype(np.float32)
    weight[:, 9] = extreme
    np.testing.assert_allclose(restored(per_block(weight, 4, 64), 5, 4, 64), weight, atol=1e-6)


def test_errors_of_a_block_are_made_up_for_by_the_next() -> None:
    """Where the second block sees nearly what the first one sees."""
    rng = np.random.default_rng(3)
    weight, first = weights(40, 64), rng.standard_normal((2000, 32))
    x = np.concatenate([first, first + 0.01 * rng.standard_normal(first.shape)], axis=1).astype(np.float32)
    moment = x.T @ x
    apart = moment * np.kron(np.eye(2, dtype=np.float32), np.ones((32, 32), np.float32))
    errors = [
        np.square(x @ (restored(per_block(weight, 4, 32, each), 40, 4, 32) - weight).T).sum() for each in (moment, apart)
    ]
    assert errors[0] < 0.6 * errors[1]


def test_rounding_by_what_is_seen_makes_outputs_more_exact() -> None:
    rng = np.random.default_rng(1)
    weight = weights(40, 256)
    x = (rng.standard_normal((2000, 24)) @ rng.standard_normal((24, 256)) + 0.1 * rng.standard_normal((2000, 256))).astype(
        np.float32
    )
    x[:, [3, 200]] = 0  # two inputs are never seen: the others are made up for all the same
    moment, fresh = x[:1500].T @ x[:1500], x[1500:]
    plain = restored(per_block(weight, 4, 128), 40, 4, 128)
    better = restored(per_block(weight, 4, 128, moment), 40, 4, 128)
    errors = [np.square(fresh @ (each - weight).T).sum() for each in (plain, better)]
    assert errors[1] < 0.4 * errors[0]


def test_inputs_that_were_never_seen_do_no_harm() -> None:
    weight, moment = weights(8, 64), np.zeros((64, 64), np.float32)
    moment[:5, :5] = np.eye(5)
    tiny = np.float32(3e-23) * np.random.default_rng(2).standard_normal(
        (100, 64), np.float32
    )  # whose squares are hardly numbers
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky((tiny.T @ tiny).astype(np.float64))
    for each in (moment, np.zeros_like(moment), tiny.T @ tiny):
        found = restored(per_block(weight, 4, 32, each), 8, 4, 32)
        assert np.isfinite(found).all()
        assert np.abs(found - weight).max() <= np.abs(weight).max()


def test_zeros_stay_zeros() -> None:
    assert not per_channel(np.zeros((3, 4), np.float32)).values.any()
    assert (per_block(np.zeros((3, 4), np.float32), 8, 16).values == 128).all()
    assert (per_block(np.zeros((3, 4), np.float32), 4, 16).values == 0x88).all()
