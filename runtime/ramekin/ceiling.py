"""What this machine can do at best, measured, and how long a job would then take at the least."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ramekin.manifest import Dims, Manifest, VersionRange
from ramekin.session import onnxruntime

_BUFFER = 256 << 20
"""Bytes that are read to measure bandwidth: more than any cache holds."""
_ROWS, _INNER, _OUTER = 1024, 1024, 4096
"""The matrix product that is timed: `(rows, inner) x (inner, outer)`; `ceiling_*.onnx` hold the right-hand side."""


@dataclass(frozen=True)
class Ceiling:
    """Rates of a machine with a number of threads.

    Attributes:
        bandwidth: bytes read from memory per second.
        int8: 8-bit operations per second in a large matrix product (a multiplication and an addition are two).
        float32: the same in float32.
    """

    bandwidth: float
    int8: float
    float32: float

    @classmethod
    def measure(cls, threads: int) -> Ceiling:
        """Measure, in about two seconds, with nothing else running."""
        ort = onnxruntime(VersionRange())
        return cls(_bandwidth(threads), _product(ort, "int8", threads), _product(ort, "float32", threads))


@dataclass(frozen=True)
class Work:
    """What one job has to compute and to read, at the least.

    A prompt of S tokens is encoded once, and projected once to the keys and values of every decoder layer. A step reads the
    decoder's weights and the prompt's keys and values once, for all n samples, and each sample's own. That is with an
    onnxruntime that runs compact graphs if there are some; in these, attention to the prompt multiplies integers.
    """

    manifest: Manifest
    source: int
    n: int
    tokens: int

    def prefill_s(self, ceiling: Ceiling) -> float:
        """Seconds for the encoder."""
        dims = self.manifest.dims
        weights = dims.encoder_layers * (4 * dims.d_model * dims.inner + self._forward(dims))
        weights += dims.decoder_layers * 2 * dims.d_model * dims.inner
        attention = dims.encoder_layers * 4 * self.source**2 * dims.inner
        computing = 2 * weights * self.source / self._rate(ceiling) + attention / ceiling.float32
        return max(computing, _bytes(self.manifest, "encoder") / ceiling.bandwidth)

    def step_s(self, ceiling: Ceiling) -> float:
        """Seconds for a step in the middle of the job."""
        dims, position = self.manifest.dims, self.tokens // 2
        weights = dims.decoder_layers * (6 * dims.d_model * dims.inner + self._forward(dims))
        weights += dims.vocab_size * dims.d_model
        attention = dims.decoder_layers * 4 * dims.inner
        prompt = self.source * attention / (ceiling.int8 if self.manifest.compact else ceiling.float32)
        computing = self.n * (2 * weights / self._rate(ceiling) + prompt + position * attention / ceiling.float32)
        moved = _bytes(self.manifest, "decoder") + self.cached_bytes(position)
        return max(computing, moved / ceiling.bandwidth)

    def first_token_s(self, ceiling: Ceiling) -> float:
        """Seconds for the encoder and the first step."""
        return self.prefill_s(ceiling) + replace(self, tokens=1).step_s(ceiling)

    def job_s(self, ceiling: Ceiling) -> float:
        """Seconds for the whole job."""
        return self.prefill_s(ceiling) + self.tokens * self.step_s(ceiling)

    def cached_bytes(self, position: int) -> int:
        """Bytes of keys and values: the prompt's, once, and n samples' of `position` tokens."""
        dims, width = self.manifest.dims, 1 if self.manifest.compact else 4
        return 2 * dims.decoder_layers * dims.inner * width * (self.source + self.n * position)

    def _forward(self, dims: Dims) -> int:
        return (2 if self.manifest.variant == "t5-v1.0" else 3) * dims.d_model * dims.d_ff

    def _rate(self, ceiling: Ceiling) -> float:
        return ceiling.int8 if self.manifest.precision in ("int8", "int4") else ceiling.float32


def _bytes(manifest: Manifest, part: str) -> int:
    """What the weights take that a prompt (encoder) or a step (decoder) reads."""
    if manifest.layout == "optimum":
        later = [name for name in manifest.files if name.startswith(f"{part}_with_past")]
        names = later or [name for name in manifest.files if name.startswith(f"{part}_")]
    else:
        names = [name for name in manifest.files if name.startswith(part) and name.endswith(".bin")]
    return sum(manifest.files[name].bytes for name in names)


def _best(run: Callable[[], object], seconds: float = 0.5) -> float:
    """The shortest of the runs that fit into some time: what the machine can do when nothing disturbs it."""
    run()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _bandwidth(threads: int) -> float:
    parts = [np.ones(_BUFFER // threads // 4, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return sum(part.nbytes for part in parts) / _best(lambda: list(pool.map(np.max, parts)))


def _product(ort: Any, kind: str, threads: int) -> float:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    graph = Path(__file__).with_name(f"ceiling_{kind}.onnx")
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    left = np.ones((_ROWS, _INNER), np.uint8 if kind == "int8" else np.float32)
    return 2 * _ROWS * _INNER * _OUTER / _best(lambda: session.run(None, {"left": left}))
