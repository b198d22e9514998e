"""`pytorch_model.bin`: the one place that needs torch. Nothing but tensors is unpickled."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ramekin.errors import CheckpointError


def torch_for(checkpoint: Path | str) -> Any:
    """The torch module, imported here and now.

    Raises:
        CheckpointError: it is missing.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise CheckpointError(
            f"{checkpoint}: pickled weights need torch: pip install torch, or save the checkpoint as safetensors"
        ) from None


def read_pickled(path: Path) -> dict[str, Callable[[str], npt.NDArray[Any]]]:
    """A reader for each tensor of a file that `torch.save` wrote.

    Raises:
        CheckpointError: torch is missing, or the file holds something else than tensors.
    """
    torch = torch_for(path)
    useless = f"{path}: not a file of tensors alone; download it again, or save the checkpoint as safetensors"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written before torch 1.6: cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # whatever a broken pickle leads to; torch's own text advises to run what the file says
        raise CheckpointError(useless) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(useless)

    def read(name: str) -> npt.NDArray[Any]:
        tensor = state[name].detach()
        return np.asarray((tensor.to(torch.float32) if tensor.is_floating_point() else tensor).numpy())

    return dict.fromkeys(state, read)
