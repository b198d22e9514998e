"""Lean: nothing heavy is imported, importing changes nothing, and what is public is listed."""

from __future__ import annotations

import subprocess
import sys

import ramekin
from tests.runtime.conftest import TINY_MODEL

BLOCKED = ("torch", "transformers", "onnx", "optimum", "tokenizers", "safetensors", "huggingface_hub", "ramekin_export")


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=60, check=True)


def test_generates_where_nothing_heavy_can_be_imported() -> None:
    code = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
from ramekin import Engine, SamplingParams
samples = Engine.load({str(TINY_MODEL)!r}).generate("a b c", SamplingParams(n=4, seed=1))
print(sum(bool(sample.token_ids) for sample in samples))
"""
    assert python(code).stdout == "4\n"


def test_importing_is_quick_and_brings_no_onnxruntime() -> None:
    timings = [python("import ramekin", "-X", "importtime").stderr for _ in range(5)]
    for timing in timings:
        assert "onnxruntime" not in timing
        assert not any(f"| {name}\n" in timing for name in BLOCKED)
    seconds = [int(timing.strip().splitlines()[-1].split("|")[1]) / 1e6 for timing in timings]
    assert min(seconds) < 0.25


def test_importing_changes_nothing() -> None:
    code = """
import locale, logging, os, signal, sys, threading, warnings
import numpy, sentencepiece
def state():
    return (dict(os.environ), threading.active_count(), list(warnings.filters), signal.getsignal(signal.SIGINT),
            logging.getLogger().handlers[:], numpy.geterr(), tasks())
def tasks():
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
before = state()
import ramekin, ramekin.cli
print(state() == before)
"""
    assert python(code).stdout == "True\n"


def test_what_is_public() -> None:
    """`__all__` is what the package shows, but for its modules."""
    shown = {name for name, value in vars(ramekin).items() if not name.startswith("_") and not isinstance(value, type(sys))}
    assert shown == set(ramekin.__all__)
