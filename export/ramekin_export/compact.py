"""The decoder graph with keys and values in int8: each sample's own always, and for few samples the prompt's too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from ramekin.cache import Floats
from ramekin.manifest import (
    COMPACT_DECODER,
    COMPACT_ROWS,
    COMPACT_SCALES,
    DECODER,
    FLOAT_ROWS,
    TOKEN_IDS,
    Dims,
    FileRecord,
    Manifest,
    compact_names,
    kept_names,
    past_names,
    present_names,
)
from ramekin_export.decoder import cross_attention_at, self_attention_at
from ramekin_export.graph import GraphBuilder, Shape

_BY_CHANNEL, _BY_TENSOR = (
    {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8, "causal": 0}
    for kind in ("PER_CHANNEL", "PER_TENSOR")
)


def add_compact(folder: Path, manifest: Manifest, own_scales: Floats) -> Manifest:
    """Write the compact decoder of a folder, over the weights of its decoder.

    Args:
        folder: the model.
        manifest: of the folder.
        own_scales: what one unit of each channel of the samples' own keys and values stands for, see `measured_scales`.

    Returns:
        The manifest with the new file in it, not saved.
    """
    path = folder / COMPACT_DECODER
    build_compact(*GraphBuilder.read(folder / DECODER), manifest.dims, own_scales).save(path)
    return replace(manifest, files={**manifest.files, path.name: FileRecord.of(path)})


def build_compact(g: GraphBuilder, nodes: list[NodeProto], dims: Dims, own_scales: Floats) -> GraphBuilder:
    """Rewrite a decoder graph; its weights stay where they are.

    `past_*` and `present_*` become int8, with a constant scale for each channel; what is larger than 127 units is cut.

    The first `float_rows` samples attend to `cross_key_*` and `cross_value_*`, the first `compact_rows` to `compact_key_*`
    and `compact_value_* (1, heads, source, head_dim)` int8 with `compact_scales (2 * layers, heads, 1, head_dim)`; of what
    both give, in this order, the first n rows count. So `(n, 1)`, with one token of anything in int8, stands for floats, and
    `(0, n)`, with float keys and values of no tokens, for int8. `GroupQueryAttention` takes one row at least, and gives what
    it read as outputs `kept_*`, which have to be bound to the memory of `compact_*`. It takes int8 since onnxruntime 1.30.

    Args:
        g: the graph without its nodes.
        nodes: its nodes.
        dims: sizes of the network.
        own_scales: `(2 * layers, heads, 1, head_dim)` float32.
    """
    cache: Shape = ["n", dims.num_heads, "capacity", dims.head_dim]
    for name in past_names(dims.decoder_layers):
        g.input(name, np.int8, cache)
    for name in present_names(dims.decoder_layers):
        g.output(name, np.int8, cache)
    floats, compacts = g.input(FLOAT_ROWS, np.int64, [1]), g.input(COMPACT_ROWS, np.int64, [1])
    small, kept = compact_names(dims.decoder_layers), kept_names(dims.decoder_layers)
    shape: Shape = [1, dims.num_heads, "compact_source", dims.head_dim]
    for name, same in zip(small, kept, strict=True):
        g.input(name, np.int8, shape)
        g.output(same, np.int8, shape)
    given = g.input(COMPACT_SCALES, np.float32, [len(small), dims.num_heads, 1, dims.head_dim])
    flat = g.node("Reshape", [given, g.constant("flat", [0, 1, -1])], "compact.scales.flat")
    scales = g.nodes("Split", [flat], "compact.scales", [f"{name}.scale" for name in small], axis=0, num_outputs=len(small))

    total = g.node("Shape", [small[0]], "compact.length.int64", start=2, end=3)
    total = g.node("Cast", [total], "compact.length", to=TensorProto.INT32)
    last = g.node("Sub", [total, g.constant("one_int32", [1], np.int32)], "compact.last")
    samples = g.node("Shape", [TOKEN_IDS], "samples", start=0, end=1)
    first, turned = g.constant("first", [0]), {"perm": [1, 0, 2]}
    none = g.constant("no_tokens", np.empty((1, 0, dims.num_heads * dims.head_dim)), np.float32)
    heads = {"num_heads": dims.num_heads, "kv_num_heads": dims.num_heads, "scale": 1.0}
    unit = g.constant("unit", [1], np.float32)

    places = {cross_attention_at(i): slice(2 * i, 2 * i + 2) for i in range(dims.decoder_layers)}
    begins, ends = {f"{at}.folded": at for at in places}, {f"{at}.heads": at for at in places}
    written = {f"{self_attention_at(i)}.heads": i for i in range(dims.decoder_layers)}
    queries = {}
    for node in nodes:
        result = node.output[0]
        if result in written:
            key_scale, value_scale = own_scales[places[cross_attention_at(written.pop(result))]]
            constants = [
                g.constant(f"{result}.key_scale", key_scale[None], np.float32),
                g.constant(f"{result}.value_scale", value_scale[None], np.float32),
            ]
            g.add(_changed(node, more_inputs=["", *constants], attributes=_BY_CHANNEL))  # "": a sink, which T5 has not
        elif result in begins:
            at = begins[result]
            queries[at] = node.input[0]
            g.add(_changed(node, first_input=g.node("Slice", [queries[at], first, floats], f"{at}.float_queries")))
        elif result in ends:
            at = ends[result]
            g.add(_changed(node, output=f"{at}.float_heads"))
            rows = g.node("Slice", [queries[at], first, compacts], f"{at}.compact_queries")
            # The operator is faster with one scale for all channels: theirs go into the queries, and onto what comes out.
            key_scale, value_scale = scales[places[at]]
            rows = g.node("Mul", [rows, key_scale], f"{at}.compact_queries.units")
            rows = g.node("Transpose", [rows], f"{at}.compact_rows", **turned)
            inputs = [rows, none, none, *small[places[at]], last, total, "", "", "", "", "", unit, unit]
            outputs = [f"{at}.compact_mixed.units", *kept[places[at]]]
            mixed, *_ = g.nodes("GroupQueryAttention", inputs, f"{at}.compact_mixed", outputs, **heads, **_BY_TENSOR)
            mixed = g.node("Mul", [mixed, value_scale], f"{at}.compact_mixed")
            both = [f"{at}.float_heads", g.node("Transpose", [mixed], f"{at}.compact_heads", **turned)]
            g.node("Slice", [g.node("Concat", both, f"{at}.both", axis=0), first, samples], f"{at}.heads")
        else:
            g.add(node)
    assert queries.keys() == places.keys()
    assert not written
    return g


def _changed(
    node: NodeProto,
    first_input: str = "",
    output: str = "",
    more_inputs: Sequence[str] = (),
    attributes: Mapping[str, Any] = MappingProxyType({}),
) -> NodeProto:
    """A copy of a node that reads or writes another value, or reads more."""
    changed = NodeProto()
    changed.CopyFrom(node)
    if first_input:
        changed.input[0] = first_input
    if output:
        changed.output[0] = output
    changed.input.extend(more_inputs)
    changed.attribute.extend(helper.make_attribute(*each) for each in attributes.items())
    return changed
