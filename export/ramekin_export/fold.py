"""Scales between two weights: the same function in real arithmetic, with activations that are easier to quantize.

Scales move freely (SmoothQuant, Xiao et al., arXiv:2211.10438, moves them from activations to weights; here they move
between two weights)

- from the rows of the values' projection into the columns of the attention's output projection;
- from the rows of the last feed-forward product (`wi_1`, or `wi` before a ReLU) into the columns of `wo`.

How a checkpoint splits such a product between its two sides is an accident of training: massive activations in front of
`wo` are one. So the split is made anew from what does not depend on it, the product itself: a channel's writing side and
its reading side become equally large. Two checkpoints that differ by such scales alone give the same folded weights.
"""

from __future__ import annotations

import numpy as np

from ramekin.cache import Floats
from ramekin_export.config import T5Config
from ramekin_export.weights import Weights


class Folded:
    """The weights of a checkpoint, rewritten as they are read."""

    def __init__(self, weights: Weights, config: T5Config) -> None:
        self._weights, self._config = weights, config
        self._scales: dict[str, Floats] = {}

    def tensor(self, name: str, *shape: int) -> Floats:
        """One tensor as float32, rewritten."""
        array, at = self._weights.tensor(name, *shape), name.removesuffix(".weight")
        before, _, part = at.rpartition(".")
        if part in ("v", self._gate()):
            return array * self._scale(before, part)[:, None]
        if part == "o" or (part == "wo" and self._gate()):
            return array / self._scale(before, "v" if part == "o" else self._gate())
        return array

    def _gate(self) -> str:
        """The projection whose rows' scales reach `wo`; none if the activation is not homogeneous."""
        if self._config.gated:
            return "wi_1"
        return "wi" if self._config.activation == "relu" else ""  # relu(s * x) is s * relu(x)

    def _scale(self, block: str, writer: str) -> Floats:
        """What the rows of a projection are multiplied by, and the columns of its reader divided by."""
        if block not in self._scales:
            dims = self._config.dims
            inner, reader = (dims.inner, "o") if writer == "v" else (dims.d_ff, "wo")
            written = np.linalg.norm(self._weights.tensor(f"{block}.{writer}.weight", inner, dims.d_model), axis=1)
            read = np.linalg.norm(self._weights.tensor(f"{block}.{reader}.weight", dims.d_model, inner), axis=0)
            dead = (written == 0) | (read == 0)
            self._scales[block] = np.where(dead, 1, np.sqrt(read / np.where(dead, 1, written))).astype(np.float32)
        return self._scales[block]
