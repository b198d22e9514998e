"""The commands that sample: `generate` and `questions`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic

import click

from ramekin.engine import Engine, TruncationWarning
from ramekin.errors import InputError
from ramekin.inputs import read_papers, read_prompts
from ramekin.options import PATH, model_options, open_engine, sampling_options
from ramekin.paper import Paper, build_prompt
from ramekin.qa_pair import SEPARATOR, QAPair
from ramekin.sample import Completion, Token
from ramekin.sampling import SamplingParams
from ramekin.terminal import Item, is_terminal, json_text, progress_in_groups, say, whole, write


@dataclass(frozen=True)
class _Asked(Generic[Item]):
    """A prompt or paper, its token ids, and whether they were cut to the model's limit."""

    item: Item
    source: Any
    cut: bool


@click.command(short_help="Continue prompts.")
@click.argument("model", type=PATH)
@click.argument("file", type=PATH, default="-")
@sampling_options
@model_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each prompt, on a line of its own.")
@click.option("--stream", is_flag=True, help="Show text as it comes (with several samples: each one when it is finished).")
def generate(
    model: Path,
    file: Path,
    threads: int | None,
    provider: str | None,
    max_source_tokens: int | None,
    on_long: str,
    as_json: bool,
    stream: bool,
    **sampling: Any,
) -> None:
    """Continue the prompt in FILE (- or nothing: stdin); a .jsonl FILE holds many, each a text or an object with "prompt".

    \b
    Examples:
      echo "Translate to German: Hello." | ramekin generate model
      ramekin generate model prompts.jsonl -n 4 --seed 7 --json
    """
    if as_json and stream:
        raise click.UsageError("--json tells of a prompt when it is done, --stream before: give one of them")
    if str(file) == "-" and is_terminal(sys.stdin):
        say("reading the prompt from this terminal; Ctrl-D ends it")
    prompts = read_prompts(file)
    engine = open_engine(model, provider, threads, max_source_tokens)
    params = _params(engine, sampling)
    labels = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    asked = _asked(engine, labels, prompts, prompts, on_long)

    def show(event: Token | Completion) -> None:
        if isinstance(event, Completion) and params.n > 1:
            write(f"[{event.index}] {event.text}")
        elif isinstance(event, Token) and params.n == 1:
            write(event.text, end="")

    def tell(each: _Asked[str], samples: list[Completion]) -> None:
        if as_json:
            rows = [_completion_json(completion) for completion in samples]
            write(json_text({"prompt": each.item, "samples": rows, **_amiss(each, samples, params.n)}))
        elif stream and params.n == 1:
            write()
        elif not stream:
            for completion in samples:
                write(completion.text)

    size = 1 if stream else engine.model.prompts_at_once
    _sample(engine, progress_in_groups(_groups(asked, size), "prompts"), params, tell, show if stream else None)


def _completion_json(completion: Completion) -> dict[str, Any]:
    return {**asdict(completion), "logprobs": [round(value, 6) for value in completion.logprobs]}


@click.command(short_help="Ask and answer questions about papers.")
@click.argument("model", type=PATH)
@click.argument("paper", type=PATH)
@sampling_options
@model_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each paper, on a line of its own.")
@click.option("--all", "show_all", is_flag=True, help="Print malformed pairs too, with what is wrong with them.")
def questions(
    model: Path,
    paper: Path,
    threads: int | None,
    provider: str | None,
    max_source_tokens: int | None,
    on_long: str,
    as_json: bool,
    show_all: bool,
    **sampling: Any,
) -> None:
    """Ask and answer questions about a PAPER (- for stdin): JSON or text with abstract and introduction; .jsonl holds many.

    \b
    Examples:
      ramekin questions model paper.json -n 16
      ramekin questions model papers.jsonl -n 8 --seed 7 --json > pairs.jsonl
    """
    papers = read_papers(paper)
    engine = open_engine(model, provider, threads, max_source_tokens)
    if engine.manifest.tokens.named.get(SEPARATOR) in engine.manifest.tokens.silent:
        say(f"{SEPARATOR} is a special token of this model's tokenizer, which texts leave out: no pair can be told")
    usual = 1 if sampling["greedy"] else 16  # greedy samples are all the same
    params = _params(engine, {**sampling, "n": usual if sampling["n"] is None else sampling["n"]})
    malformed = total = 0

    def tell(each: _Asked[Paper], samples: list[Completion]) -> None:
        nonlocal malformed, total
        pairs = [QAPair.parse(sample.text, cut=sample.finish_reason == "length") for sample in samples]
        total, malformed = total + len(pairs), malformed + sum(not pair.well_formed for pair in pairs)
        if as_json:
            rows = [
                {"question": pair.question, "answer": pair.answer, "problem": pair.problem, **_completion_json(sample)}
                for pair, sample in zip(pairs, samples, strict=True)
            ]
            write(json_text({"title": each.item.title, "pairs": rows, **_amiss(each, samples, params.n)}))
            return
        if len(papers) > 1:
            write(f"# {each.item.title}\n")
        for pair in pairs:
            if show_all or pair.well_formed:
                note = f"\n   ({pair.problem})" if pair.problem else ""
                write(f"Q: {pair.question}\nA: {pair.answer}{note}\n")

    labels = [f"paper {number} ({each.title})" if each.title else f"paper {number}" for number, each in enumerate(papers, 1)]
    prompts = [build_prompt(each, engine.manifest.prompt) for each in papers]
    for part in ("abstract", "introduction"):
        lack = [label for label, each in zip(labels, papers, strict=True) if not getattr(each, part).strip()]
        if lack and f"{{{part}}}" in engine.manifest.prompt:
            say(f"no {part} found in {lack[0]}{f' and {len(lack) - 1} more' if lack[1:] else ''}")
    asked = _asked(engine, labels, papers, prompts, on_long)
    groups = progress_in_groups(_groups(asked, engine.model.prompts_at_once), "papers")
    _sample(engine, groups, params, tell)
    if malformed and not as_json:
        hint = "" if show_all else "; --all prints them"
        say(f"{malformed} of {total} samples were not a question and a whole answer{hint}")


def _sample(
    engine: Engine,
    groups: Iterable[list[_Asked[Item]]],
    params: SamplingParams,
    tell: Callable[[_Asked[Item], list[Completion]], None],
    show: Callable[[Token | Completion], None] | None = None,
) -> None:
    """Sample from group after group; tell of each prompt, and show events as they come."""
    for group in groups:
        done: list[list[Completion]] = [[] for _ in group]
        try:
            for number, event in engine.stream_many([each.source for each in group], params):
                if isinstance(event, Completion):
                    done[number].append(event)
                if show:
                    show(event)
        finally:  # what is finished is not lost, whatever happens
            with whole():
                for each, samples in zip(group, done, strict=True):
                    if samples or show:  # a line that was shown in part is ended
                        tell(each, sorted(samples, key=lambda completion: completion.index))


def _asked(
    engine: Engine, labels: Sequence[str], items: Sequence[Item], prompts: Sequence[str], on_long: str
) -> list[_Asked[Item]]:
    """What is asked of the model; which prompts are too long is told before any is run."""
    asked = []
    for label, item, prompt in zip(labels, items, prompts, strict=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")  # else the second prompt that is cut would not be told of
            ids = engine.source_ids(prompt)
        for each in caught:
            if on_long == "error" and issubclass(each.category, TruncationWarning):
                limit, count = engine.manifest.max_source_tokens, len(engine.tokenizer.encode(prompt))
                raise InputError(f"{label}: {count} tokens, more than the limit of {limit}; nothing was run")
            say(f"{label}: {each.message}" if len(labels) > 1 else each.message)
        asked.append(_Asked(item, ids, cut=any(issubclass(each.category, TruncationWarning) for each in caught)))
    return asked


def _amiss(asked: _Asked[Any], samples: list[Completion], n: int) -> dict[str, bool]:
    """What a record says of a prompt that was cut, or has fewer samples than were asked for."""
    return {name: True for name, said in (("truncated", asked.cut), ("interrupted", len(samples) < n)) if said}


def _groups(items: list[Item], size: int) -> list[list[Item]]:
    """The items in groups that the model computes together."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def _params(engine: Engine, sampling: dict[str, Any]) -> SamplingParams:
    given = {name: value for name, value in sampling.items() if value is not None and value != ()}
    try:
        return engine.params(**given)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None
