"""What a running generation keeps between steps: the prompt's keys and values, and each sample's own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ramekin.manifest import Dims, cross_shapes

Floats = npt.NDArray[np.float32]
FEW_ROWS = 4
"""So many samples may read the prompt in int8: they wait for memory. More wait for arithmetic, of which int8 costs more."""
WORTH_STEPS = 24
"""So many steps, times the number of samples, have to be left: rounding takes what 16 steps of one gain, or 40 of four."""
_LEAST = np.float32(1e-30)  # of a channel that is zero everywhere


@dataclass(frozen=True)
class Cross:
    """Cross-attention keys `(1, heads, source, head_dim)` and values `(1, heads, head_dim, source)` of one prompt.

    All samples of the prompt share them: the decoder reads them once per step, however many samples there are.

    Attributes:
        arrays: keys and values, layer by layer, float32.
    """

    arrays: tuple[Floats, ...]

    @classmethod
    def empty(cls, dims: Dims, source: int) -> Cross:
        """Memory for a prompt of `source` tokens."""
        return cls(tuple(np.empty(shape, np.float32) for shape in cross_shapes(dims, source).values()))


@dataclass(frozen=True)
class CompactCross:
    """The keys and values of a prompt in int8, both `(1, heads, source, head_dim)`: a quarter of what a step has to read.

    Attributes:
        arrays: keys and values, layer by layer, int8.
        scales: what one unit of each channel stands for, `(2 * layers, heads, 1, head_dim)` float32.
    """

    arrays: tuple[npt.NDArray[np.int8], ...]
    scales: Floats

    @classmethod
    def of(cls, cross: Cross, threads: int) -> CompactCross:
        """Round keys and values: the largest of each channel, over the tokens of the prompt, becomes 127."""
        with ThreadPoolExecutor(threads) as pool:
            found = list(
                pool.map(_rounded, (a[0] if i % 2 == 0 else a[0].swapaxes(1, 2) for i, a in enumerate(cross.arrays)))
            )
        return cls(tuple(array[None] for array, _ in found), np.stack([scale for _, scale in found]))

    @classmethod
    def unused(cls, dims: Dims) -> CompactCross:
        """One token of zeros, for a graph that wants something here although all samples read floats."""
        layers, shape = 2 * dims.decoder_layers, (dims.num_heads, 1, dims.head_dim)
        return cls(tuple(np.zeros((1, *shape), np.int8) for _ in range(layers)), np.ones((layers, *shape), np.float32))


def _rounded(heads: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Keys or values `(heads, source, head_dim)` in int8, and scales `(heads, 1, head_dim)`; one head fits a cache."""
    small, scales = np.empty(heads.shape, np.int8), np.empty((len(heads), 1, heads.shape[2]), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told by whoever looks at the logits
        for head, rounded, scale in zip(heads, small, scales, strict=True):
            sizes = np.abs(head)
            scale[0] = np.maximum(sizes.max(axis=0), _LEAST) / 127
            np.multiply(head, 1 / scale, out=sizes)
            rounded[:] = np.rint(sizes, out=sizes)
    return small, scales


class Cache:
    """Self-attention keys and values of n samples, and the small arrays that go in and out at each step.

    All memory is allocated here, once. The decoder writes `past` in place, at position `length` of each row. When samples
    leave, `keep` moves the running ones to the front and the arrays become shorter views of the same memory.

    Attributes:
        cross: the prompt's keys and values, in one form or the other.
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

    def __init__(
        self, dims: Dims, cross: Cross, rows: int, capacity: int, candidates: int, stored: npt.DTypeLike = np.float32
    ) -> None:
        self.cross: Cross | CompactCross = cross
        self.length, self.capacity, self.candidates = 0, capacity, candidates
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
