from __future__ import annotations

import numpy as np
import pytest

from ramekin.cache import Cache, CompactCross, Cross
from ramekin.manifest import Dims

DIMS = Dims(vocab_size=7, d_model=4, d_ff=4, num_heads=2, head_dim=3, encoder_layers=1, decoder_layers=2)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [0], [4], [1, 3], [2, 3, 4], [0, 1, 4]])
def test_keep_moves_running_rows_to_the_front(rows: list[int]) -> None:
    cache = Cache(DIMS, Cross(()), rows=5, capacity=6, candidates=2)
    cache.length = 4
    for layer, array in enumerate(cache.past):
        array[:] = 100 * layer + np.arange(5)[:, None, None, None]
    memory = [array.ctypes.data for array in cache.past]
    order = cache.keep(rows)
    assert sorted(order) == rows
    assert cache.rows == len(rows)
    assert [array.ctypes.data for array in cache.past] == memory  # nothing is allocated
    for layer, array in enumerate(cache.past):
        assert array.shape == (len(rows), 2, 6, 3)
        assert array[:, 0, :4, 0].T.tolist() == [[100 * layer + row for row in order]] * 4
    assert cache.logits.shape == (len(rows), 7)
    assert cache.top_ids.shape == (len(rows), 2)


def test_keep_copies_one_row_for_each_that_leaves() -> None:
    cache = Cache(DIMS, Cross(()), rows=5, capacity=6, candidates=2)
    assert cache.keep([0, 2, 3, 4]) == [0, 4, 2, 3]


def test_int8_is_the_nearest_of_255_levels_of_each_channel() -> None:
    """Also of channels of very different size, and of one that is zero everywhere."""
    sizes = np.array([1e-6, 1.0, 0.0], np.float32)
    keys = np.random.default_rng(0).standard_normal((1, 2, 9, 3)).astype(np.float32) * sizes
    values = np.ascontiguousarray(keys.swapaxes(2, 3))
    small = CompactCross.of(Cross((keys, values)), threads=2)
    assert [array.dtype for array in small.arrays] == [np.int8, np.int8]
    np.testing.assert_array_equal(small.arrays[0], small.arrays[1])  # values are turned round
    np.testing.assert_allclose(
        small.scales[0, ..., :2], np.abs(keys[0]).max(axis=1, keepdims=True)[..., :2] / 127, rtol=1e-6
    )
    assert small.scales.shape == (2, 2, 1, 3)
    assert (np.abs(small.arrays[0] * small.scales[0] - keys) <= small.scales[0] * 0.501).all()
    assert not small.arrays[0][..., 2].any()
