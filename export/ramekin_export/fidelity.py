"""How far a quantized model's predictions are from float32's: both read the same prompts and the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ramekin.cache import Floats
from ramekin.engine import Engine
from ramekin.sampling import SamplingParams, choose, uniforms

SAMPLING = SamplingParams(n=8, max_new_tokens=48, seed=0)
"""How the texts are drawn that both models are judged on: as the model card samples, from the float32 model."""

_TOP = 50
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Averages over the tokens of some texts, teacher-forced.

    Attributes:
        tokens: how many predictions were compared.
        kl: mean Kullback-Leibler divergence of the model's distribution from float32's, in nats.
        kl_p99: its 99th percentile.
        first_choice: share of predictions with the same most likely token.
        top50: share of float32's 50 most likely tokens that are among the model's.
        nll_change: by how much the mean negative log-likelihood of the texts rises, in nats per token.
        non_finite: how many predictions hold a number that is not finite; they are left out of the others.
    """

    tokens: int
    kl: float
    kl_p99: float
    first_choice: float
    top50: float
    nll_change: float
    non_finite: int

    @classmethod
    def of(cls, rows: Sequence[Doubles]) -> Fidelity:
        """Average what `compare_rows` found, `(tokens, 4)` each."""
        table = np.concatenate(rows)
        finite = np.isfinite(table).all(axis=1)
        good = table[finite] if finite.any() else np.full((1, 4), np.nan)
        kl, first, top, change = good.mean(axis=0).tolist()
        return cls(
            tokens=len(table),
            kl=max(kl, 0.0),
            kl_p99=max(float(np.percentile(good[:, 0], 99)), 0.0),
            first_choice=first,
            top50=top,
            nll_change=change,
            non_finite=int((~finite).sum()),
        )

    def to_json(self) -> dict[str, Any]:
        """As a plain object, rounded to what means something."""
        return {name: value if isinstance(value, int) else float(f"{value:.4g}") for name, value in asdict(self).items()}


def compare_rows(reference: Floats, found: Floats, chosen: npt.NDArray[np.int64]) -> Doubles:
    """Compare predictions.

    Args:
        reference: logits `(n, vocab)`.
        found: those of the other model.
        chosen: the tokens that followed, `(n,)`.

    Returns:
        `(n, 4)`: divergence, whether the first choice agrees, share of the top 50 in common, rise of the negative
        log-likelihood; not finite where the logits are not.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        wanted, given = _log_softmax(reference), _log_softmax(found)
        divergence = (np.exp(wanted) * (wanted - given)).sum(axis=1)
    divergence[~np.isfinite(found).all(axis=1)] = np.nan
    rows = np.arange(len(chosen))
    k = min(_TOP, reference.shape[1] - 1)
    bar = np.partition(found, -k, axis=1)[:, -k, None]
    top = np.argpartition(reference, -k, axis=1)[:, -k:]
    shared = (np.take_along_axis(found, top, axis=1) >= bar).mean(axis=1)
    agree = reference.argmax(axis=1) == found.argmax(axis=1)
    return np.stack([divergence, agree, shared, wanted[rows, chosen] - given[rows, chosen]], axis=1)


def compare(
    reference: Engine,
    model: Engine,
    sources: Iterable[Sequence[int] | npt.NDArray[np.int64]],
    params: SamplingParams = SAMPLING,
    advance: Callable[[], None] = lambda: None,
) -> list[Doubles]:
    """For each prompt let the reference write `params.n` samples, and compare both models' predictions at every step.

    Both models have to be in memory; nothing is kept but four numbers for each token.

    Args:
        reference: the float32 model.
        model: the model to judge.
        sources: prompts as token ids.
        params: how the reference samples.
        advance: called after each step.

    Returns:
        For each prompt `(tokens, 4)`, see `compare_rows`.
    """
    eos, results = reference.manifest.tokens.eos, []
    for number, source in enumerate(sources):
        ids = np.asarray(source, np.int64)
        caches = [
            engine.model.new_cache(engine.model.prefill(ids), params.n, params.max_new_tokens, params.candidates)
            for engine in (reference, model)
        ]
        draws = uniforms((params.seed or 0) + number, params.n, params.max_new_tokens)
        histories = [[reference.manifest.tokens.start] for _ in range(params.n)]
        alive, rows = np.ones(params.n, bool), []
        for step in range(params.max_new_tokens):
            last = [history[-1] for history in histories]
            wanted = reference.model.step(last, caches[0])
            given = model.model.step(last, caches[1])
            chosen, _ = choose(wanted, histories, eos, params, draws[:, step])
            rows.append(compare_rows(wanted.full[alive], given.full[alive], chosen[alive]))
            for history, token in zip(histories, chosen.tolist(), strict=True):
                history.append(token)
            alive &= ~np.isin(chosen, eos)
            advance()
            if not alive.any():
                break
        results.append(np.concatenate(rows))
    return results


def _log_softmax(logits: Floats) -> Doubles:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: Doubles = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
