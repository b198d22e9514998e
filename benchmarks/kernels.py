"""Where a job's time goes, by kernel, next to the least that it could take. Prints one JSON object.

    python -m benchmarks.kernels MODEL [-n 16] [--source 900] [--tokens 100] [--threads 2]

onnxruntime's profiler tells how long each node took, and adds some microseconds to each; so the job is timed without it, too.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import onnxruntime as ort

from ramekin import Engine
from ramekin.bench import Job, run
from ramekin.ceiling import Ceiling
from ramekin.errors import RamekinError
from ramekin.model import Model, graphs, reads_compact

REST = "everything else"
_PROMPTS = 5  # read before the job; the first does not count, since memory that nobody has touched for a while costs it more
_PRODUCTS = {"FusedMatMul", "MatMul", "MatMulIntegerToFloat", "MatMulNBits"}
_INTEGERS = {"MatMulIntegerToFloat", "MatMulNBits"}
_BYTES = {"float": 4, "int8": 1, "uint8": 1}
_ATTENTION = {"GroupQueryAttention", "MultiHeadAttention"}
_TO_THE_PROMPT = r"EncDecAttention\.(scores|mixed(_units)?)$"
_ROLES = {
    r"^decoder.*EncDecAttention\.[kv]$": "keys and values for the decoder",
    r"\.(q|k|v|qkv)$": "q, k, v",
    r"\.o$": "o",
    r"\.wi(_[01])?$": "wi",
    r"\.wo$": "wo",
    r"^logits$": "head",
    _TO_THE_PROMPT: "attention to the prompt",
    r"SelfAttention\.heads$": "attention to own tokens",
}
"""By what a node computes, which its name tells: a kernel of the table."""


@dataclass
class Kernel:
    """What all nodes of one kind do in one run of a graph.

    Attributes:
        name: their kind.
        nodes: how many there are.
        ms: how long they take together, in milliseconds, the median of all runs but the first.
        read: bytes of weights, keys and values that they have to read.
        int8: operations on 8-bit numbers that they have to do (a multiplication and an addition are two); rows that our graphs
            multiply as two bytes count once.
        float32: the same in float32.
    """

    name: str
    nodes: int = 0
    ms: float = 0.0
    read: float = 0.0
    int8: float = 0.0
    float32: float = 0.0


def measure(folder: Path, job: Job, threads: int) -> dict[str, Any]:
    """Profile a job, and time it without the profiler.

    Raises:
        RamekinError: the folder cannot be loaded, or is not of our own graphs for CPUs.
    """
    engine = Engine.load(folder, threads=threads, max_source_tokens=job.source)
    if engine.manifest.layout != "ramekin":
        raise RamekinError(
            f"{folder}: only our own graphs for CPUs tell what their nodes do, not {engine.manifest.layout}'s"
        )
    profiled = _profiled(engine, folder, job, threads)
    timing = run(engine, job)
    measured = {"first_token_s": timing.first_token_s, "step_ms": timing.step_p50_ms, "job_s": timing.job_s}
    return {**asdict(job), **measured, "graphs": profiled, "ceiling": asdict(Ceiling.measure(threads))}


def _profiled(engine: Engine, folder: Path, job: Job, threads: int) -> dict[str, dict[str, Any]]:
    """Of each graph its `kernels`, and the `ms` that all take together.

    The sessions end here: their threads would look for work beside those of the next run.
    """
    compact, sessions = reads_compact(ort, engine.manifest), []
    with tempfile.TemporaryDirectory() as scratch:
        for graph in graphs(compact):
            options = ort.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / graph)
            sessions.append(ort.InferenceSession(str(folder / graph), options, providers=["CPUExecutionProvider"]))
        model = Model(ort, *sessions, engine.manifest, compact)
        for _ in range(_PROMPTS):
            model.prefill(job.prompt(model.dims.vocab_size))
        run(Engine(model, engine.tokenizer, engine.manifest), job)
        found = {}
        for part, graph, session in zip(("encoder", "decoder"), graphs(compact), sessions, strict=True):
            events = json.loads(Path(session.end_profiling()).read_text())
            kernels, ms = kernels_of(events, _weights(folder / graph), (job.tokens + 1) / 2)
            found[part] = {"kernels": [asdict(each) for each in kernels], "ms": ms}
    return found


def _weights(graph: Path) -> dict[str, int]:
    """The bytes of each node's constants, for nodes that have a matrix among them."""
    model = onnx.load(str(graph), load_external_data=False)
    bytes_of = {
        each.name: math.prod(each.dims) * onnx.helper.tensor_dtype_to_np_dtype(each.data_type).itemsize
        for each in model.graph.initializer
    }
    matrices = {each.name for each in model.graph.initializer if len(each.dims) > 1}
    return {
        node.name: sum(bytes_of.get(name, 0) for name in node.input)
        for node in model.graph.node
        if node.op_type in _PRODUCTS and matrices & set(node.input)
    }


def kernels_of(
    events: Sequence[Mapping[str, Any]], weights: Mapping[str, int], position: float
) -> tuple[list[Kernel], float]:
    """The kernels of a graph, and how long a run of it takes: all nodes, the median of all runs but the first.

    Args:
        events: of onnxruntime's profile.
        weights: bytes of each node's constants, by name.
        position: how many tokens of their own samples have in the mean.
    """
    nodes: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event)
    found = {name: Kernel(name) for name in (*_ROLES.values(), REST)}
    times: dict[str, list[list[float]]] = {name: [] for name in found}  # by kernel: of each node its runs
    for node, runs in nodes.items():
        about = runs[0]["args"]
        kernel = found[_role(node, about["op_name"], weights)]
        kernel.nodes += 1
        times[kernel.name].append([event["dur"] / 1e3 for event in runs])
        if kernel.name != REST:
            kernel.read += weights.get(node) or _cached(about, position)
            operations = _operations(about, position) / (2 if ".parts/" in node else 1)
            if about["op_name"] in _INTEGERS:
                kernel.int8 += operations
            else:
                kernel.float32 += operations
    for name, each in times.items():
        found[name].ms = _median_run(each)
    kernels = [each for each in found.values() if each.nodes]
    return kernels, _median_run([node for each in times.values() for node in each])


def _median_run(nodes: Sequence[Sequence[float]]) -> float:
    """Of nodes' times, by run: the median of what all take in a run, without the first run if there are more."""
    whole = [sum(run) for run in zip(*nodes, strict=True)]
    return median(whole[1:] or whole) if whole else 0.0


def _role(node: str, operator: str, weights: Mapping[str, int]) -> str:
    name, _, _ = node.rpartition("/")
    name = re.sub(r"\.(parts|by_token)$", "", name)
    attends = operator in _ATTENTION or (operator in _PRODUCTS and re.search(_TO_THE_PROMPT, name))
    if not attends and node not in weights:
        return REST
    return next((kind for pattern, kind in _ROLES.items() if re.search(pattern, name)), REST)


def _shapes(about: Mapping[str, Any], which: str) -> Iterator[tuple[str, list[int]]]:
    for each in about[f"{which}_type_shape"]:
        yield from each.items()


def _cached(about: Mapping[str, Any], position: float) -> float:
    """Bytes of the keys and values that an attention has to read: of its own tokens as many as there are."""
    inputs = list(_shapes(about, "input"))
    if about["op_name"] == "GroupQueryAttention":
        caches = [(kind, shape) for kind, shape in inputs if len(shape) == 4][:2]
        return sum(_BYTES[kind] * math.prod(shape) * position / shape[2] for kind, shape in caches)
    keys = inputs[1:3] if about["op_name"] == "MultiHeadAttention" else inputs[1:2]
    return sum(_BYTES[kind] * math.prod(shape) for kind, shape in keys)


def _operations(about: Mapping[str, Any], position: float) -> float:
    (_, left), (_, result) = next(_shapes(about, "input")), next(_shapes(about, "output"))
    if about["op_name"] == "GroupQueryAttention":
        return 4 * math.prod(result) * position
    if about["op_name"] == "MultiHeadAttention":
        return 4 * math.prod(result) * result[1]
    return 2 * math.prod(left) * result[-1]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-n", type=int, default=16)
    parser.add_argument("--source", type=int, default=900)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    if min(a.n, a.source, a.tokens - 1, a.threads) < 1:
        parser.error("-n, --source and --threads are at least 1, --tokens is at least 2")
    try:
        print(json.dumps(measure(a.model, Job(a.n, a.source, a.tokens), a.threads)))
    except RamekinError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
