"""How commands stop: whole lines, and once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramekin.cli import main
from ramekin.stopping import Stopping
from tests.runtime.conftest import TINY_MODEL

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends signals")
HANDLED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture
def stopping() -> Iterator[Stopping]:
    before = {number: signal.getsignal(number) for number in HANDLED}
    for number in HANDLED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with Stopping() as result:
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
    with Stopping():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_command_that_was_not_stopped_leaves_handlers_as_they_were() -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    main(["--version"])
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_a_command_that_does_not_end_can_be_ended() -> None:
    code = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from ramekin.stopping import Stopping
with Stopping():
    try:
        print("ready", flush=True); time.sleep(60)
    finally:
        print("clearing", flush=True); time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "clearing\n"
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT


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
