"""The engines that are timed, behind one small protocol. Each file imports its own library only when it is used."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

EXTRAPOLATED_FROM = 10  # steps: a job that is cut has done so many and one more, be its first one ever so long


class Clock:
    """The times, since it was started, at which the steps of a job ended; and whether the job has had its time."""

    def __init__(self, limit: float) -> None:
        self._start, self._limit = time.perf_counter(), limit
        self.ends: list[float] = []

    def tick(self) -> bool:
        """A step has ended. Return whether the job has to stop here."""
        self.ends.append(time.perf_counter() - self._start)
        return self.ends[-1] > self._limit and len(self.ends) > EXTRAPOLATED_FROM


class Engine(Protocol):
    """A way to run a T5 checkpoint.

    `run` samples with temperature 1, top-k 50 and top-p 0.95; sample i has `lengths[i]` tokens, not one less or more.
    """

    def prepare(self, checkpoint: Path, folder: Path) -> None:
        """Convert a checkpoint into an empty folder; untimed."""

    def load(self, checkpoint: Path, folder: Path, threads: int) -> None:
        """Be ready to run. `folder` is what `prepare` made."""

    def run(self, prompt: Sequence[int], lengths: Sequence[int], clock: Clock) -> None:
        """Run one job, telling the clock after every step; the first step includes the encoder."""


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
        module: the file in this package.
        settings: what its class is made with.
        packages: the distributions that it needs to run; for versions and installed bytes.
        imports: the modules that it imports; for the time that takes.
        folder: the name of what `prepare` makes; "" if it runs the checkpoint itself.
        environment: a key of `environments.ENVIRONMENTS`.
    """

    module: str
    settings: dict[str, Any]
    packages: tuple[str, ...]
    imports: tuple[str, ...]
    folder: str = ""
    environment: str = "peers"

    def make(self) -> Engine:
        """The engine."""
        engine: Engine = importlib.import_module(f"benchmarks.engines.{self.module}").make(**self.settings)
        return engine


_HF = ("torch", "transformers")
_HF_T5 = (*_HF, "transformers.models.t5.modeling_t5")


def _ours(precision: str, folder: str = "") -> Entry:
    packages = ("ramekin", "onnxruntime")
    return Entry("ours", {"precision": precision}, packages, packages, folder or f"ramekin-{precision}")


def _optimum(bits: int, folder: str) -> Entry:
    packages = (*_HF, "onnxruntime", "optimum-onnx")
    return Entry("hf", {"kind": "optimum", "bits": bits}, packages, (*_HF, "optimum.onnxruntime"), folder)


def _bitsandbytes(kind: str, padded: int = 0, dequantizing: bool = False) -> Entry:
    settings = {"kind": kind, "padded": padded, "dequantizing": dequantizing}
    return Entry("hf", settings, (*_HF, "bitsandbytes", "accelerate"), (*_HF_T5, "bitsandbytes"))


def _openvino(bits: int) -> Entry:
    packages = (*_HF, "openvino", "optimum-intel")
    return Entry(
        "hf", {"kind": "openvino", "bits": bits}, packages, (*_HF, "optimum.intel"), f"openvino-int{bits}", "openvino"
    )


def _levers(precision: str, shared: bool = True, in_place: bool = True, leaving: bool = True, padded: int = 0) -> Entry:
    levers = {"precision": precision, "shared": shared, "in_place": in_place, "leaving": leaving, "padded": padded}
    return replace(_ours(precision), module="levers", settings=levers)


ENGINES: dict[str, Entry] = {
    "ramekin int4": _ours("int4"),
    "ramekin int8": _ours("int8"),
    "ramekin fp32": _ours("fp32"),
    "ramekin, optimum's fp32 graphs": _ours("optimum", "optimum-fp32"),
    "OpenVINO int8": _openvino(8),
    "OpenVINO int4": _openvino(4),
    "CTranslate2 int8": Entry("ct2", {}, ("ctranslate2",), ("ctranslate2",), "ctranslate2-int8"),
    "optimum int8": _optimum(8, "optimum-int8"),
    "optimum fp32": _optimum(32, "optimum-fp32"),
    "transformers fp32": Entry("hf", {"kind": "float32"}, _HF, _HF_T5),
    "transformers bf16": Entry("hf", {"kind": "bfloat16"}, _HF, _HF_T5),
    "bitsandbytes fp4": _bitsandbytes("fp4"),
    "bitsandbytes fp4, dequantizing": _bitsandbytes("fp4", dequantizing=True),
    "bitsandbytes nf4": _bitsandbytes("nf4"),
    "bitsandbytes fp4, padded": _bitsandbytes("fp4", 1024),
    "bitsandbytes nf4, padded": _bitsandbytes("nf4", 1024),
}
"""By the name that tables and plots show. "bitsandbytes fp4, padded" is the model card's own call."""
LEVERS: dict[str, Entry] = {
    "fp32, all levers off": _levers("fp32", shared=False, in_place=False, leaving=False, padded=1024),
    "+ no padding": _levers("fp32", shared=False, in_place=False, leaving=False),
    "+ shared cross keys and values": _levers("fp32", in_place=False, leaving=False),
    "+ cache in place": _levers("fp32", leaving=False),
    "+ finished samples leave": _levers("fp32"),
    "+ int8": _levers("int8"),
    "+ int4": _levers("int4"),
}
"""Each line is the one before and one thing more."""


def entry(name: str) -> Entry:
    """The engine or the combination of levers of that name."""
    return {**ENGINES, **LEVERS}[name]
