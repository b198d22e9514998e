"""The decoder graph: one token in for each sample, the logits of the next one out; the same graph for every step."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from ramekin.tensors import (
    LOGITS,
    PAST_LENGTHS,
    TOKEN_IDS,
    TOP_IDS,
    TOP_K,
    TOP_VALUES,
    cross_shapes,
    past_names,
    present_names,
)
from ramekin_export.config import T5Config
from ramekin_export.graph import GraphBuilder, Shape, WeightFile
from ramekin_export.head import Head
from ramekin_export.layers import add_and_norm, decoder_bias_table, feed_forward
from ramekin_export.recipe import Recipe, project
from ramekin_export.weights import Weights, projections

CROSS_ATTENTION = "folded", "rows", "scores", "shares", "mixed", "by_sample", "heads"
"""The values between a layer's queries to the prompt and what it makes of them, in their order."""


def build_decoder(
    c: Weights, config: T5Config, recipe: Recipe, head: Head, embedding: TensorProto, weights: WeightFile
) -> GraphBuilder:
    """Build the graph; its weights go into `weights` on the way.

    `token_ids (n, 1)`, `past_lengths (n,)`, `top_k (1,)`, `past_* (n, heads, capacity, head_dim)`, `cross_key_* (1, heads,
    source, head_dim)`, `cross_value_* (1, heads, head_dim, source)` -> `logits (n, vocab)`, `top_values` and `top_ids (n,
    top_k)`, `present_*`, which have to be bound to the memory of `past_*`. All rows are at the same step.
    """
    g, dims = GraphBuilder("decoder", weights), config.dims
    ids = g.input(TOKEN_IDS, np.int64, ["n", 1])
    lengths = g.input(PAST_LENGTHS, np.int32, ["n"])
    top_k = g.input(TOP_K, np.int64, [1])
    cache: Shape = ["n", dims.num_heads, "capacity", dims.head_dim]
    past = [g.input(name, np.float32, cache) for name in past_names(dims.decoder_layers)]
    cross = [g.input(name, np.float32, shape) for name, shape in cross_shapes(dims, "source").items()]
    present = present_names(dims.decoder_layers)
    bias, capacity = _bias(g, c, config, lengths, past[0])

    x, new = g.node("Gather", [g.tensor(embedding), ids], "decoder.embedded"), ""
    for i in range(dims.decoder_layers):
        block, pair = f"decoder.block.{i}", slice(2 * i, 2 * i + 2)
        at = self_attention_at(i)
        normed, x = add_and_norm(g, c, config, new, x, f"{block}.layer.0.layer_norm")
        qkv = np.concatenate(list(projections(c, dims, at, "qkv").values()))
        packed = project(g, recipe.decoder.inward, normed, f"{at}.qkv", qkv)
        # The present outputs are never left out: without them onnxruntime computes nonsense, silently.
        inputs = [packed, "", "", *past[pair], lengths, capacity, "", "", "", bias]
        heads = {"num_heads": dims.num_heads, "kv_num_heads": dims.num_heads, "scale": 1.0}
        own, *_ = g.nodes("GroupQueryAttention", inputs, f"{at}.heads", [f"{at}.heads", *present[pair]], **heads)
        new = project(g, recipe.decoder.outward, own, f"{at}.o", c.tensor(f"{at}.o.weight", dims.d_model, dims.inner))

        at = cross_attention_at(i)
        normed, x = add_and_norm(g, c, config, new, x, f"{block}.layer.1.layer_norm")
        query = project(g, recipe.decoder.inward, normed, f"{at}.q", c.tensor(f"{at}.q.weight", dims.inner, dims.d_model))
        shared = _cross_attention(g, config, query, cross[2 * i], cross[2 * i + 1], at)
        new = project(g, recipe.decoder.outward, shared, f"{at}.o", c.tensor(f"{at}.o.weight", dims.d_model, dims.inner))

        at = f"{block}.layer.2"
        normed, x = add_and_norm(g, c, config, new, x, f"{at}.layer_norm")
        new = feed_forward(g, c, config, recipe.decoder, normed, f"{at}.DenseReluDense", merged=True)

    normed, _ = add_and_norm(g, c, config, new, x, "decoder.final_layer_norm", head.scale)
    last = g.node("Squeeze", [normed, g.constant("axis_1", [1])], "decoder.last")
    project(g, recipe.head, last, LOGITS, c.tensor(head.weight, dims.vocab_size, dims.d_model))
    g.nodes("TopK", [LOGITS, top_k], "top", [TOP_VALUES, TOP_IDS], axis=-1)

    g.output(LOGITS, np.float32, ["n", dims.vocab_size])
    g.output(TOP_VALUES, np.float32, ["n", "top_k"])
    g.output(TOP_IDS, np.int64, ["n", "top_k"])
    for name in present:
        g.output(name, np.float32, cache)
    return g


def self_attention_at(layer: int) -> str:
    """The name of a layer's attention to the tokens so far; what it makes of them is `.heads`."""
    return f"decoder.block.{layer}.layer.0.SelfAttention"


def cross_attention_at(layer: int) -> str:
    """The name of a layer's attention to the prompt. Its queries are `.q`, what it makes of them is `.heads`."""
    return f"decoder.block.{layer}.layer.1.EncDecAttention"


def _cross_attention(g: GraphBuilder, config: T5Config, query: str, keys: str, values: str, at: str) -> str:
    """Attention of `query (n, 1, heads * head_dim)` to the prompt: n samples are n rows over one set of keys and values.

    Keys and values both stand transposed on the right of their products, where onnxruntime packs them fastest, and scores
    `(1, heads, n, source)` need no transposition for their softmax.
    """
    dims = config.dims
    folded = g.node("Reshape", [query, g.constant("fold", [1, -1, dims.num_heads, dims.head_dim])], f"{at}.folded")
    rows = g.node("Transpose", [folded], f"{at}.rows", perm=[0, 2, 1, 3])  # (1, heads, n, head_dim)
    scores = g.node("FusedMatMul", [rows, keys], f"{at}.scores", transB=1)
    shares = g.node("Softmax", [scores], f"{at}.shares", axis=-1)
    mixed = g.node("FusedMatMul", [shares, values], f"{at}.mixed", transB=1)  # (1, heads, n, head_dim)
    by_sample = g.node("Transpose", [mixed], f"{at}.by_sample", perm=[0, 2, 1, 3])
    return g.node("Reshape", [by_sample, g.constant("unfold", [-1, 1, dims.inner])], f"{at}.heads")


def _bias(g: GraphBuilder, c: Weights, config: T5Config, lengths: str, past: str) -> tuple[str, str]:
    """The relative position bias of this step, `(1, heads, 1, capacity)`, and the capacity as an int32 scalar.

    Positions past the current one get the bias of distance 0; the attention does not look at them.
    """
    name = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    table = decoder_bias_table(config, c.tensor(f"{name}.weight", config.buckets, config.dims.num_heads))
    end = g.node("Squeeze", [g.node("Shape", [past], "decoder.shape", start=2, end=3)], "decoder.positions.end")
    positions = g.node("Range", [g.constant("zero", 0), end, g.constant("one", 1)], "decoder.positions")
    first = g.node("Gather", [lengths, g.constant("first", [0])], "decoder.step.int32")
    step = g.node("Cast", [first], "decoder.step", to=TensorProto.INT64)
    back = g.node("Sub", [step, positions], "decoder.positions.back")
    limits = g.constant("zero", 0), g.constant("max_distance", config.max_distance)
    column = g.node("Clip", [back, *limits], "decoder.positions.column")
    rows = g.node("Gather", [g.weight(f"{name}.table", table), column], "decoder.bias.heads", axis=1)
    bias = g.node("Unsqueeze", [rows, g.constant("axes_0_2", [0, 2])], "decoder.bias")
    return bias, g.node("Cast", [end], "decoder.capacity", to=TensorProto.INT32)
