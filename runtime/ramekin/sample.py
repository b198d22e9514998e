"""A sample on its way: its tokens, the text that is certain, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ramekin.sampling import SamplingParams
from ramekin.tokenizer import IncrementalDecoder, first_stop

FinishReason = Literal["eos", "length", "stop"]


@dataclass(frozen=True)
class Token:
    """One token of a sample.

    Attributes:
        index: which sample.
        token_id: the token.
        logprob: its log-probability under the model.
        text: the text that became certain with it; the texts of a sample's tokens add up to its completion's text.
    """

    index: int
    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True)
class Completion:
    """One finished sample.

    Attributes:
        index: which sample, from 0.
        text: its text, without special tokens and without the stop string.
        token_ids: its tokens, the eos that ended it included.
        logprobs: for each token its log-probability under the model, before temperature and all other rules.
        finish_reason: "eos", "length" (cut at `max_new_tokens`) or "stop".
        seed: the same prompt, parameters and seed give this sample again.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    seed: int


@dataclass
class Sample:
    """A sample that is still running: number `index` of its prompt's."""

    prompt: int
    index: int
    decoder: IncrementalDecoder
    history: list[int]
    logprobs: list[float] = field(default_factory=list)
    told: int = 0


def advance(
    sample: Sample, token: int, logprob: float, eos: Sequence[int], params: SamplingParams, seed: int
) -> tuple[Token, Completion | None]:
    """Add a token to a sample: its event, and the sample's completion if it ends there."""
    sample.history.append(token)
    sample.logprobs.append(logprob)
    reason: FinishReason | None = None
    if token in eos:
        reason = "eos"
    else:
        sample.decoder.push(token)
        if len(sample.logprobs) >= params.max_new_tokens:
            reason = "length"
    if reason:
        sample.decoder.finish()
    text = sample.decoder.text
    cut = first_stop(text, params.stop) if params.stop else None
    if cut is not None:
        reason, certain = "stop", cut
    elif reason or not params.stop:
        certain = len(text)
    else:  # what may be the beginning of a stop string is held back until it is certain
        certain = len(text) - max(_begun(text, stop) for stop in params.stop)
    event = Token(sample.index, token, logprob, text[sample.told : certain])
    sample.told = certain
    if not reason:
        return event, None
    return event, Completion(sample.index, text[:certain], tuple(sample.history[1:]), tuple(sample.logprobs), reason, seed)


def _begun(text: str, stop: str) -> int:
    """How many of a stop string's characters a text ends with, if they are its first ones."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)
