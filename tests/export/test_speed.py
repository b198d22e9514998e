"""The benchmarks' machinery: fresh processes, taking up again, failures, lengths, the page."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import machine, results, speed
from benchmarks.__main__ import cli
from benchmarks.engines import ENGINES, LEVERS, Clock, Entry
from benchmarks.engines.ours import make
from benchmarks.goals import Goal, section
from benchmarks.jobs import NATURAL, QUICK, Request, forced
from benchmarks.results import good_runs, read, times_as_long
from benchmarks.speed import Plan, _job_time
from benchmarks.speed_page import page, summary
from ramekin_export.cli import EXAMPLES

_GOAL = Goal("16 samples", goal=25.0, floor=13.0, unit="x", reached=None)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def plan(work: Path) -> Plan:
    return Plan(
        model="demo",
        random=False,
        checkpoint=EXAMPLES / "checkpoint",
        work=work,
        engines=("ramekin int8", "transformers fp32"),
        jobs={"120 n=4 natural": QUICK["120 n=4 natural"]},
        rounds=2,
        threads=1,
        limit_s=60,
        pythons={},
    )


def test_each_engine_in_turn_and_taken_up_again(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "_commit", lambda: {"commit": "0"})
    out = tmp_path / "results.jsonl"
    speed.run(replace(plan, rounds=1), out)
    first = read(out)
    out.write_text(out.read_text() + '{"engine": "a line that was cut')
    speed.run(plan, out)
    assert "its last line was cut" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == len(read(out))  # nothing was glued to it
    rows = read(out)
    assert rows[: len(first)] == first  # nothing is measured twice
    calls = [(row["call"], row["round"]) for row in rows if "engine" in row]
    assert calls[0] == calls[1]
    assert calls[2] == calls[3]
    assert {row["call"] for row in rows if "commit" in row} == {row["call"] for row in rows if "engine" in row}
    runs = [(row["round"], row["engine"]) for row in rows if "engine" in row]
    assert runs == [(0, "ramekin int8"), (0, "transformers fp32"), (1, "ramekin int8"), (1, "transformers fp32")]
    for name, other in (("model", "large"), ("threads", 2), ("random", True)):
        with pytest.raises(SystemExit, match=f"is of another {name}"):
            speed.run(replace(plan, **{name: other}), out)
    for row in rows:
        if "engine" in row:
            assert "error" not in row
            assert row["limit_s"] == 60
            assert [len(ends) for ends in row["requests"]] == [12]  # the longest sample
            assert row["cold_start_s"] > row["import_s"] + row["load_s"] > 0
            assert row["peak_mb"] > 50
    made = page(out, tmp_path / "plots") if _has_matplotlib() else page(out)
    assert "| | job | in turn with ramekin int8 | first token |" in made
    turns = [row for row in rows if "engine" in row]
    ratios = [theirs["job_s"] / mine["job_s"] for mine, theirs in zip(turns[::2], turns[1::2], strict=True)]
    assert re.search(rf"\| transformers fp32 \| .* s ± .* \| {sum(ratios) / 2:.2f} x \|", made)
    assert "120 n=4 natural" in made


@pytest.mark.parametrize("cut", [False, True])
def test_a_file_that_is_added_to_ends_with_a_whole_line(cut: bool, tmp_path: Path) -> None:
    head = {"machine": {}, "model": "m", "random": False, "threads": 1}
    out = tmp_path / "results.jsonl"
    out.write_text(json.dumps(head) + '\n{"round": 0}'[: -1 if cut else None])
    results.Results(out, head).add({"round": 1})
    assert [row["round"] for row in read(out) if "round" in row] == ([1] if cut else [0, 1])
    with pytest.raises(SystemExit, match="choose another one"):
        results.Results(out, {**head, "machine": 1})
    (tmp_path / "text").write_text('{"name": "no results"}\n')
    with pytest.raises(SystemExit, match="does not begin like"):
        results.Results(tmp_path / "text", head)


def test_an_engine_that_could_not_be_prepared_is_tried_again(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no such package")

    out, once = tmp_path / "results.jsonl", replace(plan, engines=("transformers fp32",), rounds=1)
    with monkeypatch.context() as patch:
        patch.setattr(speed, "installed", fails)
        speed.run(once, out)
    assert not good_runs(read(out))
    with pytest.raises(ValueError, match="nothing that ran"):
        page(out)
    speed.run(once, out)
    assert "| transformers fp32 |" in page(out).split("## Sizes and versions")[1]


@pytest.mark.parametrize(
    ("worker", "told"),
    [
        ("import os; print('a warning', file=__import__('sys').stderr); os.kill(os.getpid(), 9)", "SIGKILL"),
        ("pass", "without a result"),
        ("raise SystemExit('out of luck')", "out of luck"),
    ],
)
def test_a_worker_that_ends_without_a_result(worker: str, told: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    python = Path(sys.executable)
    monkeypatch.setattr(Plan, "python", lambda *_: python)
    real = subprocess.run
    monkeypatch.setattr(speed.subprocess, "run", lambda command, **more: real([command[0], "-c", worker], **more))
    assert told in speed._run(plan, "transformers fp32", plan.jobs["120 n=4 natural"])["error"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_command_that_is_ended_leaves_no_worker(tmp_path: Path) -> None:
    """It would compute on beside the next run, and be timed with it."""
    command = [sys.executable, "-m", "benchmarks", "run", "--quick", "--engine", "transformers fp32", "--rounds", "1"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "out.jsonl")], cwd=EXAMPLES.parent, stderr=subprocess.PIPE
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        worker, end = "", time.monotonic() + 60
        while not worker and time.monotonic() < end and process.poll() is None:
            with suppress(OSError):  # a child that has just ended
                found = [Path(f"/proc/{child}/cmdline") for child in children.read_text().split()]
                worker = next((str(each.parent) for each in found if b"benchmarks.worker" in each.read_bytes()), "")
        time.sleep(1)  # a process that is just being started is not known to the one that starts it
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert worker
    assert not Path(worker).exists()


def test_jobs_whose_samples_leave_are_not_cut(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[dict[str, Any]] = []
    monkeypatch.setattr(
        speed, "_order", lambda _plan, _engine, order, **_: orders.append(order) or {"requests": [[1.0] * 12]}
    )
    for job in ("120 n=4", "120 n=4 natural"):
        assert not speed._run(plan, "ramekin int8", QUICK[job])["cut"]
    assert orders[0]["limit_s"] == plan.limit_s
    assert orders[1]["limit_s"] > 10 * plan.limit_s


def test_results_of_another_machine_are_not_added_to(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    out.write_text(json.dumps({"machine": {"processor": "Z80"}}) + "\n")
    with pytest.raises(SystemExit, match="another machine"):
        speed.run(plan, out)


@pytest.mark.parametrize(("granted", "level"), [(True, "amx"), (False, "vnni")])
def test_amx_that_the_system_refuses_does_not_count(granted: bool, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: "model name: Z80\nflags: avx2 avx512_vnni amx_int8\n")
    monkeypatch.setattr(machine, "_amx_granted", lambda: granted)
    assert machine.level() == level


def test_one_that_fails_does_not_lose_the_others(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "broken", Entry("no_such_engine", {}, ("numpy",), ("numpy",)))
    out = tmp_path / "results.jsonl"
    speed.run(replace(plan, engines=("broken", "ramekin int8"), rounds=1), out)
    runs = {row["engine"]: row for row in read(out) if "engine" in row}
    assert "broken" in runs["broken"]["error"]  # the worker does not know it
    assert runs["ramekin int8"]["job_s"] > 0
    assert "- broken, 120 n=4 natural: " in page(out)


@pytest.mark.parametrize("name", list(LEVERS))
def test_every_combination_of_levers_runs(name: str, plan: Plan) -> None:
    requests = plan.jobs["120 n=4 natural"]
    assert speed._prepared(plan, name)
    result = speed._run(plan, name, requests)
    assert result.get("error") is None
    assert [len(ends) for ends in result["requests"]] == [max(requests[0].lengths)]


def test_a_job_that_was_cut_is_extrapolated_from_its_last_steps() -> None:
    whole = _job_time([[2.0, 3.0, 4.0]], forced(9, 4, tokens=3))
    assert whole == {"job_s": 4.0, "cut": False}
    cut = _job_time([[2.0, 3.0, 4.0]], forced(9, 4, tokens=10))
    assert cut == {"job_s": 11.0, "cut": True}
    half = _job_time([[2.0, 3.0]], (Request(9, (2,)), Request(9, (2,))))
    assert half == {"job_s": 6.0, "cut": True}


def test_a_clock_that_is_over() -> None:
    assert not any(Clock(60).tick() for _ in range(20))
    late = Clock(-1)
    assert [late.tick() for _ in range(12)] == [False] * 10 + [True] * 2  # so that there are steps to extrapolate from


def test_forced_ends_keep_no_prompts_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the peak of many papers in a row would be the harness's, not the engine's."""
    ours, caches = make("int8"), []
    ours.prepare(EXAMPLES / "checkpoint", tmp_path / "model")
    ours.load(EXAMPLES / "checkpoint", tmp_path / "model", 1)
    engine = ours._engine
    assert engine
    new_cache = engine.model.new_cache

    def watched(*arguments: Any) -> Any:
        cache = new_cache(*arguments)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(engine.model, "new_cache", watched)
    gc.collect()
    gc.disable()
    try:
        ours.run([5, 6, 1], (5, 3, 4), Clock(60))
        assert [cache() is None for cache in caches] == [True]
    finally:
        gc.enable()


def test_goals_from_our_own_figures(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure that has a ceiling stands below it, and a second call measures nothing twice."""
    monkeypatch.setattr(speed, "OWN_SOURCES", (900,))
    ours = replace(plan, engines=("ramekin int8",))
    out, own = tmp_path / "results.jsonl", tmp_path / "results-own.jsonl"
    speed.run_own(ours, own)
    first = own.read_text()
    speed.run_own(ours, own)
    assert own.read_text() == first
    head, _call, row = read(own)
    assert (head["model"], head["threads"]) == ("demo", 1)
    with pytest.raises(SystemExit, match="is of another threads"):
        speed.run_own(replace(ours, threads=2), own)
    assert 0 < row["natural_ceiling_s"] < row["jobs"][2]["job_s"]  # shorter than 16 samples of 100 tokens
    assert all(0 < job["first_token_of_the_ceiling"] < 1 for job in row["jobs"])
    run = {"engine": "ramekin int8", "round": 0, "job_s": 1.0, "requests": [[0.5, 1.0]], "cut": False, "peak_mb": 1e5}
    peer = {**run, "engine": "transformers fp32", "job_s": 3.0}
    lines = [
        json.dumps({**each, "job": job, "cold_start_s": 1.5, "import_s": 0, "load_s": 0})
        for each in (run, peer)
        for job in ("900 n=16", "900 n=16 natural")
    ]
    out.write_text("\n".join(lines))
    table = section(good_runs(read(out)), [row])
    assert "| 3.00 x | floor | ramekin int8, transformers fp32 |" in table
    natural = next(line for line in table.splitlines() if "natural" in line)
    assert row["natural_ceiling_s"] > 0.005
    assert natural.endswith(f"| {row['natural_ceiling_s']:.0%} |")
    assert "not measured" in table
    faster = [{**json.loads(line), **({"job_s": 2.0} if "fp32" in line else {})} for line in lines]
    table = section(good_runs(faster), [row], "more is there")
    assert "\n16 samples of 100 tokens, next to the fastest peer: the floor asks for " in table
    assert "% of what this machine could do; more is there.\n" in table
    behind = replace(_GOAL, reached=10.0, of_the_ceiling=0.5)
    assert behind.missed() == "16 samples: the floor asks for 65% of what this machine could do"
    assert not any(
        replace(behind, **other).missed() for other in ({"reached": 13.0}, {"of_the_ceiling": None}, {"unit": "s"})
    )


def test_next_to_a_peer_only_rounds_in_turn_count() -> None:
    def run(engine: str, call: str, number: int, job_s: float) -> dict[str, Any]:
        timed = {"job_s": job_s, "requests": [[job_s / 2, job_s]], "cut": False, "peak_mb": 1.0, "cold_start_s": job_s}
        return {"engine": engine, "job": "900 n=16", "round": number, "call": call, **timed}

    rows = [run("ramekin int8", "a", number, 1.0) for number in range(3)]
    rows += [run("OpenVINO int8", "a", number, seconds) for number, seconds in enumerate((3.0, 3.5, 5.0))]
    rows += [run("OpenVINO int8", "b", 0, 3.2)]  # a call of its own, in another hour perhaps
    lines = section(good_runs(rows), []).splitlines()
    assert any("| 3.50 x (3.00 to 5.00 in 3 rounds) | floor | ramekin int8, OpenVINO int8 |" in line for line in lines)
    rows += [run("OpenVINO int8", "a", 3, 2.0), run("ramekin int8", "a", 3, 1.0)]
    assert "3.25 x (2.00 to 5.00 in 4 rounds) | floor, not in every round |" in section(good_runs(rows), [])
    # Another peer, slower by its median, was faster in one of the rounds; in the call of its own it stands next to nothing.
    rows += [run("CTranslate2 int8", "a", 2, 4.0), run("CTranslate2 int8", "b", 1, 9.0)]
    table = section(good_runs(rows), [])
    assert "3.25 x (2.00 to 4.00 in 4 rounds) | floor, not in every round | ramekin int8, OpenVINO int8 |" in table
    # A round without the peer that is the fastest by its median counts with the second; without both it does not.
    more = [run("ramekin int8", "d", 0, 1.0), run("CTranslate2 int8", "d", 0, 3.4), run("ramekin int8", "e", 0, 1.0)]
    more += [run("transformers bf16", call, 0, 50.0) for call in ("d", "e", "f")]
    assert "3.40 x (2.00 to 4.00 in 5 rounds)" in section(good_runs([*rows, *more]), [])
    rows += [
        run("transformers bf16", "b", 0, 0.1),
        run("ramekin int8", "c", 0, 10.0),
        run("transformers bf16", "c", 0, 30.0),
    ]
    slowest = [run("optimum fp32", "a", number, 6.0) for number in (0, 1, 2)]
    found = good_runs([*rows, *slowest])
    assert times_as_long(found["900 n=16", "transformers bf16"], found["900 n=16", "ramekin int8"]) == 3.0
    assert times_as_long(found["900 n=16", "optimum fp32"], found["900 n=16", "ramekin int8"]) == 6.0
    other_hour = [run("optimum fp32", "d", 0, 8.0)]
    assert times_as_long(other_hour, found["900 n=16", "ramekin int8"]) == 8.0  # no round in common: medians
    rows = rows[:9]
    alone = [row for row in rows if row["engine"] == "ramekin int8" or row["call"] == "b"]
    assert any("| 3.20 x | floor |" in line for line in section(good_runs(alone), []).splitlines())


def test_tables_are_in_the_order_of_rounds_in_turn(tmp_path: Path) -> None:
    """Medians would put the peer that ran in the slow hour alone behind the other one, and old results know no turns."""

    def written(*rows: dict[str, Any]) -> Path:
        machine = {"processor": "p", "cores": 2, "extensions": ["avx2"]}
        head = {"machine": machine, "model": "m", "random": True, "threads": 2, "limit_s": 30.0}
        ceiling = {"ceiling": dict.fromkeys(("bandwidth", "int8", "float32"), 1e9)}
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (head, ceiling, *rows)))
        return tmp_path / "results.jsonl"

    def run(engine: str, call: str | None, job_s: float) -> dict[str, Any]:
        timed = {"job_s": job_s, "requests": [[job_s / 2, job_s]], "cut": False, "peak_mb": 1.0, "cold_start_s": job_s}
        row = {"engine": engine, "job": "900 n=16", "round": 0, **timed, "import_s": 0.0, "load_s": 0.0}
        return row if call is None else {**row, "call": call}

    ours = [
        run("ramekin int4", "slow", 5.0),
        run("ramekin int8", "slow", 4.0),
        run("ramekin int8", "b", 1.0),
        run("ramekin int8", "c", 1.0),
    ]
    peers = [run("CTranslate2 int8", "slow", 8.0), run("OpenVINO int8", "b", 3.0), run("optimum int8", "d", 2.5)]
    for table in (page(written(*ours, *peers)), summary(written(*ours, *peers))):
        lines = [line.split(" | ") for line in table.splitlines() if re.match(r"\| .*\d s ", line)]
        shown = [(line[0].strip("| ").partition(" (")[0], line[2]) for line in lines[:5]]
        by_turns = [("ramekin int8", "1.00 x"), ("ramekin int4", "1.25 x"), ("CTranslate2 int8", "2.00 x")]
        assert shown == [*by_turns, ("optimum int8", ""), ("OpenVINO int8", "3.00 x")]
        assert "| in turn with ramekin int8 |" in table
    old = page(written(run("ramekin int8", None, 1.0), run("optimum int8", None, 2.0)))
    assert "| next to ramekin int8 |" in old
    assert "| 2.00 s | 2.00 x |" in old
    assert '"Next to" compares medians' in old
    peers_alone = page(written(*peers))
    assert (
        peers_alone.index("| optimum int8 |") < peers_alone.index("| OpenVINO int8 |") < peers_alone.index("| CTranslate2")
    )


@pytest.mark.parametrize("name", list(ENGINES))
def test_every_engine_can_be_made(name: str) -> None:
    assert ENGINES[name].make()


def test_natural_lengths_are_like_the_cards() -> None:
    assert len(NATURAL) == 16
    assert max(NATURAL) == 100
    assert sorted(NATURAL)[-2] < 60
    assert sum(NATURAL) / (16 * 100) == pytest.approx(0.37, abs=0.03)


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def test_the_command_refuses_what_it_does_not_know() -> None:
    def refused(*arguments: Any) -> str:
        result = CliRunner().invoke(cli, ["run", *arguments])
        assert result.exit_code == 2
        return result.output

    assert "CHECKPOINT, or --shape, or --quick" in refused()
    assert "no job 'x'" in refused("--quick", "--job", "x")
    assert "names are peers, openvino" in refused("--quick", "--python", f"nosuch={sys.executable}")
    assert "names are peers, openvino" in refused("--quick", "--python", "peers")
    assert "--limit" in refused("--quick", "--limit", "nan")
    assert "neither a folder nor a Hub id" in CliRunner().invoke(cli, ["run", "no such folder"]).output
