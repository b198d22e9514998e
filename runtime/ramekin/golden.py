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
# Of the plain decoder; of the compact one, and of the compact one that reads the prompt in int8.
_PLAIN, _COMPACT, _FEW = "logprobs", "compact_logprobs", "few_logprobs"
# Largest difference of a log-probability that counts as rounding. Kernels of different processors differ in the last bit,
# and rounding activations to 8 bits makes more of it.
TOLERANCE = {"fp32": 2e-3, "fp32-cuda": 2e-3}
QUANTIZED_TOLERANCE = 0.5


def record(engine: Engine) -> dict[str, Any]:
    """Run fixed token ids through a fresh model; what `check` compares with.

    A model with two decoders has to be recorded with each: before it has the compact one, and again with it.
    """
    source = [i % engine.manifest.dims.vocab_size for i in range(3, 3 + 7 * SOURCE_TOKENS, 7)]
    target = [i % engine.manifest.dims.vocab_size for i in range(5, 5 + 11 * TARGET_TOKENS, 11)]
    found = {name: _score(engine, source, target, name).tolist() for name in _forms(engine)}
    return {"source_ids": source, "target_ids": target, **found}


def check(engine: Engine, golden: Mapping[str, Any]) -> float:
    """Repeat the golden run. Return the largest difference of a log-probability.

    Raises:
        ModelFormatError: the manifest has no golden run, or a broken one.
        VerificationError: the difference is more than rounding.
    """
    names = _forms(engine)
    try:
        expected = [np.asarray(golden[name], np.float32) for name in names]
        found = [_score(engine, golden["source_ids"], golden["target_ids"], name) for name in names]
        difference = float(np.abs(np.subtract(found, expected)).max())
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelFormatError(f"the manifest has no usable golden run ({error}); export the model again") from None
    tolerance = TOLERANCE.get(engine.manifest.precision, QUANTIZED_TOLERANCE)
    if not difference <= tolerance:
        raise VerificationError(
            f"golden run: log-probabilities differ by {difference:.3g}, more than {tolerance:.3g}, from those at export; "
            "export the model again on this machine, or report your processor and onnxruntime version"
        )
    return difference


def _forms(engine: Engine) -> tuple[str, ...]:
    """What the decoder computes that this onnxruntime has loaded."""
    return (_COMPACT, _FEW) if engine.model.compacts else (_PLAIN,)


def _score(engine: Engine, source: Sequence[int], target: Sequence[int], name: str) -> Floats:
    return log_probabilities(engine.logits(source, target, compact=name == _FEW), np.asarray(target, np.int64))
