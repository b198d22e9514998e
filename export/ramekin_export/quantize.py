"""Weights as small integers: int8 per output channel, int8 or int4 per block. All symmetric, without zero points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ramekin.cache import Floats

# Shares of the largest weight that the best scale of a block is looked for among.
_SHRINK = np.linspace(0.7, 1, 13, dtype=np.float32)
_DAMPING = 0.01


@dataclass(frozen=True)
class Quantized:
    """Integers and the scales that turn them back into weights; the layouts are those of the operators that read them."""

    values: npt.NDArray[Any]
    scales: Floats


def per_channel(weight: Floats, pairs: bool = True) -> Quantized:
    """int8 with one scale for each output, for `MatMulIntegerToFloat`.

    x86 processors without VNNI multiply uint8 by int8 and add the products of two neighbouring inputs in 16 bits, which
    saturate. 255 * 128 still fits: so no two neighbours may add up to more than 128. That costs a third of the
    resolution (a plain limit of 64 would cost half of it), and the same model gives the same sums everywhere.

    Args:
        weight: `(out, in)`.
        pairs: keep to that limit.

    Returns:
        Values `(in, out)` int8 and scales `(out,)`: `weight ~ (values * scales).T`.
    """
    largest = np.abs(weight).max(axis=1)
    if pairs and weight.shape[1] > 1:
        even = weight.shape[1] // 2 * 2
        largest = np.maximum(largest, np.abs(weight[:, 0:even:2] + weight[:, 1:even:2]).max(axis=1))
    scales = _scales(largest, 127)
    values = np.rint(weight / scales[:, None]).astype(np.int8)
    return Quantized(np.ascontiguousarray(values.T), scales)


def per_block(weight: Floats, bits: int, block: int, moment: Floats | None = None) -> Quantized:
    """int8 or int4 with one scale for each `block` inputs of an output, for `MatMulNBits` without zero points.

    Stored unsigned, the middle of the range standing for 0; of two int4 the first one is in the low half of the byte.
    Inputs are padded with zeros to whole blocks. int8 is rounded to nearest. For int4 each block's scale is the best of a
    few in the sum of squared errors, and with `moment` every column's rounding error is made up for by the columns
    after it (GPTQ, Frantar et al., arXiv:2210.17323).

    Args:
        weight: `(out, in)`.
        bits: 4 or 8.
        block: a power of two from 16 to 256.
        moment: sum of `x x^T` over inputs x of this layer, `(in, in)`.

    Returns:
        Values `(out, blocks, block * bits / 8)` uint8 and scales `(out * blocks,)`.
    """
    outputs, inputs = weight.shape
    blocks = -(-inputs // block)
    values = np.zeros((outputs, blocks * block), np.int8)
    scales = np.empty((outputs, blocks), np.float32)
    rest = weight.T.copy()  # by input, so that each column of the weight is one run of memory
    spread = None if moment is None or bits == 8 else _spread(moment)
    for number in range(blocks):
        columns = slice(number * block, min((number + 1) * block, inputs))
        scale = _block_scales(rest[columns], bits)
        scales[:, number] = scale
        if spread is None:
            values[:, columns] = _round(rest[columns], scale, bits).T
            continue
        errors = np.empty_like(rest[columns])
        for at, column in enumerate(range(columns.start, columns.stop)):
            rounded = _round(rest[column], scale, bits)
            values[:, column] = rounded
            errors[at] = (rest[column] - rounded * scale) / spread[column, column]
            rest[column : columns.stop] -= spread[column, column : columns.stop, None] * errors[at]
        rest[columns.stop :] -= spread[columns, columns.stop :].T @ errors
    stored = (values + np.int16(1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        stored = stored[:, 0::2] | (stored[:, 1::2] << 4)
    return Quantized(stored.reshape(outputs, blocks, -1), scales.reshape(-1))


def _block_scales(columns: Floats, bits: int) -> Floats:
    """One scale for each output over `columns (in, out)`."""
    levels = (1 << (bits - 1)) - 1
    largest = np.abs(columns).max(axis=0)
    if bits == 8:
        return _scales(largest, levels)
    signed = np.take_along_axis(columns, np.abs(columns).argmax(axis=0)[None], axis=0)[0]
    best, least = _scales(largest, levels), np.full(columns.shape[1], np.inf, np.float32)
    for shrink in _SHRINK:
        # Of the levels -8 to 7 the lowest has no counterpart: a scale may be negative, so that it serves either sign.
        for scale in (signed * shrink / -(levels + 1), largest * shrink / levels):
            scale = np.where(largest > 0, scale, 1)  # noqa: PLW2901
            error = np.square(_round(columns, scale, bits) * scale - columns).sum(axis=0)
            best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def _round(weight: Floats, scale: Floats, bits: int) -> Floats:
    lowest = -(1 << (bits - 1))
    rounded: Floats = np.clip(np.rint(weight / scale), lowest, -lowest - 1)
    return rounded


def _spread(moment: Floats) -> Floats:
    """How a column's error is spread over those after it: the upper Cholesky factor of the inverse of the damped moment."""
    damped = moment.astype(np.float64)
    diagonal = np.diag(damped).copy()
    unseen = diagonal <= 0
    damped[np.diag_indices_from(damped)] += np.where(unseen, 1, _DAMPING * diagonal.mean())
    try:
        upper: Floats = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    except np.linalg.LinAlgError:  # inputs so small that their squares are none: nothing to go by
        return np.eye(len(moment), dtype=np.float32)
    return upper


def _scales(largest: Floats, levels: int) -> Floats:
    """Scales that map `largest` to `levels`; 1 where all weights are 0."""
    return np.where(largest > 0, largest / levels, 1).astype(np.float32)
