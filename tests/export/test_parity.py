"""The graphs against transformers: the same logits, at the same scale, for every variant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ramekin import Engine, SamplingParams
from ramekin_export.pipeline import export
from tests.export.variants import VARIANTS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SOURCES = (1, 2, 17, 64, 130, 300)
TARGET = 24


def load_reference(folder: Path) -> torch.nn.Module:
    kind = transformers.MT5ForConditionalGeneration if "mt5" in str(folder) else transformers.T5ForConditionalGeneration
    return kind.from_pretrained(folder, attn_implementation="eager").float().eval()


def reference_logits(model: torch.nn.Module, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    fed = np.concatenate([[0], target[:-1]])
    with torch.no_grad():
        return model(input_ids=torch.tensor(source[None]), decoder_input_ids=torch.tensor(fed[None])).logits[0].numpy()


def cases(vocab: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for length in SOURCES:
        rng = np.random.default_rng(length)
        yield rng.integers(0, vocab, length), rng.integers(0, vocab, TARGET)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("graphs", ["fp32", "fp32-cuda"])
def test_fp32_logits_agree(
    variant: str, graphs: str, checkpoint: Callable[[str], Path], exported: Callable[[str, str], Engine]
) -> None:
    """To 1e-4 on logits whose standard deviation is near 1, the scale of T5 v1.0's head included."""
    engine, reference = exported(variant, graphs), load_reference(checkpoint(variant))
    for source, target in cases(VARIANTS[variant]["vocab_size"]):
        expected = reference_logits(reference, source, target)
        assert 0.3 < expected.std() < 3
        np.testing.assert_allclose(engine.logits(source, target), expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:You have modified the pretrained model configuration")  # transformers 4 on both
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "both"])
@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"min_length": 9}, {"min_new_tokens": 9}]
)
def test_the_checkpoints_own_settings(
    settings: dict[str, float],
    file: str,
    checkpoint: Callable[[str], Path],
    exported: Callable[[str, str], Engine],
    tmp_path: Path,
) -> None:
    """Transformers before 4.26 wrote the first file alone, later ones of release 4 a second beside it, to be passed over.

    Where there is a least length most tokens end.
    """
    if file == "both" and not transformers.__version__.startswith("4."):
        pytest.skip("transformers 5 does not read them")
    folder, source = Path(shutil.copytree(checkpoint("flan"), tmp_path / "flan")), np.arange(3, 40)
    plain = exported("flan", "fp32").generate(source, SamplingParams(greedy=True, seed=0, max_new_tokens=20))[0].token_ids
    config = json.loads((folder / "config.json").read_text())
    shortest = "min" in next(iter(settings))
    ends = {"eos_token_id": list(range(1, 450)) if shortest else 1}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0}
    assert not (folder / "generation_config.json").exists()
    in_config = file != "generation_config.json"
    (folder / ("config.json" if in_config else file)).write_text(
        json.dumps((config if in_config else tokens) | settings | ends | {"max_length": 21})
    )
    if file == "both":
        other = {"_from_model_config": True, "transformers_version": "4.30.2", **tokens, "max_length": 9, "top_k": 1}
        (folder / "generation_config.json").write_text(json.dumps(other))
    export(str(folder), tmp_path / "model", "fp32")
    engine, reference = Engine.load(tmp_path / "model"), load_reference(folder)
    with torch.no_grad():
        expected = reference.generate(torch.tensor(source[None]), do_sample=False, use_cache=False)[0, 1:].tolist()
    found = list(engine.generate(source, engine.params(greedy=True, seed=0))[0].token_ids)
    assert found == expected
    assert found != list(plain)
    assert len(found) in (range(9, 20) if shortest else (20,))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("graphs", ["fp32", "fp32-cuda"])
def test_greedy_tokens_are_equal(
    variant: str, graphs: str, checkpoint: Callable[[str], Path], exported: Callable[[str, str], Engine]
) -> None:
    engine, reference = exported(variant, graphs), load_reference(checkpoint(variant))
    for source, _ in cases(VARIANTS[variant]["vocab_size"]):
        unpadded = np.where(source == 0, 3, source)  # transformers takes 0 for padding
        with torch.no_grad():
            expected = reference.generate(torch.tensor(unpadded[None]), max_new_tokens=30, do_sample=False, use_cache=False)[
                0, 1:
            ]
        found = engine.generate(unpadded, SamplingParams(greedy=True, max_new_tokens=30, seed=0))[0].token_ids
        assert list(found) == expected.tolist()


@pytest.mark.parametrize("variant", ["flan", "v1.0", "mt5"])
@pytest.mark.parametrize("graphs", ["fp32", "fp32-cuda"])
def test_long_targets_agree(
    variant: str, graphs: str, checkpoint: Callable[[str], Path], exported: Callable[[str, str], Engine]
) -> None:
    """Beyond the largest relative position that has a bucket of its own."""
    rng = np.random.default_rng(1)
    source, target = rng.integers(0, 512, 20), rng.integers(0, 512, 200)
    expected = reference_logits(load_reference(checkpoint(variant)), source, target)
    np.testing.assert_allclose(exported(variant, graphs).logits(source, target), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.02), ("int4", 0.3)])
def test_quantized_models_stay_close(
    variant: str, precision: str, limit: float, exported: Callable[[str, str], Engine]
) -> None:
    """Mean KL divergence to fp32, in nats per token, on random weights: a broken layout gives 0.5 and more."""
    engine, plain = exported(variant, precision), exported(variant, "fp32")
    total = []
    for source, target in cases(VARIANTS[variant]["vocab_size"]):
        p, q = (log_softmax(each.logits(source, target)) for each in (plain, engine))
        total.append((np.exp(p) * (p - q)).sum(axis=1).mean())
    assert 1e-7 < np.mean(total) < limit


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_rows_do_not_influence_one_another(precision: str, exported: Callable[[str, str], Engine]) -> None:
    """The same prefix alone and beside 15 others: KL below 1e-4."""
    model = exported("flan", precision).model
    cross = model.prefill(np.arange(3, 60))
    alone, crowd = (model.new_cache(cross, rows, 12, 1) for rows in (1, 16))
    tokens = np.random.default_rng(0).integers(0, 512, (12, 16))
    for step in range(12):
        one = model.step(tokens[step, :1], alone).full.copy()
        many = model.step(tokens[step], crowd).full[:1]
        p, q = log_softmax(one), log_softmax(many)
        assert abs((np.exp(p) * (p - q)).sum()) < 1e-4


@pytest.mark.parametrize(
    ("bidirectional", "buckets", "max_distance"), [(True, 32, 128), (False, 32, 128), (True, 8, 20), (False, 16, 300)]
)
def test_position_buckets_are_transformers_own(bidirectional: bool, buckets: int, max_distance: int) -> None:
    from ramekin_export.layers import position_bucket

    attention = transformers.models.t5.modeling_t5.T5Attention
    distance = np.arange(2 * max_distance)
    expected = attention._relative_position_bucket(
        torch.tensor(-distance), bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    found = position_bucket(distance, buckets // 2 if bidirectional else buckets, max_distance)
    assert found.tolist() == expected.tolist()
    assert len(set(found[max_distance:].tolist())) == 1
