"""Fixtures and the versions that a test run saw."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_report_header() -> list[str]:
    names = ["numpy", "onnxruntime", "sentencepiece", "click", "onnx", "safetensors", "torch", "transformers"]
    found = {
        each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions() if each.metadata["Name"]
    }
    return [", ".join(f"{name} {found.get(name, 'absent')}" for name in names)]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real T5 tokenizer and 230 real papers, which stand beside the repository where it is developed."""
    if not SHARED.is_dir():
        pytest.skip("needs shared/data beside the repository (the real T5 tokenizer, real papers)")
    return SHARED
