"""The decoder graph for few samples: the prompt's keys and values may come in int8, a quarter of what a step has to read."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from ramekin.manifest import COMPACT_ROWS, COMPACT_SCALES, FLOAT_ROWS, TOKEN_IDS, Dims, compact_names, kept_names
from ramekin_export.decoder import cross_attention_at
from ramekin_export.graph import GraphBuilder, Shape


def build_compact(decoder: GraphBuilder, dims: Dims) -> GraphBuilder:
    """Rewrite a decoder graph; its weights stay where they are.

    The first `float_rows` samples attend to `cross_key_*` and `cross_value_*`, the first `compact_rows` to `compact_key_*`
    and `compact_value_* (1, heads, source, head_dim)` int8 with `compact_scales (2 * layers, heads, 1, head_dim)`; of what
    both give, in this order, the first n rows count. So `(n, 1)`, with one token of anything in int8, stands for floats, and
    `(0, n)`, with float keys and values of no tokens, for int8. `GroupQueryAttention` takes one row at least, and gives what
    it read as outputs `kept_*`, which have to be bound to the memory of `compact_*`. It takes int8 since onnxruntime 1.30.
    """
    g, nodes = decoder.rewritten()
    floats, compacts = g.input(FLOAT_ROWS, np.int64, [1]), g.input(COMPACT_ROWS, np.int64, [1])
    small, kept = compact_names(dims.decoder_layers), kept_names(dims.decoder_layers)
    shape: Shape = [1, dims.num_heads, "compact_source", dims.head_dim]
    for name, same in zip(small, kept, strict=True):
        g.input(name, np.int8, shape)
        g.output(same, np.int8, shape)
    stacked = g.input(COMPACT_SCALES, np.float32, [len(small), dims.num_heads, 1, dims.head_dim])
    scales = g.nodes(
        "Split", [stacked], "compact.scales", [f"{name}.scale" for name in small], axis=0, num_outputs=len(small)
    )

    total = g.node("Shape", [small[0]], "compact.length.int64", start=2, end=3)
    total = g.node("Cast", [total], "compact.length", to=TensorProto.INT32)
    last = g.node("Sub", [total, g.constant("one_int32", [1], np.int32)], "compact.last")
    samples = g.node("Shape", [TOKEN_IDS], "samples", start=0, end=1)
    first, turned = g.constant("first", [0]), {"perm": [1, 0, 2]}
    none = g.constant("no_tokens", np.empty((1, 0, dims.num_heads * dims.head_dim)), np.float32)
    heads = {"num_heads": dims.num_heads, "kv_num_heads": dims.num_heads, "scale": 1.0, "causal": 0}
    stored = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}

    places = {cross_attention_at(i): slice(2 * i, 2 * i + 2) for i in range(dims.decoder_layers)}
    begins, ends = {f"{at}.folded": at for at in places}, {f"{at}.heads": at for at in places}
    queries = {}
    for node in nodes:
        result = node.output[0]
        if result in begins:
            at = begins[result]
            queries[at] = node.input[0]
            g.add(_changed(node, first_input=g.node("Slice", [queries[at], first, floats], f"{at}.float_queries")))
        elif result in ends:
            at = ends[result]
            g.add(_changed(node, output=f"{at}.float_heads"))
            rows = g.node("Slice", [queries[at], first, compacts], f"{at}.compact_queries")
            rows = g.node("Transpose", [rows], f"{at}.compact_rows", **turned)
            inputs = [rows, none, none, *small[places[at]], last, total, "", "", "", "", "", *scales[places[at]]]
            outputs = [f"{at}.compact_mixed", *kept[places[at]]]
            mixed, *_ = g.nodes("GroupQueryAttention", inputs, f"{at}.compact_mixed", outputs, **heads, **stored)
            both = [f"{at}.float_heads", g.node("Transpose", [mixed], f"{at}.compact_heads", **turned)]
            g.node("Slice", [g.node("Concat", both, f"{at}.both", axis=0), first, samples], f"{at}.heads")
        else:
            g.add(node)
    assert queries.keys() == places.keys()
    return g


def _changed(node: NodeProto, first_input: str = "", output: str = "") -> NodeProto:
    """A copy of a node that reads or writes another value."""
    changed = NodeProto()
    changed.CopyFrom(node)
    if first_input:
        changed.input[0] = first_input
    if output:
        changed.output[0] = output
    return changed
