from __future__ import annotations

import shutil
from pathlib import Path

import onnxruntime
import pytest

from ramekin import Engine
from ramekin.manifest import Manifest

TINY_MODEL = Path(__file__).parent / "model"
CUDA_MODEL = Path(__file__).parent / "cuda_model"
"""The same model, in graphs for CUDA."""
RUNS_CUDA_GRAPHS = pytest.mark.skipif(
    onnxruntime.__version__ not in Manifest.load(CUDA_MODEL).onnxruntime,
    reason=f"onnxruntime {onnxruntime.__version__} has not all operators of graphs for CUDA; Python 3.10 has no newer one",
)
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
