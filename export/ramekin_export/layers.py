"""The parts that encoder and decoder share: norms, feed-forward blocks, relative positions."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ramekin.cache import Floats
from ramekin_export.config import ACTIVATIONS, T5Config
from ramekin_export.graph import GraphBuilder
from ramekin_export.recipe import Layers, project
from ramekin_export.weights import Weights


def add_and_norm(
    g: GraphBuilder, c: Weights, config: T5Config, new: str, x: str, at: str, scale: float = 1.0
) -> tuple[str, str]:
    """The residual sum `x + new` and its RMS norm, times `scale`, both `(..., d_model)`: `(normed, sum)`.

    With no `new` (an empty name), as before the first layer, the norm of `x` alone, from ONNX's own operators.
    """
    weight = g.weight(f"{at}.gain", c.tensor(f"{at}.weight", config.dims.d_model) * np.float32(scale))
    if new:
        outputs = [at, "", "", f"{at}.sum"]
        g.nodes("SkipSimplifiedLayerNormalization", [new, x, weight], at, outputs, epsilon=config.epsilon)
        return at, f"{at}.sum"
    square = g.node("Mul", [x, x], f"{at}.square")
    mean = g.node("ReduceMean", [square, g.constant("last_axis", [-1])], f"{at}.mean", keepdims=1)
    shifted = g.node("Add", [mean, g.constant("epsilon", config.epsilon, np.float32)], f"{at}.shifted")
    unit = g.node("Div", [x, g.node("Sqrt", [shifted], f"{at}.root")], f"{at}.unit")
    return g.node("Mul", [unit, weight], at), x


def feed_forward(g: GraphBuilder, c: Weights, config: T5Config, forms: Layers, x: str, at: str, merged: bool) -> str:
    """`wo(activation(wi_0 x) * wi_1 x)`, or `wo(activation(wi x))`.

    Args:
        merged: compute `wi_0` and `wi_1` as one product: fewer nodes for few rows, one copy more for many.
    """
    width, inner = config.dims.d_model, config.dims.d_ff
    if not config.gated:
        hidden = project(g, forms.inward, x, f"{at}.wi", c.tensor(f"{at}.wi.weight", inner, width))
        hidden = g.node(ACTIVATIONS[config.activation], [hidden], f"{at}.activation")
    else:
        halves = [c.tensor(f"{at}.wi_{i}.weight", inner, width) for i in (0, 1)]
        if merged:
            both = project(g, forms.inward, x, f"{at}.wi", np.concatenate(halves))
            sizes = g.constant("feed_forward_sizes", [inner, inner])
            gate, up = g.nodes("Split", [both, sizes], f"{at}.split", [f"{at}.gate", f"{at}.up"], axis=-1)
        else:
            gate, up = forms.inward(g, x, {f"{at}.wi_0": halves[0], f"{at}.wi_1": halves[1]})
        active = g.node(ACTIVATIONS[config.activation], [gate], f"{at}.activation")
        hidden = g.node("Mul", [active, up], f"{at}.gated")
    return project(g, forms.outward, hidden, f"{at}.wo", c.tensor(f"{at}.wo.weight", width, inner))


def position_bucket(distance: npt.NDArray[np.int64], buckets: int, max_distance: int) -> npt.NDArray[np.int64]:
    """The bucket of distances >= 0: one each up to `buckets / 2`, then logarithmically, one for all from `max_distance` on.

    Source: T5 (Raffel et al., arXiv:1910.10683, section 2.1), in the arithmetic of transformers' T5Attention.
    """
    exact = buckets // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    large = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)).astype(np.int64)
    return np.where(distance < exact, distance, np.minimum(large, buckets - 1))


def encoder_bias_table(config: T5Config, embedding: Floats) -> Floats:
    """Attention bias by relative position, `(heads, 2 * max_distance + 1)`: column `max_distance + key - query`."""
    half = config.buckets // 2
    offset = np.arange(-config.max_distance, config.max_distance + 1)
    bucket = position_bucket(np.abs(offset), half, config.max_distance) + np.where(offset > 0, half, 0)
    return np.ascontiguousarray(embedding[bucket].T)


def encoder_bias(g: GraphBuilder, table: str, positions: str, max_distance: int) -> str:
    """The bias `(1, heads, S, S)` of `positions (S,)`, looked up once in the table and added in every layer."""
    queries = g.node("Unsqueeze", [positions, g.constant("axis_1", [1])], "encoder.positions.query")
    offset = g.node("Sub", [positions, queries], "encoder.positions.offset")
    low, high = g.constant("minus_max_distance", -max_distance), g.constant("max_distance", max_distance)
    column = g.node("Add", [g.node("Clip", [offset, low, high], "encoder.positions.near"), high], "encoder.positions.column")
    rows = g.node("Gather", [table, column], "encoder.bias.heads", axis=1)
    return g.node("Unsqueeze", [rows, g.constant("axis_0", [0])], "encoder.bias")


def decoder_bias_table(config: T5Config, embedding: Floats) -> Floats:
    """Attention bias by how far back the key lies, `(heads, max_distance + 1)`."""
    bucket = position_bucket(np.arange(config.max_distance + 1), config.buckets, config.max_distance)
    return np.ascontiguousarray(embedding[bucket].T)
