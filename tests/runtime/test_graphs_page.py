"""The example of docs/graphs.md runs, and says what the engine says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from ramekin import Engine, SamplingParams
from tests.runtime.conftest import TINY_MODEL

PAGE = Path(__file__).parents[2] / "docs" / "graphs.md"


def test_the_example_continues_a_text_as_the_engine_does(engine: Engine) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    text = "We propose a new approach to neural parsing."
    command = [sys.executable, "-c", code, str(TINY_MODEL), text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    expected = engine.generate(text, SamplingParams(greedy=True, max_new_tokens=32, seed=0))[0]
    assert done.stdout.rstrip("\n") == expected.text
