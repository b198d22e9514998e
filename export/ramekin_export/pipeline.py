"""The export, readable as a table of contents."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ramekin
from ramekin import golden
from ramekin.engine import Engine
from ramekin.errors import CheckpointError, RamekinError, RuntimeVersionError
from ramekin.manifest import DECODER, DEFAULT_PROMPT, ENCODER, MANIFEST, TOKENIZER, FileRecord, Manifest
from ramekin.paper import check_prompt
from ramekin.sampling import SamplingParams
from ramekin_export.checkpoint import Checkpoint
from ramekin_export.config import T5Config
from ramekin_export.decoder import build_decoder
from ramekin_export.encoder import build_encoder
from ramekin_export.graph import OPSET, WeightFile
from ramekin_export.head import Head
from ramekin_export.recipe import RECIPES
from ramekin_export.vocabulary import write_vocabulary

_GENERATION = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
Progress = Callable[[int, int], None]
"""Told how many parameters were written since the last call, and how many there are."""


def export(
    source: str,
    out: Path,
    precision: str = "int8",
    revision: str | None = None,
    force: bool = False,
    prompt: str = DEFAULT_PROMPT,
    progress: Progress = lambda _done, _all: None,
) -> Manifest:
    """Turn a checkpoint into a model folder, whole or not at all.

    Args:
        source: a folder as `save_pretrained` writes it, or a Hub id.
        out: the folder to make.
        precision: a key of `RECIPES`.
        revision: branch, tag or commit of a Hub id.
        force: replace `out` if it is there.
        prompt: template for papers, kept in the manifest.
        progress: called as the work goes on.

    Raises:
        CheckpointError: the checkpoint cannot be exported; the text says why.
        FileExistsError: `out` is there, and `force` was not asked for.
        ValueError: `precision` or `prompt` is none.
    """
    if precision not in RECIPES:
        raise ValueError(f"precision must be one of {', '.join(RECIPES)}, not {precision!r}")
    check_prompt(prompt)
    out = out.resolve()
    if Path(source).is_dir() and Path(source).resolve().is_relative_to(out):
        raise FileExistsError(f"{out}: is or holds the checkpoint itself; export to another folder")
    _check_target(out, force)
    checkpoint = Checkpoint.open(source, revision)
    config = T5Config.from_json(checkpoint.config)
    with _whole_or_not_at_all(out, force) as folder:
        tokens = write_vocabulary(checkpoint.folder, checkpoint.config, checkpoint.generation, folder / TOKENIZER)
        _write_graphs(checkpoint, config, precision, folder, progress)
        manifest = Manifest(
            dims=config.dims,
            variant=config.variant,
            tokens=tokens,
            precision=precision,
            recipe=RECIPES[precision].describe(),
            files={path.name: FileRecord.of(path) for path in sorted(folder.iterdir())},
            prompt=prompt,
            generation=_generation_defaults(checkpoint.generation),
            source=checkpoint.source,
            tools=_tools(),
            opset=OPSET,
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        manifest = _with_golden_run(folder, manifest)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _write_graphs(checkpoint: Checkpoint, config: T5Config, precision: str, folder: Path, progress: Progress) -> None:
    recipe, dims, head = RECIPES[precision], config.dims, Head.of(checkpoint, config)
    total = _parameters(config)

    def advance(parameters: int) -> None:
        progress(parameters, total)

    with WeightFile(folder / "embedding.bin", advance) as weights:
        table = checkpoint.tensor("shared.weight", dims.vocab_size, dims.d_model)
        embedding = weights.add("shared.weight", table, table.size)
        del table
    with WeightFile(folder / "encoder.bin", advance) as weights:
        build_encoder(checkpoint, config, recipe, embedding, weights).save(folder / ENCODER)
    with WeightFile(folder / "decoder.bin", advance) as weights:
        build_decoder(checkpoint, config, recipe, head, embedding, weights).save(folder / DECODER)


def _parameters(config: T5Config) -> int:
    """How many weights there are to write, norms and biases aside."""
    dims = config.dims
    attention = 4 * dims.d_model * dims.num_heads * dims.head_dim
    forward = (3 if config.gated else 2) * dims.d_model * dims.d_ff
    layers = dims.encoder_layers * (attention + forward) + dims.decoder_layers * (2 * attention + forward)
    return 2 * dims.vocab_size * dims.d_model + layers


def _generation_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters that a `generation_config.json` sets; all else in it is left to the caller.

    Raises:
        CheckpointError: one is out of its range, and the checkpoint is meant for sampling.
    """
    values = {name: generation[name] for name in _GENERATION if generation.get(name) is not None}
    try:
        SamplingParams(**values)
    except (TypeError, ValueError) as error:
        if generation.get("do_sample"):
            raise CheckpointError(f"generation_config.json: {error}") from None
        return {}  # greedy checkpoints carry values such as temperature 0 that mean nothing
    return values


def _tools() -> dict[str, str]:
    names = ("numpy", "onnx", "safetensors", "sentencepiece", "onnxruntime")
    installed = {each.metadata["Name"].lower() for each in importlib.metadata.distributions() if each.metadata["Name"]}
    return {"ramekin": ramekin.__version__, **{n: importlib.metadata.version(n) for n in names if n in installed}}


def _with_golden_run(folder: Path, manifest: Manifest) -> Manifest:
    """Run the new model once, so that `ramekin verify` can compare; not where onnxruntime is missing."""
    try:
        engine = Engine.load(folder)
    except RuntimeVersionError:
        return manifest
    return replace(manifest, golden=golden.record(engine))


def _check_target(out: Path, force: bool) -> None:
    """Nothing but a model folder is ever replaced, and only by force."""
    if not out.exists():
        return
    if not force:
        raise FileExistsError(f"{out}: is there already; --force replaces it")
    entries = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    try:
        ours = {MANIFEST, *Manifest.load(out).files} if entries else set()
    except RamekinError:
        ours = set()
    if entries - ours:
        raise FileExistsError(
            f"{out}: holds other things than a model ({min(entries - ours)!r}), so --force does not replace it"
        )


@contextmanager
def _whole_or_not_at_all(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, and vanishes if anything goes wrong before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    retired = folder.with_suffix(".old")
    try:
        os.umask(umask := os.umask(0))
        folder.chmod(0o777 & ~umask)
        yield folder
        _check_target(out, force)  # somebody may have put something there meanwhile
        if out.exists():
            out.rename(retired)
        try:
            folder.rename(out)
        except BaseException:
            if retired.exists():
                retired.rename(out)
            raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(errno.ENOSPC, f"{out.parent}: no space left on this disk; free some and export again") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)
