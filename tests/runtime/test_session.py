from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ramekin import Engine, RuntimeVersionError, session
from ramekin.cli import main
from ramekin.errors import ModelFormatError, RamekinError
from ramekin.options import open_engine
from ramekin.session import usable_cores
from tests.runtime.conftest import TINY_MODEL

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(tmp_path: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "proc", tmp_path / "cgroup"


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        (
            "4:cpu,cpuacct:/docker/x\n",
            {"cpu/docker/x/cpu.cfs_quota_us": "100000", "cpu/docker/x/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("4:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),  # more than one core is two
        ("0::/a\n", {"cpu.max": "900000 100000", "a/cpu.max": "100000 100000"}, 1),
        ("0::/a\n", {"cpu.max": "100000 100000", "a/cpu.max": "900000 100000"}, 1),
        ("0::/\n", {"cpu.max": "rubbish"}, None),
        ("rubbish\n", {}, None),
    ],
)
def test_cores_within_the_quota(tmp_path: Path, cgroup: str, files: dict[str, str], limit: int | None) -> None:
    expected = CORES if limit is None else min(CORES, limit)
    assert usable_cores(*machine(tmp_path, cgroup, files)) == expected


def test_no_proc_at_all(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none", tmp_path / "none") == CORES


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        ("pthread_create failed, error code: 11", RamekinError, "gets no more threads or files"),
        ("SystemError : 24", RamekinError, "gets no more threads or files"),
        ("bad_alloc", RamekinError, "not enough memory"),
        ("no such operator", ModelFormatError, "cannot load this graph"),
    ],
)
def test_what_is_not_the_models_fault(
    said: str, kind: type[RamekinError], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("ramekin.session._create", fails)
    with pytest.raises(RamekinError, match=told) as failed:
        Engine.load(TINY_MODEL)
    assert type(failed.value) is kind


def test_threads_are_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[int] = []

    def created(ort: Any, path: Path, options: Any, provider: Any) -> Any:
        given.append(options.intra_op_num_threads)
        return create(ort, path, options, provider)

    create = session._create
    monkeypatch.setattr(session, "_create", created)
    Engine.load(TINY_MODEL, threads=3)
    Engine.load(TINY_MODEL)
    (tmp_path / "prompt").write_text("x")
    main(["generate", str(TINY_MODEL), str(tmp_path / "prompt"), "--threads", "3"])
    assert given == [3, 3, usable_cores(), usable_cores(), 3, 3]


def test_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", fails)
    with pytest.raises(RamekinError, match="gets no more threads or files"):
        Engine.load(TINY_MODEL)


def test_a_package_of_which_only_the_folder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime").mkdir()
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(RuntimeVersionError, match="onnxruntime is not whole"):
        open_engine(TINY_MODEL, provider=None, threads=None)


def test_a_command_calls_nobody_and_a_library_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime 1.30 keeps an identifier in HOME and calls its makers, unless this is set before it is imported."""
    program = "import os, sys; from ramekin.cli import main; main({}); print(os.environ.get('ORT_DISABLE_TELEMETRY'))"
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    for arguments, value in (("", "1"), ("['--version']", "None")):
        command = [sys.executable, "-c", program.format(arguments), "--version"]
        assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[-1] == value
