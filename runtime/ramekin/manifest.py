"""The contract between export and runtime: what a model folder holds. What its graphs' tensors are called: `tensors`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ramekin.errors import FormatVersionError, ModelFormatError, ModelNotFoundError

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
_MOST_LAYERS = 1024
_LARGEST, _DEEPEST = 64 << 20, 20  # bytes of a manifest, and levels of it
_LONGEST_NAME = 256  # characters of a special token
MOST_SOURCE_TOKENS = 1 << 30
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""What computes, and what ONNX Runtime calls it."""
ENCODER, DECODER, TOKENIZER = "encoder.onnx", "decoder.onnx", "spiece.model"
COMPACT_ENCODER, COMPACT_DECODER = "encoder_compact.onnx", "decoder_compact.onnx"
"""Both graphs once more, over the same weights, with keys and values in 8 bits."""

_LEAVES = "a link that leaves the model folder; put a copy of the file there (from the Hub: `hf download --local-dir`)"

DEFAULT_PROMPT = (
    "Generate Question, Answer pair correspond to the following research paper. "
    "[Abstract] {abstract} [Introduction] {introduction} Question, Answer:"
)
"""The prompt of the model card of UNIST-Eunchan/FLAN-T5-NLP-Paper-to-Question-Generation."""


@dataclass(frozen=True, kw_only=True)
class Dims:
    """Sizes of the network; all are positive, and a stack has at most 1,024 layers."""

    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    head_dim: int
    encoder_layers: int
    decoder_layers: int

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ModelFormatError(f"dims.{each.name} must be a positive integer, not {value!r}")
            if each.name.endswith("_layers") and value > _MOST_LAYERS:  # each has names of its own
                raise ModelFormatError(f"dims.{each.name} must be at most {_MOST_LAYERS}, not {value}")

    @property
    def inner(self) -> int:
        """Width of queries, keys and values, all heads side by side; not always `d_model`."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids with a meaning of their own.

    Attributes:
        start: what the decoder is fed first.
        pad: fills rows in training; part of no text.
        eos: each of these ends a sample.
        named: text such as `<extra_id_0>` and the one id that it stands for.
        silent: ids that are left out of decoded text.
    """

    start: int
    pad: int
    eos: tuple[int, ...]
    named: Mapping[str, int] = field(default_factory=dict)
    silent: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.named, dict) or not all(0 < len(text) <= _LONGEST_NAME for text in self.named):
            raise ModelFormatError(f"tokens.named must map texts of at most {_LONGEST_NAME} characters to ids")
        object.__setattr__(self, "eos", tuple(self.eos))
        object.__setattr__(self, "silent", tuple(self.silent))
        if not self.eos or any(not isinstance(i, int) or i < 0 for i in self.ids):
            raise ModelFormatError("tokens must name a start, a pad and at least one eos id, all of them integers >= 0")

    @property
    def ids(self) -> tuple[int, ...]:
        """All ids that are mentioned."""
        return (self.start, self.pad, *self.eos, *self.named.values(), *self.silent)


@dataclass(frozen=True, kw_only=True)
class VersionRange:
    """Versions of onnxruntime to compute with: from the oldest that was tried to the first that may break with it."""

    at_least: str = "1.23.2"
    below: str = "2.0.0"

    def __post_init__(self) -> None:
        for text in (self.at_least, self.below):
            if not isinstance(text, str) or not re.fullmatch(r"\d{1,4}\.\d{1,4}\.\d{1,4}", text):
                raise ModelFormatError(f"onnxruntime must be a range of versions such as 1.23.2, not {text!r}")

    def __contains__(self, version: str) -> bool:
        return _numbers(self.at_least) <= _numbers(version) < _numbers(self.below)

    def __str__(self) -> str:
        return f">={self.at_least},<{self.below}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of one file of the folder."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.bytes, int) or not 0 <= self.bytes < 2**63 or not isinstance(self.sha256, str):
            raise ModelFormatError("files must give bytes and sha256 of each file")

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Measure `path`, reading it once."""
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return cls(bytes=path.stat().st_size, sha256=digest.hexdigest())


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that the runtime knows of a model besides its graphs. Written once by the export, never changed.

    Attributes:
        layout: whose graphs they are: "ramekin", ours (see `tensors`), "cuda", ours for GPUs, or "optimum", as its exporter
            names them.
        providers: where the graphs can be computed, see `PROVIDERS`.
        clean_up_tokenization_spaces: see `Tokenizer.cleans_up`; as `tokenizer_config.json` calls it.
        opset: of ONNX, of its graphs; the compact ones have a later one of their own.
    """

    dims: Dims
    tokens: SpecialTokens
    precision: str
    recipe: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    layout: str = "ramekin"
    providers: tuple[str, ...] = ("cpu",)
    variant: str = "t5"
    prompt: str = DEFAULT_PROMPT
    max_source_tokens: int = 1024
    clean_up_tokenization_spaces: bool = False
    generation: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    opset: int = 18
    onnxruntime: VersionRange = VersionRange()  # frozen
    golden: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        longest = self.max_source_tokens
        if not isinstance(longest, int) or isinstance(longest, bool) or not 1 <= longest <= MOST_SOURCE_TOKENS:
            raise ModelFormatError(f"max_source_tokens must be from 1 to {MOST_SOURCE_TOKENS}, not {longest!r}")
        kinds = {"variant": str, "prompt": str, "precision": str, "opset": int, "clean_up_tokenization_spaces": bool}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (name in ("variant", "precision") and not str(value).isprintable()):
                raise ModelFormatError(f"{name} must be {kind.__name__} without control characters, not {value!r}")
        for name in ("recipe", "generation", "source", "tools", "golden", "quality"):
            if not isinstance(getattr(self, name), dict):
                raise ModelFormatError(f"{name} must be an object, not {getattr(self, name)!r}")
        if max(self.tokens.ids) >= self.dims.vocab_size:
            raise ModelFormatError(f"token {max(self.tokens.ids)} lies outside the vocabulary of {self.dims.vocab_size}")
        graphs = {ENCODER, DECODER, TOKENIZER}
        needed = {"ramekin": graphs, "cuda": graphs, "optimum": {TOKENIZER}}
        if self.layout not in needed:
            raise ModelFormatError(f"layout must be one of {', '.join(needed)}, not {self.layout!r}")
        object.__setattr__(self, "providers", tuple(self.providers))
        if not self.providers or set(self.providers) - set(PROVIDERS):
            raise ModelFormatError(f"providers must name one or more of {', '.join(PROVIDERS)}, not {self.providers!r}")
        if "cuda" in self.providers and self.layout != "cuda":
            raise ModelFormatError(f"graphs of the layout {self.layout!r} cannot be computed on cuda")
        missing = needed[self.layout] - set(self.files)
        if missing:
            raise ModelFormatError(f"files must list {', '.join(sorted(missing))}")
        for name in self.files:
            if name != Path(name).name or name in ("", ".", "..", MANIFEST) or "\\" in name or not name.isprintable():
                raise ModelFormatError(f"files must be plain names inside the folder, not {name!r}")

    @property
    def compact(self) -> bool:
        """Whether there are compact graphs too; one of the pair, as in folders of an earlier form, is of no use."""
        return {COMPACT_ENCODER, COMPACT_DECODER} <= self.files.keys()

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read `manifest.json`.

        Raises:
            FormatVersionError: another version of ramekin wrote it.
            ModelFormatError: it is not a manifest.
        """
        try:
            raw = json.loads(text)
            json.dumps(raw, ensure_ascii=False).encode()  # no halves of surrogate pairs
        except (ValueError, RecursionError) as error:
            raise ModelFormatError(f"not JSON: {error}") from None
        if _is_deeper(raw, _DEEPEST):
            raise ModelFormatError("nested deeper than any manifest")
        if not isinstance(raw, dict) or "format_version" not in raw:
            raise ModelFormatError("not a ramekin manifest: it has no format_version")
        if raw["format_version"] != FORMAT_VERSION:
            raise FormatVersionError(
                f"format version {raw['format_version']!r}, but this ramekin reads {FORMAT_VERSION}: "
                "export the model again, or install the ramekin that wrote it"
            )
        try:
            raw["dims"] = Dims(**raw["dims"])
            raw["tokens"] = SpecialTokens(**raw["tokens"])
            raw["onnxruntime"] = VersionRange(**raw["onnxruntime"])
            raw["files"] = {name: FileRecord(**record) for name, record in raw["files"].items()}
            return cls(**raw)
        except (TypeError, KeyError, AttributeError) as error:
            raise ModelFormatError(f"not a complete manifest: {error}") from None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read and check the manifest of a model folder.

        Raises:
            ModelNotFoundError: there is no such folder.
            ModelFormatError: the folder holds no manifest, or one that cannot be read.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelNotFoundError(f"{folder}: no such model folder; `ramekin export CHECKPOINT {folder}` makes one")
        path = folder / MANIFEST
        if not path.is_file():
            raise ModelFormatError(
                f"{folder}: not a ramekin model folder (it has no {MANIFEST}); `ramekin export {folder} OUT` makes one "
                "of a checkpoint"
            )
        if path.resolve().parent != folder.resolve():
            raise ModelFormatError(f"{path}: {_LEAVES}")
        if path.stat().st_size > _LARGEST:
            raise ModelFormatError(f"{path}: larger than any manifest; export the model again")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ModelFormatError(f"{path}: not UTF-8; export the model again") from None
        except ModelFormatError as error:
            raise type(error)(f"{path}: {error}") from None

    def check_files(self, folder: Path, hash_up_to: int | None = 32 << 20) -> None:
        """Compare the folder's files with the records.

        Sizes are always compared; contents of files up to `hash_up_to` bytes too (None: of all files, which takes about
        a second per gigabyte).

        Raises:
            ModelFormatError: a file is missing, truncated, altered, or leads out of the folder.
        """
        root = folder.resolve()
        for name, record in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ModelFormatError(f"{path}: missing; export the model again")
            if path.resolve().parent != root:
                raise ModelFormatError(f"{path}: {_LEAVES}")
            size = path.stat().st_size
            if size != record.bytes:
                raise ModelFormatError(f"{path}: {size} bytes instead of {record.bytes}; export or copy the model again")
            if (hash_up_to is None or size <= hash_up_to) and FileRecord.of(path) != record:
                raise ModelFormatError(f"{path}: altered since the export (SHA-256 differs); export or copy it again")


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether JSON has more levels: each costs frames of Python's stack wherever it is gone through."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(each, levels - 1) for each in inner)
