"""Choosing the next token: pure functions on NumPy arrays, in the order and by the rules of transformers' `generate`.

    repetition penalty -> n-gram ban -> minimum length -> temperature -> top-k -> top-p -> min-p -> draw

Source of the rules: `generation/logits_process.py` of transformers 4.57 and 5.23, against which they are tested. Nucleus
sampling: Holtzman et al., "The Curious Case of Neural Text Degeneration" (arXiv:1904.09751).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ramekin.arguments import check_integer, check_number
from ramekin.cache import Floats
from ramekin.errors import RamekinError
from ramekin.model import Logits

Ids = npt.NDArray[np.int64]

_NOT_NUMBERS = "the model computed logits that are not numbers; `ramekin verify` tells whether it is intact"
_SPARE_CANDIDATES = 14  # ranked beyond top_k, so that ties at the k-th place are seen: 64 for the default of 50
MOST_TOKENS = 1 << 20
_INTEGERS = (  # with their ranges
    ("n", 1, 1 << 16),
    ("max_new_tokens", 1, MOST_TOKENS),
    ("min_new_tokens", 0, MOST_TOKENS),
    ("top_k", 0, 1 << 31),
    ("no_repeat_ngram_size", 0, 1 << 20),
)
_NUMBERS = (
    ("temperature", 1e-4, 1e4, "a number from 0.0001 to 10000 (greedy is the limit 0)"),
    ("top_p", 5e-324, 1, "a number above 0 and at most 1"),
    ("min_p", 0, math.nextafter(1, 0), "a number from 0 up to, not including, 1"),
    ("repetition_penalty", 1e-4, 1e4, "a number from 0.0001 to 10000"),
)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample; checks itself once.

    Attributes:
        n: how many samples.
        max_new_tokens: tokens after which a sample is cut.
        min_new_tokens: before so many tokens a sample cannot end with eos; a stop string ends it at any time.
        temperature: divides the logits.
        top_k: only the k most likely tokens are drawn; 0 for no limit. 50 is transformers' silent default.
        top_p: only the smallest set of most likely tokens that reaches this mass is drawn, the token that crosses included.
        min_p: only tokens with at least this share of the most likely one's probability are drawn.
        repetition_penalty: divides positive logits of tokens already in the sample, multiplies negative ones.
        no_repeat_ngram_size: no n-gram of this size appears twice in a sample; 0 for no ban.
        seed: samples are a function of it; None draws one, which the completions tell.
        greedy: take the most likely token; temperature, top-k, top-p and min-p do not matter then.
        stop: a sample ends at the first of these strings, which is cut from its text.

    Raises:
        ValueError, TypeError: a value is out of its range or not of its type; names the argument, the value and the range.
    """

    n: int = 1
    max_new_tokens: int = 100
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    greedy: bool = False
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, low, high in _INTEGERS:
            object.__setattr__(self, name, check_integer(name, getattr(self, name), low, high))
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be at most max_new_tokens, {self.max_new_tokens}, not {self.min_new_tokens}"
            )
        for name, least, most, wanted in _NUMBERS:
            object.__setattr__(self, name, check_number(name, getattr(self, name), least, most, wanted))
        if self.seed is not None:
            object.__setattr__(self, "seed", check_integer("seed", self.seed, 0, (1 << 64) - 1))
        if not isinstance(self.greedy, bool):
            raise TypeError(f"greedy must be True or False, not {self.greedy!r}")
        if not isinstance(self.stop, Iterable):
            raise TypeError(f"stop must be a text or several, not {self.stop!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be texts that are not empty, not {self.stop!r}")
        object.__setattr__(self, "stop", stop)

    @property
    def candidates(self) -> int:
        """How many logits the decoder should rank for these parameters."""
        return self.top_k + _SPARE_CANDIDATES if self.top_k and not self.greedy else 1

    @classmethod
    def known(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `values` that are parameters."""
        names = {each.name for each in fields(cls)}
        return {name: value for name, value in values.items() if name in names}


def uniforms(seed: int, samples: int, steps: int) -> npt.NDArray[np.float64]:
    """`(samples, steps)` numbers in [0, 1), each a function of (seed, sample, step) alone.

    Philox 4x64-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), with
    the key (seed, sample); the upper 53 bits of its step-th word.
    """
    keys = [np.array([seed, sample], np.uint64) for sample in range(samples)]
    words = [np.random.Philox(key=key).random_raw(steps) for key in keys]
    return np.asarray((np.stack(words) >> np.uint64(11)) * 2.0**-53)


class Ranked(NamedTuple):
    """The largest logits of n rows.

    Attributes:
        values: in falling order, `(n, k)` float32.
        ids: their tokens, `(n, k)` int64.
        outside: the mass of all that was passed over, `(n, 1)`, in units of the first token's; None if top-k drops it.
    """

    values: Floats
    ids: Ids
    outside: npt.NDArray[np.float64] | None = None


def choose(
    logits: Logits,
    histories: Sequence[Sequence[int]],
    eos: Sequence[int],
    params: SamplingParams,
    draws: npt.NDArray[np.float64],
) -> tuple[Ids, Floats]:
    """Choose the next token of each of n samples.

    Args:
        logits: what the model predicts.
        histories: for each sample the tokens fed so far, the start token included.
        eos: tokens that end a sample.
        params: how to choose.
        draws: `(n,)` numbers in [0, 1).

    Returns:
        The tokens, `(n,)` int64, and their log-probabilities under the model, before any rule, `(n,)` float32.
    """
    ranked = candidates_of(logits, histories, eos, params)
    if not np.isfinite(ranked.values[:, 0]).all():
        raise RamekinError(_NOT_NUMBERS)
    if params.greedy:
        chosen = ranked.ids[:, 0].copy()
    else:
        places = draw(distribution(ranked, params), draws)
        chosen = np.take_along_axis(ranked.ids, places[:, None], axis=1)[:, 0]
    return chosen, _log_probabilities_of(logits, chosen)


def candidates_of(logits: Logits, histories: Sequence[Sequence[int]], eos: Sequence[int], params: SamplingParams) -> Ranked:
    """Every token that can be drawn, after penalties and bans; from the decoder's ranking where that is enough."""
    early = np.array([len(history) <= params.min_new_tokens for history in histories])
    if params.repetition_penalty != 1.0 or params.no_repeat_ngram_size:
        return rank(_ban(edit(logits.full, histories, params), early, eos), params)
    ranked = _without(Ranked(logits.top_values, logits.top_ids), early, eos)
    return ranked if _ranked_enough(ranked, logits, params) else rank(_ban(logits.full, early, eos), params)


def edit(logits: Floats, histories: Sequence[Sequence[int]], params: SamplingParams) -> Floats:
    """A copy of `(n, vocab)` logits after repetition penalty and n-gram ban. The start token counts as part of a sample."""
    logits, size = logits.copy(), params.no_repeat_ngram_size
    for row, history in enumerate(histories):
        seen = np.unique(np.asarray(history))
        score, penalty = logits[row, seen], np.float32(params.repetition_penalty)
        logits[row, seen] = np.where(score < 0, score * penalty, score / penalty)
        if size:
            tail = list(history[len(history) - size + 1 :])
            for start in range(len(history) - size + 1):
                if list(history[start : start + size - 1]) == tail:
                    logits[row, history[start + size - 1]] = -np.inf
    return logits


def _ban(logits: Floats, early: npt.NDArray[np.bool_], eos: Sequence[int]) -> Floats:
    """The logits without eos in the rows that are too short to end."""
    if early.any():
        logits = logits.copy()
        logits[np.ix_(np.flatnonzero(early), np.asarray(eos))] = -np.inf
    return logits


def _without(ranked: Ranked, early: npt.NDArray[np.bool_], eos: Sequence[int]) -> Ranked:
    """What `_ban` does, of ranked logits: eos goes to the end."""
    if not early.any():
        return ranked
    banned = early[:, None] & (ranked.ids[:, :, None] == np.asarray(eos)).any(axis=2)  # few of each: `np.isin` takes longer
    return _sorted(np.where(banned, np.float32(-np.inf), ranked.values), ranked.ids) if banned.any() else ranked


def _sorted(values: Floats, ids: Ids, outside: npt.NDArray[np.float64] | None = None) -> Ranked:
    order = np.argsort(-values, axis=1, kind="stable")
    return Ranked(np.take_along_axis(values, order, axis=1), np.take_along_axis(ids, order, axis=1), outside)


def _ranked_enough(ranked: Ranked, logits: Logits, params: SamplingParams) -> bool:
    """Whether the decoder's ranking holds every token that can be drawn, ties at the k-th place included."""
    if logits.top_values.shape[1] == logits.vocab_size:
        return True
    if params.greedy:
        return bool((ranked.values[:, 0] > -np.inf).all())
    return bool(params.top_k and (ranked.values[:, params.top_k - 1] > logits.top_values[:, -1]).all())


def rank(logits: Floats, params: SamplingParams) -> Ranked:
    """The largest of `(n, vocab)` logits, as many as can be drawn.

    Without top-k, tokens under `(1 - top_p) / (vocab - 1)` are passed over before sorting: they cannot be in the nucleus,
    for all that is at most as likely would not fill the rest of the mass (llama2.c, `sample_topp`).

    Raises:
        RamekinError: no token of a row can be drawn, or its logits are not numbers.
    """
    vocab, outside, largest = logits.shape[1], None, logits.max(axis=1, keepdims=True)
    if (largest == -np.inf).any():
        raise RamekinError("every token is banned; lower min_new_tokens or no_repeat_ngram_size")
    if not np.isfinite(largest).all():
        raise RamekinError(_NOT_NUMBERS)
    if params.greedy:
        ids = logits.argmax(axis=1)[:, None]  # of equal ones the first, as transformers does
        return Ranked(np.take_along_axis(logits, ids, axis=1), ids)
    if params.top_k:
        place = vocab - min(params.top_k, vocab)
        count = int((logits >= np.partition(logits, place, axis=1)[:, place, None]).sum(axis=1).max())
    else:
        mass = np.exp((logits - largest).astype(np.float64) / params.temperature)
        outside = mass.sum(axis=1, keepdims=True)
        count = int((mass >= (1 - params.top_p) / max(vocab - 1, 1) * outside).sum(axis=1).max())
    count = max(count, 1)  # 0 if all are equal and top_p is tiny
    if count < vocab:
        ids = np.argpartition(logits, vocab - count, axis=1)[:, vocab - count :]
        ids.sort(axis=1)
    else:
        ids = np.broadcast_to(np.arange(vocab), logits.shape)
    if outside is not None:
        outside = outside - np.take_along_axis(mass, ids, axis=1).sum(axis=1, keepdims=True)
    return _sorted(np.take_along_axis(logits, ids, axis=1), ids, outside)


def distribution(ranked: Ranked, params: SamplingParams) -> npt.NDArray[np.float64]:
    """Probabilities to draw from, `(n, k)`, of ranked logits; 0 for what the rules leave out.

    Ties at the k-th place stay, all of them. The token that crosses `top_p` stays; one that starts where the mass before
    it already is `top_p` goes. The most likely token always stays. Of equal logits those of smaller ids stay, where
    transformers, which sums up from the other end, keeps those of larger ids.
    """
    scaled = (ranked.values / np.float32(params.temperature)).astype(np.float64)  # divided in float32, as transformers does
    scaled -= scaled[:, :1]
    if 0 < params.top_k < scaled.shape[1]:
        scaled[scaled < scaled[:, params.top_k - 1, None]] = -np.inf
    mass = np.exp(scaled)
    if params.top_p < 1:
        total = mass.sum(axis=1, keepdims=True) + (0 if ranked.outside is None else ranked.outside)
        before = np.cumsum(mass / total, axis=1)[:, :-1]
        mass[:, 1:][before >= params.top_p] = 0
    if params.min_p > 0:
        mass[mass < params.min_p * mass[:, :1]] = 0
    return np.asarray(mass / mass.sum(axis=1, keepdims=True))


def draw(probabilities: npt.NDArray[np.float64], draws: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """The place in each row of `(n, k)` probabilities at which their running sum passes `draws`, `(n,)` in [0, 1)."""
    sums = np.cumsum(probabilities, axis=1)
    return np.asarray((sums <= draws[:, None] * sums[:, -1:]).sum(axis=1))


def _log_probabilities_of(logits: Logits, chosen: Ids) -> Floats:
    """The log-softmax at one token of each row; from the ranking, if it has them."""
    if not ((chosen >= 0) & (chosen < logits.vocab_size)).all():
        raise RamekinError("the model ranked tokens that there are not; `ramekin verify` tells whether it is intact")
    if logits.top_logprobs is None:
        return log_probabilities(logits.full, chosen)
    found = logits.top_ids == chosen[:, None]
    if not found.any(axis=1).all():
        return log_probabilities(logits.full, chosen)
    picked = np.take_along_axis(logits.top_logprobs, found.argmax(axis=1)[:, None], axis=1)[:, 0]
    if not np.isfinite(picked).all():
        raise RamekinError(_NOT_NUMBERS)
    return picked


def log_probabilities(logits: Floats, chosen: Ids) -> Floats:
    """The log-softmax of `(n, vocab)` logits at one token of each row, `(n,)` float32."""
    top = logits.max(axis=1)
    # Row by row: what a row needs stays in the cache, where two megabytes for all are fresh pages at every step.
    total = np.array([np.exp(row - most).sum() for row, most in zip(logits, top, strict=True)])
    if not np.isfinite(total).all():
        raise RamekinError(_NOT_NUMBERS)
    picked = np.take_along_axis(logits, chosen[:, None], axis=1)[:, 0]
    return np.asarray(picked - top - np.log(total), np.float32)
