"""Where to compute, and what is said where that cannot be: with stand-ins for what this machine does not have."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from ramekin import Engine, ModelFormatError, ProviderError
from ramekin.cli import main
from ramekin.cuda_model import RECORDED
from ramekin.device_thread import one_at_a_time
from ramekin.manifest import ENCODER, MANIFEST, Manifest
from ramekin.provider import choose_provider, cuda_problem
from ramekin.session import open_session
from tests.runtime.conftest import CUDA_MODEL, RUNS_CUDA_GRAPHS, TINY_MODEL

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class Ort:
    """An onnxruntime built for GPUs, which works or says why not."""

    __version__ = "1.31.1"

    def __init__(self, failure: str = "", missing: str = "") -> None:
        self.OrtValue = SimpleNamespace(ortvalue_from_shape_and_type=self._allocate)
        self._failure, self._missing = failure, missing

    def _allocate(self, *_: object) -> None:
        if self._failure:
            raise RuntimeError(self._failure)

    def preload_dlls(self) -> None:
        if self._missing:
            self.print(self._missing)

    print: Any = staticmethod(print)  # as a module has it that defines none

    @staticmethod
    def get_available_providers() -> list[str]:
        return [CUDA, CPU]


def opening_with(opened: Callable[..., Any]) -> SimpleNamespace:
    """An onnxruntime that opens sessions so."""
    return SimpleNamespace(
        SessionOptions=onnxruntime.SessionOptions,
        GraphOptimizationLevel=onnxruntime.GraphOptimizationLevel,
        InferenceSession=opened,
    )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NVIDIA driver."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name)


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """None."""

    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)


@pytest.mark.usefixtures("driver")
def test_cuda_where_it_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_provider(Ort(), "cuda", ("cuda",), "bf16") == ("cuda", "")
    assert choose_provider(Ort(), "auto", ("cuda", "cpu"), "fp32-cuda") == ("cuda", "")
    assert choose_provider(Ort(), "cpu", ("cuda", "cpu"), "fp32-cuda") == ("cpu", "")
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("driver")
def test_models_that_are_loaded_at_once_leave_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """What onnxruntime prints is caught, what others print meanwhile is not."""
    before, began, go_on = sys.stdout, [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    class Slow(Ort):
        def __init__(self, number: int) -> None:
            super().__init__()
            self._number = number

        def preload_dlls(self) -> None:
            self.print("Please follow these steps" * (self._number == 0))
            began[self._number].set()
            go_on[self._number].wait(10)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cuda_problem, Slow(0))
        assert began[0].wait(10)
        second = pool.submit(cuda_problem, Slow(1))
        began[1].wait(0.2)
        assert sys.stdout is before
        print("of this thread")
        go_on[0].set()
        assert first.result().startswith("CUDA does not work here (Please follow")
        go_on[1].set()
        assert second.result() == ""
    assert sys.stdout is before
    assert capsys.readouterr().out == "of this thread\n"


@pytest.mark.usefixtures("driver")
def test_the_gpu_itself_is_tried_once_its_libraries_are_loaded() -> None:
    done: list[Any] = []

    class Watched(Ort):
        def _allocate(self, *arguments: object) -> None:
            done.append(arguments)

        def preload_dlls(self) -> None:
            done.append("preloaded")

    assert cuda_problem(Watched()) == ""
    assert done == ["preloaded", ([1], 1, "cuda", 0)]


@pytest.mark.usefixtures("driver")
def test_the_gpu_is_not_tried_while_another_thread_asks_something_of_it() -> None:
    """Which might be recording, and would be spoiled."""
    began = threading.Semaphore(0)

    class Watched(Ort):
        def preload_dlls(self) -> None:
            began.release()

        def _allocate(self, *_: object) -> None:
            assert one_at_a_time()._is_owned()

    with ThreadPoolExecutor(1) as pool:
        with one_at_a_time():
            problem = pool.submit(cuda_problem, Watched())
            assert not began.acquire(timeout=0.2)
        assert problem.result() == ""


@pytest.mark.usefixtures("no_driver")
def test_no_driver() -> None:
    with pytest.raises(ProviderError, match=r"cannot compute on cuda: there is no NVIDIA driver on this machine"):
        choose_provider(Ort(), "cuda", ("cuda", "cpu"), "fp32-cuda")
    provider, reason = choose_provider(Ort(), "auto", ("cuda", "cpu"), "fp32-cuda")
    assert provider == "cpu"
    assert "no NVIDIA driver" in reason
    with pytest.raises(ProviderError, match=r"bf16 graphs are for CUDA only.*--precision int8.*no NVIDIA driver"):
        choose_provider(Ort(), "auto", ("cuda",), "bf16")


@pytest.mark.usefixtures("driver")
def test_missing_libraries_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """What onnxruntime prints goes into the error, not to stdout."""
    ort = Ort(missing="Failed to load libcublasLt.so.13: cannot open\nPlease follow https://onnxruntime.ai to install")
    problem = cuda_problem(ort)
    assert "libcublasLt.so.13" in problem
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in problem
    assert "\n" not in problem
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("driver")
def test_libraries_in_folders_that_onnxruntime_does_not_know() -> None:
    """What it says of them goes before the failure that comes of it; and its own `print` is as before."""

    class Older(Ort):
        def preload_dlls(self) -> None:
            raise FileNotFoundError("no folder cudnn")

    ort = Older("CUDA failure 999")
    assert cuda_problem(ort) == "CUDA does not work here (no folder cudnn)"
    assert cuda_problem(Older()) == ""
    assert "print" not in vars(ort)


@pytest.mark.usefixtures("driver")
def test_a_driver_without_a_gpu() -> None:
    problem = cuda_problem(Ort("CUDA failure 100: no CUDA-capable device is detected ; GPU=0"))
    assert "no CUDA-capable device is detected" in problem


def test_onnxruntime_for_the_cpu() -> None:
    ort = SimpleNamespace(__version__="1.32.0", get_available_providers=lambda: [CPU])
    with pytest.raises(ProviderError, match=r"onnxruntime 1\.32\.0 installed here has no CUDA.*onnxruntime-gpu>=1\.31"):
        choose_provider(ort, "cuda", ("cuda",), "bf16")


@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
def test_graphs_for_the_cpu_name_what_to_export(precision: str) -> None:
    with pytest.raises(ProviderError, match=rf"{precision} graphs are for the CPU only .*--precision bf16.*fp16"):
        choose_provider(Ort(), "cuda", ("cpu",), precision)
    assert choose_provider(Ort(), "auto", ("cpu",), precision) == ("cpu", f"this model's {precision} graphs are for the CPU")


def test_a_silent_fall_to_the_cpu_is_an_error() -> None:
    """onnxruntime logs that it cannot set up CUDA, and opens the session on the CPU."""

    def opened(*_: object, **__: object) -> Any:
        return SimpleNamespace(get_providers=lambda: [CPU], get_inputs=list, get_outputs=list)

    ort = opening_with(opened)
    files = frozenset(Manifest.load(CUDA_MODEL).files)
    with pytest.raises(ProviderError, match="fell back to CPUExecutionProvider instead of cuda"):
        open_session(ort, CUDA_MODEL / ENCODER, files, "cuda", 1, rests=True)


def test_settings_reach_the_provider() -> None:
    """But not the CPU; and memory that was recorded stays where it is."""
    seen: list[Any] = []
    given: list[Any] = []

    def opened(_: str, options: Any, providers: list[Any], **__: object) -> Any:
        seen.extend(providers)
        given.append(options)
        return SimpleNamespace(get_providers=lambda: [CUDA, CPU], get_inputs=list, get_outputs=list)

    ort = opening_with(opened)
    files = frozenset(Manifest.load(CUDA_MODEL).files)
    for provider, settings in (("cuda", {"device_id": "0"}), ("cuda", RECORDED), ("cpu", RECORDED)):
        open_session(ort, CUDA_MODEL / ENCODER, files, provider, 1, rests=False, settings=settings)
    assert seen == [(CUDA, {"device_id": "0"}), (CUDA, {"enable_cuda_graph": "1"}), (CPU, {})]
    assert [each.enable_mem_pattern for each in given] == [True, False, True]
    found = [each.get_session_config_entry("session.disable_cpu_ep_fallback") for each in given[:2]]
    assert found == ["1", "1"]
    assert {each.graph_optimization_level for each in given} == {onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC}
    assert {each.log_severity_level for each in given} == {4}


def test_threads_rest_after_a_run_where_another_session_runs_next() -> None:
    given: list[Any] = []

    class Opened(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, path: str, options: Any, **rest: Any) -> None:
            given.append(options)
            super().__init__(path, options, **rest)

    ort = opening_with(Opened)
    files = frozenset(Manifest.load(TINY_MODEL).files)
    for rests in (True, False):
        open_session(ort, TINY_MODEL / ENCODER, files, "cpu", 1, rests=rests)
    assert given[0].get_session_config_entry("session.force_spinning_stop") == "1"
    with pytest.raises(RuntimeError, match="force_spinning_stop"):  # there is none
        given[1].get_session_config_entry("session.force_spinning_stop")


@pytest.mark.parametrize("host_has_threads", [False, True])
def test_onnxruntime_is_not_let_fall_back(host_has_threads: bool) -> None:
    calls: list[Any] = []

    def opened(*_: object, **given: Any) -> Any:
        calls.append(given)
        if host_has_threads and len(calls) == 1:
            raise RuntimeError("... use_per_session_threads ...")
        return SimpleNamespace(get_providers=lambda: [CUDA, CPU], get_inputs=list, get_outputs=list)

    ort = opening_with(opened)
    files = frozenset(Manifest.load(CUDA_MODEL).files)
    open_session(ort, CUDA_MODEL / ENCODER, files, "cuda", 1, rests=True, settings={"device_id": "0"})
    assert calls == [{"providers": [(CUDA, {"device_id": "0"})], "enable_fallback": 0}] * (1 + host_has_threads)


@RUNS_CUDA_GRAPHS
def test_engines_tell_where_they_compute() -> None:
    engine = Engine.load(CUDA_MODEL, provider="auto")
    assert engine.provider in ("cpu", "cuda")
    assert bool(engine.not_on_cuda) == (engine.provider == "cpu")
    assert Engine.load(TINY_MODEL).provider == "cpu"
    with pytest.raises(ValueError, match="provider must be one of cpu, cuda, auto, not 'tpu'"):
        Engine.load(TINY_MODEL, provider="tpu")


@RUNS_CUDA_GRAPHS
def test_cuda_works_here_or_says_why_not() -> None:
    """With any build of onnxruntime, on any machine: in one line on stderr, whatever onnxruntime logs."""
    command = [sys.executable, "-m", "ramekin", "generate", str(CUDA_MODEL), "--provider", "cuda", "--max-new-tokens", "4"]
    done = subprocess.run(command, input="a paper", capture_output=True, text=True, check=False)
    if done.returncode == 0:
        assert done.stderr == ""
        return
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("ramekin: cannot compute on cuda: ")
    gpu_build = CUDA in onnxruntime.get_available_providers()
    assert ("pip install 'onnxruntime-gpu>=" in done.stderr) == (not gpu_build)


@RUNS_CUDA_GRAPHS
def test_the_command_says_what_auto_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("a paper")
    for model, options, told in (
        (CUDA_MODEL, [], True),
        (CUDA_MODEL, ["--provider", "auto"], True),
        (CUDA_MODEL, ["--provider", "cpu"], False),
        (TINY_MODEL, [], False),
        (TINY_MODEL, ["--provider", "auto"], True),
    ):
        main(["generate", str(model), str(tmp_path / "prompt.txt"), "--max-new-tokens", "2", "--seed", "1", *options])
        assert ("ramekin: computing on c" in capsys.readouterr().err) == told


def test_only_graphs_for_cuda_are_computed_there(tmp_path: Path) -> None:
    raw = json.loads((TINY_MODEL / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**raw, "providers": ["cuda"]}))
    with pytest.raises(ModelFormatError, match="graphs of the layout 'ramekin' cannot be computed on cuda"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("providers", [[], ["tpu"], ["cpu", "tpu"], "cpu"])
def test_a_manifest_with_strange_providers(providers: object, tmp_path: Path) -> None:
    raw = json.loads((CUDA_MODEL / MANIFEST).read_text())
    raw["providers"] = providers
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ModelFormatError, match="providers must name one or more of cpu, cuda"):
        Manifest.load(tmp_path)
