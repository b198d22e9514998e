from __future__ import annotations

import numpy as np
import pytest

from ramekin.cache import Cache
from ramekin.manifest import Dims

DIMS = Dims(vocab_size=7, d_model=4, d_ff=4, num_heads=2, head_dim=3, encoder_layers=1, decoder_layers=2)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [0], [4], [1, 3], [2, 3, 4], [0, 1, 4]])
def test_keep_moves_running_rows_to_the_front(rows: list[int]) -> None:
    cache = Cache(DIMS, {}, rows=5, capacity=6, candidates=2, stored=np.float32)
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
    cache = Cache(DIMS, {}, rows=5, capacity=6, candidates=2, stored=np.float32)
    assert cache.keep([0, 2, 3, 4]) == [0, 4, 2, 3]
