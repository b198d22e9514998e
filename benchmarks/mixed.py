"""Real papers with invented facts among their sentences: a harder reading task, and texts of any length."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

from examples.synthetic import HELD_OUT_SEED, SyntheticPaper, make_paper

_HELD_OUT_SHARE = 6
"""Every sixth real paper is kept for judging."""


@dataclass(frozen=True)
class RealPaper:
    """The sentences of a real paper."""

    abstract: tuple[str, ...]
    introduction: tuple[str, ...]


def read_real_papers(folder: Path) -> tuple[list[RealPaper], list[RealPaper]]:
    """The papers of all `.jsonl` files of a folder (with `abstract` and `introduction`): for training, for judging."""
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    papers = [RealPaper(_sentences(row["abstract"]), _sentences(row["introduction"])) for row in rows]
    papers = [paper for paper in papers if len(paper.abstract) > 1 and len(paper.introduction) > 4]
    return [p for i, p in enumerate(papers) if i % _HELD_OUT_SHARE], papers[::_HELD_OUT_SHARE]


def mixed_paper(seed: int, real: list[RealPaper], words: int) -> SyntheticPaper:
    """The synthetic paper of this seed, its sentences strewn over about `words` words of a real one."""
    rng, synthetic = random.Random(seed), make_paper(seed)
    paper = rng.choice(real)
    abstract = _window(rng, paper.abstract, words // 3)
    introduction = _window(rng, paper.introduction, words - sum(map(_words, abstract)))
    return replace(
        synthetic,
        abstract=_strew(rng, synthetic.abstract, abstract),
        introduction=_strew(rng, synthetic.introduction, introduction),
    )


def continuation(seed: int, real: list[RealPaper], words: int) -> tuple[str, str]:
    """About `words` words of a real paper as a prompt, and the text that follows them."""
    rng = random.Random(seed)
    paper = rng.choice(real)
    sentences = [*paper.abstract, *paper.introduction]
    first = rng.randrange(len(sentences) - 3)
    before: list[str] = []
    while sum(map(_words, before)) < words and first + len(before) < len(sentences) - 2:
        before.append(sentences[first + len(before)])
    after = sentences[first + len(before) : first + len(before) + 8]
    return f"Continue the following research paper. {' '.join(before)}", " ".join(after)


def held_out(count: int, real: list[RealPaper], words: int) -> list[SyntheticPaper]:
    """`count` papers that no training run has seen."""
    return [mixed_paper(HELD_OUT_SEED + i, real, words) for i in range(count)]


def _sentences(text: str) -> tuple[str, ...]:
    return tuple(each for each in re.split(r"(?<=[.?!])\s+", " ".join(text.split())) if each)


def _words(sentence: str) -> int:
    return sentence.count(" ") + 1


def _window(rng: random.Random, sentences: tuple[str, ...], words: int) -> list[str]:
    """Neighbouring sentences, from a random one on, of `words` words in all or a little less."""
    kept: list[str] = []
    for sentence in sentences[rng.randrange(max(1, len(sentences) - words // 20)) :]:
        if sum(map(_words, kept)) + _words(sentence) > words:
            break
        kept.append(sentence)
    return kept


def _strew(rng: random.Random, facts: str, text: list[str]) -> str:
    told = _sentences(facts)
    places = sorted(rng.randrange(len(text) + 1) for _ in told)
    for place, sentence in reversed(list(zip(places, told, strict=True))):
        text.insert(place, sentence)
    return " ".join(text)
