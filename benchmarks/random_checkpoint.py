"""Make a seeded random T5 checkpoint: for machines without the Hub, and for tests. Its texts mean nothing.

    python -m benchmarks.random_checkpoint OUT --tokenizer spiece.model [--shape flan-t5-large] [--seed 0]

The weights have the scales of T5's own initialization, so that attention, feed-forward and logits have natural sizes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

SHAPES: dict[str, dict[str, Any]] = {
    "flan-t5-small": {"d_model": 512, "d_ff": 1024, "num_heads": 6, "num_layers": 8},
    "flan-t5-base": {"d_model": 768, "d_ff": 2048, "num_heads": 12, "num_layers": 12},
    "flan-t5-large": {"d_model": 1024, "d_ff": 2816, "num_heads": 16, "num_layers": 24},
}
FLAN: dict[str, Any] = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 32128,
    "d_kv": 64,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def config_of(shape: str) -> dict[str, Any]:
    """The `config.json` of a FLAN-T5 size."""
    layers = SHAPES[shape]["num_layers"]
    return {**FLAN, **SHAPES[shape], "num_decoder_layers": layers}


def tensors(config: Mapping[str, Any], seed: int) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Every weight of a T5 by transformers' name, in float32. The head is left out if `tie_word_embeddings`."""
    rng = np.random.default_rng(seed)
    width, inner, forward = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]

    def normal(rows: int, columns: int, scale: float) -> npt.NDArray[np.float32]:
        return rng.standard_normal((rows, columns), np.float32) * np.float32(scale)

    def gain() -> npt.NDArray[np.float32]:
        return rng.uniform(0.5, 1.5, width).astype(np.float32)

    yield "shared.weight", normal(config["vocab_size"], width, 1.0)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", normal(config["vocab_size"], width, width**-0.5)
    for stack, layers in (("encoder", config["num_layers"]), ("decoder", config["num_decoder_layers"])):
        attentions = ["SelfAttention", "EncDecAttention"] if stack == "decoder" else ["SelfAttention"]
        for i in range(layers):
            for j, attention in enumerate(attentions):
                at = f"{stack}.block.{i}.layer.{j}"
                yield f"{at}.layer_norm.weight", gain()
                yield f"{at}.{attention}.q.weight", normal(inner, width, (width * config["d_kv"]) ** -0.5)
                yield f"{at}.{attention}.k.weight", normal(inner, width, width**-0.5)
                yield f"{at}.{attention}.v.weight", normal(inner, width, width**-0.5)
                yield f"{at}.{attention}.o.weight", normal(width, inner, inner**-0.5)
                if i == j == 0:
                    name = f"{at}.{attention}.relative_attention_bias.weight"
                    yield name, normal(config["relative_attention_num_buckets"], config["num_heads"], 1.0)
            at = f"{stack}.block.{i}.layer.{len(attentions)}"
            yield f"{at}.layer_norm.weight", gain()
            for name in ("wi_0", "wi_1") if config["feed_forward_proj"].startswith("gated") else ("wi",):
                yield f"{at}.DenseReluDense.{name}.weight", normal(forward, width, width**-0.5)
            yield f"{at}.DenseReluDense.wo.weight", normal(width, forward, forward**-0.5)
        yield f"{stack}.final_layer_norm.weight", gain()


def write_checkpoint(
    out: Path, config: Mapping[str, Any], tokenizer: Path, seed: int = 0, dtype: str = "float32", shards: int = 1
) -> Path:
    """Write a folder as `save_pretrained` does, the weights in one file or in several with an index."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: array.astype(_DTYPES[dtype]) for name, array in tensors(config, seed)}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(tokenizer, out / "spiece.model")
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(weights, out / "model.safetensors", metadata)
        return out
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[i::shards]}
        save_file(part, out / file, metadata)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a T5 spiece.model")
    parser.add_argument("--shape", choices=list(SHAPES), default="flan-t5-large")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=list(_DTYPES), default="float32")
    arguments = parser.parse_args()
    write_checkpoint(arguments.out, config_of(arguments.shape), arguments.tokenizer, arguments.seed, arguments.dtype)


if __name__ == "__main__":
    main()
