"""Papers in, question/answer pairs out: the prompt of the model card and the form of its answers."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ramekin.errors import PaperError
from ramekin.manifest import DEFAULT_PROMPT

SEPARATOR = "[SEP]"
Problem = Literal["no separator", "more than one separator", "empty question", "empty answer", "cut at the limit"]

_HEADING = re.compile(
    r"^\s{0,3}(?P<marks>#{1,6}\s*)?(?:(?P<number>\d{1,4}|[IVX]+)(?P<dot>\.?)\s+)?[*_]{0,2}(?P<name>abstract|introduction)[*_]{0,2}"
    r"\s*(?:(?P<mark>[:.\u2014-])[*_]{0,2}\s*(?P<rest>.*))?$",
    re.IGNORECASE,
)
_UNDERLINE = re.compile(r"^\s{0,3}(={3,}|-{3,}|~{3,})\s*$")
_FENCE = re.compile(r"^\s{0,3}(`{3,}|~{3,})[^`]*$")
_BOLD = re.compile(r"^\s{0,3}\*\*(?P<title>[^\s*](?:(?!\*\*).)*[^\s*.,;:?!])\*\*\s*$")
_MARKED = re.compile(r"^\s{0,3}(#{1,6})\s+(\S.*)$")
_NUMBERED = re.compile(r"^\s{0,3}(\d{1,4}|[IVX]+)(\.?)\s+([A-Z].*[^.,;:?!])$")
_ROMAN = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X")
_HEADING_WORDS = 6
_TITLE_WORDS = 20


@dataclass(frozen=True)
class Paper:
    """The parts of a paper that a question is asked about; at least one of abstract and introduction has text."""

    title: str = ""
    abstract: str = ""
    introduction: str = ""

    def __post_init__(self) -> None:
        for name in ("title", "abstract", "introduction"):
            if not isinstance(getattr(self, name), str):
                raise PaperError(f"{name} must be a text, not {type(getattr(self, name)).__name__}")
        if not (self.abstract.strip() or self.introduction.strip()):
            raise PaperError("a paper needs an abstract or an introduction")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Paper:
        """Read a paper.

        A JSON object with `title`, `abstract` and `introduction`; or plain text or Markdown with headings "Abstract" and
        "Introduction" (numbered or not; "Abstract: ..." on one line is fine). What stands before the headings is the title.

        Raises:
            PaperError: the file is missing, not UTF-8, or neither of both.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise PaperError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            raise PaperError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        try:
            return cls.parse(text)
        except PaperError as error:
            raise PaperError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> Paper:
        """What `read` does, of a text.

        Raises:
            PaperError: the text is not a paper.
        """
        if text.lstrip().startswith("{"):
            try:
                raw = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise PaperError(f"neither JSON ({error}) nor text with the heading Abstract or Introduction") from None
            return cls.from_mapping(raw)
        return cls(**_sections(text))

    @classmethod
    def from_mapping(cls, raw: Any) -> Paper:
        """A paper of a JSON object; other keys than its three do not matter.

        Raises:
            PaperError: it is not an object, or a part is not a text.
        """
        if not isinstance(raw, dict):
            raise PaperError("expected a JSON object with title, abstract and introduction")
        parts = {name: "" if raw.get(name) is None else raw[name] for name in ("title", "abstract", "introduction")}
        return cls(**{name: valid_text(each) if isinstance(each, str) else each for name, each in parts.items()})


def valid_text(text: str) -> str:
    """The text with "?" for halves of surrogate pairs, which JSON can hold but UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _sections(text: str) -> dict[str, str]:
    parts: dict[str, list[str]] = {"title": [], "abstract": [], "introduction": []}
    current: str | None = "title"
    opened: re.Match[str] | None = None
    opened_bold = False
    lines = list(_lines(text))
    for before, line in zip([_Line(""), *lines], lines, strict=False):
        heading = _HEADING.match(line.heading)
        if heading and not (opened and before.text.strip() and _in_a_sentence(heading)):
            current, opened, opened_bold = heading["name"].lower(), heading, line.bold
            parts[current].append(heading["rest"] or "")
        elif opened and current and _ends_section(line, opened, opened_bold):
            current = None
        elif current:
            parts[current].append(line.text)
    if not any("".join(parts[name]).strip() for name in ("abstract", "introduction")):
        raise PaperError(
            "not a paper: expected JSON with title, abstract and introduction, "
            "or text with the heading Abstract or Introduction"
        )
    return {name: " ".join(" ".join(lines).split()) for name, lines in parts.items()}


@dataclass(frozen=True)
class _Line:
    """A line of a text: what it says, what it says as a heading (nothing if it can be none), and whether it is all bold."""

    text: str
    heading: str = ""
    bold: bool = False


def _lines(text: str) -> Iterator[_Line]:
    """The lines of a text. Whichever way a heading is marked, it has marks at its beginning then, or is bold.

    Source: spec.commonmark.org 0.31, ATX headings, setext headings, fenced code blocks. Fences that nobody closes are text,
    and so are rules below sentences.
    """
    lines = text.strip().splitlines()
    if len(lines) > 2 and _closing(lines, 0) == len(lines) - 1:  # all of it between fences, as chat models write
        lines = lines[1:-1]
    place, unclosed = 0, {"`": len(text) + 1, "~": len(text) + 1}
    while place < len(lines):
        line, before, after = lines[place], lines[place - 1] if place else "", "".join(lines[place + 1 : place + 2])
        fence = _FENCE.match(line)
        closed = _closing(lines, place) if fence and len(fence[1]) < unclosed[fence[1][0]] else 0
        if fence and not closed:  # nor are longer ones: nobody needs to look for their ends
            unclosed[fence[1][0]] = min(unclosed[fence[1][0]], len(fence[1]))
        alone = not before.strip() or _HEADING.match(line)
        under = _UNDERLINE.match(after) if alone and _like_a_title(line) else None
        if under and under[1].startswith("~") and len(under[1]) < len(line.strip()):  # reStructuredText's are no shorter
            under = None
        if closed:
            yield from map(_Line, lines[place : closed + 1])
            place = closed
        elif under:
            yield _Line(_title(line), f"{'#' if under[1].startswith('=') else '##'} {_title(line)}")
            place += 1
        elif marked := _MARKED.match(line):
            yield _Line(_title(marked[2]), f"{marked[1]} {_title(marked[2])}")
        elif (bold := _BOLD.match(line)) and not before.strip() and len(bold["title"].split()) <= _HEADING_WORDS:
            yield _Line(line, bold["title"], bold=True)
        else:
            yield _Line(line, line)
        place += 1


def _closing(lines: Sequence[str], place: int) -> int:
    """Where the fence that a line opens is closed; 0 if it opens none, or none that is closed."""
    fence = _FENCE.match(lines[place])
    if not fence:
        return 0
    ends = (i for i in range(place + 1, len(lines)) if lines[i].strip().startswith(fence[1]) and not lines[i].strip(" \t`~"))
    return next(ends, 0)


def _like_a_title(line: str) -> bool:
    said = line.strip()
    return bool(said) and len(said.split()) <= _TITLE_WORDS and said[-1] not in ".,;:" and not _UNDERLINE.match(line)


def _title(text: str) -> str:
    """A heading's text without what closes it or, in Pandoc's way, names it, and not in bold."""
    bare = text.strip()
    start = bare.rfind("{")
    if start >= 0 and bare.endswith("}") and (bare[start + 1] in "#.-" or "=" in bare[start:].partition(" ")[0]):
        bare = bare[:start].rstrip()
    open_end = bare.rstrip("#")
    if open_end != bare and open_end[-1:].isspace():
        bare = open_end.rstrip()
    bold = _BOLD.match(bare)
    return bold["title"] if bold else bare


def _in_a_sentence(heading: re.Match[str]) -> bool:
    """Whether a line, if others stand before it, only begins with the word: "introduction. We ...", "abstract-level ..."."""
    bare = heading[0].lstrip().startswith(heading["name"]) and heading["name"].islower()
    return bare and bool(heading["rest"]) and heading["mark"] in (".", "-")


def _ends_section(line: _Line, opened: re.Match[str], opened_bold: bool) -> bool:
    """Whether a line is the heading of what follows the section that the heading `opened` began.

    A Markdown heading is, unless it is deeper; a numbered line is if it is short and goes on in the heading's own numbers,
    but below a Markdown heading it belongs to a list. Below a heading in bold others in bold are, or their next number.
    """
    marked = None if line.bold else _MARKED.match(line.heading)
    if marked:
        return not opened["marks"] or len(marked[1]) <= len(opened["marks"].strip())
    if opened["marks"] or (opened_bold and not line.bold):
        return False
    if opened_bold and not opened["number"]:
        return True
    numbered = _NUMBERED.match(line.heading)
    if not numbered or len(numbered[3].split()) > _HEADING_WORDS:
        return False
    if not opened["number"]:  # an abstract has no number: the next section is the first
        return _value(numbered[1]) == 1
    return numbered[2] == opened["dot"] and _value(numbered[1]) == _value(opened["number"]) + 1


def _value(numeral: str) -> int:
    return int(numeral) if numeral.isdecimal() else _ROMAN.index(numeral.upper()) if numeral.upper() in _ROMAN else -1


def build_prompt(paper: Paper, template: str = DEFAULT_PROMPT) -> str:
    """Fill a template's `{title}`, `{abstract}` and `{introduction}`.

    Raises:
        ValueError: the template has other fields, or formats.
    """
    values = {"title": paper.title, "abstract": paper.abstract, "introduction": paper.introduction}
    pieces = []
    try:
        for literal, name, form, conversion in string.Formatter().parse(template):
            pieces.append(literal)
            if name is not None:
                if name not in values:
                    raise ValueError(f"unknown field {{{name}}}")
                if form or conversion:
                    raise ValueError(f"{{{name}}} takes neither a format nor a conversion")
                pieces.append(values[name])
    except ValueError as error:
        raise ValueError(f"prompt template: {error}; {{title}}, {{abstract}} and {{introduction}} can be used") from None
    return "".join(pieces)


def check_prompt(template: str) -> None:
    """Refuse a template that `build_prompt` cannot fill, or that leaves the paper out.

    Raises:
        ValueError: says what is wrong with it.
    """
    if template != valid_text(template):
        raise ValueError("prompt template: it is not UTF-8 text")
    abstract, introduction = "\0a", "\0i"
    if not any(part in build_prompt(Paper("", abstract, introduction), template) for part in (abstract, introduction)):
        raise ValueError("prompt template: it has neither {abstract} nor {introduction}, so no paper would be read")


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
