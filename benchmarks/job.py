"""Time one job: random prompt of a given length, n samples of a forced number of tokens. Prints one JSON object.

    python -m benchmarks.job MODEL [-n 16] [--source 900] [--tokens 100] [--threads 2] [--profile]

`first_token_s` is from the call to the first token of all samples (encoder and first step); a step is the time between
two tokens of one sample; `python_share` is the part of a step that is not spent in onnxruntime. Loading is not in the
job's time.
`--profile` runs the job again with onnxruntime's profiler, which slows it, and adds up kernel times by operator.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ramekin import Engine, SamplingParams, Token
from ramekin.manifest import DECODER, ENCODER
from ramekin.model import Model


def run(engine: Engine, n: int, source: int, tokens: int) -> dict[str, float]:
    """Run the job once; times in seconds and milliseconds."""
    prompt = np.random.default_rng(0).integers(3, min(32_000, engine.manifest.dims.vocab_size), source)
    params = SamplingParams(n=n, max_new_tokens=tokens, min_new_tokens=tokens, seed=1)
    in_session = 0.0
    real_step = engine.model.step

    def timed_step(*arguments: Any) -> Any:
        nonlocal in_session
        began = time.perf_counter()
        result = real_step(*arguments)
        in_session += time.perf_counter() - began
        return result

    engine.model.step = timed_step  # type: ignore[method-assign]
    start = time.perf_counter()
    ends: list[float] = []
    events = (event for event in engine.stream(prompt, params) if isinstance(event, Token))
    for count, _ in enumerate(events, 1):
        if count % n == 0:
            ends.append(time.perf_counter())
        if count == n:
            in_session = 0.0
    engine.model.step = real_step  # type: ignore[method-assign]
    steps = np.diff(ends) * 1e3
    return {
        "first_token_s": round(ends[0] - start, 3),
        "step_p50_ms": round(float(np.median(steps)), 2),
        "step_p95_ms": round(float(np.percentile(steps, 95)), 2),
        "job_s": round(ends[-1] - start, 3),
        "python_share": round(1 - in_session * 1e3 / float(steps.sum()), 4),
    }


def profile(folder: Path, n: int, source: int, tokens: int, threads: int) -> dict[str, dict[str, float]]:
    """Kernel time by operator: of the whole prompt for the encoder, of one step for the decoder, in milliseconds."""
    engine = Engine.load(folder, threads=threads)
    with tempfile.TemporaryDirectory() as scratch:
        sessions = []
        for graph in (ENCODER, DECODER):
            options = ort.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / graph)
            sessions.append(ort.InferenceSession(str(folder / graph), options, providers=["CPUExecutionProvider"]))
        run(Engine(Model(ort, *sessions, engine.manifest), engine.tokenizer, engine.manifest), n, source, tokens)
        result = {}
        for graph, session, runs in zip((ENCODER, DECODER), sessions, (1, tokens), strict=True):
            events = json.loads(Path(session.end_profiling()).read_text())
            spent: Counter[str] = Counter()
            for event in events:
                if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                    spent[event["args"]["op_name"]] += event["dur"]
            result[graph] = {name: round(total / 1e3 / runs, 3) for name, total in spent.most_common(12)}
    return result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-n", type=int, default=16)
    parser.add_argument("--source", type=int, default=900)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    a = parser.parse_args()
    began = time.perf_counter()
    engine = Engine.load(a.model, threads=a.threads)
    load = time.perf_counter() - began
    result: dict[str, Any] = {
        "model": {"precision": engine.manifest.precision, "source": engine.manifest.source},
        "job": {"n": a.n, "source": a.source, "tokens": a.tokens, "threads": a.threads},
        "machine": {"processor": platform.machine(), "onnxruntime": ort.__version__, "numpy": np.__version__},
        "load_s": round(load, 3),
        **run(engine, a.n, a.source, a.tokens),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    if a.profile:
        result["kernel_ms"] = profile(a.model, a.n, a.source, a.tokens, a.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
