"""Exact rewrites of weights: the same function in real arithmetic, with activations that are easier to quantize.

T5 has RMS norms, no biases and no rotary embedding, so scales move freely through it (SmoothQuant, Xiao et al.,
arXiv:2211.10438, moves them from activations to weights; here they also move between two weights):

- from a norm's gain into the columns of every projection that reads the norm, and back;
- from the rows of the values' projection into the columns of the attention's output projection;
- from the rows of the last feed-forward product (`wi_1`, or `wi` before a ReLU) into the columns of `wo`.

How a checkpoint splits such a product between its two sides is an accident of training: massive activations in front of
`wo` are one. So the split is made anew from what does not depend on it, the product itself: a channel's writing side and
its reading side become equally large. Two checkpoints that differ by such scales alone give the same folded weights.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ramekin.cache import Floats
from ramekin_export.config import T5Config


class Weights(Protocol):
    """Tensors by name, as a checkpoint gives them."""

    def tensor(self, name: str, *shape: int) -> Floats:
        """One tensor as float32."""

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""


_TINY = np.finfo(np.float32).tiny
_PARTS = {"encoder": ["SelfAttention", "DenseReluDense"], "decoder": ["SelfAttention", "EncDecAttention", "DenseReluDense"]}


class Folded:
    """The weights of a checkpoint, rewritten as they are read."""

    def __init__(self, weights: Weights, config: T5Config, head: str) -> None:
        """Rewrite `weights`; `head` names the tensor that makes the logits. A tied one is read as the head only."""
        self._weights, self._config = weights, config
        self._readers: dict[str, list[str]] = {}
        self._writer: dict[str, str] = {}
        for stack, layers in (("encoder", config.dims.encoder_layers), ("decoder", config.dims.decoder_layers)):
            for block in range(layers):
                for number, part in enumerate(_PARTS[stack]):
                    self._add(f"{stack}.block.{block}.layer.{number}", part)
        self._readers["encoder.final_layer_norm"] = [
            f"decoder.block.{i}.layer.1.EncDecAttention.{name}" for i in range(config.dims.decoder_layers) for name in "kv"
        ]
        self._readers["decoder.final_layer_norm"] = [head.removesuffix(".weight")]
        self._norm = {reader: norm for norm, readers in self._readers.items() for reader in readers}
        self._reader = {writer: reader for reader, writer in self._writer.items()}
        self._gains: dict[str, Floats] = {}
        self._scales: dict[str, Floats] = {}

    def _add(self, layer: str, part: str) -> None:
        at, config = f"{layer}.{part}", self._config
        if part == "DenseReluDense":
            read = ["wi_0", "wi_1"] if config.gated else ["wi"]
            if config.gated or config.activation == "relu":  # relu(s * x) is s * relu(x)
                self._writer[f"{at}.wo"] = f"{at}.{read[-1]}"
        else:
            read = list("qkv" if part == "SelfAttention" else "q")
            self._writer[f"{at}.o"] = f"{at}.v"
        self._readers[f"{layer}.layer_norm"] = [f"{at}.{name}" for name in read]

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def tensor(self, name: str, *shape: int) -> Floats:
        """One tensor as float32, rewritten."""
        at = name.removesuffix(".weight")
        if at in self._readers:
            return self._gain(at)
        array = self._weights.tensor(name, *shape)
        if at in self._norm:
            array = array * self.restored(self._norm[at])
        if at in self._reader:
            array = array * self._scale(at)[:, None]
        if at in self._writer:
            array = array / self._scale(self._writer[at])
        return array

    def restored(self, norm: str) -> Floats:
        """What the output of a norm has to be multiplied by to be what it was."""
        return self._old_gain(norm) / self._gain(norm)

    def _old_gain(self, norm: str) -> Floats:
        return self._weights.tensor(f"{norm}.weight", self._config.dims.d_model)

    def _gain(self, norm: str) -> Floats:
        """The new gain of a norm: the square root of how strongly its readers read each channel."""
        if norm not in self._gains:
            squares = np.zeros(self._config.dims.d_model, np.float32)
            for reader in self._readers[norm]:
                weight = self._whole(reader)
                if reader in self._reader:
                    weight = weight * self._scale(reader)[:, None]
                squares += np.square(weight).sum(axis=0)
            self._gains[norm] = np.where(squares > 0, np.maximum(squares, _TINY) ** 0.25, 1).astype(np.float32)
        return self._gains[norm]

    def _scale(self, writer: str) -> Floats:
        """What the rows of a projection are multiplied by, and the columns of its reader divided by."""
        if writer not in self._scales:
            dims, reader = self._config.dims, self._reader[writer]
            inner = dims.d_ff if reader.endswith("wo") else dims.num_heads * dims.head_dim
            written = np.linalg.norm(self._whole(writer), axis=1)
            read = np.linalg.norm(self._weights.tensor(f"{reader}.weight", dims.d_model, inner), axis=0)
            dead = (written == 0) | (read == 0)
            self._scales[writer] = np.where(dead, 1, np.sqrt(read / np.where(dead, 1, written))).astype(np.float32)
        return self._scales[writer]

    def _whole(self, reader: str) -> Floats:
        """A projection with the gain of its norm folded in."""
        dims = self._config.dims
        rows = dims.d_ff if ".wi" in reader else dims.num_heads * dims.head_dim
        if self._norm[reader] == "decoder.final_layer_norm":
            rows = dims.vocab_size
        return self._weights.tensor(f"{reader}.weight", rows, dims.d_model) * self._old_gain(self._norm[reader])
