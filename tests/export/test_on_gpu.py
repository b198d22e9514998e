"""What only a GPU can show: CUDA's own arithmetic, recorded steps, memory that runs out. Skipped where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from ramekin import Engine, ProviderError, SamplingParams
from ramekin.provider import cuda_problem
from ramekin_export.formats import FORMATS
from ramekin_export.pipeline import export
from ramekin_export.verify import Checks
from tests.export.test_cuda import assert_same_samples, divergence
from tests.export.test_parity import cases, load_reference, reference_logits
from tests.export.variants import VARIANTS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(bool(cuda_problem(onnxruntime)), reason=cuda_problem(onnxruntime))

PARAMS = SamplingParams(n=4, max_new_tokens=20, seed=3)


@pytest.fixture(scope="module")
def on_gpu(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Engine]:
    """An engine on the GPU, made once."""
    made: dict[tuple[str, str], Engine] = {}

    def make(variant: str, precision: str) -> Engine:
        if (variant, precision) not in made:
            folder = tmp_path_factory.mktemp(variant) / precision
            export(str(checkpoint(variant)), folder, precision, checks=Checks(verify=False))
            made[variant, precision] = Engine.load(folder, "cuda")
        return made[variant, precision]

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_logits_agree(variant: str, on_gpu: Callable[[str, str], Engine], checkpoint: Callable[[str], Path]) -> None:
    """To 1e-4 on logits whose standard deviation is near 1, with transformers on the same GPU."""
    engine, reference = on_gpu(variant, "fp32-cuda"), load_reference(checkpoint(variant)).cuda()
    for source, target in cases(VARIANTS[variant]["vocab_size"]):
        expected = gpu_logits(reference, source, target)
        assert 0.3 < expected.std() < 3
        np.testing.assert_allclose(engine.logits(source, target), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_as_close_as_that_of_transformers(
    variant: str, precision: str, on_gpu: Callable[[str, str], Engine], checkpoint: Callable[[str], Path]
) -> None:
    """KL from float32, at most 1.2 times that of transformers' model, cast to it."""
    engine, reference = on_gpu(variant, precision), load_reference(checkpoint(variant))
    of_case = list(cases(VARIANTS[variant]["vocab_size"]))
    exact = [reference_logits(reference, *case) for case in of_case]
    half = reference.to("cuda", {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    theirs = np.mean([divergence(x, gpu_logits(half, *case)) for x, case in zip(exact, of_case, strict=True)])
    ours = np.mean([divergence(x, engine.logits(*case)) for x, case in zip(exact, of_case, strict=True)])
    assert 1e-9 < ours < 1.2 * theirs
    assert ours < FORMATS[precision].most_divergence


def gpu_logits(model: torch.nn.Module, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    fed = np.concatenate([[0], target[:-1]])
    with torch.no_grad():
        ids = [torch.tensor(each[None], device="cuda") for each in (source, fed)]
        return model(input_ids=ids[0], decoder_input_ids=ids[1]).logits[0].float().cpu().numpy()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("together", [16, 2])
def test_samples_equal_the_cpus(
    variant: str,
    together: int,
    on_gpu: Callable[[str, str], Engine],
    exported: Callable[[str, str], Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float32, also where there are more prompts than one job takes."""
    cuda = on_gpu(variant, "fp32-cuda")
    monkeypatch.setattr(cuda.model, "prompts_at_once", together)
    assert_same_samples(exported(variant, "fp32"), cuda, variant)


@pytest.mark.parametrize("precision", ["fp32-cuda", "bf16", "fp16"])
def test_recorded_steps_are_the_steps(precision: str, on_gpu: Callable[[str, str], Engine]) -> None:
    """A replay gives, bit by bit, what the same kernels give when they are launched one by one."""
    model = on_gpu("flan", precision).model
    tokens = np.random.default_rng(0).integers(0, 512, (20, 16))
    found = []
    for records in (True, False):
        assert model._records
        model._records = records
        try:
            cache = model.new_cache(model.prefill(np.arange(3, 60), np.arange(3, 100)), 16, 20, 20)
            found.append([model.step(row, cache).full.copy() for row in tokens])
            assert (model._recording(cache) == -1) != records
        finally:
            model._records = True
    np.testing.assert_array_equal(*found)


def test_rows_do_not_influence_one_another(on_gpu: Callable[[str, str], Engine]) -> None:
    engine = on_gpu("flan", "bf16")
    source, target = next(case for case in cases(512) if len(case[0]) == 64)
    alone = engine.logits(source, target)
    model = engine.model
    cache = model.new_cache(model.prefill(source, np.arange(3, 200)), 32, len(target), 4)
    rng = np.random.default_rng(1)
    for at, token in enumerate([0, *target[:-1]]):
        fed = rng.integers(0, 512, 32)
        fed[5] = token
        row = model.step(fed, cache).full[5:6]
        assert divergence(alone[at : at + 1], row) < 1e-4


def test_a_thread_for_each_request(on_gpu: Callable[[str, str], Engine]) -> None:
    """Of several engines, which record sizes that are new: nobody spoils another's recording, and nothing is warned of."""
    engines = [on_gpu("flan", precision) for precision in ("fp32-cuda", "bf16", "fp16")]
    jobs = [(engine, replace(PARAMS, n=n)) for n in (5, 6, 7) for engine in engines]
    for _ in range(3):
        with ThreadPoolExecutor(len(jobs)) as pool:
            found = list(pool.map(lambda job: job[0].generate([5, 6, 1], job[1]), jobs))
        assert found == [engine.generate([5, 6, 1], params) for engine, params in jobs]


def test_a_job_that_does_not_fit(on_gpu: Callable[[str, str], Engine]) -> None:
    """One clear line, and the engine works on."""
    engine = on_gpu("flan", "bf16")
    expected = engine.generate([5, 6, 1], PARAMS)
    with pytest.raises(ProviderError, match=r"too little memory \(cuda\).*fewer or shorter samples"):
        engine.model.new_cache(engine.model.prefill([5, 6, 1]), 1 << 16, 1 << 15, 20)
    assert engine.generate([5, 6, 1], PARAMS) == expected


def test_the_command_takes_the_gpu_and_says_so(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Export with all its checks, the golden run on the GPU, samples by `auto`."""

    def ramekin(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ramekin", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    model = str(tmp_path / "model")
    made = ramekin("export", str(checkpoint("flan")), model, "--precision", "bf16")
    assert made.returncode == 0, made.stderr
    assert "onnxruntime" not in made.stderr
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("What is it?")
    sizes = ("-n", "2", "--source", "40", "--tokens", "5")
    for arguments in (
        ("verify", model),
        ("generate", model, str(prompt), "-n", "2", "--json"),
        ("bench", model, *sizes, "--json"),
    ):
        done = ramekin(*arguments)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "onnxruntime" not in done.stderr
        if arguments[-1] == "--json":
            assert "cuda" in done.stdout + done.stderr
            json.loads(done.stdout.splitlines()[0])
