"""The number formats of graphs for CUDA: what is computed in half precision, and what never is."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ramekin.cache import Floats
from ramekin.errors import CheckpointError
from ramekin_export.graph import GraphBuilder, element_type
from ramekin_export.recipe import RECIPES

DType = np.dtype[Any]
INT32 = np.dtype(np.int32)
FLOAT32, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class FloatLinear:
    """A plain matrix product: the formats of what it reads, of its weights, and of its result."""

    reads: DType
    weights: DType
    result: DType

    @property
    def form(self) -> str:
        """What the manifest tells of it."""
        return str(self.weights.name)

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:
        """Project `x (..., in)` by each of the weights `(out, in)`, called after the values that they make."""
        if self.reads != self.weights:
            x = cast(g, x, self.weights, f"{next(iter(weights))}.input")
        outputs = []
        for name, weight in weights.items():
            inner = [x, g.weight(f"{name}.weight", narrowed(name, weight.T, self.weights))]
            if self.result == self.weights:
                outputs.append(g.node("MatMul", inner, name))
            else:
                outputs.append(cast(g, g.node("MatMul", inner, f"{name}.product"), self.result, name))
        return outputs


@dataclass(frozen=True)
class Format:
    """Where which floats are used.

    Attributes:
        products: weights, attention and the caches.
        stream: the residual stream, its norms, and the feed-forward blocks from the gate through `wo`, whose inputs are a
            hundred times larger than anything else and pass the 65,504 of float16 (transformers keeps `wo` in float32 too).
            Products of float32 in it are TF32 on Ampere and newer.
        most_divergence: mean KL divergence from float32, in nats per token, beyond which an export fails.
    """

    products: DType
    stream: DType
    most_divergence: float
    rotated: ClassVar = False  # what recipes do to weights: rounding to half precision needs none of it
    folded: ClassVar = False
    calibrated: ClassVar = False
    compact: ClassVar = False

    @property
    def inward(self) -> FloatLinear:
        """From the stream into an attention: queries, keys, values."""
        return FloatLinear(self.stream, self.products, self.products)

    @property
    def outward(self) -> FloatLinear:
        """From an attention back to the stream."""
        return FloatLinear(self.products, self.products, self.stream)

    @property
    def gates(self) -> FloatLinear:
        """`wi`, `wi_0` and `wi_1`."""
        return FloatLinear(self.stream, self.products, self.stream)

    @property
    def wo(self) -> FloatLinear:
        """The feed-forward blocks' output projection."""
        return FloatLinear(self.stream, self.stream, self.stream)

    @property
    def head(self) -> FloatLinear:
        """The logits, in float32 whatever the rest is: rounded to bfloat16, half of the likeliest would be equal."""
        return FloatLinear(self.stream, FLOAT32, FLOAT32)

    @property
    def quantized(self) -> bool:
        """Whether it is anything but float32."""
        return self.products != FLOAT32

    @property
    def providers(self) -> tuple[str, ...]:
        """Where onnxruntime has kernels for all of it."""
        return ("cuda",) if self.quantized else ("cuda", "cpu")

    def describe(self) -> dict[str, str]:
        """What the manifest tells of it."""
        return {"products": self.products.name, "stream": self.stream.name}


FORMATS = {
    "fp32-cuda": Format(FLOAT32, FLOAT32, most_divergence=1e-6),
    "bf16": Format(BFLOAT16, BFLOAT16, most_divergence=0.02),
    "fp16": Format(FLOAT16, FLOAT32, most_divergence=0.002),
}
"""Graphs for CUDA, by precision. bfloat16 has float32's range, so nothing needs to be kept out of it."""
PRECISIONS: ChainMap[str, Any] = ChainMap(FORMATS, RECIPES)  # a view of both
"""All precisions: recipes for the CPU and formats for CUDA."""


def cast(g: GraphBuilder, x: str, dtype: DType, name: str) -> str:
    """`x` in another format, called `name`."""
    return g.node("Cast", [x], name, to=element_type(dtype))


def narrowed(name: str, array: Floats, dtype: DType) -> npt.NDArray[Any]:
    """A weight in another format.

    Raises:
        CheckpointError: it holds numbers that are too large for it.
    """
    if dtype == FLOAT32:
        return array
    with np.errstate(over="ignore"):
        small = array.astype(dtype)
    if not np.isfinite(small.astype(np.float32)).all():
        largest = np.abs(array).max()
        raise CheckpointError(f"{name}: {largest:.3g} does not fit into {dtype.name}; use --precision bf16, int8 or fp32")
    return np.asarray(small)
