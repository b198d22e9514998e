"""Where to compute: the CPU, or a GPU through CUDA; and if not, why not."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

from ramekin.device_thread import one_at_a_time
from ramekin.errors import ProviderError, one_line
from ramekin.manifest import PROVIDERS

AUTO = "auto"
_DRIVER = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"


def choose_provider(ort: Any, wanted: str, offered: Sequence[str], precision: str) -> tuple[str, str]:
    """Decide where to compute.

    Args:
        ort: the onnxruntime module.
        wanted: "cpu", "cuda", or "auto": CUDA where model and machine allow it.
        offered: where the model's graphs can be computed.
        precision: the model's, for the error text.

    Returns:
        The provider, and why "auto" took no other one (empty: there was no other reason than that it was asked for).

    Raises:
        ProviderError: it cannot be computed there; never does the CPU step in for a GPU that was asked for by name.
    """
    if wanted == AUTO:
        if "cuda" not in offered:
            return "cpu", f"this model's {precision} graphs are for the CPU"
        problem = cuda_problem(ort)
        if not problem:
            return "cuda", ""
        if "cpu" not in offered:
            raise ProviderError(f"{_only(precision, offered)}, and {problem}")
        return "cpu", problem
    if wanted not in offered:
        raise ProviderError(_only(precision, offered))
    problem = cuda_problem(ort) if wanted == "cuda" else ""
    if problem:
        raise ProviderError(f"cannot compute on cuda: {problem}")
    return wanted, ""


def _only(precision: str, offered: Sequence[str]) -> str:
    if "cuda" in offered:
        return (
            f"this model's {precision} graphs are for CUDA only: provider cuda "
            "(for a CPU: `ramekin export --precision int8`, int4 or fp32)"
        )
    return (
        f"this model's {precision} graphs are for the CPU only (for a GPU: `ramekin export --precision bf16`, "
        "or fp16 before Ampere)"
    )


def cuda_problem(ort: Any) -> str:
    """Why nothing can be computed on a GPU here, and what to do about it; empty if it works.

    Where onnxruntime cannot set up CUDA it would log a warning and go on with the CPU.
    """
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        return (
            f"the onnxruntime {ort.__version__} installed here has no CUDA: "
            "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu>=1.31.1'"
        )
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return f"there is no NVIDIA driver on this machine ({_DRIVER} cannot be loaded)"
    with one_at_a_time():
        told = _preload(ort)
        if "Please follow" in told:  # a library is missing; onnxruntime would now log what it has just said
            return f"CUDA does not work here ({one_line(told)}); libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        try:
            ort.OrtValue.ortvalue_from_shape_and_type([1], 1, "cuda", 0)
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            return f"CUDA does not work here ({one_line(told or error)})"
    return ""


def _preload(ort: Any) -> str:
    """Load CUDA's libraries from where pip puts them. Returns what onnxruntime prints if some are missing."""
    said: list[str] = []
    ort.print = lambda *what, **_: said.append(" ".join(map(str, what)))  # that module's alone: stdout is the process's
    try:
        ort.preload_dlls()
    except Exception as error:  # older releases raise on folders that they do not know
        return str(error)
    finally:
        del ort.print
    return "\n".join(said)
