"""The residual stream in another basis: the same function, but no channel stands out in front of a projection.

An RMS norm sees only lengths, so an orthogonal matrix passes through it, once the norm's gain has moved into the projections
that read it. T5 has no biases and adds everything to one stream, which encoder and decoder both begin with rows of the
embedding: one matrix for all of it costs nothing at run time (QuaRot, Ashkboos et al., arXiv:2404.00456).

In a random basis an outlier of one channel is a little of every channel. What leaves a norm has a root mean square of 1 and
is nearly Gaussian, whatever the model, so one constant scale serves all tokens (`recipe.Int8Normed`).
"""

from __future__ import annotations

import numpy as np

from ramekin.cache import Floats
from ramekin_export.config import T5Config
from ramekin_export.weights import Weights

_WRITERS = (".o", ".wo")


class Rotated:
    """The weights of a checkpoint, rewritten as they are read."""

    def __init__(self, weights: Weights, config: T5Config, head: str) -> None:
        """Rewrite `weights`; `head` names the tensor that makes the logits. A tied one is read as the head only."""
        self._weights, self._width = weights, config.dims.d_model
        self._basis = _orthogonal(self._width)
        self._norm = {head.removesuffix(".weight"): "decoder.final_layer_norm"}
        for stack, layers in (("encoder", config.dims.encoder_layers), ("decoder", config.dims.decoder_layers)):
            for block in range(layers):
                own, last = f"{stack}.block.{block}.layer.0", f"{stack}.block.{block}.layer.{1 if stack == 'encoder' else 2}"
                self._norm |= {f"{own}.SelfAttention.{name}": f"{own}.layer_norm" for name in "qkv"}
                self._norm |= {f"{last}.DenseReluDense.{name}": f"{last}.layer_norm" for name in ("wi", "wi_0", "wi_1")}
                if stack == "decoder":
                    cross = f"{stack}.block.{block}.layer.1"
                    self._norm[f"{cross}.EncDecAttention.q"] = f"{cross}.layer_norm"
                    self._norm |= {f"{cross}.EncDecAttention.{name}": "encoder.final_layer_norm" for name in "kv"}

    def tensor(self, name: str, *shape: int) -> Floats:
        """One tensor as float32, rewritten."""
        at = name.removesuffix(".weight")
        array = self._weights.tensor(name, *shape)
        if at.endswith("layer_norm"):
            array = np.ones_like(array)
        elif at in self._norm:
            array = np.multiply(array, self._weights.tensor(f"{self._norm[at]}.weight", self._width))
            array = array @ self._basis
        elif at.endswith(_WRITERS):
            array = self._basis.T @ array
        return array

    def embedding(self, rows: Floats) -> Floats:
        """Rows of the embedding `(any, d_model)` as the rewritten layers expect them."""
        return rows @ self._basis


def _orthogonal(width: int) -> Floats:
    """A random orthogonal matrix, the same at every call (Mezzadri, arXiv:math-ph/0609050)."""
    q, r = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))
    basis: Floats = np.asarray(q * np.sign(np.diag(r)), np.float32)
    return basis
