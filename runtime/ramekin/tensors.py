"""What the tensors of a model folder's graphs are called, and their shapes: the other half of the contract in `manifest`."""

from __future__ import annotations

from typing import TypeVar

from ramekin.manifest import Dims

# Tensor names. The encoder graph: input_ids (1, S) int64 -> cross_key_i (1, heads, S, head_dim), cross_value_i (1,
# heads, head_dim, S). The decoder graph: token_ids (n, 1) int64, past_lengths (n,) int32, top_k (1,) int64, past_key_i,
# past_value_i (n, heads, capacity, head_dim), cross_* -> logits (n, vocab), top_values and top_ids (n, top_k),
# present_key_i, present_value_i, which are bound to the memory of past_*. All floats are float32. The compact
# graphs have other cross_*, see `compact_shapes`, and past_* and present_* in int8.
INPUT_IDS = "input_ids"
TOKEN_IDS, PAST_LENGTHS, TOP_K = "token_ids", "past_lengths", "top_k"
LOGITS, TOP_VALUES, TOP_IDS = "logits", "top_values", "top_ids"
# Graphs for CUDA have others of other shapes, see `build_cuda_encoder` and `build_cuda_decoder`, and these besides.
SOURCE_LENGTHS, POSITIONS, DISTANCES, UNFOLDED = "source_lengths", "positions", "distances", "unfolded"
TOP_LOGPROBS = "top_logprobs"


def cross_names(layers: int) -> list[str]:
    """The cross-attention keys and values, layer by layer: `cross_key_0, cross_value_0, cross_key_1, ...`."""
    return [f"cross_{part}_{i}" for i in range(layers) for part in ("key", "value")]


Size = TypeVar("Size")


def cross_shapes(dims: Dims, source: Size) -> dict[str, tuple[int | Size, ...]]:
    """The shape of each of `cross_names`, for a prompt of `source` tokens: a number, or what stands for any number."""
    keys = (1, dims.num_heads, source, dims.head_dim)
    values = (1, dims.num_heads, dims.head_dim, source)
    return {name: (keys, values)[i % 2] for i, name in enumerate(cross_names(dims.decoder_layers))}


def compact_shapes(dims: Dims, source: Size) -> dict[str, tuple[int | Size, ...]]:
    """The same for the compact graphs: keys and values in 8 bits, each with what a unit stands for and what stands for 0."""
    shapes: dict[str, tuple[int | Size, ...]] = {}
    for i, name in enumerate(cross_names(dims.decoder_layers)):
        values = bool(i % 2)
        shapes[name] = (dims.num_heads, source, dims.head_dim) if values else (dims.num_heads, dims.head_dim, source)
        shapes[f"{name}_scale"] = (dims.num_heads, 1, dims.head_dim) if values else ()
        shapes[f"{name}_zero"] = ()
    return shapes


def compact_type(name: str) -> str:
    """The type of one of `compact_shapes`."""
    return "float32" if name.endswith("_scale") else "int8" if "value" in name else "uint8"


def past_names(layers: int) -> list[str]:
    """The self-attention caches that the decoder reads, in the order of `cross_names`."""
    return [f"past_{part}_{i}" for i in range(layers) for part in ("key", "value")]


def present_names(layers: int) -> list[str]:
    """The self-attention caches that the decoder writes, in the order of `past_names`."""
    return [f"present_{part}_{i}" for i in range(layers) for part in ("key", "value")]
