from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from ramekin import Engine, SamplingParams
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


CUDA_PARAMS = SamplingParams(n=3, max_new_tokens=30, seed=11, top_k=20)

# As onnxruntime 1.31.1 words it: what matters stands behind hundreds of characters.
OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running MultiHeadAttention node. "
    "Name:'decoder.block.0.layer.0.SelfAttention.heads/MultiHeadAttention' Status Message: /onnxruntime_src/onnxruntime/"
    "core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*) "
    "Failed to allocate "
    "memory for requested buffer of size 1099511627776"
)


class Failing:
    """A session that fails some times before it works."""

    def __init__(self, session: Any, *texts: str) -> None:
        self._session, self._texts = session, list(texts)
        self.ids: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        if options is not None:
            self.ids.append(options.get_run_config_entry("gpu_graph_id"))
        if self._texts:
            raise RuntimeError(self._texts.pop(0))
        self._session.run_with_iobinding(binding, options)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The tiny random model: real graphs, meaningless text."""
    return Engine.load(TINY_MODEL, threads=2)


@pytest.fixture
def cuda() -> Engine:
    """The graphs for CUDA on the CPU, in groups as on a GPU."""
    engine = Engine.load(CUDA_MODEL, provider="cpu", threads=2)
    assert engine.model.prompts_at_once == 1
    engine.model.prompts_at_once = 16
    return engine


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may damage."""
    return Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))
