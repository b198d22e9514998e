"""The sampler against transformers' own processors: the same kept set, the same probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ramekin import SamplingParams
from ramekin.model import Logits
from ramekin.sampling import candidates_of, distribution, draw, uniforms

torch = pytest.importorskip("torch")
processors = pytest.importorskip("transformers").generation.logits_process

ROWS, VOCAB, EOS = 1000, 500, 1
COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 0},
    {"top_k": 0, "top_p": 1.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 499},
    {"top_k": 500},
    {"top_k": 10_000},
    {"top_p": 1.0},
    {"top_p": 0.5},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"top_k": 0, "top_p": 0.3},
    {"top_k": 0, "top_p": 0.9},
    {"temperature": 0.2},
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"temperature": 2.5, "top_k": 0},
    {"temperature": 0.5, "top_k": 3, "top_p": 0.6},
    {"min_p": 0.1},
    {"min_p": 0.5, "top_p": 1.0},
    {"min_p": 0.05, "top_k": 0, "top_p": 1.0},
    {"min_p": 0.2, "temperature": 1.7, "top_k": 0, "top_p": 0.8},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"repetition_penalty": 5.0, "top_k": 0},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "top_k": 0},
    {"min_new_tokens": 5},
    {"min_new_tokens": 20},
    {"min_new_tokens": 21},
    {"min_new_tokens": 21, "top_k": 0},
    {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 30,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
    },
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "temperature": 1.4, "top_k": 0, "top_p": 0.7, "min_p": 0.01},
]


def reference(logits: np.ndarray, histories: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities `(n, vocab)`, in the order that `generate` puts its processors in."""
    ids, scores = torch.tensor(histories), torch.tensor(logits)
    chain: list[Any] = []
    if params.repetition_penalty != 1:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.no_repeat_ngram_size:
        chain.append(processors.NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if params.min_new_tokens:
        chain.append(processors.MinNewTokensLengthLogitsProcessor(1, params.min_new_tokens, EOS, device="cpu"))
    if params.temperature != 1:
        chain.append(processors.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(processors.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(processors.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(processors.MinPLogitsWarper(params.min_p))
    for each in chain:
        scores = each(ids, scores)
    return torch.softmax(scores.double(), dim=-1).numpy()


def ours(logits: np.ndarray, histories: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The same through the runtime's functions, from the ranking that the decoder graph would give where that is used."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, : params.candidates]
    given = Logits.of(logits, np.take_along_axis(logits, order, axis=1), order)
    ranked = candidates_of(given, histories.tolist(), [EOS], params)
    out = np.zeros(logits.shape)
    np.put_along_axis(out, ranked.ids, distribution(ranked, params), axis=1)
    return out


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_a_thousand_rows(combination: dict[str, Any]) -> None:
    rng = np.random.default_rng(len(str(combination)))
    logits = (rng.standard_normal((ROWS, VOCAB)) * rng.uniform(0.5, 5, (ROWS, 1))).astype(np.float32)
    histories = rng.integers(0, 30, (ROWS, 21))  # few different tokens, so that n-grams repeat
    histories[:, 0] = 0
    params = SamplingParams(**combination)
    expected, found = reference(logits, histories, params), ours(logits, histories, params)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    assert ((found > 0) == (expected > 0)).all()


def test_ties_are_kept_as_transformers_keeps_them() -> None:
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, 10:30] = 2
    logits[1, :49] = np.arange(49)
    logits[2, :] = np.arange(VOCAB) // 30
    params = SamplingParams(top_p=1.0)
    histories = np.zeros((3, 2), int)
    expected, found = reference(logits, histories, params), ours(logits, histories, params)
    assert ((found > 0) == (expected > 0)).all()
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_draws_from_logits_follow_transformers_distribution() -> None:
    """100,000 draws from one row of 500 logits, counted, against the reference's probabilities: chi-square."""
    logits = (np.random.default_rng(5).standard_normal((1, VOCAB)) * 2).astype(np.float32)
    params = SamplingParams(temperature=0.9)
    histories = np.zeros((1, 2), int)
    expected = reference(logits, histories, params)[0]
    probabilities = ours(logits, histories, params)
    draws = uniforms(123, 100, 1000)
    places = np.concatenate([draw(np.repeat(probabilities, 1000, axis=0), row) for row in draws])
    counts = np.bincount(places, minlength=VOCAB)
    alive = expected > 0
    assert not counts[~alive].any()
    freedom = int(alive.sum()) - 1
    chi_square = ((counts - 100_000 * expected)[alive] ** 2 / (100_000 * expected[alive])).sum()
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert freedom > 10
    assert abs(z) < 3.09
