"""A checkpoint as `save_pretrained` writes it: a folder or a Hub id, its weights read one at a time, without torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # makes bfloat16 known to NumPy, and so to safetensors
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ramekin.cache import Floats
from ramekin.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "spiece.model", "*.bin"]
_EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


class Checkpoint:
    """An open checkpoint folder.

    Attributes:
        folder: where it lies.
        source: what the manifest tells of its origin.
        config: the raw `config.json`.
        generation: the raw `generation_config.json`, empty if there is none.
    """

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = _read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        self.generation = _read_json(generation) if generation.is_file() else {}
        self._readers, files = _open_weights(folder)
        self.source = {**source, "weights": files}

    @classmethod
    def open(cls, source: str, revision: str | None = None) -> Checkpoint:
        """Open a local folder or, if there is none of that name, a Hub id (from the Hub, or offline from its cache).

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        folder = Path(source)
        if folder.is_dir():
            return cls(folder, {"folder": folder.resolve().name})
        if not _HUB_ID.fullmatch(source):
            raise CheckpointError(f"{source}: neither a folder nor a Hub id such as google/flan-t5-small")
        folder = _from_hub(source, revision)
        return cls(folder, {"repository": source, "revision": revision or "main", "commit": folder.name})

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def tensor(self, name: str, *shape: int) -> Floats:
        """Read one tensor as float32.

        Raises:
            CheckpointError: it is missing, has another shape, or holds numbers that are not finite.
        """
        if name == "shared.weight":  # every name of the embedding is the same tensor; files may hold any of them
            name = next((each for each in _EMBEDDING_NAMES if each in self._readers), name)
        if name not in self._readers:
            raise CheckpointError(
                f"{self.folder}: the weights have no tensor {name!r}; is this a whole T5 with its decoder?"
            )
        try:
            array = np.asarray(self._readers[name](name))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: tensor {name!r} cannot be read: {error}") from None
        if array.shape != shape:
            raise CheckpointError(f"{self.folder}: tensor {name!r} has shape {array.shape}, but config.json implies {shape}")
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array.min()) or not np.isfinite(array.max()):
            raise CheckpointError(f"{self.folder}: tensor {name!r} holds numbers that are not finite")
        return array


Reader = Callable[[str], npt.NDArray[Any]]


def _open_weights(folder: Path) -> tuple[dict[str, Reader], dict[str, str]]:
    """A reader for each tensor, and the SHA-256 of each file; safetensors before pickles, one file before shards."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (folder / name).is_file():
            paths = [folder / name] if name.endswith("s") else _shards(folder / name)
            readers = {key: reader for path in paths for key, reader in _safetensors(path).items()}
            return readers, {path.name: _sha256(path) for path in paths}
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            from ramekin_export.pickled import read_pickled  # noqa: PLC0415  # only here is torch needed

            paths = [folder / name] if name.endswith("bin") else _shards(folder / name)
            readers = {key: reader for path in paths for key, reader in read_pickled(path).items()}
            return readers, {path.name: _sha256(path) for path in paths}
    raise CheckpointError(f"{folder}: no model.safetensors and no pytorch_model.bin (nor an index of shards)")


def _shards(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    paths = []
    for name in sorted({str(value) for value in weight_map.values()}):
        path = index.parent / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(
                f"{index}: names a shard {name!r} that is not in the folder; download the checkpoint again"
            )
        paths.append(path)
    return paths


def _safetensors(path: Path) -> dict[str, Reader]:
    def read(name: str) -> npt.NDArray[Any]:
        # Opened for each tensor: a mapping that stays open would count the whole file as memory of this process.
        with safe_open(path, framework="np") as stream:
            return np.asarray(stream.get_tensor(name))

    try:
        with safe_open(path, framework="np") as stream:
            return dict.fromkeys(stream.keys(), read)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}); download the checkpoint again") from None


def _from_hub(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # slow to import, and not needed for folders
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
    except LocalEntryNotFoundError:
        reason = "the Hub cannot be reached and its cache does not have it; check the network or give a folder"
    except (HfHubHTTPError, HFValidationError) as error:
        reason = f"the Hub answers: {str(error).strip().splitlines()[0]}"
    except OSError as error:
        reason = f"the Hub cannot be reached: {error}"
    raise CheckpointError(f"{repository}: no such folder, and {reason}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: not a checkpoint: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return raw


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
