"""The golden run: a short continuation that a model computed when it was exported, to compare with what it computes now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ramekin.cache import Floats
from ramekin.engine import Engine
from ramekin.errors import ModelFormatError, VerificationError
from ramekin.sampling import log_probabilities

SOURCE_TOKENS, TARGET_TOKENS = 48, 8
_LONGEST = 1024  # what is longer was not recorded by any ramekin, and takes for ever
_PLAIN, _COMPACT = "logprobs", "compact_logprobs"  # of the plain graphs, and of the compact ones
# Largest difference of a log-probability that counts as rounding. Kernels of different processors differ in the last bit,
# and rounding activations to 8 bits makes more of it.
TOLERANCE = {"fp32": 2e-3, "fp32-cuda": 2e-3}
QUANTIZED_TOLERANCE = 0.5


def record(engine: Engine) -> dict[str, Any]:
    """Run fixed token ids through a fresh model; what `check` compares with.

    A model that has compact graphs too has to be recorded with each: before it has them, and again with them.
    """
    source = [i % engine.manifest.dims.vocab_size for i in range(3, 3 + 7 * SOURCE_TOKENS, 7)]
    target = [i % engine.manifest.dims.vocab_size for i in range(5, 5 + 11 * TARGET_TOKENS, 11)]
    return {"source_ids": source, "target_ids": target, _form(engine): _score(engine, source, target).tolist()}


def check(engine: Engine, golden: Mapping[str, Any]) -> float:
    """Repeat the golden run. Return the largest difference of a log-probability.

    Raises:
        ModelFormatError: the manifest has no golden run, or a broken one.
        VerificationError: the difference is more than rounding.
    """
    try:
        expected = np.asarray(golden[_form(engine)], np.float32)
        source, target = golden["source_ids"], golden["target_ids"]
        if max(len(source), len(target)) > _LONGEST:
            raise ValueError(f"more than {_LONGEST} tokens")
        found = _score(engine, source, target)
        difference = float(np.abs(np.subtract(found, expected)).max())
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelFormatError(
            f"the manifest has no usable golden run ({error}); export the model again, with onnxruntime installed"
        ) from None
    tolerance = TOLERANCE.get(engine.manifest.precision, QUANTIZED_TOLERANCE)
    if not difference <= tolerance:
        raise VerificationError(
            f"golden run: log-probabilities differ by {difference:.3g}, more than {tolerance:.3g}, from those at export; "
            "export the model again on this machine, or report your processor and onnxruntime version"
        )
    return difference


def _form(engine: Engine) -> str:
    """Which graphs this onnxruntime has loaded."""
    return _COMPACT if engine.model.compact else _PLAIN


def _score(engine: Engine, source: Sequence[int], target: Sequence[int]) -> Floats:
    return log_probabilities(engine.logits(source, target), np.asarray(target, np.int64))
