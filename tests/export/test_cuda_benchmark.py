"""The script that will measure a GPU, on the CPU: every part of it, on a tiny shape."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.runtime.conftest import RUNS_CUDA_GRAPHS, TINY_MODEL

ROOT = Path(__file__).parents[2]


def test_the_page_tells_the_results() -> None:
    from benchmarks.cuda_page import page

    result = json.loads((ROOT / "benchmarks/results/speed/h200.json").read_text())
    assert (ROOT / "docs/speed-gpu.md").read_text() == page(result)
    result["times"]["times as fast"]["transformers fp4"] = 3.21
    assert "| 16 samples, next to bitsandbytes fp4 | 10 x | 3.2 x |" in page(result)


@pytest.mark.parametrize(
    ("tokenizer", "problem", "absent", "told"),
    [
        ("no.model", "", "", "there is no file .*no.model"),
        ("spiece.model", "there is no NVIDIA driver", "", r"there is no NVIDIA driver \(`--provider cpu` tries"),
        ("spiece.model", "", "onnxruntime-gpu", "not installed: onnxruntime-gpu; `--help` tells"),
        ("spiece.model", "", "none", "the torch installed here does not see a GPU"),
    ],
)
def test_what_it_needs_is_told_in_one_line(
    tokenizer: str,
    problem: str,
    absent: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch = pytest.importorskip("torch")
    from benchmarks import cuda

    monkeypatch.setattr(cuda, "cuda_problem", lambda _: problem)
    monkeypatch.setattr(cuda, "distributions", lambda name: [] if name == absent else [name])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as ended:
        cuda.main(["--tokenizer", str(TINY_MODEL / tokenizer), "--out", str(out)])
    assert ended.value.code == 2
    assert re.search(f"error: {told}", capsys.readouterr().err)
    assert not out.exists()


@RUNS_CUDA_GRAPHS
@pytest.mark.filterwarnings("ignore")  # optimum's exporter traces, and warns of it
def test_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from benchmarks import cuda

    shape = {"d_model": 128, "d_ff": 96, "num_heads": 2, "num_layers": 2}
    monkeypatch.setitem(cuda.SHAPES, "tiny", shape)
    monkeypatch.setattr(cuda, "PAPERS", 3)
    monkeypatch.setattr(cuda, "PEERS", ("bfloat16",))  # bitsandbytes is not among the tests' packages
    missing = [] if find_spec("optimum") else ["optimum"]  # it is not there with transformers 5
    monkeypatch.setattr(cuda, "PARTS", [part for part in cuda.PARTS if part not in missing])
    spiece, out = TINY_MODEL / "spiece.model", tmp_path / "out.json"
    cuda.main(
        [
            "--tokenizer",
            str(spiece),
            "--out",
            str(out),
            "--shape",
            "tiny",
            "--provider",
            "cpu",
            "--source",
            "40",
            "--tokens",
            "3",
        ]
    )
    found = json.loads(out.read_text())
    assert not [part for part in found.values() if "error" in part]
    assert found["logits"]["fp32-cuda"]["largest"] < 1e-4
    assert found["samples"] == {"samples": 4, "equal": 4}
    assert found["nodes"]["memcpy"] == {"nodes": 0}
    assert set(found["nodes"]["provider"]) == {"CPUExecutionProvider"}
    assert found["times"]["best"] == "ramekin fp32-cuda"
    assert found["times"]["times as fast"]["transformers bfloat16"] > 0
    assert found["limit"]["bytes"] > 1e6
    assert found["one_sample"]["times as fast"]["transformers bfloat16"] > 0
    assert missing or found["optimum"]["times as fast"]["optimum float32"] > 0
    assert found["throughput"]["papers"] == 3
    assert found["throughput"]["tokens_per_s"] > 0
