"""How commands stop: in whole lines, in order, and at once for who insists."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ramekin.cli import main
from ramekin.stopping import Stopping
from tests.runtime.conftest import TINY_MODEL

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends signals")
HANDLED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stopping]:
    monkeypatch.setattr("ramekin.stopping._PATIENCE", 1e9)  # else a slow machine would end pytest
    before = {number: signal.getsignal(number) for number in HANDLED}
    for number in HANDLED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with Stopping(ends=False) as result:
        yield result
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HANDLED)
def test_the_first_signal_stops_and_the_next_do_not_disturb(stopping: Stopping, number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stopped:
        signal.raise_signal(number)
    if number != signal.SIGINT:
        assert stopped.value.code == 128 + number
    for each in HANDLED:
        signal.raise_signal(each)


def test_what_is_whole_is_not_stopped_half_way(stopping: Stopping) -> None:
    done = []

    def write() -> None:
        with stopping.whole():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(SystemExit) as stopped:
        write()
    assert stopped.value.code == 143
    assert done
    with stopping.whole():  # it has stopped; what is finished can still be written
        done.append("more")
    assert len(done) == 2


def test_a_handler_of_the_host_stays(stopping: Stopping) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with Stopping(ends=True):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_command_that_was_not_stopped_leaves_handlers_as_they_were() -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    main(["--version"])
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_a_command_that_does_not_end_can_be_ended() -> None:
    code = """
import signal, time
from ramekin import stopping
signal.signal(signal.SIGINT, signal.default_int_handler)
with stopping.Stopping(ends=True):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        signal.raise_signal(signal.SIGINT)  # too early to be heard
        stopping._PATIENCE = 0
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            print("twice", flush=True)
            signal.raise_signal(signal.SIGINT)
    print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "twice\n", "")


def test_a_line_that_nobody_reads_can_be_cut() -> None:
    code = """
import signal
from ramekin import stopping
signal.signal(signal.SIGTERM, signal.SIG_DFL)
stopping._PATIENCE = 0
with stopping.Stopping(ends=True) as command, command.whole():
    signal.raise_signal(signal.SIGTERM)
    print("waiting", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "waiting\n", "")


@pytest.mark.parametrize("ends", [True, False])
def test_only_a_process_that_ends_is_deaf(ends: bool) -> None:
    code = f"""
import signal
from ramekin.stopping import Stopping
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with Stopping(ends={ends}):
        signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print(signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.default_int_handler))
    print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, signal.alarm(0) > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"True\n{ends} {ends}\n"


def test_an_error_goes_before_a_stop(stopping: Stopping) -> None:
    def write() -> None:
        with stopping.whole():
            signal.raise_signal(signal.SIGTERM)
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write()


def test_whole_things_may_have_whole_parts(stopping: Stopping) -> None:
    done = []

    def write() -> None:
        with stopping.whole():
            for part in range(3):
                with stopping.whole():
                    signal.raise_signal(signal.SIGTERM)
                done.append(part)

    with pytest.raises(SystemExit):
        write()
    assert done == [0, 1, 2]


SWALLOWS = """
import signal, time
stopped = False
try:
    signal.raise_signal({})
except BaseException:
    stopped = True
"""


@pytest.mark.parametrize("number", HANDLED)
def test_a_module_is_loaded_to_its_end(
    stopping: Stopping, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extension modules drop what is raised while they load, and the command would go on as if nobody had asked."""
    (tmp_path / f"swallows_{number}.py").write_text(SWALLOWS.format(int(number)))
    monkeypatch.syspath_prepend(tmp_path)
    assert not importlib.import_module(f"swallows_{number}").stopped
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as ended:
        time.sleep(30)
    assert time.monotonic() - began < 20  # it is woken
    assert number == signal.SIGINT or ended.value.code == 128 + number  # type: ignore[union-attr]


def test_a_module_that_loads_for_ever_can_be_ended(tmp_path: Path) -> None:
    """By the third signal, as anything else."""
    (tmp_path / "hangs.py").write_text("import time\nprint('loading', flush=True)\nwhile True: time.sleep(0.01)\n")
    program = (
        f"import signal, sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import ramekin.stopping; ramekin.stopping._PATIENCE = 0.1\n"
        "with ramekin.stopping.Stopping(ends=True): import hangs"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        for _ in range(3):
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        assert process.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.parametrize("number", HANDLED)
def test_a_command_that_is_over_before_a_signal_is_raised_again(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host hears it there, and not in the middle of something of its own."""
    (tmp_path / f"over_{number}.py").write_text(SWALLOWS.format(int(number)))
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def command(failure: type[OSError] | None) -> None:
        sys.modules.pop(f"over_{number}", None)
        with Stopping(ends=False):
            importlib.import_module(f"over_{number}")
            if failure:
                raise failure

    try:
        for failure in (None, OSError):
            with pytest.raises(failure or (KeyboardInterrupt, SystemExit)):
                command(failure)
            time.sleep(0.2)  # nothing comes any more
    finally:
        signal.signal(number, before)


def test_no_thread_to_raise_it_again(stopping: Stopping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("can't start new thread")

    (tmp_path / "at_once.py").write_text(SWALLOWS.format(int(signal.SIGTERM)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("threading.Thread.start", fails)
    assert importlib.import_module("at_once").stopped


def test_a_host_that_runs_commands_while_it_is_loaded(tmp_path: Path) -> None:
    """It is stopped at once: the module that is loading is not one of the command's."""
    (tmp_path / "host.py").write_text(
        "import signal\n"
        "from ramekin.stopping import Stopping\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job is deaf to it
        "with Stopping(ends=False):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('not at once')\n"
        "print('went on')\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import host"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == ""
    assert "KeyboardInterrupt" in done.stderr


def test_a_thread_that_cannot_listen() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, ["--version"]).result() is None


@pytest.mark.parametrize("unbuffered", ["", "1"])  # as container images set it
@pytest.mark.parametrize("number", HANDLED)
def test_a_slow_reader_gets_whole_lines(number: signal.Signals, unbuffered: str, tmp_path: Path) -> None:
    """The first line is longer than a pipe holds: the signal comes while it is being written."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"a prompt"\n' * 40)
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell begin with it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup's with this one
from ramekin.cli import main
options = "-n 300 --max-new-tokens 50 --min-new-tokens 50 --seed 1 --json".split()
main(["generate", {str(TINY_MODEL)!r}, {str(prompts)!r}, *options])
"""
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment) as process:
        assert process.stdout
        first = os.read(process.stdout.fileno(), 1)
        time.sleep(0.5)  # until the pipe is full
        process.send_signal(number)
        time.sleep(0.1)
        out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number), err
    lines = (first + out).decode().splitlines()
    assert len(lines[0]) > 1 << 16
    assert len(lines) < 40
    for line in map(json.loads, lines):
        assert len(line["samples"]) == 300 or line["interrupted"]
    assert out.endswith(b"\n")
