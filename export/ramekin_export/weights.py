"""Where weights come from: a checkpoint, or one that is rewritten as it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ramekin.cache import Floats
from ramekin.errors import CheckpointError


class Weights(Protocol):
    """Tensors by name, as a checkpoint gives them."""

    def tensor(self, name: str, *shape: int) -> Floats:
        """One tensor as float32."""

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""


def finite(name: str, rewrite: Callable[[], Floats]) -> Floats:
    """A tensor that `rewrite` makes of others, which are finite.

    Raises:
        CheckpointError: it is not.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        array = rewrite()
        if not np.isfinite(array.sum(dtype=np.float64)):
            raise CheckpointError(f"{name}: these weights are too large for float32 arithmetic; is the checkpoint intact?")
    return array
