"""Make `runtime/ramekin/ceiling_*.onnx`: one matrix product each, which shows what a machine can do at best.

    python -m tests.make_ceiling_graphs

The right-hand side is made by the graph itself, so that the files are small, and is constant, so that onnxruntime packs it
once, as it does with weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper

import ramekin
from ramekin.ceiling import _INNER, _OUTER

FOLDER = Path(ramekin.__file__).parent


def graph(kind: str) -> bytes:
    """The file of one kind."""
    left, right, out, operator = {
        "int8": (TensorProto.UINT8, np.int8, TensorProto.INT32, "MatMulInteger"),
        "float32": (TensorProto.FLOAT, np.float32, TensorProto.FLOAT, "MatMul"),
    }[kind]
    shape = numpy_helper.from_array(np.array([_INNER, _OUTER]), "shape")
    value = numpy_helper.from_array(np.array([1], right))
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["right"], value=value),
        helper.make_node(operator, ["left", "right"], ["product"]),
    ]
    inputs = [helper.make_tensor_value_info("left", left, ["rows", _INNER])]
    outputs = [helper.make_tensor_value_info("product", out, ["rows", _OUTER])]
    whole = helper.make_graph(nodes, f"ceiling_{kind}", inputs, outputs, [shape])
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    checker.check_model(model)
    return bytes(model.SerializeToString())


def main() -> None:
    """Write the files."""
    for kind in ("int8", "float32"):
        (FOLDER / f"ceiling_{kind}.onnx").write_bytes(graph(kind))


if __name__ == "__main__":
    main()
