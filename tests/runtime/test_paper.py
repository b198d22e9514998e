from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ramekin import Paper, PaperError, QAPair, build_prompt


@pytest.mark.parametrize(
    ("text", "question", "answer", "problem"),
    [
        ("What is it?[SEP] A net.", "What is it?", "A net.", None),
        ("  What  is\nit? [SEP]A<n>net. ", "What is it?", "A net.", None),
        ("What? [SEP] One. [SEP] Two.", "What?", "One.", "more than one separator"),
        ("What is it?", "What is it?", "", "no separator"),
        ("A net.", "", "A net.", "no separator"),
        ("", "", "", "no separator"),
        ("[SEP] A net.", "", "A net.", "empty question"),
        ("What? [SEP]", "What?", "", "empty answer"),
        ("[SEP]", "", "", "empty question"),
    ],
)
def test_question_answer_pairs(text: str, question: str, answer: str, problem: str | None) -> None:
    pair = QAPair.parse(text)
    assert (pair.question, pair.answer, pair.problem) == (question, answer, problem)
    assert pair.well_formed == (problem is None)


def test_a_pair_that_was_cut() -> None:
    assert QAPair.parse("What? [SEP] A net that", cut=True).problem == "cut at the limit"
    assert QAPair.parse("What is", cut=True).problem == "no separator"
    assert QAPair.parse("What? [SEP] One. [SEP] Tw", cut=True).problem == "more than one separator"  # the answer was whole


EXPECTED = Paper("A Title", "We propose. It works.", "Much has been said.")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"title": "A Title", "abstract": EXPECTED.abstract, "introduction": EXPECTED.introduction, "id": 3}),
        "A Title\n\nAbstract\nWe propose.\nIt works.\n\nIntroduction\nMuch has been said.\n",
        "# A Title\n\n## Abstract\n\nWe propose. It works.\n\n## 1. Introduction\nMuch has\nbeen said.\n\n"
        "## 2 Related Work\nNo.",
        "A Title\nAbstract: We propose. It works.\n1 Introduction\nMuch has been said.\n2 Method\nNo.",
        "A Title\n**Abstract**\nWe propose. It works.\nI. INTRODUCTION\nMuch has been said.\nII. Method\nNo.",
        "A Title\n=======\n\nAbstract\n~~~~~~~~\n\nWe propose. It works.\n\nIntroduction\n~~~~~~~~~~~~\nMuch has"
        " been said.\n\nRelated Work\n~~~~~~~~~~~~\nNo.",
        "A Title\nABSTRACT \u2014 We propose. It works.\r\nINTRODUCTION\r\nMuch has been said.",
    ],
)
def test_papers_in_every_form(text: str, tmp_path: Path) -> None:
    path = tmp_path / "paper"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert Paper.read(path) == EXPECTED


def test_code_below_a_short_line() -> None:
    text = "Abstract\n\nWe do.\n\nIntroduction\n\nMuch has.\n\nListing one\n~~~\nprint(1)\n~~~\n\nThe end."
    assert Paper.parse(text).introduction == "Much has. Listing one ~~~ print(1) ~~~ The end."


@pytest.mark.parametrize(
    ("text", "introduction"),
    [
        ("## Introduction\nOne.\n### Contributions\nTwo.\n## Method\nNo.", "One. Contributions Two."),
        ("1. Introduction\n1. We propose a parser\n2. We evaluate it on five languages and more\n2. Method\nNo.", None),
        ("Introduction\nIt uses\n3 Transformers of different sizes and shapes\nand more.", None),
        ("**Introduction:** We do X.", "We do X."),
        ("**Introduction**: We do X.", "We do X."),
        (
            "Introduction\nAs in every\nintroduction. Here\nabstract-level text.",
            "As in every introduction. Here abstract-level text.",
        ),
        ("introduction: we do X.", "we do X."),
        ("introduction. We do X.", "We do X."),
        ("A Title\n\nabstract. No.\n\nintroduction - We do X.", "We do X."),
        ("abstract\nNo.\n**introduction.** We do X.", "We do X."),
    ],
)
def test_sections_keep_what_is_theirs(text: str, introduction: str | None) -> None:
    found = Paper.parse(text).introduction
    if introduction is None:
        assert "No." not in found
        assert found.endswith(("more", "more."))
    else:
        assert found == introduction


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF; `pdftotext -raw` makes a text of it"),
        (b"", "not a paper"),
        (b"Just some text about nothing.", "heading Abstract or Introduction"),
        (b"{broken", "neither JSON"),
        (b"{}", "needs an abstract"),
        (b'{"abstract": 3}', "abstract must be a text"),
        (b'{"abstract": [], "introduction": "x"}', "abstract must be a text"),
        (b'{"abstract": "x", "title": 0}', "title must be a text"),
        (b'{"title": "x", "abstract": " "}', "needs an abstract"),
        (b"\x00\x01\x02", "not a paper"),
    ],
)
def test_what_is_not_a_paper(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "paper.txt"
    path.write_bytes(content)
    with pytest.raises(PaperError, match=says) as caught:
        Paper.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_paper(tmp_path: Path) -> None:
    with pytest.raises(PaperError, match="cannot be read: No such file"):
        Paper.read(tmp_path / "none.json")
    with pytest.raises(PaperError, match="cannot be read: Is a directory"):
        Paper.read(tmp_path)


def test_prompt_is_the_model_cards() -> None:
    assert build_prompt(EXPECTED) == (
        "Generate Question, Answer pair correspond to the following research paper. [Abstract] We propose. It works. "
        "[Introduction] Much has been said. Question, Answer:"
    )


def test_braces_in_a_paper_are_text() -> None:
    assert build_prompt(Paper("{x}", "{abstract}", "}{"), "{{{title}}} {abstract}{introduction}") == "{{x}} {abstract}}{"


@pytest.mark.parametrize("template", ["{year}", "{abstract.__class__}", "{abstract!r}", "{abstract", "{0}", "{abstract:>9}"])
def test_wrong_templates(template: str) -> None:
    with pytest.raises(ValueError, match="prompt template"):
        build_prompt(EXPECTED, template)


@pytest.mark.parametrize(
    ("text", "title", "abstract", "introduction"),
    [
        ("My T?\n====\nAbstract\n---\nA.\nIntroduction\n--------\nI.\n\nRelated\n-------\nB.", "My T?", "A.", "I."),
        (
            "**Abstract**\nA.\n\n**1. Introduction**\nI.\n\n**1.1 Why**\nJ.\n\n**So**\n\n**2. Method**\nM.",
            "",
            "A.",
            "I. **1.1 Why** J. **So**",
        ),
        (
            "**Abstract**\nA.\n\n**Introduction**\nI.\n**Not one**\n\n2 Is none here.\n\n**Method**\nM.",
            "",
            "A.",
            "I. **Not one** 2 Is none here.",
        ),
        ("# T\n## **Abstract**\nA.\n## **1 Introduction**\nI.\n## **2 Method**\nM.", "T", "A.", "I."),
        (
            "## 1. Introduction\nWe have:\n\n1. A set\n2. A model\n3. Code\n## 2. Method\nM.",
            "",
            "",
            "We have: 1. A set 2. A model 3. Code",
        ),
        (
            "###### Abstract\nWe do:\n\n1. We build\n\n**Key**\n\nEnd.\n###### Introduction\nI.",
            "",
            "We do: 1. We build **Key** End.",
            "I.",
        ),
        (
            "## Introduction\nRun:\n```sh\n# load it\n\n**Method**\n~~~\n```\nEnd.\n## Method\nM.",
            "",
            "",
            "Run: ```sh # load it **Method** ~~~ ``` End.",
        ),
        ("# T\n## Abstract\nA.\n```\ncode\n## Introduction\nI.\n## Method\nM.", "T", "A. ``` code", "I."),
        ("```markdown\n# T\n## Abstract\nA.\n## Introduction\nI.\n```\n", "T", "A.", "I."),
        (
            "## Abstract ##\nA.\n## Introduction {#sec:intro}\nI.\n### Part ###\nP.\n\n**Bold**\n\nQ.\n## Method ##\nM.",
            "",
            "A.",
            "I. Part P. **Bold** Q.",
        ),
        (
            "# Learning {BERT} in C#\n## Abstract {.unnumbered}\nA.\n### On $x^{n}$ and {0,1}\n## Introduction {a=b}\nI.",
            "Learning {BERT} in C#",
            "A. On $x^{n}$ and {0,1}",
            "I.",
        ),
        (
            "**GPT** versus **BERT**\n\nAbstract\nWe compare\n\n**BERT** and **RoBERTa**\non ten."
            "\n\n__init__\n\n1 Introduction\nI.\n\n**Our question**\n\nJ.\n\n2 Method\nM.",
            "**GPT** versus **BERT**",
            "We compare **BERT** and **RoBERTa** on ten. __init__",
            "I. **Our question** J.",
        ),
        (
            "T\n\nAbstract\n\nWe present a thing.\n---\n\nIntroduction"
            "\n\nTwo lines\nand a rule\n---\nMore.\n\n2 lines\n--\n",
            "T",
            "We present a thing. ---",
            "Two lines and a rule --- More. 2 lines --",
        ),
    ],
)
def test_markdown_in_its_forms(text: str, title: str, abstract: str, introduction: str) -> None:
    assert Paper.parse(text) == Paper(title, abstract, introduction)


@pytest.mark.parametrize(
    "text",
    [
        "T\n\nA BSTRACT\nWe do.\n\n1\n\nI NTRODUCTION\n\nMuch has.\n\n2\n\nR ELATED W ORK\n\nNo.",  # pdftotext
        "T\n\nAbstract\nWe do. \n1 \nIntroduction \nMuch has. \n2 \nRelated Work \nNo. ",  # PyMuPDF
        "T\n\nAbstract\u2014We do.\nIndex Terms\u2014nets\n\nI. I NTRODUCTION\nMuch has.\n\nII. R ELATED W ORK\nNo.",
        "T\n\nA B S T R A C T\n\nWe do.\n\nKeywords:\nNets\n\n1.Introduction\n\nMuch has.\n\n2.Related work\n\nNo.",
        "      T\n\n            Abstract\n    We do.\n\n      1   Introduction\nMuch has.\n\n      2   Method\nNo.",
        "T\n\nABSTRACT\nWe do.\nCCS CONCEPTS\nNets.\nKEYWORDS\nnets\n\n1 INTRODUCTION & AIMS\nMuch has.\n\n2 METHOD\nNo.",
        "T\n\nAbstract \u2013 We do.\n\nAuthor summary\n\nA.\n\nIntroduction\n\nMuch has.\n\nMaterials and methods\n\nNo.",
        '# T\n# Abstract\nWe do.\n\n**Keywords:** nets\n# <span id="1"></span>1 Introduction\nMuch has.\n# 2 Method\nNo.',
        "# T\n\n***Abstract*\u2014** We do.\n\n## **1** **Introduction**\n\nMuch has.\n\n## **2** **Method**\n\nNo.",
        "T\n\n**Abstract**\n\nWe do.\n\n**1** **Introduction**\n\nMuch has.\n\n**2** **Method**\n\nNo.",
        "---\nabstract: |\n  We\n\n  do.\nauthor:\n- A\ntitle: 'T'\n---\n\n# Introduction\n\nMuch has.\n\n# Method\n\nNo.",
        "---\ntitle: T\nabstract: We do.\ntags: [x]\n...\n## 1. Introduction and motivation\nMuch has.\n## 2. Method\nNo.",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_papers_as_tools_write_them(text: str, end: str) -> None:
    assert Paper.parse(text.replace("\n", end)) == Paper("T", "We do.", "Much has.")


@pytest.mark.parametrize(
    ("text", "abstract", "introduction"),
    [
        ("Abstract\nKeywords:\nNets\n\nWe do.\nIntroduction\nI.", "Keywords: Nets We do.", "I."),  # in a box at its side
        (
            "Abstract\nWe look for\nkeywords: all.\nMethods\nThey do.\nResults\nB.",
            "We look for keywords: all. Methods They do. Results B.",
            "",
        ),
        ("Introduction\nAll of the\nResults\nare new.", "", "All of the Results are new."),
        (
            "T\n1\n\nIntroduction\nIt has\n\n2\n\nRunning Head\n\ngone.\n\n2\n\nMethod\nNo.",
            "",
            "It has 2 Running Head gone.",
        ),
        ("T\n1\nIntroduction\nIt has.\n\n2\n\n\fRunning Head\n\nSo.", "", "It has. 2 Running Head So."),
        ("Abstract\nWe do.\n1\n\nI. INTRODUCTION\nI.\nII. METHOD\nNo.", "We do. 1", "I."),
        ("# 1 Introduction\nIt has.\n# 1.1 Aims\nMany.\n# 2 Method\nNo.", "", "It has. 1.1 Aims Many."),
        ("# Abstract and Concrete\n## Abstract\nWe do.", "We do.", ""),
        ("---\n\nA Title\n\n---\n\nAbstract\nWe do.", "We do.", ""),
        ('---\ntitle: T\nabstract: ""\n---\n\nAbstract\nWe do.', "We do.", ""),
    ],
)
def test_what_only_looks_like_an_end(text: str, abstract: str, introduction: str) -> None:
    paper = Paper.parse(text)
    assert (paper.abstract, paper.introduction) == (abstract, introduction)


@pytest.mark.parametrize(
    "text",
    [
        f"# a{' ' * 200_000}b",
        "~~~ x\n" * 50_000,
        "x\n" * 200_000,
        "# a}\n\n-b}\n---\n" * 20_000,
        "\n".join(map("`".__mul__, range(900, 3, -1))),
        "---\na: b\n" + "title: |\n \n" * 50_000,
        f"# {'<a ' * 50_000}",
        f"{' ' * 200_000}1{' ' * 200_000}b",
        f"{' ' * 200_000}b",
        f"{' ' * 2_000}b\n" * 100,
        "a-\n" * 100_000,
        "a-" + "\n" * 300_000,
        ".\n1\n" * 50_000,
    ],
)
def test_any_text_is_read_at_once(text: str) -> None:
    began = time.process_time()
    assert Paper.parse(f"{text}\n## Abstract\nA.").abstract == "A."
    assert time.process_time() - began < 5  # seconds: some 0.2 here, and minutes if each line were looked for in all others


def test_numbers_of_any_length() -> None:
    paper = Paper.parse(f"Abstract\nText.\n{'9' * 5000} Methods\nMore.\n{'1' * 5000} Introduction\n")
    assert paper.abstract.startswith("Text. 999")


def test_parts_that_are_not_texts() -> None:
    with pytest.raises(PaperError, match="abstract must be a text, not int"):
        Paper(abstract=5)  # type: ignore[arg-type]
    with pytest.raises(PaperError, match="cannot be read"):
        Paper.read("a\0b")
