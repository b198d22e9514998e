"""Which weights make the logits, and at which scale: the one thing that T5's versions and transformers' disagree on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ramekin_export.checkpoint import Checkpoint
from ramekin_export.config import T5Config

_WEIGHT, _EMBEDDING = "lm_head.weight", "shared.weight"


@dataclass(frozen=True)
class Head:
    """The tensor of the head, and what its input is multiplied by (argmax hides a wrong scale, sampling does not)."""

    weight: str
    scale: float

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: T5Config) -> Head:
        """Decide by the weights first, then by the config.

        Raises:
            CheckpointError: they contradict each other.
        """
        shape = config.dims.vocab_size, config.dims.d_model
        equal: bool | None = None
        if _WEIGHT in checkpoint:
            equal = np.array_equal(checkpoint.tensor(_WEIGHT, *shape), checkpoint.tensor(_EMBEDDING, *shape))
        scaled = config.scales_head(equal)
        return cls(_EMBEDDING if equal is not False else _WEIGHT, config.dims.d_model**-0.5 if scaled else 1.0)
