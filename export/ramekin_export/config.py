"""The T5 family's dimensions and variants, from the raw `config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ramekin.config_files import feed_forward_of, variant_of
from ramekin.errors import CheckpointError, ModelFormatError
from ramekin.manifest import Dims

_FAMILY = ("mt5", "t5")
_OTHER_HEADS = ("ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")
_HEAD_STEP = 8  # of GroupQueryAttention
_FARTHEST = 1 << 16  # T5 has 128; the table of biases holds each distance
ACTIVATIONS = {"relu": "Relu", "gelu": "Gelu", "gelu_new": "FastGelu"}
"""The operator for each."""


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """What the graphs depend on.

    Attributes:
        dims: sizes.
        activation: "relu", "gelu" (exact) or "gelu_new" (its tanh approximation).
        gated: `activation(wi_0 x) * wi_1 x` (v1.1, FLAN, mT5) instead of `activation(wi x)` (v1.0).
        buckets: relative positions share this many buckets ...
        max_distance: ... and beyond this distance they share the last one.
        epsilon: of the RMS norms.
        tied: what the config says of `tie_word_embeddings`; None if nothing.
        scaled: what the config says of `scale_decoder_outputs` (transformers 5); None if nothing.
        saved_by: the first number of the version of transformers that wrote the config; 0 if it does not say.
        model_type: "t5" or "mt5".
        variant: the member of the family, for people.
    """

    dims: Dims
    activation: str
    gated: bool
    buckets: int
    max_distance: int
    epsilon: float
    tied: bool | None
    scaled: bool | None
    saved_by: int
    model_type: str
    variant: str

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> T5Config:
        """Read a `config.json` of transformers 4 or 5.

        Raises:
            CheckpointError: not a T5, or one with parts that are not supported.
        """
        model_type = raw.get("model_type")
        if model_type not in _FAMILY:
            raise CheckpointError(
                f"config.json: model_type {model_type!r}; only {' and '.join(_FAMILY)} checkpoints can be exported"
            )
        written = raw.get("architectures")
        other = [str(each) for each in (written if isinstance(written, list) else []) if str(each).endswith(_OTHER_HEADS)]
        if other:
            raise CheckpointError(f"config.json: a {other[0]}, which writes no text; only models that do can be exported")
        projection = feed_forward_of(raw)
        gated, activation = projection.startswith("gated-"), projection.removeprefix("gated-")
        if projection == "gated-gelu":
            activation = "gelu_new"
        # transformers makes these two of the former, and then lets the file have the last word.
        named, says = raw.get("dense_act_fn"), _flag(raw, "is_gated_act")
        activation, gated = str(named or activation), gated if says is None else says
        if activation not in ACTIVATIONS:
            told = f"dense_act_fn {named!r}" if named else f"feed_forward_proj {projection!r}"
            raise CheckpointError(f"config.json: {told} is not supported; only {', '.join(ACTIVATIONS)} are")
        layers = raw.get("num_layers", 6)
        try:
            dims = Dims(
                vocab_size=raw.get("vocab_size", 32128),
                d_model=raw.get("d_model", 512),
                d_ff=raw.get("d_ff", 2048),
                num_heads=raw.get("num_heads", 8),
                head_dim=raw.get("d_kv", 64),
                encoder_layers=layers,
                decoder_layers=raw.get("num_decoder_layers") or layers,
            )
            buckets = int(raw.get("relative_attention_num_buckets", 32))
            max_distance = int(raw.get("relative_attention_max_distance", 128))
            epsilon = float(raw.get("layer_norm_epsilon", 1e-6))
        except (ModelFormatError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"config.json: {error}") from None
        if dims.head_dim % _HEAD_STEP:
            raise CheckpointError(f"config.json: d_kv {dims.head_dim}: onnxruntime wants a multiple of {_HEAD_STEP}")
        if buckets < 4 or not buckets // 2 < max_distance <= _FARTHEST or not 0 < epsilon < 1:
            raise CheckpointError("config.json: relative attention or layer_norm_epsilon out of range")
        return cls(
            dims=dims,
            activation=activation,
            gated=gated,
            buckets=buckets,
            max_distance=max_distance,
            epsilon=epsilon,
            tied=_flag(raw, "tie_word_embeddings"),
            scaled=_flag(raw, "scale_decoder_outputs"),
            saved_by=int(version[1]) if (version := re.match(r"(\d{1,3})\.", str(raw.get("transformers_version")))) else 0,
            model_type=str(model_type),
            variant=variant_of(raw),
        )

    def scales_head(self, equal_to_embedding: bool | None) -> bool:
        """Whether the decoder's output is scaled by `d_model ** -0.5` before the head, as v1.0 does.

        transformers 4 scales if `tie_word_embeddings`; transformers 5 writes `tie_word_embeddings: true` for every model,
        decides by `scale_decoder_outputs` for T5 and never scales mT5. So the weights are asked first.

        Args:
            equal_to_embedding: whether the head's weights are the embedding's; None if there are no weights of its own.

        Raises:
            CheckpointError: config and weights contradict each other, and versions of transformers would disagree; or
                there is no head where there must be one.
        """
        if equal_to_embedding is None and self.tied is False and self.scaled is None:
            raise CheckpointError(
                "the weights have no tensor 'lm_head.weight', and config.json says that the embedding does not stand in "
                "for it (tie_word_embeddings: false); is this a whole T5 with its decoder and head?"
            )
        if self.scaled and self.model_type == "mt5" and not (self.tied and self.saved_by == 4):
            raise CheckpointError(
                "config.json: scale_decoder_outputs is true, but transformers scales no mT5's "
                "(its release 4 tied ones alone); make it false"
            )
        if self.scaled is not None:
            return self.scaled
        if equal_to_embedding is False:
            if self.tied is False or self.model_type == "mt5":  # transformers 5 writes true for mT5, and never scales it
                return False
            message = "tie_word_embeddings is not false, yet lm_head.weight differs from shared.weight"
        elif self.model_type == "t5":
            return self.tied is not False
        elif not self.tied or self.saved_by:
            return bool(self.tied) and self.saved_by == 4
        else:
            message = "tie_word_embeddings: true does not tell whether the head of an mT5 is scaled"
        raise CheckpointError(
            f'config.json: {message}: versions of transformers disagree on this checkpoint. Add "scale_decoder_outputs": '
            "false to config.json for FLAN-T5, T5 v1.1 and mT5, or true for T5 v1.0"
        )


def _flag(raw: Mapping[str, Any], name: str) -> bool | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} must be true or false, not {value!r}")
    return value
