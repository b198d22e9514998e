"""Precision recipes: in which form each linear layer computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from onnx import numpy_helper

from ramekin.cache import Floats
from ramekin_export.graph import GraphBuilder
from ramekin_export.quantize import per_block, per_channel

_MIDDLE = numpy_helper.from_array(np.array([128], np.uint8), "middle")


class Linear(Protocol):
    """A form of linear layer."""

    @property
    def form(self) -> str:
        """What the manifest tells of it."""

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:
        """Project `x (..., in)` by each of the weights `(out, in)`, called after the values that they make."""


@dataclass(frozen=True)
class Float32:
    """Plain matrix products: the reference."""

    form: str = "float32"

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:  # noqa: D102
        return [g.node("MatMul", [x, g.weight(f"{name}.weight", w.T)], name) for name, w in weights.items()]


@dataclass(frozen=True)
class Int8PerToken:
    """int8 weights with a scale for each output; activations become uint8 around 128 with a scale for each token.

    One scale for all tokens would be what onnxruntime's `DynamicQuantizeLinear` makes; a single massive activation then
    takes the resolution of every token.

    Attributes:
        pairs: keep integer sums exact on every processor, see `per_channel`.
    """

    pairs: bool = True
    form: str = "int8 per channel, activations 8 bits per token"

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:  # noqa: D102
        at = f"{next(iter(weights))}.input"
        largest = g.node("ReduceMax", [g.node("Abs", [x], f"{at}.abs"), g.constant("last_axis", [-1])], f"{at}.largest")
        step = g.node("Mul", [largest, g.constant("int8_step", 1 / 127, np.float32)], f"{at}.step")
        scale = g.node("Max", [step, g.constant("tiny", 1e-30, np.float32)], f"{at}.scale")
        scales = g.node("Reshape", [scale, g.constant("flat", [-1])], f"{at}.scales")
        middles = g.node("ConstantOfShape", [g.node("Shape", [scales], f"{at}.tokens")], f"{at}.middles", value=_MIDDLE)
        small = g.node("QuantizeLinear", [x, scales, middles], at, axis=1)
        one, middle = g.constant("one_float", 1, np.float32), g.constant("middle", 128, np.uint8)
        outputs = []
        for name, weight in weights.items():
            q = per_channel(weight, self.pairs)
            values = g.weight(f"{name}.weight", q.values)
            columns = g.weight(f"{name}.scale", q.scales, parameters=0)
            whole = g.node("MatMulIntegerToFloat", [small, values, one, columns, middle], f"{name}.by_token")
            outputs.append(g.node("Mul", [whole, scale], name))
        return outputs


@dataclass(frozen=True)
class PerBlock:
    """int8 or int4 weights with a scale for each block of inputs; activations become int8 by row and block.

    So no sample depends on the others of its batch. `accuracy_level=4` asks for integer arithmetic; without it
    onnxruntime turns all weights back into floats at every call.

    Attributes:
        moments: sums of `x x^T` by the name of the value x, to round int4 weights by.
    """

    bits: int
    block: int = 128
    moments: Mapping[str, Floats] = field(default_factory=dict, repr=False)

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:  # noqa: D102
        outputs = []
        for name, weight in weights.items():
            q = per_block(weight, self.bits, self.block, self.moments.get(x))
            values = g.weight(f"{name}.weight", q.values, parameters=weight.size)
            scales = g.weight(f"{name}.scale", q.scales, parameters=0)
            shape = {"N": weight.shape[0], "K": weight.shape[1], "bits": self.bits, "block_size": self.block}
            outputs.append(g.node("MatMulNBits", [x, values, scales], name, **shape, accuracy_level=4))
        return outputs

    @property
    def form(self) -> str:
        """What the manifest tells of it."""
        rounding = ", rounded to what calibration saw" if self.moments else ""
        return f"{self.bits} bits per block of {self.block}{rounding}, activations 8 bits per row and block"


@dataclass(frozen=True)
class Recipe:
    """The forms of a model's linear layers.

    Attributes:
        folded: rewrite the weights first, see `fold`.
        calibrated: round the decoder's weights by what its layers see.
        most_divergence: mean KL divergence from float32, in nats per token, beyond which an export fails.
    """

    encoder: Linear
    decoder: Linear
    head: Linear
    folded: bool = True
    calibrated: bool = False
    most_divergence: float = 1e-6

    @property
    def quantized(self) -> bool:
        """Whether it is anything but the reference."""
        return not isinstance(self.encoder, Float32)

    def rounded_by(self, moments: Mapping[str, Floats]) -> Recipe:
        """The same recipe, its decoder's weights rounded by what its layers see."""
        decoder = replace(self.decoder, moments=moments) if isinstance(self.decoder, PerBlock) else self.decoder
        return replace(self, decoder=decoder)

    def describe(self) -> dict[str, Any]:
        """What the manifest tells of it."""
        return {part: getattr(self, part).form for part in ("encoder", "decoder", "head")}


# What the head reads is rounded in smaller blocks: its errors reach the logits as they are, with nothing behind to average
# them away. That halves the divergence of int8 for 1 to 2 % of a step.
_HEAD = PerBlock(8, block=32)
RECIPES: dict[str, Recipe] = {
    "fp32": Recipe(Float32(), Float32(), Float32(), folded=False),
    "int8": Recipe(Int8PerToken(), PerBlock(8), _HEAD, most_divergence=0.01),
    "int4": Recipe(Int8PerToken(), PerBlock(4, block=256), _HEAD, calibrated=True, most_divergence=0.1),
}


def project(g: GraphBuilder, linear: Linear, x: str, name: str, weight: Floats) -> str:
    """One projection."""
    return linear(g, x, {name: weight})[0]


def names(at: str, parts: Sequence[str]) -> list[str]:
    """`at.part` for each part."""
    return [f"{at}.{part}" for part in parts]
