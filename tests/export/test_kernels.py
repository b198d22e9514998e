"""Where the time goes, kernel by kernel: what is counted to which, how much that is at the least, and the page."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from click.testing import CliRunner

from benchmarks import kernels, speed
from benchmarks.__main__ import cli
from benchmarks.kernels import REST, Kernel, kernels_of
from benchmarks.kernels_page import least_ms, plot, section
from benchmarks.results import read
from benchmarks.speed_page import page
from ramekin import Engine, TruncationWarning
from ramekin.manifest import Manifest
from ramekin.model import reads_compact
from ramekin_export.cli import EXAMPLES, export
from tests.runtime.conftest import TINY_MODEL

SOURCE, TOKENS, N = 120, 9, 3
MIDDLE = 5  # tokens of their own that samples have in the mean of 9 steps


def event(node: str, operator: str, ms: float, inputs: list[Any], result: list[int]) -> dict[str, Any]:
    about = {"op_name": operator, "input_type_shape": inputs, "output_type_shape": [{"float": result}]}
    return {"cat": "Node", "name": f"{node}/{operator}_kernel_time", "dur": 1e3 * ms, "args": about}


def run(scale: float) -> list[dict[str, Any]]:
    """A step of two samples of a decoder of one layer, with 10 tokens of prompt."""
    at, cache = "decoder.block.0.layer", {"int8": [2, 4, 8, 16]}
    return [
        event("decoder.embedded", "Gather", scale, [{"float": [99, 64]}], [2, 1, 64]),
        event(f"{at}.0.SelfAttention.qkv", "MatMulIntegerToFloat", 2 * scale, [{"uint8": [2, 1, 64]}], [2, 1, 192]),
        event(f"{at}.0.SelfAttention.heads", "GroupQueryAttention", 3, [{"float": [2, 1, 192]}, cache, cache], [2, 1, 64]),
        event(f"{at}.0.SelfAttention.o.parts", "MatMulIntegerToFloat", 4, [{"uint8": [2, 2, 64]}], [2, 2, 64]),
        event(f"{at}.0.SelfAttention.o", "MatMul", 1, [{"float": [2, 1, 2]}, {"float": [2, 2, 64]}], [2, 1, 64]),
        event(f"{at}.1.EncDecAttention.q", "MatMulNBits", 1, [{"float": [2, 1, 64]}], [2, 1, 64]),
        event(
            f"{at}.1.EncDecAttention.scores",
            "MatMulIntegerToFloat",
            5,
            [{"uint8": [4, 2, 16]}, {"uint8": [4, 16, 10]}],
            [4, 2, 10],
        ),
        event(f"{at}.2.DenseReluDense.wo", "MatMul", 6, [{"float": [2, 1, 128]}], [2, 1, 64]),
        event("logits", "MatMulNBits", 7, [{"float": [2, 64]}], [2, 99]),
        {"cat": "Session", "name": "model_run", "dur": 1e6},
    ]


WEIGHTS = {
    "decoder.block.0.layer.0.SelfAttention.qkv/MatMulIntegerToFloat": 12_288,
    "decoder.block.0.layer.0.SelfAttention.o.parts/MatMulIntegerToFloat": 4_096,
    "decoder.block.0.layer.1.EncDecAttention.q/MatMulNBits": 2_048,
    "decoder.block.0.layer.2.DenseReluDense.wo/MatMul": 32_768,
    "logits/MatMulNBits": 6_336,
}


def test_each_node_is_counted_once_and_times_are_those_of_a_run_in_the_middle() -> None:
    # The first run counts for nothing; of the others one is slow as a whole.
    found, ms = kernels_of([*run(100), *run(1), *run(3), *run(50)], WEIGHTS, position=6)
    assert found == [
        Kernel("q, k, v", 2, 2 * 3 + 1, 14_336, 2 * 2 * 64 * 192 + 2 * 2 * 64 * 64),
        Kernel("o", 1, 4, 4_096, 2 * 2 * 64 * 64),
        Kernel("wo", 1, 6, 32_768, 0, 2 * 2 * 128 * 64),
        Kernel("head", 1, 7, 6_336, 2 * 2 * 64 * 99),
        Kernel("attention to the prompt", 1, 5, 640, 2 * 4 * 2 * 16 * 10),
        Kernel("attention to own tokens", 1, 3, 2 * 2 * 4 * 6 * 16, 0, 4 * 2 * 64 * 6),
        Kernel(REST, 2, 1 + 3),
    ]
    assert ms == 3 * 3 + 27
    assert kernels_of(run(1), WEIGHTS, 6)[1] == 3 + 27  # the only one


def test_a_run_is_as_slow_as_its_nodes_together() -> None:
    """Slow moments that hit another kernel in every run are in the time of all."""

    def step(norm: float, gelu: float, cast: float) -> list[dict[str, Any]]:
        product = event("logits", "MatMulNBits", gelu, [{"float": [1, 64]}], [1, 99])
        return [
            event("norm", "Mul", norm, [{"float": [1]}], [1]),
            product,
            event("cast", "Cast", cast, [{"float": [1]}], [1]),
        ]

    found, ms = kernels_of([*step(9, 9, 9), *step(1, 1, 5), *step(1, 5, 1), *step(5, 1, 1)], WEIGHTS, 6)
    assert [(each.name, each.ms) for each in found] == [("head", 1), (REST, 6)]
    assert ms == 7
    found, ms = kernels_of([*step(9, 9, 9), *step(1, 5, 1), *step(5, 1, 5), *step(1, 7, 1)], WEIGHTS, 6)
    assert [(each.name, each.ms) for each in found] == [("head", 5), (REST, 2)]
    assert ms == 9


def test_the_encoders_attention() -> None:
    rows = {"float": [1, 10, 64]}
    heads = event(
        "encoder.block.0.layer.0.SelfAttention.heads",
        "MultiHeadAttention",
        1,
        [rows, rows, rows, {"float": [1, 4, 10, 10]}],
        [1, 10, 64],
    )
    (found,), _ = kernels_of([heads], {}, 6)
    assert found == Kernel("attention to own tokens", 1, 1, 2 * 10 * 64 * 4, 0, 4 * 10 * 10 * 64)


def test_the_least_is_the_longer_of_reading_and_computing() -> None:
    rates = {"bandwidth": 10e9, "int8": 2e12, "float32": 1e12}
    assert least_ms({"read": 50e6, "int8": 2e9, "float32": 0}, rates) == pytest.approx(5)
    assert least_ms({"read": 50e6, "int8": 4e9, "float32": 5e9}, rates) == pytest.approx(7)


def row(**others: Any) -> dict[str, Any]:
    rates = {"bandwidth": 10e9, "int8": 2e12, "float32": 1e12}
    wi = {"name": "wi", "nodes": 24, "ms": 20.0, "read": 50e6, "int8": 3e9, "float32": 0}
    rest = {"name": REST, "nodes": 100, "ms": 4.0, "read": 0, "int8": 0, "float32": 0}
    graphs = {"encoder": {"kernels": [{**wi, "ms": 40.0}], "ms": 50.0}, "decoder": {"kernels": [wi, rest], "ms": 25.0}}
    about = {
        "engine": "ramekin int8",
        "n": 3,
        "source": 120,
        "tokens": 9,
        "first_token_s": 0.5,
        "step_ms": 30.0,
        "job_s": 1.0,
    }
    return {"call": "2026-11-26T17:44:11+00:00", **about, "graphs": graphs, "ceiling": rates, **others}


def test_the_section() -> None:
    failed = {"engine": "ramekin int4", "n": 3, "error": "no", "call": "2026-11-25T01:01:01+00:00"}
    calls = [{"call": failed["call"], "commit": "def"}, {"call": row()["call"], "commit": "abc"}]
    text = section([{"machine": {}}, *calls, failed, row(), row(n=1)])
    assert "(2026-11-26, commit abc)" in text
    assert "(commit not known)" in section([row()])
    assert "(10.0 GB/s, 2,000 G int8 and 1,000 G float32 operations per second in the first of these jobs)" in text
    prompt, three, one = text.split("### ")[1:]
    assert prompt.splitlines()[4:6] == [
        "| wi | 24 | 40.0 ms | 50 MB | 3.00 G int8 | 5.0 ms | 12% |",
        "| all | 24 | 50.0 ms | | | 5.0 ms | 10% |",
    ]
    assert three.splitlines()[0] == "A step of 3 samples, ramekin int8"
    assert three.splitlines()[4:7] == [
        "| wi | 24 | 20.0 ms | 50 MB | 3.00 G int8 | 5.0 ms | 25% |",
        f"| {REST} | 100 | 4.0 ms | | | | |",
        "| all | 124 | 25.0 ms | | | 5.0 ms | 20% |",
    ]
    assert one.startswith("A step of 1 sample, ramekin int8")
    assert one.count("Without the profiler 30.0 ms pass from token to token") == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in int8, where a run of benchmarks looks for it."""
    home = tmp_path_factory.mktemp("kernels") / "demo" / "ramekin-int8"
    home.parent.mkdir()
    done = CliRunner().invoke(export, [str(EXAMPLES / "checkpoint"), str(home), "--precision", "int8"])
    assert done.exit_code == 0, done.output
    (home / "done").touch()
    (home.with_name("ramekin-int4")).mkdir()  # ... and one that cannot be loaded
    (home.with_name("ramekin-int4") / "done").touch()
    return home


def test_every_weight_key_and_value_is_read_by_one_kernel(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, as far as the page; an engine that fails does not stop the other, and nothing is measured twice."""
    monkeypatch.setattr(speed, "PROFILED", (N,))
    monkeypatch.setattr(speed, "OWN_SOURCES", (SOURCE // 2, SOURCE))
    monkeypatch.setattr(speed, "FORCED", TOKENS)
    out = tmp_path / "results-kernels.jsonl"
    command = ["run", "--quick", "--kernels", "--threads", "1", "--work", str(folder.parents[1]), "--out", str(out)]
    done = CliRunner().invoke(cli, command)
    assert "ramekin int4, 3 samples failed: " in done.stderr
    assert done.exit_code == 0, done.output
    first = read(out)
    assert CliRunner().invoke(cli, command).exit_code == 1
    assert [each.get("engine") for each in read(out)[len(first) :]] == [None, "ramekin int4"]
    failed, found = first[-2:]
    assert "manifest.json" in failed["error"]
    assert (found["n"], found["source"], found["tokens"], first[0]["threads"]) == (N, SOURCE, TOKENS, 1)

    manifest = Manifest.load(folder)
    dims, width = manifest.dims, 1 if reads_compact(onnxruntime, manifest) else 4
    inner, d_model = dims.inner, dims.d_model
    encoder, decoder = ({each["name"]: each for each in found["graphs"][part]["kernels"]} for part in ("encoder", "decoder"))
    attention, prompt, own = "attention to own tokens", "attention to the prompt", "attention to own tokens"
    layer = {"q, k, v": 3 * d_model * inner, "o": d_model * inner, "wi": 2 * d_model * dims.d_ff, "wo": d_model * dims.d_ff}
    weights = {name: dims.encoder_layers * size for name, size in layer.items()}
    weights["keys and values for the decoder"] = dims.decoder_layers * 2 * d_model * inner
    assert encoder.keys() - {attention, REST} == weights.keys()
    for name, size in weights.items():
        assert encoder[name]["int8"] == 2 * SOURCE * size
        assert size < encoder[name]["read"] < 1.1 * size  # and their scales
    assert encoder[attention]["float32"] == dims.encoder_layers * 4 * SOURCE**2 * inner
    layer |= {"q, k, v": 4 * d_model * inner, "o": 2 * d_model * inner}
    weights = {name: dims.decoder_layers * size for name, size in layer.items()} | {"head": dims.vocab_size * d_model}
    assert decoder.keys() - {prompt, own, REST} == weights.keys()
    for name, size in weights.items():
        assert decoder[name]["int8"] == 2 * N * size
        assert size < decoder[name]["read"] < 1.4 * size  # the head's blocks are filled up
    assert decoder[prompt]["read"] == dims.decoder_layers * 2 * SOURCE * inner * width
    assert decoder[own]["read"] == dims.decoder_layers * 2 * N * MIDDLE * inner * width
    assert decoder[own]["float32"] == dims.decoder_layers * 4 * N * MIDDLE * inner
    for part in (encoder, decoder):
        assert all(each["ms"] > 0 and (each["name"] == REST) == (each["read"] == 0) for each in part.values())

    main = tmp_path / "results.jsonl"
    timed = {
        "job_s": 1.0,
        "requests": [[0.5, 1.0]],
        "cut": False,
        "peak_mb": 1.0,
        "cold_start_s": 1.5,
        "import_s": 0,
        "load_s": 0,
    }
    ran = {"engine": "ramekin int8", "job": "120 n=4", "round": 0, **timed}
    main.write_text(
        "".join(f"{json.dumps(each)}\n" for each in ({**first[0], "limit_s": 30}, {"ceiling": found["ceiling"]}, ran))
    )
    assert section(read(out)) in page(main)


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(tmp_path / "plots" / "a.svg", [row(), row(n=1), {"error": "no"}])
    assert (tmp_path / "plots" / "a.svg").stat().st_size > 1_000


@pytest.mark.parametrize("options", [["-n", "0"], ["--tokens", "1"], ["--source", "0"], ["--threads", "0"], []])
def test_a_wrong_command_is_one_line(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels", str(tmp_path / "none"), *options])
    with pytest.raises(SystemExit) as ended:
        kernels.main()
    told = capsys.readouterr().err
    assert ended.value.code == (2 if options else 1)
    assert told.splitlines()[-1].startswith("kernels: error: -n," if options else str(tmp_path / "none"))
    assert "Traceback" not in told


@pytest.mark.parametrize("kind", ["optimum", "cuda"])
def test_only_graphs_of_ours_can_be_told_apart(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign:
        class manifest:  # noqa: N801
            layout = kind

    monkeypatch.setattr(Engine, "load", lambda *_, **__: Foreign)
    with pytest.raises(kernels.RamekinError, match=f"only our own graphs for CPUs .* not {kind}"):
        kernels.measure(Path("m"), kernels.Job(1, 1, 2), 1)


def test_a_longer_prompt_than_the_models_is_not_cut() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TruncationWarning)
        assert kernels.measure(TINY_MODEL, kernels.Job(1, 1025, 2), 1)["source"] == 1025
