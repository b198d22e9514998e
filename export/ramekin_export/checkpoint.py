"""A checkpoint as `save_pretrained` writes it: a folder or a Hub id, its weights read one at a time, without torch.

A folder of optimum's float32 export is one too: its graphs hold the same weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # makes bfloat16 known to NumPy, and so to safetensors
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ramekin.cache import Floats
from ramekin.config_files import CONFIG, read_generation, read_json
from ramekin.errors import CheckpointError
from ramekin.manifest import MANIFEST, Dims, FileRecord
from ramekin.optimum_folder import OptimumFolder
from ramekin.paper import valid_text
from ramekin_export.hub import NO_WEIGHTS, from_hub
from ramekin_export.traced import Reader, read_traced

_ADAPTER = "adapter_config.json"
_MERGE = "merge them with peft (`merge_and_unload`), save the whole model and export that"
_NESTED = ("*", "snapshots/*")  # what a Trainer writes to, and the Hub's cache
_MOST_DIGITS = 9  # Python reads no numbers of thousands
_BLOCK = re.compile(r"(encoder|decoder)\.block\.(\d+)\.")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FLOATS = {"float16", "bfloat16", "float32", "float64"}
_EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


class Checkpoint:
    """An open checkpoint folder.

    Attributes:
        folder: where it lies.
        source: what the manifest tells of its origin.
        config: the raw `config.json`.
        generation: how it is meant to generate, as its files say.
    """

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self.folder = folder
        if (folder / _ADAPTER).is_file():
            whole = (folder / CONFIG).is_file()
            told = f"its {_ADAPTER} tells of weights to add" if whole else "an adapter without its model"
            raise CheckpointError(f"{folder}: {told}; {_MERGE}")
        if (folder / MANIFEST).is_file() and not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder}: a model folder of ramekin's; export the checkpoint that it was made from")
        if not (folder / CONFIG).is_file():
            within = [each.parent for place in _NESTED for each in sorted(folder.glob(f"{place}/{CONFIG}"))]
            newest = max(within, key=lambda each: each.stat().st_mtime, default=None)
            hint = f"; give {newest}, or another that has one" if newest else ""
            raise CheckpointError(f"{folder}: not a checkpoint: it has no {CONFIG}{hint}")
        self.config = read_json(folder / CONFIG)
        if self.config.get("quantization_config") is not None:
            raise CheckpointError(
                f"{folder}: its weights are quantized already; export the checkpoint that they were made from"
            )
        self.generation = read_generation(folder, self.config)
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
            if revision:
                raise CheckpointError(f"{source}: a folder has no revisions; leave --revision out")
            return cls(folder, {"folder": valid_text(folder.resolve().name)})
        if folder.exists():
            raise CheckpointError(f"{source}: a file; give the folder that it is in")
        if not _HUB_ID.fullmatch(source):
            raise CheckpointError(f"{source}: neither a folder nor a Hub id such as google/flan-t5-small")
        folder = from_hub(source, revision)
        return cls(folder, {"repository": source, "revision": revision or "main", "commit": folder.name})

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def check_names(self, dims: Dims) -> None:
        """Whether weights would be lost: transformers warns of what it does not use, and a network cut in half still talks.

        Raises:
            CheckpointError: there are weights of more blocks than `config.json` tells of, of adapters, or of a larger model.
        """
        for name in self._readers:
            if "lora_" in name:
                raise CheckpointError(f"{self.folder}: tensor {name!r} is an adapter's; {_MERGE}")
            block = _BLOCK.match(name)
            if block:
                layers = dims.encoder_layers if block[1] == "encoder" else dims.decoder_layers
                if len(block[2]) > _MOST_DIGITS or int(block[2]) >= layers:
                    raise CheckpointError(
                        f"{self.folder}: tensor {name!r} is of a block that config.json does not have: "
                        f"{layers} in the {block[1]}"
                    )
        inner = next((name for name in self._readers if name.endswith(".shared.weight")), None)
        if inner:
            raise CheckpointError(
                f"{self.folder}: names of tensors begin with {inner.removesuffix('shared.weight')!r}; save the T5 model "
                "in it with `save_pretrained`"
            )

    def tensor(self, name: str, *shape: int) -> Floats:
        """Read one tensor as float32.

        Raises:
            CheckpointError: it is missing, has another shape, or holds numbers that are not finite.
        """
        if name == "shared.weight":
            return self._embedding(*shape)
        return self._read(name, *shape)

    def _read(self, name: str, *shape: int) -> Floats:
        if name not in self._readers:
            raise CheckpointError(
                f"{self.folder}: the weights have no tensor {name!r}; is this a whole T5 with its decoder, "
                "named as transformers does?"
            )
        try:
            array = np.asarray(self._readers[name](name))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: tensor {name!r} cannot be read: {error}") from None
        except (TypeError, AttributeError, RuntimeError) as error:  # a kind of tensor that NumPy does not have
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} cannot be read ({error}); save it as float32, float16 or bfloat16"
            ) from None
        if array.shape != shape:
            raise CheckpointError(f"{self.folder}: tensor {name!r} has shape {array.shape}, but config.json implies {shape}")
        if array.dtype.name not in _FLOATS:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is {array.dtype}, not a floating-point one")
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array.min()) or not np.isfinite(array.max()):
            raise CheckpointError(f"{self.folder}: tensor {name!r} holds numbers that are not finite")
        return array

    def _embedding(self, *shape: int) -> Floats:
        """The one embedding of a T5, of which files may hold any of its names or all."""
        name, *others = [each for each in _EMBEDDING_NAMES if each in self] or _EMBEDDING_NAMES[:1]
        array = self._read(name, *shape)
        for other in others:
            if not np.array_equal(array, self._read(other, *shape)):
                raise CheckpointError(
                    f"{self.folder}: tensors {name!r} and {other!r} differ, and T5 has one embedding: versions of "
                    "transformers disagree on this checkpoint"
                )
        return array


def _open_weights(folder: Path) -> tuple[dict[str, Reader], dict[str, str]]:
    """A reader for each tensor, and the SHA-256 of each file; safetensors before pickles, one file before shards."""
    for name, open_file in (("model.safetensors", _safetensors), ("pytorch_model.bin", _pickled)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            readers, files = open_file(folder / name), {name}
        elif index.is_file():
            readers, files = _open_shards(index, open_file)
        else:
            continue
        return readers, {file: FileRecord.of(folder / file).sha256 for file in sorted(files)}
    found = OptimumFolder.find(folder)
    if found:
        return read_traced(found), {path.name: FileRecord.of(path).sha256 for path in found.graphs}
    raise CheckpointError(f"{folder}: {NO_WEIGHTS}")


def _open_shards(index: Path, open_file: Callable[[Path], dict[str, Reader]]) -> tuple[dict[str, Reader], set[str]]:
    """A reader for each tensor, from the shard that the index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    shards: dict[str, dict[str, Reader]] = {}
    readers: dict[str, Reader] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or file not in shards:
            if not isinstance(file, str) or Path(file).name != file or not (index.parent / file).is_file():
                raise CheckpointError(
                    f"{index}: names a shard {file!r} that is not in the folder; download the checkpoint again"
                )
            shards[file] = open_file(index.parent / file)
        if tensor not in shards[file]:
            raise CheckpointError(f"{index}: says that {tensor!r} is in {file}, which does not hold it")
        readers[tensor] = shards[file][tensor]
    return readers, set(shards)


def _pickled(path: Path) -> dict[str, Reader]:
    from ramekin_export.pickled import read_pickled  # noqa: PLC0415  # only there torch is needed

    return read_pickled(path)


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
