"""Question/answer pairs, as the model of the card writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SEPARATOR = "[SEP]"
Problem = Literal["no separator", "more than one separator", "empty question", "empty answer", "cut at the limit"]


@dataclass(frozen=True)
class QAPair:
    """A question and its answer, and what is wrong with the text that they came from (None: nothing)."""

    question: str
    answer: str
    problem: Problem | None = None

    @classmethod
    def parse(cls, text: str, cut: bool = False) -> QAPair:
        """Read `question [SEP] answer`.

        Nothing is refused: the question ends at the first separator, the answer at the second, if there is one; without any,
        all is question or, if it does not end with a question mark, all is answer.

        Args:
            text: what the model wrote; `<n>` counts as a blank, as on the model card.
            cut: the sample ran into the token limit (`finish_reason == "length"`), so the answer may end in mid-sentence.
        """
        parts = [" ".join(part.split()) for part in text.replace("<n>", " ").split(SEPARATOR)]
        if len(parts) == 1:
            question, answer = (parts[0], "") if parts[0].endswith("?") else ("", parts[0])
            return cls(question, answer, "no separator")
        question, answer = parts[:2]
        problem: Problem | None = None
        if not question:
            problem = "empty question"
        elif not answer:
            problem = "empty answer"
        elif len(parts) > 2:
            problem = "more than one separator"
        elif cut:
            problem = "cut at the limit"
        return cls(question, answer, problem)

    @property
    def well_formed(self) -> bool:
        """Whether the text was a question, one separator and a whole answer."""
        return self.problem is None
