"""The encoder graph for CUDA: several prompts, padded to one length, in; every decoder layer's cross keys and values out."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from ramekin.tensors import INPUT_IDS, POSITIONS, SOURCE_LENGTHS, cross_names
from ramekin_export.config import T5Config
from ramekin_export.cuda_layers import OPSET, Stack
from ramekin_export.formats import INT32, Format, cast, narrowed
from ramekin_export.graph import GraphBuilder, WeightFile
from ramekin_export.layers import encoder_bias, encoder_bias_table
from ramekin_export.weights import Weights


def build_cuda_encoder(
    c: Weights, config: T5Config, form: Format, embedding: TensorProto, weights: WeightFile
) -> GraphBuilder:
    """Build the graph; its weights go into `weights` on the way.

    `input_ids (prompts, S)`, `source_lengths (prompts,)`, `positions (S,)` = 0 ... S-1 -> `cross_key_i`, `cross_value_i`
    `(prompts, S, heads * head_dim)`. What stands behind a prompt's length is never looked at.
    """
    g, dims = GraphBuilder("encoder", weights, OPSET), config.dims
    ids = g.input(INPUT_IDS, np.int64, ["prompts", "source"])
    lengths = cast(g, g.input(SOURCE_LENGTHS, np.int64, ["prompts"]), INT32, "encoder.lengths")
    bias = _bias(g, c, config, form, g.input(POSITIONS, np.int64, ["source"]))
    stack = Stack(g, c, config, form, g.node("Gather", [g.tensor(embedding), ids], "encoder.embedded"))
    for i in range(dims.encoder_layers):
        block = f"encoder.block.{i}"
        at = f"{block}.layer.0.SelfAttention"
        q, k, v = stack.inward(stack.norm(f"{block}.layer.0.layer_norm"), at, "qkv")
        stack.outward(stack.attention(q, k, v, bias, lengths, at), at)
        stack.feed_forward(stack.norm(f"{block}.layer.1.layer_norm"), f"{block}.layer.1.DenseReluDense")
    hidden = stack.norm("encoder.final_layer_norm")
    outputs = iter(cross_names(dims.decoder_layers))
    for i in range(dims.decoder_layers):
        for projected in stack.inward(hidden, f"decoder.block.{i}.layer.1.EncDecAttention", "kv"):
            name = next(outputs)
            g.node("Identity", [projected], name)
            g.output(name, form.products, ["prompts", "source", dims.inner])
    return g


def _bias(g: GraphBuilder, c: Weights, config: T5Config, form: Format, positions: str) -> str:
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    table = encoder_bias_table(config, c.tensor(f"{name}.weight", config.buckets, config.dims.num_heads))
    narrow = g.weight(f"{name}.table", narrowed(name, table, form.products))
    return encoder_bias(g, narrow, positions, config.max_distance)
