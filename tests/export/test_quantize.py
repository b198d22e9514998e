from __future__ import annotations

import numpy as np
import pytest

from ramekin_export.quantize import per_block, per_channel


def weights(outputs: int, inputs: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((outputs, inputs)) * rng.uniform(0.01, 10, (outputs, 1))).astype(np.float32)


def test_per_channel_error_is_half_a_step() -> None:
    weight = weights(20, 50)
    q = per_channel(weight)
    assert q.values.dtype == np.int8
    assert q.values.shape == (50, 20)
    error = np.abs((q.values * q.scales).T - weight)
    assert (error <= q.scales[:, None] * 0.5001).all()
    assert np.abs(q.values).max() == 127


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [32, 128, 130, 192, 512])
def test_per_block_error_is_half_a_step(bits: int, inputs: int) -> None:
    weight, block = weights(10, inputs), 128
    q = per_block(weight, bits, block)
    blocks = -(-inputs // block)
    assert q.values.shape == (10, blocks, block * bits // 8)
    values = q.values
    if bits == 4:
        values = np.stack([q.values & 15, q.values >> 4], axis=-1).reshape(10, blocks, block)
    scales = q.scales.reshape(10, blocks, 1)
    restored = ((values.astype(int) - (1 << (bits - 1))) * scales).reshape(10, -1)
    assert not restored[:, inputs:].any()
    step = np.repeat(scales[:, :, 0], block, axis=1)[:, :inputs]
    assert (np.abs(restored[:, :inputs] - weight) <= 0.5001 * step).all()


def test_zeros_stay_zeros() -> None:
    assert not per_channel(np.zeros((3, 4), np.float32)).values.any()
    assert (per_block(np.zeros((3, 4), np.float32), 8, 16).values == 128).all()
