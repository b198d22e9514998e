"""Which files an `.onnx` file refers to, read from its bytes: the runtime has no `onnx` package to ask.

onnxruntime before 1.24 loads external weights from any path that a graph names, so a model folder that came from
somewhere else is looked through before it is opened.

Source: protobuf's encoding (protobuf.dev/programming-guides/encoding) and the field numbers of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from mmap import mmap

# Where tensors can hide: message -> {field number: message of that field}. TensorProto field 13 is external_data.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_MAX_DEPTH = 50


def external_locations(model: bytes | mmap) -> frozenset[str]:
    """Every `location` of external data in a serialized ModelProto.

    Raises:
        ValueError: the bytes are not a protobuf message.
    """
    return frozenset(_locations(memoryview(model), "model", 0))


def _locations(message: memoryview, kind: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs nested too deeply")
    children = _CHILDREN[kind]
    for number, value in _fields(message):
        child = children.get(number)
        if child == "entry":
            entry = dict(_fields(value))
            if bytes(entry.get(1, b"")) == b"location":
                yield bytes(entry.get(2, b"")).decode("utf-8", "replace")
        elif child:
            yield from _locations(value, child, depth + 1)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message; numbers are passed over."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        if tag >> 32:
            raise ValueError("a field number that is too large")  # onnxruntime would drop its upper bits
        wire = tag & 7
        if wire == 0:
            _, at = _varint(message, at)
        elif wire == 1:
            at += 8
        elif wire == 5:
            at += 4
        elif wire == 2:
            size, at = _varint(message, at)
            if at + size > end:
                raise ValueError("truncated")
            yield tag >> 3, message[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire}")
    if at != end:
        raise ValueError("truncated")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("truncated")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")
