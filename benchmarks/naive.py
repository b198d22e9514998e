"""Plain quantization, to see what our recipes add to it: what a first attempt with onnxruntime's operators does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ramekin.cache import Floats
from ramekin_export.graph import GraphBuilder
from ramekin_export.quantize import per_channel


@dataclass(frozen=True)
class Int8PerTensor:
    """int8 weights with a scale for each output; activations become uint8 with one scale for the whole tensor."""

    pairs: bool = True
    form: str = "int8 per channel, one activation scale"

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:
        """Project."""
        at = f"{next(iter(weights))}.input"
        small, scale, zero = g.nodes("DynamicQuantizeLinear", [x], at, [at, f"{at}.scale", f"{at}.zero"])
        outputs = []
        for name, weight in weights.items():
            q = per_channel(weight, self.pairs)
            inputs = [small, g.weight(f"{name}.weight", q.values), scale, g.weight(f"{name}.scale", q.scales, 0), zero]
            outputs.append(g.node("MatMulIntegerToFloat", inputs, name))
        return outputs


@dataclass(frozen=True)
class NearestPerBlock:
    """int8 or int4 weights per block of inputs, the largest of a block at the end of the range, rounded to nearest."""

    bits: int
    block: int = 128
    form: str = "per block, nearest"

    def __call__(self, g: GraphBuilder, x: str, weights: Mapping[str, Floats]) -> list[str]:
        """Project."""
        outputs = []
        largest, middle = (1 << (self.bits - 1)) - 1, 1 << (self.bits - 1)
        for name, weight in weights.items():
            rows, inputs = weight.shape
            blocks = -(-inputs // self.block)
            padded = np.pad(weight, ((0, 0), (0, blocks * self.block - inputs))).reshape(rows, blocks, self.block)
            scales = np.abs(padded).max(axis=2) / largest
            scales = np.where(scales > 0, scales, 1).astype(np.float32)
            values = (np.rint(padded / scales[:, :, None]) + middle).astype(np.uint8)
            if self.bits == 4:
                values = values[:, :, 0::2] | (values[:, :, 1::2] << 4)
            stored = g.weight(f"{name}.weight", values, weight.size), g.weight(f"{name}.scale", scales.reshape(-1), 0)
            shape = {"N": rows, "K": inputs, "bits": self.bits, "block_size": self.block, "accuracy_level": 4}
            outputs.append(g.node("MatMulNBits", [x, *stored], name, **shape))
        return outputs
