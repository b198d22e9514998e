"""What the decoder's linear layers see: second moments of their inputs while the model writes samples of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ramekin.cache import Floats
from ramekin.manifest import (
    DECODER,
    ENCODER,
    INPUT_IDS,
    LOGITS,
    PAST_LENGTHS,
    TOKEN_IDS,
    TOKENIZER,
    TOP_IDS,
    TOP_K,
    TOP_VALUES,
    Manifest,
    cross_names,
    past_names,
    present_names,
)
from ramekin.model import Logits
from ramekin.paper import Paper
from ramekin.sampling import SamplingParams, choose, uniforms
from ramekin.session import onnxruntime, open_session, usable_cores
from ramekin.tokenizer import Tokenizer
from ramekin_export.verify import prompts

SAMPLING = SamplingParams(n=8, max_new_tokens=48, seed=1, top_k=0, top_p=1.0)
_TAPPED = "decoder.tapped.onnx"


def calibrate(folder: Path, papers: Sequence[Paper], progress: Callable[[int, int], None]) -> dict[str, Floats]:
    """Sample from a float32 model, adding up `x x^T` for every input x of a matrix product in its decoder.

    Args:
        folder: the model; a graph with more outputs is written there.
        papers: what the model is asked to continue.
        progress: called after each step.

    Returns:
        By the name of the value in the graph: `(width, width)` float32.
    """
    manifest = Manifest.load(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER, manifest.tokens)
    taps = _write_tapped(folder)
    ort, allowed, threads = onnxruntime(manifest.onnxruntime), frozenset(manifest.files), usable_cores()
    encoder = open_session(ort, folder / ENCODER, allowed, "cpu", threads, rests=True)
    decoder = open_session(ort, folder / _TAPPED, allowed, "cpu", threads, rests=False)
    moments: dict[str, Floats] = {}
    sources, layers = prompts(tokenizer, manifest, papers, whole=True), manifest.dims.decoder_layers
    for number, source in enumerate(sources):
        seen: dict[str, list[Floats]] = {name: [] for name in taps}
        cross = dict(zip(cross_names(layers), encoder.run(cross_names(layers), {INPUT_IDS: source[None]}), strict=True))
        for values in _sample(manifest, decoder, cross, taps, number):
            for name, rows in zip(taps, values, strict=True):
                seen[name].append(rows)
            progress(1, SAMPLING.max_new_tokens * len(sources))
        for name, parts in seen.items():
            rows = np.concatenate(parts)
            moments[name] = moments.get(name, np.float32(0)) + rows.T @ rows
    return moments


def _sample(
    manifest: Manifest, decoder: Any, cross: dict[str, Floats], taps: Sequence[str], seed: int
) -> Iterator[list[Floats]]:
    """Write samples of one prompt; after each step the tapped values, `(samples still running, width)` each."""
    dims, n, most = manifest.dims, SAMPLING.n, SAMPLING.max_new_tokens
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
        yield [tapped.reshape(n, -1)[alive] for tapped in rest[2 * layers :]]
        chosen, _ = choose(Logits.of(logits, values, ids), histories, eos, SAMPLING, draws[:, step])
        for history, token in zip(histories, chosen.tolist(), strict=True):
            history.append(token)
        alive &= ~np.isin(chosen, eos)
        if not alive.any():
            return


def _write_tapped(folder: Path) -> list[str]:
    """Write the decoder graph with the inputs of its matrix products as further outputs; their names."""
    model = onnx.load(folder / DECODER, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    taps = list(dict.fromkeys(node.input[0] for node in products))
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in taps)
    (folder / _TAPPED).write_bytes(model.SerializeToString())
    return taps
