"""How a sample ends and what of its text is told, on tokens whose texts are plain to see."""

from __future__ import annotations

import pytest

from ramekin import Completion, SamplingParams
from ramekin.sample import Sample, advance
from ramekin.tokenizer import IncrementalDecoder


class Letters:
    """A tokenizer whose token is a byte; 0 and 1 have no text."""

    cleans_up = False

    def text_of(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id > 1 else b""


def told(tokens: bytes, *, limit: int = 99, stop: tuple[str, ...] = ()) -> tuple[list[str], Completion | None]:
    """The text that each token tells, and the completion of the last."""
    params = SamplingParams(max_new_tokens=limit, stop=stop)
    sample, texts, end = Sample(0, 0, IncrementalDecoder(Letters()), [0]), [], None  # type: ignore[arg-type]
    for token in tokens:
        assert end is None
        event, end = advance(sample, token, -1.0, (1,), params, 7)
        texts.append(event.text)
    return texts, end


@pytest.mark.parametrize(
    ("tokens", "stop", "texts"),
    [
        (b"xabcy", ("abc",), ["x", "", "", ""]),
        (b"xabdy", ("abc",), ["x", "", "", "abd", "y"]),
        (b"xaaab", ("aab",), ["x", "", "", "a", ""]),  # the longest beginning is held back, and no more
        (b"xabc", ("zz", "abc"), ["x", "", "", ""]),  # of any of them
        (b"xabc", ("abc", "zz"), ["x", "", "", ""]),
    ],
)
def test_what_may_be_a_stop_string_is_held_back(tokens: bytes, stop: tuple[str, ...], texts: list[str]) -> None:
    found, end = told(tokens[: len(texts)], stop=stop)
    assert found == texts
    stopped = any(each in tokens.decode() for each in stop)
    assert (end is not None) == stopped
    if end:
        assert (end.text, end.finish_reason) == ("".join(texts), "stop")


def test_a_stop_string_goes_before_the_limit() -> None:
    """It is cut from the text, whatever else ends the sample with its last letter."""
    texts, end = told(b"xab", limit=3, stop=("ab",))
    assert end
    assert (texts, end.text, end.finish_reason, end.token_ids) == (["x", "", ""], "x", "stop", tuple(b"xab"))


@pytest.mark.parametrize(("last", "limit", "reason"), [(b"\x01", 99, "eos"), (b"", 3, "length")])
def test_a_sample_that_ends_within_a_character(last: bytes, limit: int, reason: str) -> None:
    """Its bytes are told of as `Tokenizer.decode` does, and not dropped."""
    texts, end = told(b"a\xe2\x82" + last, limit=limit)
    assert end
    assert (end.text, end.finish_reason) == ("a\ufffd", reason)
    assert "".join(texts) == end.text


def test_what_was_held_back_is_told_at_the_end() -> None:
    texts, end = told(b"xa\x01", stop=("ab",))
    assert end
    assert (texts, end.text, end.finish_reason) == (["x", "", "a"], "xa", "eos")
