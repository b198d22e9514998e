"""Where a job's time goes, by operator. Prints one JSON object.

    python -m benchmarks.kernels MODEL [-n 16] [--source 900] [--tokens 100] [--threads 2]

The job is run with onnxruntime's profiler, which slows it. How long it takes without: `ramekin bench MODEL`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import onnxruntime as ort

from ramekin import Engine
from ramekin.bench import Job, run
from ramekin.model import Model, graphs, reads_compact


def profile(folder: Path, job: Job, threads: int) -> dict[str, dict[str, float]]:
    """Kernel time by operator: of the whole prompt for the encoder, of one step for the decoder, in milliseconds."""
    engine = Engine.load(folder, threads=threads)
    with tempfile.TemporaryDirectory() as scratch:
        compact, sessions = reads_compact(ort, engine.manifest), []
        for graph in graphs(compact):
            options = ort.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / graph)
            sessions.append(ort.InferenceSession(str(folder / graph), options, providers=["CPUExecutionProvider"]))
        model = Model(ort, *sessions, engine.manifest, compact)
        run(Engine(model, engine.tokenizer, engine.manifest), job)
        result = {}
        for graph, session, runs in zip(graphs(compact), sessions, (1, job.tokens), strict=True):
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
    a = parser.parse_args()
    print(json.dumps(profile(a.model, Job(a.n, a.source, a.tokens), a.threads)))


if __name__ == "__main__":
    main()
