"""The golden run: a short continuation that a model computed when it was exported, to compare with what it computes now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ramekin.cache import FEW_ROWS, Floats
from ramekin.engine import Engine
from ramekin.errors import ModelFormatError, VerificationError
from ramekin.model import Model
from ramekin.sampling import log_probabilities

SOURCE_TOKENS, TARGET_TOKENS = 48, 8
# Largest difference of a log-probability that counts as rounding. Kernels of different processors differ in the last bit,
# and rounding activations to 8 bits makes more of it.
TOLERANCE = {"fp32": 2e-3, "fp32-cuda": 2e-3}
QUANTIZED_TOLERANCE = 0.5


def record(engine: Engine) -> dict[str, Any]:
    """Run fixed token ids through a fresh model; what `check` compares with.

    Where few samples read the prompt in int8 both is recorded: older versions of onnxruntime can only repeat the other.
    """
    source = [i % engine.manifest.dims.vocab_size for i in range(3, 3 + 7 * SOURCE_TOKENS, 7)]
    target = [i % engine.manifest.dims.vocab_size for i in range(5, 5 + 11 * TARGET_TOKENS, 11)]
    few = {"few_logprobs": _plain(engine.score(source, target))} if _compacts(engine) else {}
    return {"source_ids": source, "target_ids": target, "logprobs": _plain(_score(engine, source, target, bool(few))), **few}


def check(engine: Engine, golden: Mapping[str, Any]) -> float:
    """Repeat the golden run. Return the largest difference of a log-probability.

    Raises:
        ModelFormatError: the manifest has no golden run, or a broken one.
        VerificationError: the difference is more than rounding.
    """
    try:
        source, target, many = golden["source_ids"], golden["target_ids"], "few_logprobs" in golden
        expected = [np.asarray(golden["logprobs"], np.float32)]
        found = [_score(engine, source, target, many)]
        if many and _compacts(engine):
            expected.append(np.asarray(golden["few_logprobs"], np.float32))
            found.append(engine.score(source, target))
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


def _compacts(engine: Engine) -> bool:
    return isinstance(engine.model, Model) and engine.model.compacts


def _score(engine: Engine, source: Sequence[int], target: Sequence[int], many: bool) -> Floats:
    """What `Engine.score` gives, or what each of so many samples would that they read the prompt in floats."""
    if not many:
        return engine.score(source, target)
    rows, ids = FEW_ROWS + 1, np.asarray(target, np.int64)
    cache = engine.model.new_cache(engine.model.prefill(engine.source_ids(source)), rows, len(ids), 1)
    fed = [engine.manifest.tokens.start, *ids[:-1].tolist()]
    return log_probabilities(np.stack([engine.model.step([token] * rows, cache).full[0].copy() for token in fed]), ids)


def _plain(logprobs: Floats) -> list[float]:
    return [float(each) for each in logprobs]
