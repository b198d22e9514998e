"""One job, timed: a prompt of random tokens, n samples of a number of tokens that is forced."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ramekin.engine import Engine
from ramekin.sample import Token
from ramekin.sampling import SamplingParams


@dataclass(frozen=True)
class Job:
    """What is asked for: `n` samples of `tokens` tokens each after a prompt of `source` tokens."""

    n: int
    source: int
    tokens: int

    def prompt(self, vocabulary: int) -> npt.NDArray[np.int64]:
        """Random token ids, the same at every call."""
        return np.random.default_rng(0).integers(3, min(32_000, vocabulary), self.source)


@dataclass(frozen=True)
class Timing:
    """What a job took.

    Attributes:
        first_token_s: from the call to the first token of the last sample: encoder and first step.
        step_p50_ms: time between two tokens of a sample, median.
        step_p95_ms: the same, 95th percentile.
        job_s: from the call to the last token.
        tokens_per_s: tokens of all samples by the job's time.
        python_share: the part of the steps that is not spent in the model's `step`: choosing tokens, text, events. What
            `step` itself does in Python, some 20 microseconds with our graphs, is not in it.
    """

    first_token_s: float
    step_p50_ms: float
    step_p95_ms: float
    job_s: float
    tokens_per_s: float
    python_share: float

    @classmethod
    def of(cls, job: Job, ends: Sequence[float], in_session: float = float("nan")) -> Timing:
        """From the times, since the call, at which each step ended, and the seconds of the later steps in a session."""
        steps = np.diff(ends) * 1e3
        p50, p95 = (float(np.percentile(steps, q)) if len(steps) else float("nan") for q in (50, 95))
        share = 1 - in_session * 1e3 / float(steps.sum()) if len(steps) else float("nan")
        return cls(ends[0], p50, p95, ends[-1], job.n * job.tokens / ends[-1], share)

    @classmethod
    def median(cls, timings: Sequence[Timing]) -> Timing:
        """Each figure's median over several runs."""
        rows = [list(asdict(timing).values()) for timing in timings]
        return cls(*(float(value) for value in np.median(rows, axis=0)))


class _Clock:
    """A model whose steps are timed."""

    def __init__(self, model: Any) -> None:
        self._model, self.seconds = model, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def step(self, *arguments: Any) -> Any:
        """The model's own step."""
        began = time.perf_counter()
        result = self._model.step(*arguments)
        self.seconds += time.perf_counter() - began
        return result


def run(engine: Engine, job: Job) -> Timing:
    """Run a job once."""
    clock: Any = _Clock(engine.model)
    timed = Engine(clock, engine.tokenizer, engine.manifest)
    params = SamplingParams(n=job.n, max_new_tokens=job.tokens, min_new_tokens=job.tokens, seed=1)
    prompt, ends = job.prompt(engine.manifest.dims.vocab_size), []
    start, tokens = time.perf_counter(), 0
    for event in timed.stream(prompt, params):
        tokens += isinstance(event, Token)
        if isinstance(event, Token) and tokens % job.n == 0:
            ends.append(time.perf_counter() - start)
            if tokens == job.n:
                clock.seconds = 0.0
    return Timing.of(job, ends, clock.seconds)


def forget_peak_memory() -> None:
    """Let `peak_memory_mb` begin anew, where the system can do that (Linux: proc(5), clear_refs)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """The most memory that this process has held, in MB; NaN where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` begins with what the parent process held
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(found[1]) * 1024 / 1e6 if found else float("nan")
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
