"""One model folder of one checkpoint: tokenizer, graphs, manifest."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ramekin
from ramekin.config_files import cleans_up, generation_defaults
from ramekin.manifest import DECODER, ENCODER, MANIFEST, TOKENIZER, FileRecord, Manifest, VersionRange
from ramekin_export.checkpoint import Checkpoint
from ramekin_export.config import T5Config
from ramekin_export.cuda_decoder import build_cuda_decoder
from ramekin_export.cuda_encoder import build_cuda_encoder
from ramekin_export.cuda_layers import OPSET as CUDA_OPSET
from ramekin_export.decoder import build_decoder
from ramekin_export.encoder import build_encoder
from ramekin_export.fold import Folded
from ramekin_export.formats import FLOAT32, Format, narrowed
from ramekin_export.graph import OPSET, WeightFile
from ramekin_export.head import Head
from ramekin_export.recipe import Recipe
from ramekin_export.rotate import Rotated
from ramekin_export.vocabulary import write_vocabulary
from ramekin_export.weights import Finite, Weights

CUDA_LAYOUT: dict[str, Any] = {"layout": "cuda", "opset": CUDA_OPSET, "onnxruntime": VersionRange(at_least="1.31.1")}
"""What the manifest tells of graphs for CUDA. 1.31.1 is the release in whose CUDA library their kernels were looked for."""

Progress = Callable[[int, int], None]
"""Told how much was done since the last call, and how much there is."""


class Writer:
    """Writes an open checkpoint as model folders, in any recipe.

    Attributes:
        config: what its graphs depend on.
    """

    def __init__(self, checkpoint: Checkpoint, prompt: str) -> None:
        self._checkpoint, self._prompt = checkpoint, prompt
        self.config = T5Config.from_json(checkpoint.config)
        checkpoint.check_names(self.config.dims)

    def write(self, folder: Path, precision: str, recipe: Recipe | Format, progress: Progress) -> Manifest:
        """Fill an empty folder: by a recipe with graphs for the CPU, in a number format with graphs for CUDA.

        Raises:
            CheckpointError: the checkpoint cannot be exported; the text says why.
        """
        checkpoint = self._checkpoint
        tokens = write_vocabulary(checkpoint.folder, checkpoint.config, checkpoint.generation, folder / TOKENIZER)
        self._write_graphs(folder, recipe, progress)
        layout = {"opset": OPSET} if isinstance(recipe, Recipe) else CUDA_LAYOUT | {"providers": recipe.providers}
        manifest = Manifest(
            dims=self.config.dims,
            variant=self.config.variant,
            tokens=tokens,
            precision=precision,
            recipe=recipe.describe(),
            files={path.name: FileRecord.of(path) for path in sorted(folder.iterdir())},
            prompt=self._prompt,
            clean_up_tokenization_spaces=cleans_up(checkpoint.folder),
            generation=generation_defaults(checkpoint.generation),
            source=checkpoint.source,
            tools=tools(),
            **layout,
        )
        save(folder, manifest)
        return manifest

    def _write_graphs(self, folder: Path, recipe: Recipe | Format, progress: Progress) -> None:
        config, dims, total = self.config, self.config.dims, _parameters(self.config)
        weights: Weights = self._checkpoint
        head = Head.of(self._checkpoint, config)
        stored = FLOAT32 if isinstance(recipe, Recipe) else recipe.stream
        rotated = Rotated(weights, config, head.weight) if recipe.rotated else None
        weights = rotated or weights
        if recipe.folded:
            weights = Folded(weights, config)
        weights = Finite(weights)

        def advance(parameters: int) -> None:
            progress(parameters, total)

        with WeightFile(folder / "embedding.bin", advance) as file:
            table = self._checkpoint.tensor("shared.weight", dims.vocab_size, dims.d_model)
            if rotated:
                table = rotated.embedding(table)
            embedding = file.add("shared.weight", narrowed("shared.weight", table, stored), table.size)
            del table
        with WeightFile(folder / "encoder.bin", advance) as file:
            if isinstance(recipe, Recipe):
                encoder = build_encoder(weights, config, recipe, embedding, file)
            else:
                encoder = build_cuda_encoder(weights, config, recipe, embedding, file)
            encoder.save(folder / ENCODER)
        with WeightFile(folder / "decoder.bin", advance) as file:
            if isinstance(recipe, Recipe):
                decoder = build_decoder(weights, config, recipe, head, embedding, file)
            else:
                decoder = build_cuda_decoder(weights, config, recipe, head, embedding, file)
            decoder.save(folder / DECODER)


def save(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder."""
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _parameters(config: T5Config) -> int:
    """How many weights there are to write, norms and biases aside."""
    dims = config.dims
    attention = 4 * dims.d_model * dims.inner
    forward = (3 if config.gated else 2) * dims.d_model * dims.d_ff
    layers = dims.encoder_layers * (attention + forward) + dims.decoder_layers * (2 * attention + forward)
    return 2 * dims.vocab_size * dims.d_model + layers


def tools(*others: str) -> dict[str, str]:
    """Versions of what an export is made with, `others` included."""
    names = ("numpy", "onnx", "safetensors", "sentencepiece", "onnxruntime", *others)
    installed = {each.metadata["Name"].lower() for each in importlib.metadata.distributions() if each.metadata["Name"]}
    return {"ramekin": ramekin.__version__, **{n: importlib.metadata.version(n) for n in names if n in installed}}
