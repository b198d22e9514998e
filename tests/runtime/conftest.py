from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ramekin import Engine

TINY_MODEL = Path(__file__).parent / "model"
CUDA_MODEL = Path(__file__).parent / "cuda_model"
"""The same model, in graphs for CUDA."""
INT8_MODEL = Path(__file__).parent / "int8_model"
"""The same in int8, with a second pair of graphs, whose keys and values are in 8 bits."""


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The tiny random model: real graphs, meaningless text."""
    return Engine.load(TINY_MODEL, threads=2)


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may damage."""
    return Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))
