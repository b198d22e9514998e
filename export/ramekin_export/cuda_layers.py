"""The parts that both graphs for CUDA share.

One operator serves all three attentions: `MultiHeadAttention`, which has CUDA kernels for float32, float16 and bfloat16 and
takes heads side by side, so that nothing is transposed. (ONNX's own `Attention` computes the same in up to three times the
time: docs/log.md.) No shape is computed in the graphs, and what depends on positions alone comes in from the host: so every
node runs on the GPU, and a step can be captured as a CUDA graph.
"""

from __future__ import annotations

import numpy as np

from ramekin_export.config import ACTIVATIONS, T5Config
from ramekin_export.formats import Format, narrowed
from ramekin_export.graph import GraphBuilder
from ramekin_export.recipe import project
from ramekin_export.weights import Weights, projections

OPSET = 24  # the first with TensorScatter


class Stack:
    """An encoder's or decoder's stream of `d_model` channels, which grows layer by layer."""

    def __init__(self, g: GraphBuilder, c: Weights, config: T5Config, form: Format, embedded: str) -> None:
        """Begin with `embedded`, the tokens' vectors in the format of the stream."""
        self._g, self._c, self._config, self._form = g, c, config, form
        self._sum, self._new = embedded, ""

    def norm(self, at: str, scale: float = 1.0) -> str:
        """Add what the last layer made to the stream; its RMS norm, times `scale`."""
        gain = self._c.tensor(f"{at}.weight", self._config.dims.d_model) * np.float32(scale)
        inputs = [self._sum, self._g.weight(f"{at}.gain", narrowed(at, gain, self._form.stream))]
        if not self._new:
            return self._g.node("RMSNormalization", inputs, at, epsilon=self._config.epsilon)
        outputs = [at, "", "", f"{at}.sum"]
        self._g.nodes("SkipSimplifiedLayerNormalization", [self._new, *inputs], at, outputs, epsilon=self._config.epsilon)
        self._sum = f"{at}.sum"
        return at

    def inward(self, normed: str, at: str, parts: str, together: bool = False) -> list[str]:
        """The projections `parts` ("q", "qkv") of an attention, heads side by side.

        `together`: in one product, which is then split. For few rows that takes less time, for thousands more.
        """
        weights = projections(self._c, self._config.dims, at, parts)
        if not together:
            return self._form.inward(self._g, normed, weights)
        for name, weight in weights.items():
            narrowed(name, weight, self._form.products)  # tells which of them is too large
        whole = self._form.inward(self._g, normed, {f"{at}.{parts}": np.concatenate(list(weights.values()))})
        return self._g.nodes("Split", whole, f"{at}.split", list(weights), axis=-1, num_outputs=len(weights))

    def attention(self, query: str, keys: str, values: str, bias: str, lengths: str, at: str) -> str:
        """Attention of `query (B, n, inner)` to the first `lengths (B,)`, int32, of the keys and values `(B, S, inner)`."""
        inputs = [query, keys, values, "", lengths, *([bias] if bias else [])]
        heads = self._config.dims.num_heads
        return self._g.node("MultiHeadAttention", inputs, f"{at}.heads", num_heads=heads, scale=1.0)

    def outward(self, heads: str, at: str) -> None:
        """The output projection of an attention, which the next norm adds to the stream."""
        weight = self._c.tensor(f"{at}.o.weight", self._config.dims.d_model, self._config.dims.inner)
        self._new = project(self._g, self._form.outward, heads, f"{at}.o", weight)

    def feed_forward(self, normed: str, at: str) -> None:
        """`wo(activation(wi_0 x) * wi_1 x)`, or `wo(activation(wi x))`, which the next norm adds to the stream."""
        g, width, inner = self._g, self._config.dims.d_model, self._config.dims.d_ff
        parts = ["wi_0", "wi_1"] if self._config.gated else ["wi"]
        weights = {f"{at}.{part}": self._c.tensor(f"{at}.{part}.weight", inner, width) for part in parts}
        gate, *up = self._form.gates(g, normed, weights)
        hidden = g.node(ACTIVATIONS[self._config.activation], [gate], f"{at}.activation")
        if up:
            hidden = g.node("Mul", [hidden, *up], f"{at}.gated")
        self._new = project(g, self._form.wo, hidden, f"{at}.wo", self._c.tensor(f"{at}.wo.weight", width, inner))
