"""The sampler on hand-made distributions; `tests/export/test_sampler_parity.py` compares it with transformers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ramekin import RamekinError, SamplingParams
from ramekin.model import Logits
from ramekin.sampling import Ranked, choose, distribution, draw, log_probabilities, rank, uniforms


def logits_of(*probabilities: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array([probabilities], np.float32))


def kept(probabilities: list[float], **params: object) -> list[float]:
    rules = SamplingParams(**{"top_k": 0, "top_p": 1.0, **params})
    return [round(float(p), 4) for p in distribution(rank(logits_of(*probabilities), rules), rules)[0] if p]


def whole(full: np.ndarray, k: int) -> Logits:
    """What the decoder graph returns for these logits."""
    order = np.argsort(-full, axis=1, kind="stable")[:, :k]
    return Logits.of(full, np.take_along_axis(full, order, axis=1), order)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.5, 0.3, 0.2]),
        ({"top_k": 2}, [0.625, 0.375]),
        ({"top_p": 0.49}, [1.0]),
        ({"top_p": 0.51}, [0.625, 0.375]),  # the token that crosses the mass stays
        ({"top_p": 0.81}, [0.5, 0.3, 0.2]),
        ({"top_p": 1e-9}, [1.0]),  # one token always stays
        ({"min_p": 0.5}, [0.625, 0.375]),
        ({"min_p": 0.61}, [1.0]),
        ({"temperature": 0.5}, [0.6579, 0.2368, 0.1053]),
        ({"top_k": 2, "top_p": 0.6}, [1.0]),  # top-p counts what top-k has left: 0.625 of it is the first token's
    ],
)
def test_kept_probabilities(params: dict[str, object], expected: list[float]) -> None:
    assert kept([0.3, 0.5, 0.2], **params) == expected


def test_a_token_that_reaches_the_mass_exactly_is_enough() -> None:
    """The tie rule of transformers; shares that are powers of two are exact."""
    assert kept([0.5, 0.5], top_p=0.5) == [1.0]
    assert kept([0.25] * 4, top_p=0.5) == [0.5, 0.5]
    assert kept([0.25] * 4, top_p=0.51) == [0.3333] * 3


def test_ties_at_the_kth_place_all_stay() -> None:
    assert kept([0.4, 0.2, 0.2, 0.2], top_k=2) == [0.4, 0.2, 0.2, 0.2]


@pytest.mark.parametrize("seed", range(50))
def test_passing_over_the_tail_does_not_change_the_nucleus(seed: int) -> None:
    rng = np.random.default_rng(seed)
    top_p, temperature = rng.uniform(0.01, 0.999), rng.uniform(0.3, 3)
    logits = rng.standard_normal((1, 300)).astype(np.float32) * 4
    params = SamplingParams(top_k=0, top_p=top_p, temperature=temperature)
    ranked = rank(logits, params)
    order = np.argsort(-logits, axis=1, kind="stable")
    everything = distribution(Ranked(np.take_along_axis(logits, order, axis=1), order), params)
    found = distribution(ranked, params)
    nucleus = int((everything > 0).sum())
    assert ranked.ids[0, :nucleus].tolist() == order[0, :nucleus].tolist()
    np.testing.assert_allclose(found[0, :nucleus], everything[0, :nucleus], rtol=1e-9)
    assert not found[0, nucleus:].any()


def test_a_hundred_thousand_draws_follow_the_distribution() -> None:
    full = np.random.default_rng(3).standard_normal((1, 200)).astype(np.float32) * 2
    params = SamplingParams(top_k=20, top_p=0.9, temperature=0.8)
    ranked = whole(full, params.candidates)
    expected = distribution(Ranked(ranked.top_values, ranked.top_ids), params)[0]
    draws = 100_000
    numbers = uniforms(11, 1, draws)[0]
    places = np.concatenate([draw(expected[None].repeat(1000, 0), part) for part in np.split(numbers, 100)])
    counts = np.bincount(places, minlength=len(expected))
    alive = expected > 0
    assert not counts[~alive].any()
    chi_square = float(((counts - draws * expected)[alive] ** 2 / (draws * expected[alive])).sum())
    freedom = int(alive.sum()) - 1
    # Wilson and Hilferty's normal approximation; 3.09 is the 99.9th percentile.
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert freedom >= 5
    assert abs(z) < 3.09


def test_random_numbers_depend_on_seed_sample_and_step_alone() -> None:
    numbers = uniforms(7, 16, 100)
    np.testing.assert_array_equal(numbers[:4, :30], uniforms(7, 4, 30))
    assert len({*numbers.ravel().tolist(), *uniforms(8, 16, 100).ravel().tolist()}) == 3200
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert uniforms(2**64 - 1, 2, 1).shape == (2, 1)


def philox(counter: int, key: list[int]) -> list[int]:
    """One block of Philox 4x64-10, straight from the paper (Salmon et al., SC 2011)."""
    mask, x, key = 2**64 - 1, [counter, 0, 0, 0], list(key)
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(high >> 64) ^ x[1] ^ key[0], high & mask, (low >> 64) ^ x[3] ^ key[1], low & mask]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return x


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 1, 2**64 - 1])
def test_random_numbers_are_philox(seed: int) -> None:
    """So that a seed written down today gives the same sample with every version of NumPy."""
    expected = [[(word >> 11) * 2.0**-53 for block in (1, 2) for word in philox(block, [seed, i])] for i in range(3)]
    assert uniforms(seed, 3, 8).tolist() == expected


def test_the_largest_draw_stays_in_range() -> None:
    probabilities = np.array([[0.1] * 10, [1.0] + [0.0] * 9, [0.3, 0.3, 0.4] + [0.0] * 7])
    assert draw(probabilities, np.full(3, 1 - 2.0**-53)).tolist() == [9, 0, 2]
    assert draw(probabilities, np.zeros(3)).tolist() == [0, 0, 0]
    assert draw(np.array([[0.5, 0.5]]), np.array([0.5])).tolist() == [1]  # a share is closed below, open above


def test_log_probabilities_are_the_models_own() -> None:
    full = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    full[:, [0, 1]] = 4  # what a rule takes away has its share all the same
    expected = full - np.log(np.exp(full).sum(axis=1, keepdims=True))
    for params in (
        SamplingParams(temperature=0.3, top_k=3),
        SamplingParams(repetition_penalty=3.0),
        SamplingParams(no_repeat_ngram_size=1),
        SamplingParams(min_new_tokens=5),
        SamplingParams(min_new_tokens=5, top_k=0),
        SamplingParams(greedy=True),
    ):
        for given in (whole(full.copy(), params.candidates), with_logprobs(full.copy(), params.candidates)):
            chosen, logprobs = choose(given, [[0]] * 3, [1], params, np.array([0.1, 0.5, 0.9]))
            np.testing.assert_allclose(logprobs, expected[range(3), chosen], atol=1e-5)


def with_logprobs(full: np.ndarray, k: int) -> Logits:
    """What the graphs for CUDA return, which compute log-probabilities of what they rank."""
    given = whole(full, k)
    logprobs = given.top_values - np.log(np.exp(full).sum(axis=1, keepdims=True))
    return replace(given, top_logprobs=logprobs.astype(np.float32))


def test_a_token_beyond_the_graphs_log_probabilities() -> None:
    """Rules may leave none of the tokens that the graph ranked."""
    full = np.arange(300, dtype=np.float32)[None] / 100
    for params in (SamplingParams(top_k=0, top_p=1.0), SamplingParams(repetition_penalty=50.0)):
        chosen, logprobs = choose(with_logprobs(full, 4), [[0, *range(280, 300)]], [1], params, np.array([0.99]))
        assert chosen.item() < 290
        np.testing.assert_allclose(logprobs, log_probabilities(full, chosen), atol=1e-5)


@pytest.mark.parametrize("rules", [{"top_k": 20, "top_p": 1.0}, {"top_k": 0, "top_p": 0.9}])
def test_of_equal_tokens_the_smaller_come_first(rules: dict[str, object]) -> None:
    full = np.random.default_rng(1).integers(0, 9, (1, 300)).astype(np.float32)
    ids = rank(full, SamplingParams(**rules)).ids
    assert ids.shape[1] < 300
    assert ids.tolist() == np.argsort(-full, axis=1, kind="stable")[:, : ids.shape[1]].tolist()


def test_ties_beyond_the_ranking_are_found() -> None:
    """The decoder ranks 64 logits; with 200 equal ones at the k-th place all of them must be drawable."""
    full = np.zeros((1, 300), np.float32)
    full[0, :40] = 1
    params = SamplingParams(top_p=1.0)
    low = choose(whole(full, params.candidates), [[0]], [1], params, np.array([0.0]))[0]
    high = choose(whole(full, params.candidates), [[0]], [1], params, np.array([0.9999999]))[0]
    assert (low.item(), high.item()) == (0, 299)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("eos", [[1], [1, 2, 5]])
def test_minimum_length(greedy: bool, eos: list[int]) -> None:
    full = np.zeros((2, 100), np.float32)
    full[:, [1, 2, 5]] = 50
    full[:, 7] = 20
    params = SamplingParams(greedy=greedy, min_new_tokens=3)
    draws = np.array([0.5, 0.5])
    chosen, _ = choose(whole(full, params.candidates), [[0, 9, 9], [0, 9, 9, 9]], eos, params, draws)
    assert chosen[0] not in eos
    assert chosen[1] in (1, 2, 5)


def test_no_repeat_ngram_and_repetition_penalty() -> None:
    full = np.zeros((1, 10), np.float32)
    full[0, 4], full[0, 6] = 9, 8
    history = [[0, 3, 4, 3]]
    draws = np.array([0.0])
    for params, expected in (
        (SamplingParams(greedy=True), 4),
        (SamplingParams(greedy=True, no_repeat_ngram_size=2), 6),  # 3 4 was there
        (SamplingParams(greedy=True, no_repeat_ngram_size=3), 4),
        (SamplingParams(greedy=True, no_repeat_ngram_size=5), 4),
        (SamplingParams(greedy=True, repetition_penalty=2.0), 6),
    ):
        assert choose(whole(full, params.candidates), history, [1], params, draws)[0].item() == expected


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(RamekinError, match="not numbers"):
        log_probabilities(np.full((1, 5), np.nan, np.float32), np.array([0]))
    given = whole(np.zeros((1, 5), np.float32), 5)
    given = replace(given, top_logprobs=np.full((1, 5), np.nan, np.float32))
    with pytest.raises(RamekinError, match="not numbers"):
        choose(given, [[0]], [1], SamplingParams(), np.array([0.5]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rules", [{}, {"top_k": 0}, {"top_k": 0, "top_p": 0.5}, {"repetition_penalty": 2.0}, {"greedy": True}]
)
@pytest.mark.parametrize("where", [slice(None), slice(3, 4)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_of_logits_that_are_not_numbers_is_told(rules: dict[str, object], where: slice, value: float) -> None:
    full = np.zeros((2, 300), np.float32)
    full[1, where] = value
    params = SamplingParams(**rules)
    with pytest.raises(RamekinError, match="not numbers"):
        choose(whole(full, params.candidates), [[0]] * 2, [1], params, np.array([0.5, 0.5]))


def test_the_most_likely_token_always_stays() -> None:
    """Even where all are equal and top_p is less than the share of one."""
    assert kept([0.25] * 4, top_p=1e-5) == [1.0]


def test_the_first_of_equal_tokens_is_the_greedy_one() -> None:
    """From the decoder's ranking and from all logits alike, and as transformers does."""
    full = np.zeros((1, 1000), np.float32)
    full[0, [7, 400, 900]] = 5
    for params in (SamplingParams(greedy=True), SamplingParams(greedy=True, no_repeat_ngram_size=2)):
        assert choose(whole(full, params.candidates), [[0]], [1], params, np.array([0.0]))[0].item() == 7


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("n", 0, ValueError),
        ("n", 1.5, TypeError),
        ("n", True, TypeError),
        ("max_new_tokens", 0, ValueError),
        ("min_new_tokens", 101, ValueError),
        ("temperature", -1, ValueError),
        ("temperature", 0, ValueError),
        ("temperature", 1e-300, ValueError),
        ("repetition_penalty", 1e300, ValueError),
        ("temperature", math.nan, ValueError),
        ("temperature", math.inf, ValueError),
        ("temperature", "1", TypeError),
        ("top_k", -1, ValueError),
        ("top_p", 0, ValueError),
        ("top_p", 1.01, ValueError),
        ("top_p", np.float32(0), ValueError),
        ("min_p", np.float32(1), ValueError),
        ("top_p", math.nan, ValueError),
        ("min_p", 1, ValueError),
        ("min_p", -0.1, ValueError),
        ("repetition_penalty", 0, ValueError),
        ("no_repeat_ngram_size", -1, ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**64, ValueError),
        ("greedy", 1, TypeError),
        ("stop", ("",), ValueError),
    ],
)
def test_wrong_parameters_are_named(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        SamplingParams(**{name: value})


def test_right_parameters_at_the_edge() -> None:
    SamplingParams(min_p=0.0, top_p=1.0, top_k=0, temperature=1e-3, min_new_tokens=100, seed=0, stop="x")
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(n=np.int64(3), seed=np.uint64(7), top_p=np.float32(0.5)).n == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", np.uint8(250)),
        ("top_k", np.int8(120)),
        ("no_repeat_ngram_size", np.uint8(3)),
        ("max_new_tokens", np.int8(100)),
    ],
)
def test_numpy_numbers_do_not_wrap_around(name: str, value: np.integer) -> None:
    given, plain = SamplingParams(**{name: value}), SamplingParams(**{name: int(value)})
    assert given.candidates == plain.candidates
    assert type(getattr(given, name)) is int
    assert type(SamplingParams(temperature=np.float16(0.5)).temperature) is float


def test_ties_that_a_banned_eos_hides() -> None:
    """All tokens but eos are as likely: the ranking, from which eos is taken, does not hold them all."""
    full = np.zeros((1, 300), np.float32)
    full[0, 1] = 2
    params = SamplingParams(top_p=1.0, min_new_tokens=3)
    ids, _ = choose(whole(full, params.candidates), [[0]], [1], params, np.array([0.9999999]))
    assert ids.item() == 299
