"""A small graph builder: nodes by name, weights straight into external files, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

import ramekin

OPSET = 18
_IR_VERSIONS = {18: 9, 21: 10, 24: 11}
MICROSOFT = "com.microsoft"
_MICROSOFT_OPS = {
    "FastGelu",
    "FusedMatMul",
    "Gelu",
    "GroupQueryAttention",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "MultiHeadAttention",
    "SkipSimplifiedLayerNormalization",
}
_PAGE, _LINE = 4096, 64  # large weights start at page boundaries, so that they can be mapped; small ones at cache lines
_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
}

Shape = Sequence[int | str]


def element_type(dtype: npt.DTypeLike) -> int:
    """ONNX's number for an element type."""
    return int(_TYPES[np.dtype(dtype)])


class WeightFile:
    """A file of raw tensors; graphs refer to them by place and length."""

    def __init__(self, path: Path, progress: Callable[[int], None] = lambda _: None) -> None:
        self.name, self._progress = path.name, progress
        self._stream: BinaryIO = path.open("wb")

    def add(self, name: str, array: npt.NDArray[Any], parameters: int) -> TensorProto:
        """Append an array; `parameters` of the checkpoint are told to be done."""
        array = np.ascontiguousarray(array)
        self._stream.write(b"\0" * (-self._stream.tell() % (_PAGE if array.nbytes >= 16 * _PAGE else _LINE)))
        offset = self._stream.tell()
        self._stream.write(array.view(np.uint8).data)  # bfloat16 has no buffer of its own
        tensor = TensorProto(name=name, data_type=element_type(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._progress(parameters)
        return tensor

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


class GraphBuilder:
    """One graph in the making. Every value is called after the node that computes it."""

    def __init__(self, name: str, weights: WeightFile | None, opset: int = OPSET) -> None:
        self._name, self._weights, self._opset = name, weights, opset
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: dict[str, onnx.ValueInfoProto] = {}
        self._outputs: dict[str, onnx.ValueInfoProto] = {}
        self._initializers: dict[str, TensorProto] = {}
        self._folder = Path()

    @classmethod
    def read(cls, path: Path, opset: int) -> tuple[GraphBuilder, list[onnx.NodeProto]]:
        """A graph with inputs, outputs and weights of a file but no nodes yet, and the file's nodes, to be added to it.

        It is of `opset`, in which these nodes have to mean what they do in the file's own.
        """
        model = onnx.load(path, load_external_data=False)
        g = cls(model.graph.name, None, opset)
        g._folder = path.parent
        g._inputs = {each.name: each for each in model.graph.input}
        g._outputs = {each.name: each for each in model.graph.output}
        g._initializers = {each.name: each for each in model.graph.initializer}
        return g, list(model.graph.node)

    def input(self, name: str, dtype: npt.DTypeLike, shape: Shape) -> str:
        """Declare an input, or declare it anew."""
        self._inputs[name] = helper.make_tensor_value_info(name, element_type(dtype), list(shape))
        return name

    def output(self, name: str, dtype: npt.DTypeLike, shape: Shape) -> None:
        """Declare that the value `name` is an output, or declare it anew."""
        self._outputs[name] = helper.make_tensor_value_info(name, element_type(dtype), list(shape))

    def drop(self, names: Sequence[str]) -> None:
        """Declare inputs or outputs to be none."""
        for name in names:
            self._inputs.pop(name, None)
            self._outputs.pop(name, None)

    def constant(self, name: str, value: npt.ArrayLike, dtype: type = np.int64) -> str:
        """A small constant inside the `.onnx` file; asking twice gives the same one."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def weight(self, name: str, array: npt.NDArray[Any], parameters: int | None = None) -> str:
        """A weight in the graph's external file; `parameters` of the checkpoint are in it (None: its own size)."""
        if not self._weights:
            raise ValueError(f"{name}: a graph that was read has no file for weights")
        return self.tensor(self._weights.add(name, array, array.size if parameters is None else parameters))

    def tensor(self, tensor: TensorProto) -> str:
        """A weight that already lies in some file."""
        self._initializers[tensor.name] = tensor
        return str(tensor.name)

    def array(self, name: str) -> npt.NDArray[Any]:
        """A constant or a weight of a graph that was read."""
        array: npt.NDArray[Any] = numpy_helper.to_array(self._initializers[name], str(self._folder))
        return array

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node with one output."""
        return self.nodes(op, inputs, name, [name], **attributes)[0]

    def nodes(self, op: str, inputs: Sequence[str], name: str, outputs: Sequence[str], **attributes: Any) -> list[str]:
        """Add a node with these outputs; an empty name is an output that nobody reads."""
        ours = op in _MICROSOFT_OPS and not (op == "Gelu" and self._opset >= 20)  # since then it is one of ONNX's own
        domain = MICROSOFT if ours else None
        self._nodes.append(
            helper.make_node(op, list(inputs), list(outputs), name=f"{name}/{op}", domain=domain, **attributes)
        )
        return list(outputs)

    def add(self, node: onnx.NodeProto) -> None:
        """Add a node of another graph."""
        self._nodes.append(node)

    def save(self, path: Path) -> None:
        """Write the `.onnx` file."""
        read = {name for node in self._nodes for name in node.input}  # onnxruntime warns of weights that nobody reads
        graph = helper.make_graph(
            self._nodes,
            self._name,
            list(self._inputs.values()),
            list(self._outputs.values()),
            initializer=[tensor for name, tensor in self._initializers.items() if name in read],
        )
        opsets = [helper.make_opsetid("", self._opset), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSIONS[self._opset])
        model.producer_name, model.producer_version = "ramekin", ramekin.__version__
        path.write_bytes(model.SerializeToString())
