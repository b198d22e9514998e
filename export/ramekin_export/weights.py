"""Where weights come from: a checkpoint, or one that is rewritten as it is read."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ramekin.cache import Floats
from ramekin.errors import CheckpointError
from ramekin.manifest import Dims


class Weights(Protocol):
    """Tensors by name, as a checkpoint gives them."""

    def tensor(self, name: str, *shape: int) -> Floats:
        """One tensor as float32."""


def projections(c: Weights, dims: Dims, at: str, parts: str) -> dict[str, Floats]:
    """The weights `(inner, d_model)` of an attention's projections `parts` ("q", "kv", "qkv"), by the projections' names."""
    return {f"{at}.{part}": c.tensor(f"{at}.{part}.weight", dims.inner, dims.d_model) for part in parts}


class Finite:
    """Weights that are rewritten as they are read, and refused if that makes them too large for float32."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def tensor(self, name: str, *shape: int) -> Floats:
        """One tensor as float32.

        Raises:
            CheckpointError: it holds numbers that are not finite.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            array = self._weights.tensor(name, *shape)
            if not np.isfinite(array.sum(dtype=np.float64)):
                raise CheckpointError(
                    f"{name}: these weights are too large for float32 arithmetic; is the checkpoint intact?"
                )
        return array
