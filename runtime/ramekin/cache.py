"""What a running generation keeps between steps: the prompt's keys and values, and each sample's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ramekin.manifest import Dims

Floats = npt.NDArray[np.float32]
Cross = Mapping[str, npt.NDArray[Any]]
"""Cross-attention keys and values of one prompt by name, as the encoder gives them: see `cross_shapes` and `compact_shapes`.

All samples of the prompt share them: the decoder reads them once per step, however many samples there are.
"""


class Cache:
    """Self-attention keys and values of n samples, and the small arrays that go in and out at each step.

    All memory is allocated here, once. The decoder writes `past` in place, at position `length` of each row. When samples
    leave, `keep` moves the running ones to the front and the arrays become shorter views of the same memory.

    Attributes:
        cross: the prompt's keys and values.
        rows: how many samples are running, n.
        length: how many positions are filled, the same for all rows.
        capacity: how many positions there are.
        candidates: how many of the largest logits are ranked for each row, k.
        past: `2 * layers` arrays `(n, heads, capacity, head_dim)`, float32 or int8.
        token_ids: the tokens to feed, `(n, 1)` int64.
        past_lengths: `length` for each row, `(n,)` int32.
        logits: of the next token, `(n, vocab)` float32.
        top_values: the k largest logits in falling order, `(n, k)` float32.
        top_ids: their tokens, `(n, k)` int64.
        binding: the decoder's binding to these arrays; None when it has to be made anew.
    """

    past: tuple[npt.NDArray[Any], ...]
    token_ids: npt.NDArray[np.int64]
    past_lengths: npt.NDArray[np.int32]
    logits: Floats
    top_values: Floats
    top_ids: npt.NDArray[np.int64]

    def __init__(self, dims: Dims, cross: Cross, rows: int, capacity: int, candidates: int, stored: npt.DTypeLike) -> None:
        self.cross, self.length, self.capacity, self.candidates = cross, 0, capacity, candidates
        shape = (rows, dims.num_heads, capacity, dims.head_dim)
        self._memory: dict[str, npt.NDArray[Any]] = {
            "token_ids": np.empty((rows, 1), np.int64),
            "past_lengths": np.empty(rows, np.int32),
            "logits": np.empty((rows, dims.vocab_size), np.float32),
            "top_values": np.empty((rows, candidates), np.float32),
            "top_ids": np.empty((rows, candidates), np.int64),
        }
        self._past = tuple(np.empty(shape, stored) for _ in range(2 * dims.decoder_layers))
        self._resize(rows)

    def _resize(self, rows: int) -> None:
        self.rows = rows
        self.past = tuple(array[:rows] for array in self._past)
        for name, array in self._memory.items():
            setattr(self, name, array[:rows])
        self.binding: Any = None

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all rows but these. Return, for each row of the smaller batch, which row it was.

        The gaps are filled with the last running rows: one row moves for each that leaves, and only its filled positions.
        """
        size, kept = len(rows), set(rows)
        movers = iter([row for row in rows if row >= size])
        order = [row if row in kept else next(movers) for row in range(size)]
        for target, origin in enumerate(order):
            if target != origin:
                for array in self._past:
                    array[target, :, : self.length] = array[origin, :, : self.length]
        self._resize(size)
        return order
