"""The decoder graph for CUDA: one token in for each sample of each prompt, what the next one may be out."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from ramekin.tensors import (
    DISTANCES,
    LOGITS,
    PAST_LENGTHS,
    SOURCE_LENGTHS,
    TOKEN_IDS,
    TOP_IDS,
    TOP_K,
    TOP_LOGPROBS,
    TOP_VALUES,
    UNFOLDED,
    cross_names,
    past_names,
    present_names,
)
from ramekin_export.config import T5Config
from ramekin_export.cuda_layers import OPSET, Stack
from ramekin_export.formats import INT32, Format, cast, narrowed
from ramekin_export.graph import GraphBuilder, Shape, WeightFile
from ramekin_export.head import Head
from ramekin_export.layers import decoder_bias_table
from ramekin_export.recipe import project
from ramekin_export.weights import Weights


def build_cuda_decoder(
    c: Weights, config: T5Config, form: Format, head: Head, embedding: TensorProto, weights: WeightFile
) -> GraphBuilder:
    """Build the graph; its weights go into `weights` on the way.

    With rows = prompts * n, the samples of one prompt side by side, all at the same step: `token_ids (rows, 1)`,
    `past_lengths (rows,)`, `distances (capacity,)` = how far each position of the cache lies back (below 0: not filled yet),
    `source_lengths (prompts,)`, `unfolded (3,)` = (prompts, n, heads * head_dim), `top_k (1,)`, `past_* (rows, capacity,
    heads * head_dim)`, `cross_* (prompts, S, heads * head_dim)` -> `logits (rows, vocab)`, `top_values`, `top_ids` and
    `top_logprobs (rows, top_k)`, `present_*`, which have to be bound to the memory of `past_*`. `unfolded` and `top_k` lie
    in the host's memory.
    """
    g, dims = GraphBuilder("decoder", weights, OPSET), config.dims
    ids = g.input(TOKEN_IDS, np.int64, ["rows", 1])
    filled = g.input(PAST_LENGTHS, np.int64, ["rows"])
    distances = g.input(DISTANCES, np.int64, ["capacity"])
    source_lengths = cast(g, g.input(SOURCE_LENGTHS, np.int64, ["prompts"]), INT32, "decoder.source_lengths")
    unfolded = g.input(UNFOLDED, np.int64, [3])
    top_k = g.input(TOP_K, np.int64, [1])
    cache: Shape = ["rows", "capacity", dims.inner]
    past = [g.input(name, form.products, cache) for name in past_names(dims.decoder_layers)]
    cross = [g.input(name, form.products, ["prompts", "source", dims.inner]) for name in cross_names(dims.decoder_layers)]
    present = present_names(dims.decoder_layers)
    bias = _bias(g, c, config, form, distances)
    lengths = cast(g, g.node("Add", [filled, g.constant("one", 1)], "decoder.filled"), INT32, "decoder.lengths")
    folded = g.constant("folded", [-1, 1, dims.inner])

    stack = Stack(g, c, config, form, g.node("Gather", [g.tensor(embedding), ids], "decoder.embedded"))
    for i in range(dims.decoder_layers):
        block, pair = f"decoder.block.{i}", slice(2 * i, 2 * i + 2)
        at = f"{block}.layer.0.SelfAttention"
        query, *new = stack.inward(stack.norm(f"{block}.layer.0.layer_norm"), at, "qkv", together=True)
        keys, values = (
            g.node("TensorScatter", [old, each, filled], output, axis=1)
            for old, each, output in zip(past[pair], new, present[pair], strict=True)
        )
        stack.outward(stack.attention(query, keys, values, bias, lengths, at), at)

        at = f"{block}.layer.1.EncDecAttention"
        (query,) = stack.inward(stack.norm(f"{block}.layer.1.layer_norm"), at, "q")
        query = g.node("Reshape", [query, unfolded], f"{at}.unfolded")  # (prompts, n, inner): n queries over one prompt
        heads = stack.attention(query, cross[2 * i], cross[2 * i + 1], "", source_lengths, at)
        stack.outward(g.node("Reshape", [heads, folded], f"{at}.folded"), at)

        stack.feed_forward(stack.norm(f"{block}.layer.2.layer_norm"), f"{block}.layer.2.DenseReluDense")

    normed = stack.norm("decoder.final_layer_norm", head.scale)
    last = g.node("Squeeze", [normed, g.constant("axis_1", [1])], "decoder.last")
    project(g, form.head, last, LOGITS, c.tensor(head.weight, dims.vocab_size, dims.d_model))
    g.nodes("TopK", [LOGITS, top_k], "top", [TOP_VALUES, TOP_IDS], axis=-1)
    logprobs = g.node("LogSoftmax", [LOGITS], "logprobs", axis=-1)  # a reduction would need cuDNN, which may be missing
    g.node("GatherElements", [logprobs, TOP_IDS], TOP_LOGPROBS, axis=-1)

    g.output(LOGITS, np.float32, ["rows", dims.vocab_size])
    g.output(TOP_VALUES, np.float32, ["rows", "top_k"])
    g.output(TOP_IDS, np.int64, ["rows", "top_k"])
    g.output(TOP_LOGPROBS, np.float32, ["rows", "top_k"])
    for name in present:
        g.output(name, form.products, cache)
    return g


def _bias(g: GraphBuilder, c: Weights, config: T5Config, form: Format, distances: str) -> str:
    """The relative position bias of this step, `(1, heads, 1, capacity)`."""
    name = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    table = decoder_bias_table(config, c.tensor(f"{name}.weight", config.buckets, config.dims.num_heads))
    limits = g.constant("zero", 0), g.constant("max_distance", config.max_distance)
    column = g.node("Clip", [distances, *limits], "decoder.distances.column")
    rows = g.node(
        "Gather", [g.weight(f"{name}.table", narrowed(name, table, form.products)), column], "decoder.bias.heads", axis=1
    )
    return g.node("Unsqueeze", [rows, g.constant("axes_0_2", [0, 2])], "decoder.bias")
