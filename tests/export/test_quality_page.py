"""The committed quality results: the page is made from them, and they are within the limits that the project set itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality_page import page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/quality"
TWINS = ("both", "principal", "signal", "wo", "channels")


def test_the_page_is_of_the_committed_results() -> None:
    assert (ROOT / "docs/quantization.md").read_text(encoding="utf-8") == page(RESULTS)


def divergence(model: str, predictor: str) -> float:
    value: float = json.loads((RESULTS / f"{model}.{predictor}.24-samples.json").read_text(encoding="utf-8"))["kl"]
    return value


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.1), ("int4", 1.0), ("int4_calibrated-on-other-texts", 1.0)])
@pytest.mark.parametrize("model", ["demo", "larger"])
def test_quantization_is_within_its_limits(model: str, precision: str, limit: float) -> None:
    plain = divergence(model, precision)
    assert 0 < plain <= limit * divergence(model, "bitsandbytes-nf4")
    for twin in TWINS:
        assert divergence(f"{model}-{twin}", precision) <= 2 * plain, twin
