"""What the decoder's layers see while a model writes samples of its own; of linear layers' inputs the second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ramekin.cache import Floats
from ramekin.manifest import DECODER, ENCODER, TOKENIZER, Manifest
from ramekin.model import Logits
from ramekin.paper import Paper
from ramekin.sampling import SamplingParams, choose, uniforms
from ramekin.session import onnxruntime, open_session, usable_cores
from ramekin.tensors import (
    INPUT_IDS,
    LOGITS,
    PAST_LENGTHS,
    TOKEN_IDS,
    TOP_IDS,
    TOP_K,
    TOP_VALUES,
    cross_names,
    past_names,
    present_names,
)
from ramekin.tokenizer import Tokenizer
from ramekin_export.verify import prompts

SAMPLING = SamplingParams(n=8, max_new_tokens=48, seed=1, top_k=0, top_p=1.0)
_TAPPED = "decoder.tapped.onnx"


@dataclass(frozen=True)
class Seen:
    """What a step of all samples of a prompt showed.

    Attributes:
        step: its number; 0 begins another prompt.
        cross: the prompt's keys and values by name.
        past: the samples' own, `(samples, heads, capacity, head_dim)` each, filled up to `step`.
        tapped: the values that were asked for, in their order; only the samples that are still running are in them.
    """

    step: int
    cross: Mapping[str, Floats]
    past: Sequence[Floats]
    tapped: Sequence[Floats]


def calibrate(folder: Path, papers: Sequence[Paper], progress: Callable[[int, int], None]) -> dict[str, Floats]:
    """Sample from a float32 model, adding up `x x^T` for every input x of a matrix product in its decoder.

    Args:
        folder: the model; a graph with more outputs is written there.
        papers: what the model is asked to continue.
        progress: called after each step.

    Returns:
        By the name of the value in the graph: `(width, width)` float32.
    """
    graph = onnx.load(folder / DECODER, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    taps = list(dict.fromkeys(node.input[0] for node in products))
    moments: dict[str, Floats] = {}
    rows: dict[str, list[Floats]] = {name: [] for name in taps}

    def add_up() -> None:  # once a prompt: a product of many rows is faster than many of few
        for name, parts in rows.items():
            whole = np.concatenate(parts)
            moments[name] = moments.get(name, np.float32(0)) + whole.T @ whole
            parts.clear()

    for seen in sampled(folder, papers, taps, SAMPLING, progress):
        if not seen.step and rows[taps[0]]:
            add_up()
        for name, values in zip(taps, seen.tapped, strict=True):
            rows[name].append(values.reshape(-1, values.shape[-1]))
    add_up()
    return moments


def sampled(
    folder: Path, papers: Sequence[Paper], taps: Sequence[str], params: SamplingParams, progress: Callable[[int, int], None]
) -> Iterator[Seen]:
    """Let a model write samples, and tell what each step showed.

    Args:
        folder: the model, with float keys and values; a graph with more outputs is written there and deleted.
        papers: what the model is asked to continue.
        taps: names of float32 values in the decoder whose first axis is that of the samples.
        params: how it samples.
        progress: called after each step.
    """
    manifest = Manifest.load(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER, manifest.tokens)
    ort, allowed, threads = onnxruntime(manifest.onnxruntime), frozenset(manifest.files), usable_cores()
    encoder = open_session(ort, folder / ENCODER, allowed, "cpu", threads, rests=True)
    model = onnx.load(folder / DECODER, load_external_data=False)
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in taps)
    tapped = folder / _TAPPED
    try:
        tapped.write_bytes(model.SerializeToString())
        decoder = open_session(ort, tapped, allowed, "cpu", threads, rests=False)
    finally:
        tapped.unlink(missing_ok=True)
    sources, names = prompts(tokenizer, manifest, papers, whole=True), cross_names(manifest.dims.decoder_layers)
    for number, source in enumerate(sources):
        cross = dict(zip(names, encoder.run(names, {INPUT_IDS: source[None]}), strict=True))
        for seen in _sample(manifest, decoder, cross, taps, params, number):
            yield seen
            progress(1, params.max_new_tokens * len(sources))


def _sample(
    manifest: Manifest, decoder: Any, cross: dict[str, Floats], taps: Sequence[str], params: SamplingParams, seed: int
) -> Iterator[Seen]:
    dims, n, most = manifest.dims, params.n, params.max_new_tokens
    layers, eos = dims.decoder_layers, manifest.tokens.eos
    fixed = {**cross, TOP_K: np.array([1])}
    past = [np.zeros((n, dims.num_heads, most, dims.head_dim), np.float32) for _ in range(2 * layers)]
    draws = uniforms(seed, n, most)
    histories, alive = [[manifest.tokens.start] for _ in range(n)], np.ones(n, bool)
    for step in range(most):
        tokens, lengths = np.array([history[-1:] for history in histories]), np.full(n, step, np.int32)
        feed = {TOKEN_IDS: tokens, PAST_LENGTHS: lengths, **fixed, **dict(zip(past_names(layers), past, strict=True))}
        logits, values, ids, *rest = decoder.run([LOGITS, TOP_VALUES, TOP_IDS, *present_names(layers), *taps], feed)
        past = rest[: 2 * layers]
        yield Seen(step, cross, past, [value[alive] for value in rest[2 * layers :]])
        chosen, _ = choose(Logits.of(logits, values, ids), histories, eos, params, draws[:, step])
        for history, token in zip(histories, chosen.tolist(), strict=True):
            history.append(token)
        alive &= ~np.isin(chosen, eos)
        if not alive.any():
            return
