"""Papers, and the prompt that is made of one."""

from __future__ import annotations

import json
import os
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramekin.errors import PaperError
from ramekin.manifest import DEFAULT_PROMPT
from ramekin.sections import sections


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
        "Introduction" ("Abstract: ..." on one line is fine), or YAML in front. What stands before the headings is the title.
        Words that a PDF's text has in two at the ends of lines become whole, and line numbers go.

        Raises:
            PaperError: the file is missing, not UTF-8, or neither of both.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            raise PaperError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if content.startswith(b"%PDF-"):
            raise PaperError(f"{path}: a PDF; `pdftotext -raw` makes a text of it")
        try:
            return cls.parse(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise PaperError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
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
        parts = sections(text)
        if not (parts["abstract"] or parts["introduction"]):
            raise PaperError("not a paper: no heading Abstract or Introduction, nor JSON with title, abstract, introduction")
        return cls(**parts)

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
