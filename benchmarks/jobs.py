"""What the engines are asked to do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The 16 samples that the model card shows have 499 words, the longest 88 of them, the next 41, and one was cut at 100 tokens.
# At about 1.2 tokens for a word that is a distribution like this one; what matters is its shape: most are short, one is long.
NATURAL = (27, 45, 30, 24, 38, 100, 31, 28, 36, 22, 51, 32, 26, 41, 29, 34)
FORCED = 100
_PAPERS = (420, 900, 610, 340, 780, 512, 950, 260)
"""Prompt tokens of the papers that are worked through in a row."""


@dataclass(frozen=True)
class Request:
    """A prompt of `source` random tokens; sample i has `lengths[i]` tokens."""

    source: int
    lengths: tuple[int, ...]

    def prompt(self, vocabulary: int) -> list[int]:
        """Token ids, the same at every call; the last one is T5's eos."""
        rng = np.random.default_rng(self.source)
        ids: list[int] = rng.integers(3, min(32_000, vocabulary), self.source - 1).tolist()
        return [*ids, 1]


def forced(source: int, n: int, tokens: int = FORCED) -> tuple[Request, ...]:
    """One prompt, n samples of equal length."""
    return (Request(source, (tokens,) * n),)


JOBS: dict[str, tuple[Request, ...]] = {
    **{f"{source} n={n}": forced(source, n) for source in (900, 512, 256) for n in (16, 4, 1)},
    "900 n=16 natural": (Request(900, NATURAL),),
    "8 papers n=4 natural": tuple(Request(source, NATURAL[i : i + 4]) for i, source in enumerate(_PAPERS)),
}
"""By name: prompt tokens, samples, and "natural" where the samples end at lengths like those of the model card."""
QUICK: dict[str, tuple[Request, ...]] = {
    "120 n=1": forced(120, 1, 12),
    "120 n=4": forced(120, 4, 12),
    "120 n=4 natural": (Request(120, (5, 12, 3, 7)),),
}
"""Small ones, for the demo model."""
