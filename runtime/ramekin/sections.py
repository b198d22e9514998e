"""Where the title, abstract and introduction of a text are: plain text, a PDF's too, Markdown and reStructuredText."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ramekin.pdf_text import Words, without_line_numbers

# With blanks, since small capitals come out of a PDF as "A BSTRACT".
_ABSTRACT, _INTRODUCTION = "[ ]?".join("abstract"), "[ ]?".join("introduction")
_NUMERAL = r"\d{1,4}|[IVX]+"
_HEADING = re.compile(
    rf"""\s* (?P<marks>\#{{1,6}})? \s* [*_]{{0,3}}
    (?: (?P<number>{_NUMERAL}) (?P<dot>\.?) (?:(?<=\.)|\s) \s* )? [*_]{{0,3}}
    (?P<name>{_ABSTRACT}|{_INTRODUCTION}) [*_]{{0,3}}
    (?: (?P<more> \s+ (?:and|&) \s .{{1,60}} )
      | \s* (?: (?P<mark>[:.\u2013\u2014-]) [*_]{{0,3}} \s* (?P<rest>.*) )? )""",
    re.IGNORECASE | re.VERBOSE,
)
_AFTER_ABSTRACT = re.compile(
    r"""[\s\#]* [*_]{0,3}
    (?i:key[ ]?words([ ]and[ ]phrases)?|index[ ]terms|ccs[ ]concepts|categories[ ]and[ ]subject[ ]descriptors
      |author[ ]summary|significance[ ]statement)
    [*_]{0,3} \s* ([:.\u2013\u2014-]|$)""",
    re.VERBOSE,
)
_AFTER_INTRODUCTION = re.compile(r"\s*(?=[A-Z])(?i:related works?|(materials and )?methods|results|references)\s*$")
_NUMBERED = re.compile(rf"\s*({_NUMERAL})(\.?)(?:(?<=\.)|\s)\s*([A-Z].*[^.,;:?!])$")
_SENTENCE_END = re.compile(r"[.!?)\]\"\u201d][\d ]*$")  # or a footnote's number behind it

_NUMBER_APART = re.compile(
    rf"""(?P<ended>[.!?)\]\"\u201d]\d{{0,2}}[ ]*)?  # else the number may be a page's
    (?P<gap>\n\n?) (?P<number>\d{{1,2}}|[IVX]{{1,4}}\.) [ ]*\n\n?
    (?=(?(ended)(?![IVX]+\.)[A-Z]|(?i:{_INTRODUCTION})[ ]*\n))""",
    re.VERBOSE,
)
"""A section's number on a line of its own, as PDFs' text has it."""

_FRONT_MATTER = re.compile(r"\s*---\s*?\n(?=[\w-]+:)(.*?\n)(?:---|\.\.\.)\s*?(?:\n|$)", re.DOTALL)
_FIELD = re.compile(
    r"""^(title|abstract|introduction):[ \t]*
    (?:[|>][-+\d]*\s*?$)?           # of a block: it is folded, whichever it is
    (.*\n (?:(?:[ \t].*)?\n)*)      # all lines that are deeper, or empty""",
    re.MULTILINE | re.VERBOSE,
)

_UNDERLINE = re.compile(r"\s{0,3}(={3,}|-{3,}|~{3,})\s*$")
_FENCE = re.compile(r"\s{0,3}(`{3,}|~{3,})[^`]*$")
_BOLD = re.compile(r"\s{0,3}\*\*(?P<title>[^\s*](?:(?!\*\*).)*[^\s*.,;:?!])\*\*\s*$")
_MARKED = re.compile(r"\s{0,3}(#{1,6})\s+(\S.*)$")
_ANCHOR = re.compile(r"</?(?:span|a|b)\b[^<>]*>")
_ROMAN = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X")
_HEADING_WORDS = 6
_TITLE_WORDS = 20


def sections(text: str) -> dict[str, str]:
    """The `title`, `abstract` and `introduction` of a text, without line breaks; empty if they are not found.

    They stand in YAML in front, or below headings, however these are marked; what stands before the first is the title.
    """
    text = without_line_numbers(text.replace("\r\n", "\n").replace("\r", "\n"))
    front = _FRONT_MATTER.match(text)
    fields = _FIELD.findall(front[1]) if front else []
    given = {name: " ".join(value.split()).strip("\"'") for name, value in fields}
    found = _below_headings(text[front.end() :] if front else text)
    return {name: given.get(name) or said for name, said in found.items()}


def _below_headings(text: str) -> dict[str, str]:
    parts: dict[str, list[str]] = {"title": [], "abstract": [], "introduction": []}
    current: str | None = "title"
    opened: _Heading | None = None
    lines = list(_lines(_NUMBER_APART.sub(r"\g<ended>\g<gap>\g<number> ", text)))
    for before, line in zip([_Line(""), *lines], lines, strict=False):
        heading = _Heading.of(line, within=opened is not None and bool(before.text.strip()))
        if heading:
            current, opened = heading.name, heading
            parts[current].append(heading.rest)
        elif opened and current and _ends_section(line, opened, "".join(parts[current][-3:])):
            current = None
        elif current:
            parts[current].append(line.text)
    words = Words(text)
    return {name: words.joined(lines) for name, lines in parts.items()}


@dataclass(frozen=True)
class _Line:
    """A line of a text: what it says, what it says as a heading (nothing if it can be none), and whether it is all bold."""

    text: str
    heading: str = ""
    bold: bool = False


@dataclass(frozen=True)
class _Heading:
    """The heading of an abstract or introduction.

    Attributes:
        name: "abstract" or "introduction".
        level: how many marks it has; 0: none.
        number: its number, as it is written; empty if it has none.
        dot: what stands behind the number, a dot or nothing.
        bold: whether it is bold, and has no marks.
        rest: what the section says on the same line.
    """

    name: str
    level: int
    number: str
    dot: str
    bold: bool
    rest: str

    @classmethod
    def of(cls, line: _Line, within: bool) -> _Heading | None:
        """The heading that a line is. In mid-paragraph, `within`, a sentence may begin like one: "abstract-level ..."."""
        match = _HEADING.fullmatch(line.heading.strip())  # else blanks could be told apart in many ways
        if not match:
            return None
        name, number, rest = match["name"].lower().replace(" ", ""), match["number"] or "", match["rest"] or ""
        if match["more"] and (name == "abstract" or not (number or match["marks"])):
            return None
        if within and rest and match["mark"] in (".", "-", "\u2013") and line.heading.lstrip().startswith(name):
            return None
        return cls(name, len(match["marks"] or ""), number, match["dot"] or "", line.bold, rest)


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
        alone = not before.strip() or _Heading.of(_Line(line, line), within=False)
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
        elif (bold := _BOLD.match(_joined(line))) and not before.strip() and len(bold["title"].split()) <= _HEADING_WORDS:
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


def _joined(line: str) -> str:
    """A line whose number and name are bold each, bold as one."""
    return line.replace("** **", " ")


def _title(text: str) -> str:
    """A heading's text without anchors in HTML and what closes it or, in Pandoc's way, names it, and not in bold."""
    bare = _joined(_ANCHOR.sub("", text)).strip()
    start = bare.rfind("{")
    if start >= 0 and bare.endswith("}") and (bare[start + 1] in "#.-" or "=" in bare[start:].partition(" ")[0]):
        bare = bare[:start].rstrip()
    open_end = bare.rstrip("#")
    if open_end != bare and open_end[-1:].isspace():
        bare = open_end.rstrip()
    bold = _BOLD.match(bare)
    return bold["title"] if bold else bare


def _ends_section(line: _Line, opened: _Heading, so_far: str) -> bool:
    """Whether a line is the heading of what follows the section that the heading `opened` began.

    A Markdown heading is, unless it is deeper; a numbered line is if it is short and goes on in the heading's own numbers,
    but below a Markdown heading it belongs to a list. Below a heading in bold others in bold are, or their next number.
    After a whole sentence some words are, however they are set.
    """
    words = _AFTER_ABSTRACT if opened.name == "abstract" else _AFTER_INTRODUCTION
    if words.match(line.heading) and _SENTENCE_END.search(so_far):
        return True
    marked = None if line.bold else _MARKED.match(line.heading)
    if marked:
        deeper = len(marked[1]) > opened.level or (opened.number and re.match(rf"{opened.number}\.\d", marked[2]))
        return not (opened.level and deeper)  # a number, since some converters give all headings one level
    if opened.level or (opened.bold and not line.bold):
        return False
    if opened.bold and not opened.number:
        return True
    numbered = _NUMBERED.match(line.heading)
    if not numbered or sum(len(word) > 1 for word in numbered[3].split()) > _HEADING_WORDS:
        return False
    same_style = not opened.number or numbered[2] == opened.dot
    return same_style and _value(numbered[1]) == _value(opened.number) + 1


def _value(numeral: str) -> int:
    """Of none 0, since an abstract has no number and the section behind it is the first; -1 if it is too large."""
    return int(numeral) if numeral.isdecimal() else _ROMAN.index(numeral.upper()) if numeral.upper() in _ROMAN else -1
