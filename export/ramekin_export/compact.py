"""Both graphs once more, over the same weights, with keys and values in 8 bits: the prompt's, and each sample's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from ramekin.cache import Floats
from ramekin.manifest import COMPACT_DECODER, COMPACT_ENCODER, DECODER, ENCODER, Dims, FileRecord, Manifest
from ramekin.tensors import compact_shapes, compact_type, cross_names, past_names, present_names
from ramekin_export.decoder import CROSS_ATTENTION, cross_attention_at, self_attention_at
from ramekin_export.graph import GraphBuilder, Shape
from ramekin_export.reach import Reach

OPSET = 21
"""Of the compact graphs: the first whose `QuantizeLinear` has scales of blocks, so that each sample and head has its own."""

REACH = 84
"""So many of 127 units the largest value takes that was seen: other texts may go half as far again before anything is cut.
With 64, twice as far, the larger model's divergence rises by 15 % instead of 4 to 7 %: `docs/log.md`."""
SHARES = 127
"""The largest share of attention in units. Its products with values, two at a time, fit the 16 bits that processors without
VNNI add them up in; 255 units change no divergence."""
_LEAST = np.float32(1e-30)  # of a channel that is zero everywhere
# Channels that reach less far, next to the farthest of their layer, count as this far: values, and queries and keys, of
# which one may be small because the other is large.
_NARROWEST, _EVENED = np.float32(1e-3), np.float32(1e-9)
_WHOLE_ROW = 1 << 30  # values that share a scale at the most: as many as the longest prompt has tokens
_SCALES = 12, 13  # the places of keys' and values' scales among the inputs of GroupQueryAttention
_IN_INT8 = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8, "causal": 0}


@dataclass(frozen=True)
class Units:
    """What a unit of 8 bits stands for; all arrays are `(layers, heads, head_dim)` float32.

    Queries and keys are rounded to one step for a whole layer, so their channels are evened out first: queries are divided
    by the factors that keys are multiplied by, which leaves scores as they are (SmoothQuant, arXiv:2211.10438). What is
    taken from all keys alike leaves shares as they are (SageAttention, arXiv:2410.02367).

    Attributes:
        own_keys: of samples' own keys.
        own_values: of samples' own values.
        queries: of queries.
        step: of queries once they are divided by `factors`, `(layers,)`.
        centres: what is taken from keys.
        factors: what keys are multiplied by then.
        means: what is taken from values, and put back: their mean, so that shares too small for a unit are not lost.
        widths: what values are divided by then.
    """

    own_keys: Floats
    own_values: Floats
    queries: Floats
    step: Floats
    centres: Floats
    factors: Floats
    means: Floats
    widths: Floats

    @classmethod
    def of(cls, reach: Reach) -> Units:
        """From what was seen."""
        centres = reach.keys.mean(axis=0)
        queries, keys = _wide(reach.queries, _EVENED), _wide(reach.keys[1] - centres, _EVENED)
        factors = np.sqrt(queries / keys)
        step = (queries / factors).max(axis=(1, 2)) / REACH
        return cls(
            own_keys=np.maximum(reach.own_keys / REACH, _LEAST),
            own_values=np.maximum(reach.own_values / REACH, _LEAST),
            queries=factors * step[:, None, None],
            step=step,
            centres=centres,
            factors=factors,
            means=reach.mean_values,
            widths=_wide(np.abs(reach.values - reach.mean_values).max(axis=0), _NARROWEST),
        )


def _wide(reach: Floats, narrowest: np.float32) -> Floats:
    wide: Floats = np.maximum(reach, np.maximum(reach.max(axis=(1, 2), keepdims=True) * narrowest, _LEAST))
    return wide


def add_compact(folder: Path, manifest: Manifest, units: Units) -> Manifest:
    """Write the compact graphs of a folder, over the weights of its others.

    Args:
        folder: the model.
        manifest: of the folder.
        units: from what `measured_reach` says of it.

    Returns:
        The manifest with the new files in it, not saved.
    """
    dims = manifest.dims
    build_compact_encoder(*GraphBuilder.read(folder / ENCODER, OPSET), dims, units).save(folder / COMPACT_ENCODER)
    build_compact_decoder(*GraphBuilder.read(folder / DECODER, OPSET), dims, units).save(folder / COMPACT_DECODER)
    records = {name: FileRecord.of(folder / name) for name in (COMPACT_ENCODER, COMPACT_DECODER)}
    return replace(manifest, files={**manifest.files, **records})


def build_compact_encoder(g: GraphBuilder, nodes: list[NodeProto], dims: Dims, units: Units) -> GraphBuilder:
    """Rewrite an encoder graph; its weights stay where they are.

    It gives `cross_key_i (heads, head_dim, S)` uint8 and `cross_value_i (heads, S, head_dim)` int8, each with what stands
    for 0, `_zero`, a scalar of its type, and what a unit stands for, `_scale`: a scalar for keys, `(heads, 1, head_dim)` for
    values. Both are found anew for each prompt, so nothing is cut.

    Args:
        g: the graph without its nodes.
        nodes: its nodes.
        dims: sizes of the network.
        units: of the model.
    """
    names = cross_names(dims.decoder_layers)
    g.drop(names)
    written = {}  # by the name of the projection
    for i in range(dims.decoder_layers):
        at = cross_attention_at(i)
        written[f"{at}.k"] = names[2 * i], units.centres[i], units.factors[i], None
        written[f"{at}.v"] = names[2 * i + 1], units.means[i], 1 / units.widths[i], units.widths[i]
    replaced = {*names, *(f"{projected}.heads" for projected in written)}
    flip = g.constant("top_bit", 128, np.uint8)
    for node in nodes:
        if node.output[0] in replaced:
            continue
        if node.output[0] not in written:
            g.add(node)
            continue
        projected = node.output[0]
        name, centre, factor, widths = written.pop(projected)
        x = _stretched(g, node, factor, centre)
        small, scale, zero = f"{projected}.small", f"{name}_scale", f"{name}_zero"
        if widths is None:
            g.nodes("DynamicQuantizeLinear", [x], small, [small, scale, zero])
        else:  # a uint8 less 128, as int8: the kernels for that are faster
            unsigned = [f"{small}.unsigned", f"{scale}.all", f"{zero}.unsigned"]
            values, unit, middle = g.nodes("DynamicQuantizeLinear", [x], small, unsigned)
            for plain, signed in ((values, small), (middle, zero)):
                g.node("Cast", [g.node("BitwiseXor", [plain, flip], f"{signed}.flipped")], signed, to=TensorProto.INT8)
            g.node("Mul", [unit, g.constant(f"{name}.widths", widths[:, None], np.float32)], scale)
        rows = g.node("Reshape", [small, g.constant("rows", [-1, dims.num_heads, dims.head_dim])], f"{projected}.rows")
        g.node("Transpose", [rows], name, perm=[1, 2, 0] if widths is None else [1, 0, 2])
    assert not written
    for name, shape in compact_shapes(dims, "source").items():
        g.output(name, compact_type(name), shape)
    return g


def build_compact_decoder(g: GraphBuilder, nodes: list[NodeProto], dims: Dims, units: Units) -> GraphBuilder:
    """Rewrite a decoder graph; its weights stay where they are.

    It takes what the compact encoder gives. `past_*` and `present_*` are int8, with a constant scale for each channel; what
    is larger than 127 units is cut, and so are queries.

    Args:
        g: the graph without its nodes.
        nodes: its nodes.
        dims: sizes of the network.
        units: of the model.
    """
    cache: Shape = ["n", dims.num_heads, "capacity", dims.head_dim]
    for name in past_names(dims.decoder_layers):
        g.input(name, np.int8, cache)
    for name in present_names(dims.decoder_layers):
        g.output(name, np.int8, cache)
    g.drop(cross_names(dims.decoder_layers))
    for name, shape in compact_shapes(dims, "source").items():
        g.input(name, compact_type(name), shape)
    layers = range(dims.decoder_layers)
    kept = {f"{self_attention_at(i)}.heads": i for i in layers}
    asked = {f"{cross_attention_at(i)}.q": i for i in layers}
    replaced = {f"{cross_attention_at(i)}.{part}" for i in layers for part in CROSS_ATTENTION}
    for node in nodes:
        result = node.output[0]
        if result in kept:
            i = kept.pop(result)
            scales = (("key", units.own_keys[i]), ("value", units.own_values[i]))
            constants = {
                place: g.constant(f"{result}.{part}_scale", scale[None, :, None], np.float32)
                for place, (part, scale) in zip(_SCALES, scales, strict=True)
            }
            g.add(_changed(node, constants, _IN_INT8))
        elif result in asked:
            i = asked.pop(result)
            _attention(g, dims, units, i, _stretched(g, node, 1 / units.queries[i]))
        elif result not in replaced:
            g.add(node)
    assert not kept
    assert not asked
    return g


def _attention(g: GraphBuilder, dims: Dims, units: Units, i: int, query: str) -> None:
    """Attention of queries in units, `(n, 1, heads * head_dim)`, to the prompt: both products are of integers."""
    at, (keys, values) = cross_attention_at(i), cross_names(dims.decoder_layers)[2 * i : 2 * i + 2]
    one, middle = g.constant("one_float", 1, np.float32), g.constant("middle", 128, np.uint8)
    small = g.node("QuantizeLinear", [query, one, middle], f"{at}.units")
    folded = g.node("Reshape", [small, g.constant("rows", [-1, dims.num_heads, dims.head_dim])], f"{at}.folded")
    rows = g.node("Transpose", [folded], f"{at}.rows", perm=[1, 0, 2])  # (heads, n, head_dim)
    step = g.constant(f"{at}.step", units.step[i], np.float32)
    scores = g.node("MatMulIntegerToFloat", [rows, keys, step, f"{keys}_scale", middle, f"{keys}_zero"], f"{at}.scores")
    shares = g.node("Softmax", [scores], f"{at}.shares", axis=-1)
    # The largest share of each sample and head becomes 127 units: with one scale for all, even attention would get none.
    largest = g.node("ReduceMax", [shares, g.constant("last_axis", [-1])], f"{at}.largest")
    unit = g.node("Mul", [largest, g.constant("share_unit", 1 / SHARES, np.float32)], f"{at}.unit")
    small = g.node("QuantizeLinear", [shares, unit], f"{at}.share_units", axis=-1, block_size=_WHOLE_ROW)
    inputs = [small, values, one, f"{values}_scale", "", f"{values}_zero"]
    mixed = g.node("MatMulIntegerToFloat", inputs, f"{at}.mixed_units")
    mixed = g.node("Mul", [mixed, unit], f"{at}.mixed")
    by_sample = g.node("Transpose", [mixed], f"{at}.by_sample", perm=[1, 0, 2])
    flat = g.node("Reshape", [by_sample, g.constant("unfold", [-1, 1, dims.inner])], f"{at}.flat")
    g.node("Add", [flat, g.constant(f"{at}.means", units.means[i].reshape(-1), np.float32)], f"{at}.heads")


def _stretched(g: GraphBuilder, node: NodeProto, factor: Floats, centre: Floats | None = None) -> str:
    """`(x - centre) * factor`, by channel `(heads, head_dim)`, of what a projection computes.

    Where that has scales for its outputs, and a place for an offset if there is one, it costs nothing.
    """
    result, factor = node.output[0], factor.reshape(-1)
    offset = None if centre is None else -centre.reshape(-1) * factor
    place = {"MatMulIntegerToFloat": 3, "MatMulNBits": 2 if offset is None else None}.get(node.op_type)
    if place is None:
        g.add(node)
        stretched = g.node("Mul", [result, g.constant(f"{result}.factor", factor, np.float32)], f"{result}.stretched")
        if offset is None:
            return stretched
        return g.node("Add", [stretched, g.constant(f"{result}.offset", offset, np.float32)], f"{result}.moved")
    scales = g.array(node.input[place])
    scaled = (scales.reshape(len(factor), -1) * factor[:, None]).reshape(scales.shape)
    constants = {place: g.constant(f"{result}.scales", scaled, np.float32)}
    if offset is not None:
        constants |= {6: g.constant(f"{result}.offset", offset, np.float32)}
    g.add(_changed(node, constants))
    return str(result)


def _changed(node: NodeProto, inputs: Mapping[int, str], attributes: Mapping[str, Any] = MappingProxyType({})) -> NodeProto:
    """A copy of a node with other inputs at some places, or further attributes."""
    changed = NodeProto()
    changed.CopyFrom(node)
    changed.input.extend([""] * (max(inputs) + 1 - len(changed.input)))
    for place, name in inputs.items():
        changed.input[place] = name
    changed.attribute.extend(helper.make_attribute(*each) for each in attributes.items())
    return changed
