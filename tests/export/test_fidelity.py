from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ramekin import Engine, SamplingParams
from ramekin_export.fidelity import Fidelity, compare, compare_rows


def logits(rows: int = 6, vocab: int = 300, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((rows, vocab))).astype(np.float32)


CHOSEN = np.arange(6)


def test_a_model_does_not_differ_from_itself() -> None:
    found = Fidelity.of([compare_rows(logits(), logits(), CHOSEN)])
    assert found == Fidelity(tokens=6, kl=0, kl_p99=0, first_choice=1, top50=1, nll_change=0, non_finite=0)


def test_adding_a_constant_changes_nothing() -> None:
    found = Fidelity.of([compare_rows(logits(), logits() + 5, CHOSEN)])
    assert found.kl < 1e-9
    assert found.first_choice == found.top50 == 1


def test_each_figure_is_what_it_says() -> None:
    reference, other = logits(), logits(seed=1)
    rows = compare_rows(reference, other, CHOSEN)
    for row in range(6):
        p = np.exp(reference[row].astype(float)) / np.exp(reference[row].astype(float)).sum()
        q = np.exp(other[row].astype(float)) / np.exp(other[row].astype(float)).sum()
        top = [set(np.argsort(-each)[:50].tolist()) for each in (p, q)]
        assert rows[row, 0] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-6)
        assert rows[row, 1] == (p.argmax() == q.argmax())
        assert rows[row, 2] == pytest.approx(len(top[0] & top[1]) / 50)
        assert rows[row, 3] == pytest.approx(float(np.log(p[row]) - np.log(q[row])), rel=1e-5)
    found = Fidelity.of([rows[:2], rows[2:]])
    assert found.tokens == 6
    assert found.kl == pytest.approx(rows[:, 0].mean())
    assert found.kl_p99 == pytest.approx(np.percentile(rows[:, 0], 99))


def test_small_figures_are_written_as_exactly_as_large_ones() -> None:
    found = Fidelity(tokens=123456, kl=1.23456e-7, kl_p99=0.5, first_choice=1, top50=1, nll_change=-2.34567e-5, non_finite=0)
    written = found.to_json()
    assert (written["tokens"], written["kl"], written["nll_change"]) == (123456, 1.235e-7, -2.346e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_counted(bad: float) -> None:
    other = logits()
    other[2, 7] = bad
    found = Fidelity.of([compare_rows(logits(), other, CHOSEN)])
    assert (found.non_finite, found.tokens, found.kl) == (1, 6, 0)
    everything = Fidelity.of([compare_rows(logits(), np.full_like(other, bad), CHOSEN)])
    assert everything.non_finite == 6
    assert np.isnan(everything.kl)


def test_both_models_are_fed_the_same_samples(exported: Callable[[str, str], Engine]) -> None:
    exact, other = exported("flan", "fp32"), exported("gated-relu", "fp32")
    sources = [np.arange(3, 40), np.arange(5, 150)]
    params, steps = SamplingParams(n=3, max_new_tokens=10, seed=0), []
    rows = compare(exact, other, sources, params, lambda: steps.append(1))
    assert [len(each) <= 30 for each in rows] == [True, True]
    assert len(steps) <= 20
    for number, (source, each) in enumerate(zip(sources, rows, strict=True)):
        samples = exact.generate(source, SamplingParams(n=3, max_new_tokens=10, seed=number))
        total = sum(float((exact.score(source, s.token_ids) - other.score(source, s.token_ids)).sum()) for s in samples)
        assert each[:, 3].sum() == pytest.approx(total, abs=1e-3)
        assert len(each) == sum(len(sample.token_ids) for sample in samples)
    assert Fidelity.of(compare(exact, exact, sources, params)).kl == 0
