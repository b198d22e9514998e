"""Tiny checkpoints of every member of the T5 family, with the proportions that hide no mistake."""

from __future__ import annotations

from typing import Any

from benchmarks.random_checkpoint import FLAN

_TINY: dict[str, Any] = {
    **FLAN,
    "vocab_size": 512,
    "d_model": 64,
    "d_kv": 24,  # not d_model / num_heads
    "num_heads": 4,
    "d_ff": 80,
    "num_layers": 3,
    "num_decoder_layers": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "flan": _TINY,
    "v1.1-deep-decoder": {**_TINY, "num_layers": 1, "num_decoder_layers": 4, "d_kv": 8},
    "v1.0": {**_TINY, "feed_forward_proj": "relu", "tie_word_embeddings": True},
    "v1.0-saved-by-5": {
        **_TINY,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "scale_decoder_outputs": True,
        "transformers_version": "5.23.0",
    },
    "mt5": {**_TINY, "model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"], "vocab_size": 600},
    "exact-gelu": {**_TINY, "feed_forward_proj": "gelu", "num_heads": 3, "d_kv": 16},
    "gated-relu": {**_TINY, "feed_forward_proj": "gated-relu", "relative_attention_num_buckets": 16},
    "few-buckets": {
        **_TINY,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "layer_norm_epsilon": 0.005,
    },
    "one-head": {**_TINY, "num_heads": 1, "d_kv": 64, "num_layers": 2},
}
