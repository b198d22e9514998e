"""Weights as small integers: int8 per output channel, int8 or int4 per block. All symmetric, rounded to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ramekin.cache import Floats


@dataclass(frozen=True)
class Quantized:
    """Integers and the scales that turn them back into weights; the layouts are those of the operators that read them."""

    values: npt.NDArray[Any]
    scales: Floats


def per_channel(weight: Floats) -> Quantized:
    """int8 with one scale for each output, for `MatMulIntegerToFloat`.

    Args:
        weight: `(out, in)`.

    Returns:
        Values `(in, out)` int8 and scales `(out,)`: `weight ~ (values * scales).T`.
    """
    scales = _scales(np.abs(weight).max(axis=1), 127)
    values = np.rint(weight / scales[:, None]).astype(np.int8)
    return Quantized(np.ascontiguousarray(values.T), scales)


def per_block(weight: Floats, bits: int, block: int) -> Quantized:
    """int8 or int4 with one scale for each `block` inputs of an output, for `MatMulNBits` without zero points.

    Stored unsigned, the middle of the range standing for 0; of two int4 the first one is in the low half of the byte.
    Inputs are padded with zeros to whole blocks.

    Args:
        weight: `(out, in)`.
        bits: 4 or 8.
        block: a power of two from 16 to 256.

    Returns:
        Values `(out, blocks, block * bits / 8)` uint8 and scales `(out * blocks,)`.
    """
    outputs, inputs = weight.shape
    blocks = -(-inputs // block)
    padded = np.pad(weight, ((0, 0), (0, blocks * block - inputs))).reshape(outputs, blocks, block)
    largest, middle = (1 << (bits - 1)) - 1, 1 << (bits - 1)
    scales = _scales(np.abs(padded).max(axis=2), largest)
    values = (np.rint(padded / scales[:, :, None]) + middle).astype(np.uint8)
    if bits == 4:
        values = values[:, :, 0::2] | (values[:, :, 1::2] << 4)
    return Quantized(values, scales.reshape(-1))


def _scales(largest: Floats, levels: int) -> Floats:
    """Scales that map `largest` to `levels`; 1 where all weights are 0."""
    return np.where(largest > 0, largest / levels, 1).astype(np.float32)
