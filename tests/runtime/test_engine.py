"""The loop on a tiny real model: properties that hold whatever the weights are."""

from __future__ import annotations

import compileall
import copy
import gc
import pickle
import shutil
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ramekin
from ramekin import Completion, Engine, RamekinError, SamplingParams, Token, TruncationWarning
from ramekin.cache import Cache
from ramekin.model import Logits
from ramekin.sampling import choose, uniforms
from tests.runtime.conftest import INT8_MODEL, TINY_MODEL

PROMPT = "We propose a new approach to neural parsing."


def key(completion: Completion) -> tuple[object, ...]:
    return completion.index, completion.token_ids, completion.text, completion.finish_reason


def sampled(engine: Engine, n: int, **params: object) -> list[Completion]:
    return engine.generate(PROMPT, SamplingParams(**{"n": n, "seed": 5, "max_new_tokens": 40, "temperature": 2.0, **params}))


def test_sample_i_does_not_depend_on_n(engine: Engine) -> None:
    sixteen = sampled(engine, 16)
    assert len({completion.token_ids for completion in sixteen}) == 16
    assert len({len(completion.token_ids) for completion in sixteen}) > 2  # so rows left the batch on the way
    for n in (1, 4):
        assert [key(c) for c in sampled(engine, n)] == [key(c) for c in sixteen[:n]]


class Staying:
    """A model whose rows stay in the batch when their samples have finished."""

    def __init__(self, model: Any) -> None:
        self._model, self.prompts_at_once = model, model.prompts_at_once
        self.prefill, self.wasted = model.prefill, 0

    def new_cache(self, cross: Any, rows: int, *sizes: int) -> Any:
        cache = self._model.new_cache(cross, rows, *sizes)
        self._fed = np.zeros(rows, np.int64)
        self._active = np.arange(rows)
        cache.keep = self._keep
        return cache

    def _keep(self, rows: list[int]) -> list[int]:
        self._active = self._active[rows]
        return rows

    def step(self, token_ids: list[int], cache: Any) -> Logits:
        self.wasted += len(self._fed) - len(self._active)
        self._fed[self._active] = token_ids
        logits = self._model.step(self._fed, cache)
        ranked = logits.top_values[self._active], logits.top_ids[self._active]
        return Logits.of(logits.full[self._active], *ranked)


def test_compaction_changes_nothing(engine: Engine) -> None:
    """The same samples when finished rows stay in the batch."""
    model: Any = Staying(engine.model)
    staying = Engine(model, engine.tokenizer, engine.manifest)
    assert [key(c) for c in sampled(staying, 8)] == [key(c) for c in sampled(engine, 8)]
    assert model.wasted


def test_a_sample_replayed_by_hand(engine: Engine) -> None:
    """Its token at each step is what its own number of that step draws from the logits there."""
    params = SamplingParams(n=3, seed=11, max_new_tokens=25, temperature=1.5, min_new_tokens=25)
    draws = uniforms(11, 3, 25)
    assert len(set(draws.ravel())) == draws.size
    for sample in engine.generate(PROMPT, params):
        full = engine.logits(PROMPT, sample.token_ids)
        history = [engine.manifest.tokens.start]
        for step, row in enumerate(full):
            order = np.argsort(-row, kind="stable")[None, : params.candidates]
            ranked = Logits.of(row[None], row[order[0]][None], order)
            chosen, _ = choose(ranked, [history], engine.manifest.tokens.eos, params, draws[[sample.index], step])
            history.append(int(chosen[0]))
        assert tuple(history[1:]) == sample.token_ids


def test_without_a_seed_every_prompt_and_every_call_has_its_own(engine: Engine) -> None:
    params = SamplingParams(n=2, max_new_tokens=20, temperature=2.0)
    several = engine.generate_many([PROMPT] * 3, params)
    calls = [*several, engine.generate(PROMPT, params), engine.generate(PROMPT, params)]
    assert len({samples[0].seed for samples in calls}) == len(calls)
    assert len({sample.token_ids for samples in calls for sample in samples}) == 2 * len(calls)
    again = engine.generate(PROMPT, replace(params, seed=several[1][0].seed))
    assert [key(c) for c in again] == [key(c) for c in several[1]]


def test_what_is_wrong_is_told_at_once(engine: Engine) -> None:
    """Not when somebody asks for the first event, in another thread perhaps."""
    for wrong in ([], [-1], [10**6]):
        with pytest.raises(ValueError, match="token ids must be"):
            engine.stream(wrong)
        with pytest.raises(ValueError, match="token ids must be"):
            engine.stream_many([[5, 1], wrong])
    with pytest.raises(TypeError, match="params must be SamplingParams"):
        engine.stream(PROMPT, {"n": 4})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`generate_many` and `stream_many` take several texts"):
        engine.stream(["a", "b"])  # type: ignore[list-item]
    for nothing in (None, 5, b"a", bytearray(b"a"), memoryview(b"a"), {5}, {"input_ids": [5]}):
        with pytest.raises(TypeError, match=f"a list of token ids, not {type(nothing).__name__}"):
            engine.stream(nothing)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a list of token ids, not int"):
        engine.generate_many(b"abc")
    with pytest.raises(TypeError, match="a list of token ids, not a text, which `score` takes"):
        engine.logits([5, 1], "a text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token ids must be"):
        engine.stream(np.array(5))


def test_a_stream_that_nobody_reads_to_its_end(engine: Engine) -> None:
    for stream in (engine.stream(PROMPT, engine.params(n=2)), engine.stream_many([PROMPT], engine.params(n=2))):
        next(stream)
        stream.close()
        assert list(stream) == []


def test_streamed_samples_are_the_same(engine: Engine) -> None:
    params = SamplingParams(n=6, seed=5, max_new_tokens=40, temperature=2.0)
    events = list(engine.stream(PROMPT, params))
    done = {event.index: event for event in events if isinstance(event, Completion)}
    assert [key(done[i]) for i in range(6)] == [key(c) for c in engine.generate(PROMPT, params)]
    for index, completion in done.items():
        tokens = [event for event in events if isinstance(event, Token) and event.index == index]
        assert tuple(token.token_id for token in tokens) == completion.token_ids
        assert "".join(token.text for token in tokens) == completion.text
    first_done = next(i for i, event in enumerate(events) if isinstance(event, Completion))
    assert any(isinstance(event, Token) for event in events[first_done:])  # others go on after one has finished


@contextmanager
def no_collector() -> Iterator[None]:
    """What is freed in here is freed by its last reference going, at once."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_prompts_memory_goes_with_its_last_sample(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of a long prompt are 200 MB; a server cannot wait for the garbage collector."""
    caches: list[weakref.ref[Cache]] = []
    new_cache = engine.model.new_cache

    def watched(*arguments: object) -> Cache:
        cache: Cache = new_cache(*arguments)  # type: ignore[arg-type]
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(engine.model, "new_cache", watched)
    with no_collector():
        sampled(engine, 8)
        stream = engine.stream(PROMPT, SamplingParams(n=2, seed=5))
        next(stream)
        assert [cache() is None for cache in caches] == [True, False]
        stream.close()  # someone who reads no further
        assert [cache() is None for cache in caches] == [True, True]


def test_seeds(engine: Engine) -> None:
    assert [key(c) for c in sampled(engine, 2)] == [key(c) for c in sampled(engine, 2)]
    assert key(sampled(engine, 1)[0]) != key(sampled(engine, 1, seed=6)[0])
    drawn = sampled(engine, 2, seed=None)
    assert [key(c) for c in sampled(engine, 2, seed=drawn[0].seed)] == [key(c) for c in drawn]


def test_greedy_ignores_the_seed(engine: Engine) -> None:
    one, other = (sampled(engine, 2, greedy=True, seed=seed) for seed in (1, 2))
    assert one[0].token_ids == one[1].token_ids == other[0].token_ids


def test_limits_and_reasons(engine: Engine) -> None:
    for completion in sampled(engine, 16, max_new_tokens=12):
        assert len(completion.token_ids) == len(completion.logprobs) <= 12
        assert (completion.token_ids[-1] == 1) == (completion.finish_reason == "eos")
        assert completion.finish_reason == "eos" or len(completion.token_ids) == 12
    assert {len(c.token_ids) for c in sampled(engine, 8, max_new_tokens=9, min_new_tokens=9)} == {9}
    assert [len(c.token_ids) for c in sampled(engine, 3, max_new_tokens=1)] == [1, 1, 1]


def test_stop_strings(engine: Engine) -> None:
    whole = sampled(engine, 1, min_new_tokens=30)[0].text
    stop = whole[10:14]
    params = {"min_new_tokens": 30, "stop": (stop, "never there")}
    completion = sampled(engine, 1, **params)[0]
    assert completion.finish_reason == "stop"
    assert completion.text == whole[: whole.index(stop)]
    streamed = engine.stream(PROMPT, SamplingParams(n=1, seed=5, max_new_tokens=40, temperature=2.0, **params))
    assert "".join(event.text for event in streamed if isinstance(event, Token)) == completion.text


def test_only_what_may_be_a_stop_string_is_held_back(engine: Engine) -> None:
    params = {"seed": 5, "max_new_tokens": 40, "temperature": 2.0, "min_new_tokens": 30}
    plain = [event.text for event in engine.stream(PROMPT, SamplingParams(**params)) if isinstance(event, Token)]
    text = "".join(plain)
    for stop in ("\n\nnever there, and long", text[10] + "\n", text[10:14] + "\n"):
        told = ""
        for event, whole in zip(engine.stream(PROMPT, SamplingParams(**params, stop=stop)), accumulate(plain), strict=False):
            told += event.text
            held = whole[len(told) :]
            assert whole.startswith(told)
            assert stop.startswith(held) or whole == text
            assert not any(whole.endswith(stop[:size]) for size in range(len(held) + 1, len(stop)))


@pytest.mark.parametrize("params", [{"max_new_tokens": 8, "min_new_tokens": 8}, {"stop": ("zzzzzzzzzz",)}, {"greedy": True}])
def test_streamed_text_adds_up(engine: Engine, params: dict[str, object]) -> None:
    """However a sample ends, and whatever was held back for a stop string."""
    for seed in range(5):
        events = list(engine.stream(PROMPT, SamplingParams(**{"seed": seed, "max_new_tokens": 40, **params})))
        assert isinstance(events[-1], Completion)
        assert "".join(event.text for event in events[:-1]) == events[-1].text


def test_logprobs_are_those_of_score(engine: Engine) -> None:
    for completion in sampled(engine, 4, top_k=5, temperature=0.7):
        expected = engine.score(PROMPT, completion.token_ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_logits_and_score_agree(engine: Engine) -> None:
    logits = engine.logits([5, 6, 7, 1], [9, 10, 11])
    assert logits.shape == (3, 512)
    assert logits.dtype == np.float32
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(engine.score([5, 6, 7, 1], [9, 10, 11]), expected[range(3), [9, 10, 11]], atol=1e-5)
    np.testing.assert_allclose(engine.logits([5, 6, 7, 1], [9, 400, 3])[1], logits[1], atol=1e-6)  # causal


def test_long_prompts_are_cut_with_a_warning(engine: Engine) -> None:
    short = Engine(engine.model, engine.tokenizer, replace(engine.manifest, max_source_tokens=8))
    with pytest.warns(TruncationWarning, match=r"has \d+ tokens; its end was cut to the model's limit of 8"):
        ids = short.source_ids(PROMPT)
    assert len(ids) == 8
    assert ids[-1] == 1  # eos stays, as with transformers
    with pytest.warns(TruncationWarning):
        assert short.source_ids(list(range(20))).tolist() == list(range(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.source_ids(PROMPT)
    for call in (
        short.source_ids,
        short.generate,
        lambda text: short.generate_many([text]),
        lambda text: short.score(text, "a"),
    ):
        with pytest.warns(TruncationWarning) as caught:
            call(PROMPT)
        assert [each.filename for each in caught] == [__file__]  # the caller's line, however deep the cut was made


def test_prompts_from_an_iterator(engine: Engine) -> None:
    params = SamplingParams(n=2, max_new_tokens=3, seed=1)
    assert engine.generate_many(iter(["a", "b"]), params) == engine.generate_many(["a", "b"], params)
    assert len({number for number, _ in engine.stream_many(iter(["a", "b"]), params)}) == 2
    for call in (engine.generate_many, lambda text: list(engine.stream_many(text))):
        with pytest.raises(TypeError, match="several prompts are a list of texts"):
            call("abc")


@pytest.mark.parametrize("params", [{}, {"n": 2}, 3])
def test_parameters_of_another_type(engine: Engine, params: object) -> None:
    with pytest.raises(TypeError, match="params must be SamplingParams"):
        engine.generate("x", params)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["threads", "max_source_tokens"])
def test_numbers_of_another_type(name: str) -> None:
    for value in (2.5, "2", True):
        with pytest.raises(TypeError, match=f"{name} must be an integer"):
            Engine.load(TINY_MODEL, **{name: value})  # type: ignore[arg-type]
    assert Engine.load(TINY_MODEL, **{name: np.int64(2)})  # type: ignore[arg-type]


def test_the_callers_limit_goes_before_the_models_wish(engine: Engine) -> None:
    wishing = Engine(engine.model, engine.tokenizer, replace(engine.manifest, generation={"min_new_tokens": 20}))
    assert wishing.params().min_new_tokens == 20
    assert wishing.params(max_new_tokens=5).min_new_tokens == 5
    with pytest.raises(ValueError, match="min_new_tokens must be at most max_new_tokens, 5, not 6"):
        wishing.params(max_new_tokens=5, min_new_tokens=6)


@pytest.mark.parametrize("prompt", ["", "   ", "\u65e5\u672c\u8a9e", "<extra_id_0>", [1], [2, 2, 2], np.array([3, 1])])
def test_odd_prompts_work(engine: Engine, prompt: object) -> None:
    assert engine.generate(prompt, SamplingParams(max_new_tokens=3, seed=0))[0].token_ids  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [[], [-1], [512], [1.5], [[1]], np.zeros((1, 2), int)])
def test_wrong_ids_are_refused(engine: Engine, ids: object) -> None:
    with pytest.raises(ValueError, match="token ids"):
        engine.generate(ids)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token ids"):
        engine.logits([3, 1], ids)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_samples(engine: Engine, threads: int) -> None:
    from tests.runtime.conftest import TINY_MODEL

    other = Engine.load(TINY_MODEL, threads=threads)
    assert [key(c) for c in sampled(other, 3)] == [key(c) for c in sampled(engine, 3)]


@pytest.mark.parametrize("folder", [TINY_MODEL, INT8_MODEL])
def test_several_threads_use_one_engine(folder: Path) -> None:
    engine = Engine.load(folder, threads=2)

    def job(number: int) -> list[tuple[object, ...]]:
        params = SamplingParams(n=1 + number % 3, max_new_tokens=12, seed=number)
        return [(*key(each), each.logprobs) for each in engine.generate(np.arange(3, 20 + number), params)]

    one_by_one = [job(number) for number in range(24)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(job, range(24))) == one_by_one


@pytest.mark.parametrize("arguments", [{"provider": "tpu"}, {"threads": 0}, {"threads": 5000}, {"max_source_tokens": 0}])
def test_wrong_load_arguments(arguments: dict[str, object]) -> None:
    from tests.runtime.conftest import TINY_MODEL

    with pytest.raises(ValueError, match=next(iter(arguments))):
        Engine.load(TINY_MODEL, **arguments)  # type: ignore[arg-type]


def test_more_candidates_than_tokens(engine: Engine) -> None:
    """Ranked are all of them then."""
    every, more = (engine.generate(PROMPT, SamplingParams(top_k=k, seed=1, max_new_tokens=5)) for k in (512, 10_000))
    assert every == more


def test_what_the_decoder_is_fed_first(engine: Engine) -> None:
    """The start token, which need not be the padding's."""
    other = Engine(engine.model, engine.tokenizer, replace(engine.manifest, tokens=replace(engine.manifest.tokens, start=9)))
    expected = engine.model.step([9], engine.model.new_cache(engine.model.prefill([5, 1]), 1, 1, 1)).full[0].copy()
    np.testing.assert_array_equal(other.logits([5, 1], [7])[0], expected)
    first = other.generate([5, 1], SamplingParams(greedy=True, max_new_tokens=1))[0]
    assert first.token_ids == (expected.argmax(),)
    assert not np.array_equal(engine.logits([5, 1], [7])[0], expected)


def test_each_eos_ends_a_sample(engine: Engine) -> None:
    eos = (1, *range(400, 500))
    several = Engine(
        engine.model, engine.tokenizer, replace(engine.manifest, tokens=replace(engine.manifest.tokens, eos=eos))
    )
    samples = sampled(several, 16)
    assert len({sample.token_ids[-1] for sample in samples if sample.finish_reason == "eos"}) > 2
    assert not any(set(sample.token_ids[:-1]) & set(eos) for sample in samples)


def test_model_defaults_come_before_the_usual_ones(engine: Engine) -> None:
    tuned = Engine(engine.model, engine.tokenizer, replace(engine.manifest, generation={"top_k": 3, "max_new_tokens": 7}))
    assert (tuned.params().top_k, tuned.params().max_new_tokens, tuned.params().top_p) == (3, 7, 0.95)
    assert tuned.params(top_k=9).top_k == 9


def test_the_cache_cannot_overflow(engine: Engine) -> None:
    cache = engine.model.new_cache(engine.model.prefill([5, 1]), rows=1, capacity=2, candidates=1)
    for _ in range(2):
        engine.model.step([0], cache)
    with pytest.raises(ValueError, match="full"):
        engine.model.step([0], cache)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_engine_is_not_copied(engine: Engine, copied: Callable[[Engine], object]) -> None:
    with pytest.raises(TypeError, match=r"an Engine cannot be pickled or copied; load one in each process"):
        copied(engine)


def test_no_memory_for_the_cache(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's error is one of ours, as onnxruntime's is."""

    def new_cache(*_: object) -> Cache:
        raise MemoryError("Unable to allocate 800. MiB")

    monkeypatch.setattr(engine.model, "new_cache", new_cache)
    with pytest.raises(RamekinError, match=r"not enough memory; ask for fewer or shorter samples \(Unable to allocate 800"):
        engine.generate(PROMPT)


def test_seeds_that_are_drawn_are_whole_as_doubles(engine: Engine) -> None:
    seeds = [engine.generate(PROMPT, SamplingParams(max_new_tokens=1))[0].seed for _ in range(20)]
    assert len(set(seeds)) == 20
    assert all(int(float(seed)) == seed for seed in seeds)
    assert max(seeds).bit_length() > 45


def test_a_warning_points_at_the_caller_in_a_bundle_without_sources(tmp_path: Path) -> None:
    folder = shutil.copytree(Path(ramekin.__file__).parent, tmp_path / "ramekin")
    compileall.compile_dir(folder, quiet=1, legacy=True, stripdir=str(tmp_path))
    for source in folder.glob("*.py"):
        source.unlink()
    program = (
        f"import ramekin; e = ramekin.Engine.load({str(TINY_MODEL)!r}, max_source_tokens=2)\n"
        + "e.source_ids('a b c')\n" * 2
    )
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=True
    )
    assert [line.partition(" Trunc")[0].rpartition("/")[2] for line in done.stderr.splitlines() if "Trunc" in line] == [
        "program.py:2:",
        "program.py:3:",
    ]
