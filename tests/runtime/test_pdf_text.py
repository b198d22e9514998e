from __future__ import annotations

import pytest

from ramekin import Paper

DIVIDED = "Divided words are di-\nvided or divi-\nded. "  # which tells that hyphens at the ends of lines divide words


def introduction(text: str) -> str:
    return Paper.parse(f"Introduction\n{text}").introduction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It repre-\nsents what it represents.", "It represents what it represents."),
        ("It repre-\nsents it.", "It represents it."),
        ("It repre\u2010\nsents it, it repre\u00ad\n  sents.", "It represents it, it represents."),
        ("It repre-\n\n\fsents it.", "It represents it."),
        ("A multi-task\u00ad\ning task.", "A multi-tasking task."),
        ("Multi-task is multi-\ntask.", "Multi-task is multi-task."),
        (
            "The task is multi-\ntask.",
            "The task is multi-task.",
        ),  # a word that stands elsewhere, and the joined one does not
        ("It is multi-task, or deep-\ntask.", "It is multi-task, or deep-task."),
        ("Pretrain, pre-train, pre-\ntrain.", "Pretrain, pre-train, pre-train."),
        ("Dis mantle, dismantle, dis-\nmantle.", "Dis mantle, dismantle, dismantle."),
        ("It is state-of-\nthe-art, state-\nof-the-art.", "It is state-of-the-art, state-of-the-art."),
        ("An encoder/de-\ncoder.", "An encoder/de-coder."),
        ("R-\nCNN, CNN-\nbased, non-\nGaussian.", "R-CNN, CNN-based, non-Gaussian."),
        ("Short-\nand long-term.", "Short- and long-term."),
        ("Short-\nto-long.", "Short-to-long."),
        ("Its kind -\nsuch is life - is 3-\nfold, GPT-\n3.", "Its kind - such is life - is 3- fold, GPT- 3."),
    ],
)
def test_words_in_two_become_whole_and_compounds_stay(text: str, expected: str) -> None:
    assert introduction(DIVIDED + text) == f"Divided words are divided or divided. {expected}"


def test_where_nothing_tells_that_words_are_divided_hyphens_stay() -> None:
    assert (
        introduction("Words as an edi-\ntor wraps multi-\ntask, multi-task.")
        == "Words as an edi-tor wraps multi-task, multi-task."
    )


def numbered(lines: list[str], first: int = 0) -> list[str]:
    return [f"{line} {number:03}" if number % 2 else f"{line}\n{number:03}" for number, line in enumerate(lines, first)]


def test_line_numbers_of_review_versions_go() -> None:
    said = [f"Line {'abcdefghij'[i % 10]} has 7 words." for i in range(40)]
    text = ["1 Introduction", *said, "2 Method", "No."]
    found = Paper.parse("\n".join(["T", *numbered(["Abstract", "A repre-", "sents."]), *numbered(text, 4)]))
    assert (found.title, found.abstract, found.introduction) == ("T", "A repre-sents.", " ".join(said))


@pytest.mark.parametrize("step", [1, 12])
def test_other_numbers_stay(step: int) -> None:
    few = "\n".join(f"Row {number}" for number in range(0, 29 * step, step))
    many = "\n".join(f"Row {number}" for number in range(0, 29 * 12, 12)) + "\nA line." * 30
    for text in (few, many):
        assert introduction(text) == " ".join(text.split())
    rare = "\n".join(f"Row {number}" for number in range(40)) + "\nA line." * 200
    assert introduction(rare) == " ".join(rare.split())


def test_a_tables_numbers_stay() -> None:
    table = "\n".join(f"model | {number}" for number in range(40))
    assert introduction(table) == " ".join(table.split())


def test_a_word_in_two_around_a_line_number() -> None:
    text = "\n".join(f"{line}\n{number}" for number, line in enumerate([*["It represents."] * 40, "It repre-", "sents."]))
    assert introduction(text).endswith("It represents. It represents.")


def test_a_roman_number_on_a_line_of_its_own() -> None:
    text = "T\n\nAbstract\nWe do.\n\nI.\n\nINTRODUCTION\n\nMuch has.\n\nII.\n\nBACKGROUND\n\nNo."
    assert Paper.parse(text) == Paper("T", "We do.", "Much has.")
