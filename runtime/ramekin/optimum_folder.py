"""A folder that optimum's exporter wrote: which of its files are the graphs, and what the others say of the model.

Layout: `encoder_model.onnx` and either `decoder_model_merged.onnx` or `decoder_model.onnx` with
`decoder_with_past_model.onnx`, beside the tokenizer and `config.json`, or one folder down in `onnx/` as on the Hub. Other
precisions have a suffix.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import sentencepiece

from ramekin.config_files import (
    CONFIG,
    cleans_up,
    generation_defaults,
    read_generation,
    read_json,
    special_tokens,
    variant_of,
)
from ramekin.errors import CheckpointError, ModelFormatError
from ramekin.manifest import MANIFEST, TOKENIZER, Dims, FileRecord, Manifest
from ramekin.paper import valid_text

_SUFFIXES = ("", "_quantized", "_int8", "_uint8", "_fp16", "_q4", "_bnb4")
"""In the order in which they are taken, if there are several."""
REMEDY = "`optimum-cli export onnx --model CHECKPOINT --task text2text-generation-with-past OUT` writes a whole one"


@dataclass(frozen=True)
class OptimumFolder:
    """The parts of such a folder.

    Attributes:
        folder: where the tokenizer and the JSON files lie.
        suffix: of the names of the graphs, "" or "_quantized", for example.
        encoder: the encoder's graph.
        decoder: the decoder's; if there is no `with_past`, merged, which serves every step.
        with_past: the decoder's for all steps but the first.
        files: names of the files beside the graphs, in which their weights may lie.
    """

    folder: Path
    suffix: str
    encoder: Path
    decoder: Path
    with_past: Path | None
    files: frozenset[str]

    @classmethod
    def find(cls, folder: Path, listed: Collection[str] | None = None) -> OptimumFolder | None:
        """The parts; None if there is no such folder, or nothing of an optimum export in it.

        Args:
            folder: where to look.
            listed: names of the files that may be taken, where a manifest tells them.

        Raises:
            ModelFormatError: some of the graphs are missing; says which, and how to make them.
        """
        for place in (folder, folder / "onnx") if listed is None else (folder,):
            names = {path.name for path in place.iterdir() if path.is_file()} if place.is_dir() else set()
            files = frozenset(names if listed is None else names.intersection(listed))
            if any(fnmatch(name, "*coder_*model*.onnx") for name in files):
                return cls._choose(folder, place, files)
        return None

    @classmethod
    def without_manifest(cls, folder: Path) -> OptimumFolder | None:
        """The parts of a folder that is optimum's own: one with a manifest says itself what it is."""
        return None if (folder / MANIFEST).is_file() else cls.find(folder)

    @classmethod
    def _choose(cls, folder: Path, place: Path, there: frozenset[str]) -> OptimumFolder:
        lacking: list[frozenset[str]] = []
        for suffix in _SUFFIXES:
            encoder, decoder = f"encoder_model{suffix}.onnx", f"decoder_model{suffix}.onnx"
            merged, with_past = f"decoder_model_merged{suffix}.onnx", f"decoder_with_past_model{suffix}.onnx"
            if {encoder, merged} <= there:
                return cls(folder, suffix, place / encoder, place / merged, None, there)
            if {encoder, decoder, with_past} <= there:
                return cls(folder, suffix, place / encoder, place / decoder, place / with_past, there)
            lacking += [frozenset(names) - there for names in ((encoder, merged), (encoder, decoder, with_past))]
        fewest = min(lacking, key=lambda names: (len(names), "decoder_with_past_model" not in str(names)))
        raise ModelFormatError(f"{place}: half an optimum export: {' and '.join(sorted(fewest))} missing; {REMEDY}")

    @property
    def graphs(self) -> tuple[Path, ...]:
        """All graphs."""
        return (self.encoder, self.decoder, *((self.with_past,) if self.with_past else ()))

    def dims(self, shapes: Mapping[str, Any]) -> Dims:
        """The sizes: what the graphs tell, and the rest from `config.json`.

        Args:
            shapes: `num_heads`, `head_dim`, `decoder_layers`; `vocab_size` and `d_model` too, unless the graphs leave them
                open.

        Raises:
            CheckpointError: `config.json` is missing, or not a T5's.
        """
        raw = read_json(self.folder / CONFIG)
        if raw.get("model_type") not in ("t5", "mt5"):
            raise CheckpointError(
                f"{self.folder / CONFIG}: model_type {raw.get('model_type')!r}; only t5 and mt5 can be run"
            )
        told = {name: raw.get(name) for name in ("vocab_size", "d_model", "d_ff")}
        try:
            return Dims(**{**told, "encoder_layers": raw.get("num_layers"), **shapes})
        except (TypeError, ModelFormatError) as error:
            raise CheckpointError(f"{self.folder / CONFIG}: {error}") from None

    def manifest(self, dims: Dims, precision: str, shares_prompt: bool) -> Manifest:
        """A manifest made from the folder's files; it records sizes, and no hashes.

        Args:
            dims: of the model.
            precision: what its caches hold.
            shares_prompt: whether all samples read one copy of the prompt's keys and values.

        Raises:
            CheckpointError: a file is missing, or not as transformers writes it.
        """
        raw = read_json(self.folder / CONFIG)
        generation = read_generation(self.folder, raw)
        path = self.folder / TOKENIZER
        if not path.is_file():
            raise CheckpointError(f"{self.folder}: no {TOKENIZER}; copy the base model's there")
        pieces = sentencepiece.SentencePieceProcessor()
        try:
            pieces.LoadFromSerializedProto(path.read_bytes())
            tokens = special_tokens(self.folder, raw, generation, pieces)
        except CheckpointError:
            raise
        except (RuntimeError, KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CheckpointError(
                f"{self.folder}: its tokenizer files are not as transformers writes them ({error!r})"
            ) from None
        return Manifest(
            dims=dims,
            tokens=tokens,
            precision=self.suffix.removeprefix("_").replace("quantized", "int8") or precision,
            recipe={
                "graphs": "optimum's, " + ("with two decoders" if self.with_past else "with a merged decoder"),
                "prompt": "its keys and values are "
                + ("shared by all samples" if shares_prompt else "copied for each sample"),
            },
            files={each.name: FileRecord(bytes=each.stat().st_size, sha256="") for each in (*self._weights(), path)},
            layout="optimum",
            variant=variant_of(raw),
            clean_up_tokenization_spaces=cleans_up(self.folder),
            generation=generation_defaults(generation),
            source={"folder": valid_text(self.folder.resolve().name)},
        )

    def _weights(self) -> list[Path]:
        """The graphs, and files that hold their weights."""
        beside = [path for graph in self.graphs for path in graph.parent.glob(f"{graph.name}[_.]data*")]
        return [*self.graphs, *sorted(beside)]
