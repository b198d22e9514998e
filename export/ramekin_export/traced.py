"""The weights in graphs that optimum's exporter traced, under the names that they have in a checkpoint.

Embeddings, gains and relative biases keep their names. A linear layer's weight is an input of a `MatMul` node, transposed,
with a name that tells nothing; the node is called after the module that it was traced from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from ramekin.errors import CheckpointError
from ramekin.optimum_folder import OptimumFolder

Reader = Callable[[str], npt.NDArray[Any]]
_MODULE = re.compile(r"/?(?:(?:encoder|decoder)/)?(block\.\d+/layer\.\d+/\w+/\w+|lm_head)/MatMul(?:_\d+)?")
_KEPT = re.compile(r"(?:(?:encoder|decoder)\.)?(block\.\d+\..+|final_layer_norm\.weight|lm_head\.weight)")
_MERGED = re.compile(r"_merged_\d+$")  # what optimum adds when it puts two decoders into one graph
_EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def read_traced(found: OptimumFolder) -> dict[str, Reader]:
    """A reader for each tensor.

    Raises:
        CheckpointError: the graphs are quantized, or a graph cannot be read.
    """
    if found.suffix:
        raise CheckpointError(f"{found.encoder}: not a float32 export; convert the one that it was made from")
    readers: dict[str, Reader] = {}
    for stack, graph in (("encoder", found.encoder), ("decoder", found.decoder)):
        for name, array in _tensors(graph, stack):
            readers.setdefault(name, _constant(array))
    return readers


def _constant(array: npt.NDArray[Any]) -> Reader:
    return lambda _name: array


def _tensors(path: Path, stack: str) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's errors, and onnx's own, have no common base
        raise CheckpointError(f"{path}: not an ONNX file that can be read ({error})") from None
    there = {tensor.name: tensor for graph in _graphs(model.graph) for tensor in graph.initializer}
    for full, tensor in there.items():
        name = _MERGED.sub("", full)
        kept = _KEPT.fullmatch(name)
        if name in _EMBEDDINGS:
            yield "shared.weight", _array(path, tensor)
        elif kept:
            yield _full(kept[1], stack), _array(path, tensor)
    for graph in _graphs(model.graph):
        for node in graph.node:
            module = _MODULE.fullmatch(node.name) if node.op_type == "MatMul" else None
            weight = there.get(node.input[1]) if module and len(node.input) > 1 else None
            if module and weight is not None:
                name = f"{module[1].replace('/', '.')}.weight"
                yield _full(name, stack), np.ascontiguousarray(_array(path, weight).T)


def _array(path: Path, tensor: onnx.TensorProto) -> npt.NDArray[Any]:
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except Exception as error:  # of shapes and types that do not fit together onnx raises whatever comes first
        raise CheckpointError(f"{path}: tensor {tensor.name!r} cannot be read ({error})") from None


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those in its branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _full(name: str, stack: str) -> str:
    return name if name.startswith("lm_head") else f"{stack}.{name}"
