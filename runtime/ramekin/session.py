"""ONNX Runtime sessions: which version, how many threads, and a look at a graph before it is run."""

from __future__ import annotations

import importlib
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ramekin.errors import ModelFormatError, ProviderError, RamekinError, RuntimeVersionError, one_line
from ramekin.manifest import PROVIDERS, VersionRange
from ramekin.onnxfile import external_locations

LIMITS = "this process gets no more threads or files; look at `ulimit -u`, `ulimit -n` and the container's limit of pids"
MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))  # more is a slip of the finger, and looks like a hang


def onnxruntime(supported: VersionRange) -> Any:
    """The onnxruntime module, imported here and now.

    Raises:
        RuntimeVersionError: it is not installed, or of a version that the graphs were not tried with.
    """
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise RuntimeVersionError(f"onnxruntime cannot be imported ({error}): pip install onnxruntime") from error
    if not hasattr(module, "__version__"):  # a folder that somebody left
        raise RuntimeVersionError("onnxruntime is not whole: pip install --force-reinstall onnxruntime")
    if module.__version__ not in supported:
        package = "onnxruntime-gpu" if PROVIDERS["cuda"] in module.get_available_providers() else "onnxruntime"
        raise RuntimeVersionError(
            f"{package} {module.__version__} is not supported by this model: pip install '{package}{supported}'"
        )
    return module


def about_memory(error: Exception) -> bool:
    """Whether onnxruntime failed for want of memory, which its errors tell by their texts alone."""
    signs = ("out of memory", "failed to allocate", "alloc_failed", "bad_alloc")
    return any(sign in " ".join(str(error).split()).lower() for sign in signs)


def about_limits(error: Exception) -> bool:
    """Whether the system gave no more threads or files, which is not the model's fault."""
    signs = ("pthread_create", "start new thread", "too many open files", "systemerror : 24")
    return any(sign in str(error).lower() for sign in signs)


def failure(error: Exception, hint: str = "; `ramekin verify` tells whether the model is intact") -> RamekinError:
    """What to tell of a run that onnxruntime ended with an error, and what to do about it."""
    reason = one_line(error)
    if about_memory(error):
        return RamekinError(f"not enough memory; ask for fewer or shorter samples, or give a shorter prompt ({reason})")
    if about_limits(error):
        return RamekinError(f"{LIMITS} ({reason})")
    return RamekinError(f"onnxruntime failed: {reason}{hint}")


def usable_cores(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may really use: its CPU affinity, cut to its cgroup's CPU quota (rounded up).

    Source: the kernel's documentation of cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`).
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    quotas = []
    for folder in _cgroup_folders(proc, cgroup):
        try:
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()[:2]
            else:
                quota, period = ((folder / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period"))
            if quota.strip() != "max" and int(quota) > 0:
                quotas.append(math.ceil(int(quota) / int(period)))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return max(1, min([cores, *quotas]))


def _cgroup_folders(proc: Path, cgroup: Path) -> list[Path]:
    """This process's cgroup and all above it, each of which may hold a quota."""
    folders = [cgroup, cgroup / "cpu"]
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        root = cgroup if not controllers else cgroup / "cpu"
        if not controllers or "cpu" in controllers.split(","):
            parts = [part for part in path.split("/") if part not in ("", "..")]
            folders += [root.joinpath(*parts[: end + 1]) for end in range(len(parts))]
    return folders


def open_session(
    ort: Any,
    path: Path,
    files: frozenset[str],
    provider: str,
    threads: int,
    rests: bool,
    fuse: bool = False,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """Open one graph of a model folder.

    Each session has threads of its own. A pool for the whole process would spare a few, but once one exists, every
    other onnxruntime session in the process fails unless it asks for that pool: a library must not do that to its host.

    Args:
        ort: the onnxruntime module.
        path: the `.onnx` file.
        files: names of the folder's files; weights may lie in no other place.
        provider: a key of `PROVIDERS`.
        threads: how many threads compute, at least 1.
        rests: let the threads sleep as soon as a run ends, since another session runs next.
        fuse: let onnxruntime fuse operators; ours are fused already, and looking for more only takes time.
        settings: options of a provider other than the CPU.

    Raises:
        ProviderError: onnxruntime opened it, but not on this provider.
        RamekinError: there is not enough memory for it.
        ModelFormatError: the file is not a graph that onnxruntime can load, or asks for files outside the folder.
    """
    try:
        strangers = external_locations(_mapped(path)) - files
    except ValueError as error:
        raise ModelFormatError(f"{path}: not an ONNX file ({error}); export the model again") from None
    if strangers:
        raise ModelFormatError(f"{path}: asks for weights in {min(strangers)!r}, which is not a file of this model")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ModelFormatError(f"{path}: onnxruntime opens no path that is not valid text; rename the folder") from None
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what is an error for onnxruntime is raised, and told by us
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fuse else levels.ORT_ENABLE_BASIC
    if rests:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # not for single nodes either
    given = {} if provider == "cpu" else dict(settings)
    options.enable_mem_pattern = "enable_cuda_graph" not in given  # planned anew, memory must not move under a recording
    try:
        session = _create(ort, path, options, (PROVIDERS[provider], given))
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        reason = one_line(error)
        if about_memory(error):
            raise RamekinError(f"{path}: not enough memory to load this graph ({reason})") from error
        if about_limits(error):
            raise RamekinError(f"{path}: {LIMITS} ({reason})") from error
        raise ModelFormatError(f"{path}: onnxruntime cannot load this graph: {reason}") from error
    try:
        for each in (*session.get_inputs(), *session.get_outputs()):
            str(each)  # its names are decoded only when they are asked for
    except UnicodeDecodeError as error:
        raise ModelFormatError(f"{path}: a name in it is not UTF-8 ({error}); export the model again") from None
    if PROVIDERS[provider] not in session.get_providers():
        raise ProviderError(f"{path}: onnxruntime fell back to {', '.join(session.get_providers())} instead of {provider}")
    return session


def _mapped(path: Path) -> mmap.mmap:
    """A file's bytes without reading them all: other exporters leave gigabytes of weights in it."""
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _create(ort: Any, path: Path, options: Any, provider: tuple[str, dict[str, str]]) -> Any:
    try:
        return ort.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
    except RuntimeError as error:
        if "use_per_session_threads" not in str(error):
            raise
        options.use_per_session_threads = False  # the host has made a pool for the whole process: use that
        return ort.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
