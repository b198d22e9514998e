"""Where weights come from: a checkpoint, or one that is rewritten as it is read."""

from __future__ import annotations

from typing import Protocol

from ramekin.cache import Floats


class Weights(Protocol):
    """Tensors by name, as a checkpoint gives them."""

    def tensor(self, name: str, *shape: int) -> Floats:
        """One tensor as float32."""

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""
