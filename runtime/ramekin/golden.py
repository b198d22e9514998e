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
_FLOATS, _INT8 = "logprobs", "few_logprobs"  # how the prompt is read
# Largest difference of a log-probability that counts as rounding. Kernels of different processors differ in the last bit,
# and rounding activations to 8 bits makes more of it.
TOLERANCE = {"fp32": 2e-3, "fp32-cuda": 2e-3}
QUANTIZED_TOLERANCE = 0.5


def record(engine: Engine) -> dict[str, Any]:
    """Run fixed token ids through a fresh model; what `check` compares with.

    Where few samples read the prompt in int8 both is recorded, since an older onnxruntime can repeat only the other.
    """
    source = [i % engine.manifest.dims.vocab_size for i in range(3, 3 + 7 * SOURCE_TOKENS, 7)]
    target = [i % engine.manifest.dims.vocab_size for i in range(5, 5 + 11 * TARGET_TOKENS, 11)]
    found = {
        name: _score(engine, source, target, name) for name in (_FLOATS, _INT8) if name == _FLOATS or engine.model.compacts
    }
    return {"source_ids": source, "target_ids": target, **{name: row.tolist() for name, row in found.items()}}


def check(engine: Engine, golden: Mapping[str, Any]) -> float:
    """Repeat the golden run. Return the largest difference of a log-probability.

    Raises:
        ModelFormatError: the manifest has no golden run, or a broken one.
        VerificationError: the difference is more than rounding.
    """
    names = [_FLOATS, _INT8] if engine.model.compacts and _INT8 in golden else [_FLOATS]
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


def _score(engine: Engine, source: Sequence[int], target: Sequence[int], name: str) -> Floats:
    return log_probabilities(engine.logits(source, target, compact=name == _INT8), np.asarray(target, np.int64))
