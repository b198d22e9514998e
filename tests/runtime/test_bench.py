"""Timing: what the figures mean, the machine's ceiling, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ramekin import Engine
from ramekin.bench import Job, Timing, forget_peak_memory, peak_memory_mb, run
from ramekin.ceiling import Ceiling, Work
from ramekin.cli import main
from ramekin.manifest import COMPACT_DECODER, COMPACT_ENCODER, FileRecord, Manifest
from tests.runtime.conftest import TINY_MODEL
from tests.runtime.test_cli import run as command

FLAN_T5_LARGE = {
    "vocab_size": 32128,
    "d_model": 1024,
    "d_ff": 2816,
    "num_heads": 16,
    "head_dim": 64,
    "encoder_layers": 24,
    "decoder_layers": 24,
}


def test_figures_of_a_job() -> None:
    timing = Timing.of(Job(n=2, source=9, tokens=4), [1.0, 1.1, 1.3, 1.4], in_session=0.3)
    assert timing.first_token_s == 1.0
    assert timing.step_p50_ms == pytest.approx(100)
    assert timing.job_s == 1.4
    assert timing.tokens_per_s == pytest.approx(8 / 1.4)
    assert timing.python_share == pytest.approx(0.25)


def test_median_of_runs() -> None:
    runs = [Timing.of(Job(1, 9, 2), [first, first + 1], 0.5) for first in (3.0, 1.0, 2.0)]
    assert Timing.median(runs).first_token_s == 2.0


def test_a_job_makes_exactly_its_tokens(engine: Engine) -> None:
    timing = run(engine, Job(n=3, source=20, tokens=7))
    assert 0 < timing.first_token_s < timing.job_s
    assert timing.tokens_per_s == pytest.approx(21 / timing.job_s)
    assert 0 <= timing.python_share < 1


def test_a_job_is_not_ended_by_its_samples(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    eos = tuple(range(1, 400))
    short = Engine(engine.model, engine.tokenizer, replace(engine.manifest, tokens=replace(engine.manifest.tokens, eos=eos)))
    step, rows = engine.model.step, []

    def counted(token_ids: Any, cache: Any) -> Any:
        rows.append(len(token_ids))
        return step(token_ids, cache)

    monkeypatch.setattr(engine.model, "step", counted)
    run(short, Job(n=3, source=20, tokens=7))
    assert rows == [3] * 7


def test_the_least_work_of_flan_t5_large(engine: Engine) -> None:
    """By hand: 302 M encoder weights and 50 M of cross K/V; 352 M decoder weights without these, and a head of 33 M."""
    manifest = _large(engine.manifest)
    rates = Ceiling(bandwidth=math.inf, int8=1.0, float32=math.inf)
    layer = 4 * 1024 * 1024 + 3 * 1024 * 2816
    assert Work(manifest, 900, 16, 100).prefill_s(rates) == 2 * 900 * (24 * layer + 24 * 2 * 1024 * 1024)
    assert Work(manifest, 900, 16, 100).step_s(rates) == 2 * 16 * (24 * (layer + 2 * 1024 * 1024) + 32128 * 1024)
    memory = Ceiling(bandwidth=1.0, int8=math.inf, float32=math.inf)
    shared, own = 2 * 24 * 900 * 1024 * 4, 2 * 24 * 50 * 1024 * 4
    assert Work(manifest, 900, 16, 100).step_s(memory) == 385_000_000 + shared + 16 * own
    pair = dict.fromkeys((COMPACT_ENCODER, COMPACT_DECODER), FileRecord(bytes=1, sha256=""))
    compact = replace(manifest, files={**manifest.files, **pair})
    assert Work(compact, 900, 16, 100).step_s(memory) == 385_000_000 + (shared + 16 * own) / 4
    slow = Ceiling(bandwidth=math.inf, int8=1e9, float32=1.0)  # floats alone take time: a sample's own, and the prompt's
    assert Work(manifest, 900, 16, 100).step_s(slow) == pytest.approx(16 * 24 * 4 * 950 * 1024, rel=0.01)
    assert Work(compact, 900, 16, 100).step_s(slow) == pytest.approx(16 * 24 * 4 * 50 * 1024, rel=0.01)


def _large(manifest: Manifest) -> Manifest:
    files = {**manifest.files, "decoder.bin": FileRecord(bytes=385_000_000, sha256="")}
    return replace(manifest, dims=replace(manifest.dims, **FLAN_T5_LARGE), precision="int8", files=files)


def test_the_least_work_of_other_graphs(engine: Engine) -> None:
    """Graphs for CUDA read their weights too, and what is not quantized multiplies at the rate of float32."""
    manifest = _large(engine.manifest)
    memory = Ceiling(bandwidth=1.0, int8=math.inf, float32=math.inf)
    assert Work(replace(manifest, layout="cuda"), 900, 1, 1).step_s(memory) > 385_000_000
    rates = Ceiling(bandwidth=math.inf, int8=math.inf, float32=1.0)
    for precision, computing in (("int8", False), ("int4", False), ("fp32", True), ("fp32-cuda", True), ("fp16", True)):
        work = Work(replace(manifest, precision=precision), 900, 1, 1)
        assert (work.prefill_s(rates) > 2 * 900 * 24 * 4 * 1024 * 1024) == computing


def test_weights_in_files_with_names_of_their_own(engine: Engine) -> None:
    """As in a folder from elsewhere: what cannot be told apart counts as nothing."""
    files = {name.replace(".bin", ".weights"): record for name, record in engine.manifest.files.items()}
    rates = Ceiling(bandwidth=1.0, int8=1e9, float32=1e9)
    assert Work(replace(engine.manifest, files=files), 10, 1, 2).job_s(rates) > 0


def test_the_ceiling_of_this_machine() -> None:
    ceiling = Ceiling.measure(threads=1)
    assert 1e8 < ceiling.bandwidth < 1e13
    assert 1e8 < ceiling.float32 < 1e14
    assert 1e8 < ceiling.int8 < 1e15


def test_peak_memory_is_this_process() -> None:
    before = peak_memory_mb()
    block = np.ones(int(before * 1.2e6 / 8))  # alone more than all that was held so far
    assert peak_memory_mb() > before * 1.2
    del block
    if Path("/proc/self/clear_refs").exists():
        forget_peak_memory()
        assert peak_memory_mb() < before * 1.2


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["bench", str(TINY_MODEL), "--source", "40", "--tokens", "5", "--repeat", "2", "-n", "3", "-n", "1"]
    status, out, err = command(*options, "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert [row["n"] for row in result["jobs"]] == [1, 3]
    assert result["threads"] == int(min(result["threads_tried_s"], key=result["threads_tried_s"].get))
    assert all(row["of_the_ceiling"] > 0 for row in result["jobs"])
    status, out, err = command(*options, "--threads", "1")
    assert (status, err) == (0, "")
    assert "first token" in out
    assert "GB/s" in out


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No threads are tried, and the processor's ceiling is not told. (An engine on the CPU that says otherwise.)"""
    load, loaded = Engine.load, []

    def elsewhere(*arguments: Any) -> Engine:
        engine = load(*arguments)
        engine.provider = "cuda"
        loaded.append(engine)
        return engine

    monkeypatch.setattr(Engine, "load", elsewhere)
    monkeypatch.setattr(Ceiling, "measure", None)
    options = ["bench", str(TINY_MODEL), "--source", "40", "--tokens", "5", "--repeat", "1", "-n", "2"]
    main([*options, "--json"])
    assert len(loaded) == 2  # one of them asked where
    result = json.loads(capsys.readouterr().out)
    assert (result["provider"], result["threads_tried_s"], result["ceiling"]) == ("cuda", {}, None)
    assert result["jobs"][0]["of_the_ceiling"] is None
    main(options)
    page = capsys.readouterr().out
    assert "first token" in page
    assert "GB/s" not in page
    assert "tried" not in page


def test_commands_let_onnxruntime_log_errors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library does not."""
    seen: list[int] = []
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", seen.append)
    Engine.load(TINY_MODEL)
    assert not seen
    main(["bench", str(TINY_MODEL), "--source", "9", "--tokens", "2", "--repeat", "1", "-n", "1", "--threads", "1"])
    assert seen == [3]
