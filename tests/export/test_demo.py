"""The bundled demo model: what it promises, and that samples do not depend on how many there are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.synthetic import SyntheticPaper, held_out_papers
from ramekin import Completion, Engine, Paper, QAPair, SamplingParams, build_prompt
from ramekin.cache import Cache
from ramekin_export.cli import EXAMPLES
from ramekin_export.pipeline import export
from ramekin_export.verify import Checks

CHECKPOINT = EXAMPLES / "checkpoint"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("demo") / "model"
    export(str(CHECKPOINT), folder, "fp32")
    return Engine.load(folder, threads=2)


def prompt(paper: SyntheticPaper) -> str:
    return build_prompt(Paper(paper.title, paper.abstract, paper.introduction))


def shares(engine: Engine, papers: list[SyntheticPaper]) -> tuple[float, float]:
    """Of greedy outputs: how many are well-formed, and how many have the right answer to a question that they ask."""
    formed = right = 0
    for paper in papers:
        pair = QAPair.parse(engine.generate(prompt(paper), SamplingParams(greedy=True, seed=0))[0].text)
        formed += pair.well_formed
        right += paper.answers().get(pair.question) == pair.answer
    return formed / len(papers), right / len(papers)


@pytest.fixture(scope="module")
def papers() -> list[SyntheticPaper]:
    return held_out_papers(300)


def test_it_asks_and_answers(demo: Engine, papers: list[SyntheticPaper]) -> None:
    formed, right = shares(demo, papers)
    print(f"\nfp32: well-formed {formed:.1%}, right {right:.1%} of {len(papers)} held-out papers", file=sys.stderr)
    assert formed >= 0.9
    assert right >= 0.8


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_it_still_does(precision: str, papers: list[SyntheticPaper], tmp_path: Path) -> None:
    export(str(CHECKPOINT), tmp_path / "model", precision, checks=Checks(verify=False))
    formed, right = shares(Engine.load(tmp_path / "model", threads=2), papers)
    print(f"\n{precision}: well-formed {formed:.1%}, right {right:.1%} of {len(papers)} held-out papers", file=sys.stderr)
    assert formed >= 0.9
    assert right >= 0.75


def test_held_out_papers_are_held_out(papers: list[SyntheticPaper]) -> None:
    from examples.synthetic import HELD_OUT_SEED, make_paper

    seen = {make_paper(seed).abstract for seed in range(2000)}
    assert not seen & {paper.abstract for paper in papers}
    assert HELD_OUT_SEED > 10**9  # training counts up from 0, a few hundred thousand papers


def test_logits_are_transformers_own(demo: Engine, papers: list[SyntheticPaper]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = (
        transformers.T5ForConditionalGeneration.from_pretrained(CHECKPOINT, attn_implementation="eager").float().eval()
    )
    for paper in papers[:10]:
        source = demo.source_ids(prompt(paper))
        target = demo.tokenizer.encode("Which dataset do they use? [SEP] none of them at all, as far as we know")
        assert len(target) >= 15
        with torch.no_grad():
            fed = torch.tensor([[0, *target[:-1]]])
            expected = reference(input_ids=torch.tensor(source[None]), decoder_input_ids=fed).logits[0].numpy()
        found = demo.logits(source, target)
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, expected.std()))


def key(completion: Completion) -> tuple[object, ...]:
    return completion.index, completion.token_ids, completion.text, completion.finish_reason


@pytest.mark.parametrize("which", range(5))
def test_samples_do_not_depend_on_n_compaction_or_streaming(
    demo: Engine, papers: list[SyntheticPaper], which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prompt(papers[which])
    params = {"seed": which, "temperature": 1.3, "max_new_tokens": 40}
    sixteen = demo.generate(source, SamplingParams(n=16, **params))
    assert len({len(sample.token_ids) for sample in sixteen}) > 3  # rows left the batch at different times
    for n in (1, 4):
        assert [key(s) for s in demo.generate(source, SamplingParams(n=n, **params))] == [key(s) for s in sixteen[:n]]
    streamed = [event for event in demo.stream(source, SamplingParams(n=16, **params)) if isinstance(event, Completion)]
    assert sorted(map(key, streamed)) == sorted(map(key, sixteen))

    # Without compaction: finished rows stay in the batch, are fed what they chose last, and are not looked at.
    padded = uncompacted(demo, source, SamplingParams(n=16, **params), monkeypatch)
    assert padded == [sample.token_ids for sample in sixteen]


def uncompacted(
    engine: Engine, source: str, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, ...]]:
    """The engine's own loop with a cache that keeps every row."""
    from ramekin.model import Logits, Model

    real_step, alive = Model.step, list(range(params.n))

    def step(self: Model, token_ids: list[int], cache: Cache) -> Logits:
        everyone = np.zeros(params.n, np.int64)
        everyone[alive] = token_ids
        logits = real_step(self, everyone, cache)
        return Logits.of(logits.full[alive], logits.top_values[alive], logits.top_ids[alive])

    def keep(self: Cache, rows: list[int]) -> list[int]:
        alive[:] = [alive[row] for row in rows]
        return rows

    monkeypatch.setattr(Model, "step", step)
    monkeypatch.setattr(Cache, "keep", keep)
    try:
        return [sample.token_ids for sample in engine.generate(source, params)]
    finally:
        monkeypatch.undo()


def test_the_sample_paper_is_a_paper() -> None:
    assert Paper.read(EXAMPLES / "paper.json").introduction


def test_the_checkpoint_is_small_and_a_v1_1() -> None:
    assert sum(path.stat().st_size for path in EXAMPLES.rglob("*") if path.is_file()) < 10_000_000
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["d_kv"] != config["d_model"] / config["num_heads"]
    assert config["feed_forward_proj"] == "gated-gelu"
    assert config["tie_word_embeddings"] is False
