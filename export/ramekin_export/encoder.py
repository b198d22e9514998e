"""The encoder graph: a prompt of exact length in, every decoder layer's cross-attention keys and values out."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from ramekin.tensors import INPUT_IDS, cross_shapes
from ramekin_export.config import T5Config
from ramekin_export.graph import GraphBuilder, WeightFile
from ramekin_export.layers import add_and_norm, encoder_bias, encoder_bias_table, feed_forward
from ramekin_export.recipe import Recipe, project
from ramekin_export.weights import Weights, projections


def build_encoder(c: Weights, config: T5Config, recipe: Recipe, embedding: TensorProto, weights: WeightFile) -> GraphBuilder:
    """Build the graph; its weights go into `weights` on the way.

    `input_ids (1, S)` -> `cross_key_i (1, heads, S, head_dim)`, `cross_value_i (1, heads, head_dim, S)`. There is no mask:
    one prompt, no padding.
    """
    g, dims = GraphBuilder("encoder", weights), config.dims
    ids = g.input(INPUT_IDS, np.int64, [1, "source"])
    bias = _bias(g, c, config, ids)
    x, new = g.node("Gather", [g.tensor(embedding), ids], "encoder.embedded"), ""
    for i in range(dims.encoder_layers):
        attention, forward = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        normed, x = add_and_norm(g, c, config, new, x, f"{attention}.layer_norm")

        at = f"{attention}.SelfAttention"
        q, k, v = recipe.encoder.inward(g, normed, projections(c, dims, at, "qkv"))
        heads = g.node("MultiHeadAttention", [q, k, v, "", "", bias], f"{at}.heads", num_heads=dims.num_heads, scale=1.0)
        new = project(g, recipe.encoder.outward, heads, f"{at}.o", c.tensor(f"{at}.o.weight", dims.d_model, dims.inner))

        normed, x = add_and_norm(g, c, config, new, x, f"{forward}.layer_norm")
        new = feed_forward(g, c, config, recipe.encoder, normed, f"{forward}.DenseReluDense", merged=False)

    hidden, _ = add_and_norm(g, c, config, new, x, "encoder.final_layer_norm")
    _cross(g, c, config, recipe, hidden)
    return g


def _bias(g: GraphBuilder, c: Weights, config: T5Config, ids: str) -> str:
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    table = encoder_bias_table(config, c.tensor(f"{name}.weight", config.buckets, config.dims.num_heads))
    length = g.node("Squeeze", [g.node("Shape", [ids], "encoder.length", start=1)], "encoder.positions.end")
    positions = g.node("Range", [g.constant("zero", 0), length, g.constant("one", 1)], "encoder.positions")
    return encoder_bias(g, g.weight(f"{name}.table", table), positions, config.max_distance)


def _cross(g: GraphBuilder, c: Weights, config: T5Config, recipe: Recipe, hidden: str) -> None:
    """Project the encoder's output for the cross-attention of every decoder layer: it is done once, not at each step."""
    dims = config.dims
    split = g.constant("split_heads", [1, -1, dims.num_heads, dims.head_dim])
    outputs = iter(cross_shapes(dims, "source").items())
    for i in range(dims.decoder_layers):
        kv = projections(c, dims, f"decoder.block.{i}.layer.1.EncDecAttention", "kv")
        for projected, order in zip(recipe.encoder.inward(g, hidden, kv), ([0, 2, 1, 3], [0, 2, 3, 1]), strict=True):
            rows = g.node("Reshape", [projected, split], f"{projected}.heads")
            output, shape = next(outputs)
            g.node("Transpose", [rows], output, perm=order)
            g.output(output, np.float32, shape)
