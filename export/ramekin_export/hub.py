"""A checkpoint on the Hub: what the export needs of it, downloaded or, offline, found in the Hub's cache."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ramekin.config_files import CONFIG, FAST, read_json
from ramekin.errors import CheckpointError
from ramekin.manifest import TOKENIZER
from ramekin_export.config import T5Config
from ramekin_export.pickled import torch_for
from ramekin_export.vocabulary import NO_TOKENIZER

_PATIENCE = 10  # seconds until the Hub counts as out of reach
_DOWN = 500  # the same holds for this status, and larger ones
NO_WEIGHTS = (
    "no model.safetensors and no pytorch_model.bin (nor an index of shards); weights of TensorFlow or Flax have to be saved "
    "anew by transformers 4 (`from_tf` or `from_flax`)"
)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def from_hub(repository: str, revision: str | None) -> Path:
    """The folder of one commit in the Hub's cache, with all that an export reads.

    Args:
        repository: the id.
        revision: branch, tag or commit; None: "main".

    Raises:
        CheckpointError: it is not to be had; the text says why.
    """
    import huggingface_hub as hub  # noqa: PLC0415  # slow to import, and not needed for folders
    from huggingface_hub import constants, errors  # noqa: PLC0415

    try:
        try:
            listed = hub.HfApi().model_info(repository, revision=revision, timeout=_PATIENCE).siblings or []
        except Exception as error:  # every transport has errors of its own
            status = getattr(getattr(error, "response", None), "status_code", _DOWN)
            if status < _DOWN or isinstance(error, errors.HFValidationError):
                raise
            return _from_cache(hub, repository, revision, warned=not constants.HF_HUB_OFFLINE)
        return _downloaded(hub, repository, revision, wanted(each.rfilename for each in listed))
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        reason = f"it is gated: ask for access on its page, and {_LOG_IN}"
    except errors.RepositoryNotFoundError:
        reason = f"no such folder, and no such repository on the Hub, or a private one: {_LOG_IN}"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision!r} on the Hub"
    except Exception as error:  # of the Hub, of the transport or of the disk
        reason = f"it cannot be downloaded: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
    raise CheckpointError(f"{repository}: {reason}")


def _downloaded(hub: Any, repository: str, revision: str | None, names: list[str]) -> Path:
    if not any(_holds_weights(name) for name in names):
        raise CheckpointError(f"{repository}: on the Hub it has {NO_WEIGHTS}")
    if any(name.endswith(".bin") for name in names):
        torch_for(repository)  # without it they would be gigabytes for nothing
    folders = set()
    for name in names:  # one by one: a pool of threads would hear of an interrupt only after gigabytes
        path = Path(hub.hf_hub_download(repository, name, revision=revision))
        folders.add(path.parent)
        if name == CONFIG:
            T5Config.from_json(read_json(path))  # before the weights of a model that is none
            if not {TOKENIZER, FAST} & set(names):
                raise CheckpointError(f"{repository}: {NO_TOKENIZER}")
    if len(folders) > 1:
        raise CheckpointError(f"{repository}: it was changed on the Hub meanwhile; try again")
    return folders.pop()


def _from_cache(hub: Any, repository: str, revision: str | None, warned: bool) -> Path:
    found = hub.try_to_load_from_cache(repository, CONFIG, revision=revision)
    folder = Path(found).parent if isinstance(found, str) else None
    if not folder or not any(_holds_weights(path.name) for path in folder.iterdir()):
        what = f"revision {revision} of it" if revision else "it"
        raise CheckpointError(
            f"{repository}: no such folder, and the Hub cannot be reached and its cache does not have {what}; "
            "check the network or give a folder"
        )
    if warned:
        told = f"{repository}: the Hub cannot be reached; this is commit {folder.name} from its cache"
        warnings.warn(told, RuntimeWarning, stacklevel=2)
    return folder


def wanted(names: Iterable[str]) -> list[str]:
    """Of a repository's files the ones to download: no other folder's, no other framework's, no weights twice.

    Weights are the last: where they are in the cache, nothing else is missing there.
    """
    present = {name for name in names if "/" not in name}
    small = sorted(name for name in present if name.endswith(".json") or name == TOKENIZER)
    for kind in ("model", "pytorch_model"):
        weights = sorted(name for name in present if _holds_weights(name) and name.startswith(kind))
        if weights:
            return small + weights
    return small


def _holds_weights(name: str) -> bool:
    return bool(re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin", name))
