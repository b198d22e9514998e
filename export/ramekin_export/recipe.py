"""Precision recipes: in which form each linear layer computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from onnx import numpy_helper

from ramekin.cache import Floats
from ramekin_export.graph import GraphBuilder
from ramekin_export.quantize import per_block, per_channel

_MIDDLE = numpy_helper.from_array(np.array([128], np.uint8), "middle")
_COARSE, _FINE = 1 / 127, 1 / 127 / 254  # what a coarse step leaves is at most half of it: 127 fine ones


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
        at, axis = f"{next(iter(weights))}.input", g.constant("last_axis", [-1])
        least = g.node("Neg", [g.node("ReduceMin", [x, axis], f"{at}.lowest")], f"{at}.least")  # a pass less than Abs
        largest = g.node("Max", [g.node("ReduceMax", [x, axis], f"{at}.highest"), least], f"{at}.largest")
        step = g.node("Mul", [largest, g.constant("int8_step", 1 / 127, np.float32)], f"{at}.step")
        scale = g.node("Max", [step, g.constant("tiny", 1e-30, np.float32)], f"{at}.scale")
        scales = g.node("Reshape", [scale, g.constant("flat", [-1])], f"{at}.scales")
        middles = g.node("ConstantOfShape", [g.node("Shape", [scales], f"{at}.tokens")], f"{at}.middles", value=_MIDDLE)
        small = g.node("QuantizeLinear", [x, scales, middles], at, axis=1)
        one, outputs = g.constant("one_float", 1, np.float32), []
        for name, weight in weights.items():
            whole = _int8_product(g, small, one, name, weight, self.pairs, f"{name}.by_token")
            outputs.append(g.node("Mul", [whole, scale], name))
        return outputs


@dataclass(frozen=True)
class Int8Normed:
    """int8 weights with a scale for each output; activations become uint8 around 128 with one constant scale.

    For what a norm made of a rotated stream: each row has a root mean square of 1 and is nearly Gaussian, whatever the model
    and the text. So no pass looks for the largest value, and no sample depends on the others of its batch.

    Attributes:
        pairs: keep integer sums exact on every processor, see `per_channel`.
        largest: what becomes 127, in root mean squares; what is larger is clipped (one value in 150,000 of a Gaussian).
    """

    pairs: bool = True
    largest: float = 4.5
    form: str = "int8 per channel, activations 8 bits with one constant scale"

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:  # noqa: D102
        scale = g.constant("normed_scale", self.largest / 127, np.float32)
        middle = g.constant("middle", 128, np.uint8)
        small = g.node("QuantizeLinear", [x, scale, middle], f"{next(iter(weights))}.input")
        return [_int8_product(g, small, scale, name, weight, self.pairs, name) for name, weight in weights.items()]


@dataclass(frozen=True)
class Int8TwoBytes:
    """int8 weights with a scale for each output; activations become two uint8 around 128: a coarse one, and the rest of it.

    For the decoder's `o` and `wo`, whose inputs no constant scale fits, and whose few large values leave too little of
    8 bits to the others. Both bytes of a row are rows of one product, which reads each weight once. Values are divided by
    the norm of their row, which is never less than the largest of them: so scales are constant, and nothing is clipped.

    Attributes:
        pairs: keep integer sums exact on every processor, see `per_channel`.
    """

    pairs: bool = True
    form: str = "int8 per channel, activations 16 bits per token"

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:
        """Project `x (n, 1, in)` by each of the weights `(out, in)`, called after the values that they make."""
        at, middle = f"{next(iter(weights))}.input", g.constant("middle", 128, np.uint8)
        coarse, fine = g.constant("coarse_step", _COARSE, np.float32), g.constant("fine_step", _FINE, np.float32)
        width = next(iter(weights.values())).shape[1]
        root = math.sqrt(width)  # so many root mean squares are a row's norm
        gain = g.constant(f"one_by_root_{width}", np.full(width, 1 / root), np.float32)
        names = [f"{at}.unit", f"{at}.factor"]  # the row by its norm; 1 by its root mean square
        # onnxruntime's own, though it lies among ONNX's: no operator of ONNX tells the second.
        unit, factor = g.nodes("SimplifiedLayerNormalization", [x, gain], f"{at}.unit", names, epsilon=1e-30)
        high = g.node("QuantizeLinear", [unit, coarse, middle], f"{at}.high")
        rest = g.node("Sub", [unit, g.node("DequantizeLinear", [high, coarse, middle], f"{at}.rounded")], f"{at}.rest")
        low = g.node("QuantizeLinear", [rest, fine, middle], f"{at}.low")
        rows = g.node("Concat", [high, low], at, axis=1)  # (n, 2, in)
        steps = g.constant(f"both_steps_{width}", [_COARSE * root, _FINE * root], np.float32)
        scales = g.node("Div", [steps, factor], f"{at}.scales")  # (n, 1, 2)
        one, outputs = g.constant("one_float", 1, np.float32), []
        for name, weight in weights.items():
            parts = _int8_product(g, rows, one, name, weight, self.pairs, f"{name}.parts")
            outputs.append(g.node("MatMul", [scales, parts], name))
        return outputs


def _int8_product(g: GraphBuilder, small: str, scale: str, name: str, weight: Floats, pairs: bool, result: str) -> str:
    """The product of uint8 activations around 128 and int8 weights, times both their scales."""
    q, middle = per_channel(weight, pairs), g.constant("middle", 128, np.uint8)
    values, columns = g.weight(f"{name}.weight", q.values), g.weight(f"{name}.scale", q.scales, parameters=0)
    return g.node("MatMulIntegerToFloat", [small, values, scale, columns, middle], result)


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
class Layers:
    """The forms of a stack's linear layers.

    Attributes:
        inward: of those that read what a norm made: queries, keys, values and `wi`.
        outward: of those that write to the residual stream: `o` and `wo`.
    """

    inward: Linear
    outward: Linear

    @classmethod
    def alike(cls, form: Linear) -> Layers:
        """All in one form."""
        return cls(form, form)

    @property
    def form(self) -> str:
        """What the manifest tells of it."""
        return self.inward.form if self.inward == self.outward else f"{self.inward.form}; o and wo: {self.outward.form}"


@dataclass(frozen=True)
class Recipe:
    """The forms of a model's linear layers.

    Attributes:
        rotated: rewrite the weights first, see `rotate`.
        folded: rewrite the weights first, see `fold`.
        calibrated: round the decoder's weights by what its layers see.
        compact: add graphs that keep keys and values in 8 bits, see `compact`; `Writer` alone does not.
        most_divergence: mean KL divergence from float32, in nats per token, beyond which an export fails.
    """

    encoder: Layers
    decoder: Layers
    head: Linear
    rotated: bool = True
    folded: bool = True
    calibrated: bool = False
    compact: bool = False
    most_divergence: float = 1e-6

    def __post_init__(self) -> None:
        if not self.rotated and any(isinstance(stack.inward, Int8Normed) for stack in (self.encoder, self.decoder)):
            raise ValueError("Int8Normed needs a rotated stream: with the gains of norms no constant scale fits")

    @property
    def quantized(self) -> bool:
        """Whether it is anything but the reference."""
        return not isinstance(self.head, Float32)

    def rounded_by(self, moments: Mapping[str, Floats]) -> Recipe:
        """The same recipe, its decoder's weights rounded by what its layers see."""

        def rounded(form: Linear) -> Linear:
            return replace(form, moments=moments) if isinstance(form, PerBlock) else form

        return replace(self, decoder=Layers(rounded(self.decoder.inward), rounded(self.decoder.outward)))

    def describe(self) -> dict[str, Any]:
        """What the manifest tells of it."""
        return {part: getattr(self, part).form for part in ("encoder", "decoder", "head")}


_FLOAT32 = Layers.alike(Float32())
_ENCODER = Layers(Int8Normed(), Int8PerToken())
RECIPES: dict[str, Recipe] = {
    "fp32": Recipe(_FLOAT32, _FLOAT32, Float32(), rotated=False, folded=False),
    # Many samples are bound by arithmetic, and integer products at a constant scale are the fastest there is; few samples by
    # the bytes of the weights, of which int4 has half.
    "int8": Recipe(_ENCODER, Layers(Int8Normed(), Int8TwoBytes()), PerBlock(8), compact=True, most_divergence=0.01),
    "int4": Recipe(
        _ENCODER, Layers.alike(PerBlock(4, block=256)), PerBlock(8), calibrated=True, compact=True, most_divergence=0.1
    ),
}


def project(g: GraphBuilder, linear: Linear, x: str, name: str, weight: Floats) -> str:
    """One projection."""
    return linear(g, x, {name: weight})[0]
