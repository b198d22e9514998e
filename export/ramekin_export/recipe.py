"""Precision recipes: in which form each linear layer computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ramekin.cache import Floats
from ramekin_export.graph import GraphBuilder
from ramekin_export.quantize import per_block, per_channel


class Linear(Protocol):
    """A form of linear layer."""

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:
        """Project `x (..., in)` by each of the weights `(out, in)`, called after the values that they make."""


@dataclass(frozen=True)
class Float32:
    """Plain matrix products: the reference."""

    form: str = "float32"

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:  # noqa: D102
        return [g.node("MatMul", [x, g.weight(f"{name}.weight", w.T)], name) for name, w in weights.items()]


@dataclass(frozen=True)
class Int8PerChannel:
    """int8 weights with a scale for each output; activations become uint8 with one scale for the whole tensor."""

    form: str = "int8 per channel"

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:  # noqa: D102
        at = f"{next(iter(weights))}.input"
        small, scale, zero = g.nodes("DynamicQuantizeLinear", [x], at, [at, f"{at}.scale", f"{at}.zero"])
        outputs = []
        for name, weight in weights.items():
            q = per_channel(weight)
            values = g.weight(f"{name}.weight", q.values)
            scales = g.weight(f"{name}.scale", q.scales, parameters=0)
            outputs.append(g.node("MatMulIntegerToFloat", [small, values, scale, scales, zero], name))
        return outputs


@dataclass(frozen=True)
class PerBlock:
    """int8 or int4 weights with a scale for each block of inputs; activations become int8 by row and block.

    So no sample depends on the others of its batch. `accuracy_level=4` asks for integer arithmetic; without it
    onnxruntime turns all weights back into floats at every call.
    """

    bits: int
    block: int = 128

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:  # noqa: D102
        outputs = []
        for name, weight in weights.items():
            q = per_block(weight, self.bits, self.block)
            values = g.weight(f"{name}.weight", q.values, parameters=weight.size)
            scales = g.weight(f"{name}.scale", q.scales, parameters=0)
            shape = {"N": weight.shape[0], "K": weight.shape[1], "bits": self.bits, "block_size": self.block}
            outputs.append(g.node("MatMulNBits", [x, values, scales], name, **shape, accuracy_level=4))
        return outputs


@dataclass(frozen=True)
class Recipe:
    """The forms of a model's linear layers."""

    encoder: Linear
    decoder: Linear
    head: Linear

    def describe(self) -> dict[str, Any]:
        """What the manifest tells of it."""
        return {part: _describe(getattr(self, part)) for part in ("encoder", "decoder", "head")}


def _describe(linear: Any) -> str:
    settings = asdict(linear)
    return str(settings.get("form") or ", ".join(f"{name} {value}" for name, value in settings.items()))


RECIPES: dict[str, Recipe] = {
    "fp32": Recipe(Float32(), Float32(), Float32()),
    "int8": Recipe(Int8PerChannel(), PerBlock(8), PerBlock(8)),
    "int4": Recipe(Int8PerChannel(), PerBlock(4), PerBlock(8)),
}


def project(g: GraphBuilder, linear: Linear, x: str, name: str, weight: Floats) -> str:
    """One projection."""
    return linear(g, x, {name: weight})[0]


def names(at: str, parts: Sequence[str]) -> list[str]:
    """`at.part` for each part."""
    return [f"{at}.{part}" for part in parts]
