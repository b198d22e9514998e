"""The commands. Results go to stdout, all else to stderr; exit status 0, 1 for a failed job, 2 for wrong use."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from importlib.metadata import entry_points
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

import ramekin
from ramekin.bench_cli import bench
from ramekin.engine import Engine
from ramekin.errors import InputError, RamekinError
from ramekin.folder_cli import info, verify
from ramekin.inputs import read_papers, read_prompts
from ramekin.options import Command, model_options, open_engine, sampling_options
from ramekin.paper import Paper, QAPair, build_prompt
from ramekin.sample import Completion
from ramekin.sampling import SamplingParams
from ramekin.stopping import Stopping
from ramekin.terminal import Item, is_terminal, json_line, progress_in_groups, say, whole, write


class _Commands(click.Group):
    """The commands of this file, and those that other parts of the distribution register, loaded when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(each.name for each in entry_points(group="ramekin.commands"))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own:
            return own
        for each in entry_points(group="ramekin.commands", name=cmd_name):
            try:
                command: click.Command = each.load()
            except ImportError as error:
                reason = f"`ramekin {cmd_name}` needs {error.name}: pip install 'ramekin[cpu,export]'"
                anything = {"ignore_unknown_options": True, "allow_extra_args": True}
                return click.Command(
                    cmd_name, anything, _refuse(reason), short_help=f"(needs {error.name})", add_help_option=False
                )
            return command
        return None


def _refuse(reason: str) -> Command:
    def refuse() -> None:
        raise click.ClickException(reason)

    return refuse


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(ramekin.__version__, prog_name="ramekin")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run fine-tuned T5 and FLAN-T5 models without PyTorch."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


cli.add_command(bench)
cli.add_command(info)
cli.add_command(verify)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path), default="-")
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
    if str(file) == "-" and is_terminal(sys.stdin):
        say("reading the prompt from this terminal; Ctrl-D ends it")
    prompts = read_prompts(file)
    engine = open_engine(model, provider, threads, max_source_tokens)
    params = _params(engine, sampling)
    labels = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    sources = _sources(engine, labels, prompts, on_long)
    pairs = list(zip(prompts, sources, strict=True))
    for group in progress_in_groups(_groups(pairs, 1 if stream else engine.model.prompts_at_once), "prompts"):
        done: list[list[Completion]] = [[] for _ in group]
        try:
            for number, event in engine.stream_many([source for _, source in group], params):
                if isinstance(event, Completion):
                    done[number].append(event)
                    if stream and not as_json and params.n > 1:
                        write(f"[{event.index}] {event.text}")
                elif stream and not as_json and params.n == 1:
                    write(event.text, end="")
        finally:  # what is finished is not lost, whatever happens
            with whole():
                begun = _begun(group, done, streamed=stream and not as_json)
                _tell(*begun, as_json, params.n, streamed=stream)


def _tell(group: list[tuple[str, Any]], done: list[list[Completion]], as_json: bool, n: int, streamed: bool) -> None:
    for (prompt, _), samples in zip(group, done, strict=True):
        samples.sort(key=lambda completion: completion.index)
        if as_json:
            rows = [_completion_json(completion) for completion in samples]
            write(json_line({"prompt": prompt, "samples": rows, **_interrupted(samples, n)}))
        elif streamed and n == 1:
            write()
        elif not streamed:
            for completion in samples:
                write(completion.text)


def _completion_json(completion: Completion) -> dict[str, Any]:
    return {
        "index": completion.index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "logprobs": [round(value, 6) for value in completion.logprobs],
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
    }


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("paper", type=click.Path(path_type=Path))
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
    """Ask and answer questions about a PAPER: JSON with title, abstract, introduction; text with such headings; or .jsonl.

    \b
    Examples:
      ramekin questions model paper.json -n 16
      ramekin questions model papers.jsonl -n 8 --seed 7 --json > pairs.jsonl
    """
    papers = read_papers(paper)
    engine = open_engine(model, provider, threads, max_source_tokens)
    params = _params(engine, {**sampling, "n": 16 if sampling["n"] is None else sampling["n"]})
    malformed = total = 0

    def tell(group: list[tuple[Paper, Any]], done: list[list[Completion]]) -> None:
        nonlocal malformed, total
        for (each, _), samples in zip(group, done, strict=True):
            samples.sort(key=lambda completion: completion.index)
            pairs = [QAPair.parse(sample.text, cut=sample.finish_reason == "length") for sample in samples]
            total, malformed = total + len(pairs), malformed + sum(not pair.well_formed for pair in pairs)
            if as_json:
                rows = [
                    {"question": pair.question, "answer": pair.answer, "problem": pair.problem, **_completion_json(sample)}
                    for pair, sample in zip(pairs, samples, strict=True)
                ]
                write(json_line({"title": each.title, "pairs": rows, **_interrupted(samples, params.n)}))
                continue
            if len(papers) > 1:
                write(f"# {each.title}\n")
            for pair in pairs:
                if show_all or pair.well_formed:
                    note = f"\n   ({pair.problem})" if pair.problem else ""
                    write(f"Q: {pair.question}\nA: {pair.answer}{note}\n")

    labels = [f"paper {number} ({each.title})" if each.title else f"paper {number}" for number, each in enumerate(papers, 1)]
    prompts = [build_prompt(each, engine.manifest.prompt) for each in papers]
    sources = _sources(engine, labels, prompts, on_long)
    for group in progress_in_groups(
        _groups(list(zip(papers, sources, strict=True)), engine.model.prompts_at_once), "papers"
    ):
        done: list[list[Completion]] = [[] for _ in group]
        try:
            for number, event in engine.stream_many([source for _, source in group], params):
                if isinstance(event, Completion):
                    done[number].append(event)
        finally:  # what is finished is not lost, whatever happens
            with whole():
                tell(*_begun(group, done, streamed=False))
    if malformed and not as_json:
        hint = "" if show_all else "; --all prints them"
        say(f"{malformed} of {total} samples were not a question and a whole answer{hint}")


def _sources(engine: Engine, labels: list[str], prompts: list[str], on_long: str) -> list[Any]:
    """The token ids of all prompts; which of them are too long is told before any is run."""
    sources = []
    for label, prompt in zip(labels, prompts, strict=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")  # else the second prompt that is cut would not be told of
            sources.append(engine.source_ids(prompt))
        for each in caught:
            if on_long == "error":
                limit, count = engine.manifest.max_source_tokens, len(engine.tokenizer.encode(prompt))
                raise InputError(f"{label}: {count} tokens, more than the limit of {limit}; nothing was run")
            say(f"{label}: {each.message}" if len(labels) > 1 else each.message)
    return sources


def _begun(group: list[Item], done: list[list[Completion]], *, streamed: bool) -> tuple[list[Item], list[list[Completion]]]:
    """Those of a group that have finished samples; all if their texts were shown as they came, to end the line."""
    kept = [place for place, samples in enumerate(done) if samples or streamed]
    return [group[place] for place in kept], [done[place] for place in kept]


def _interrupted(samples: list[Completion], n: int) -> dict[str, bool]:
    """What a record with fewer samples than were asked for says of it."""
    return {"interrupted": True} if len(samples) < n else {}


def _groups(items: list[Item], size: int) -> list[list[Item]]:
    """The items in groups that the model computes together."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def _params(engine: Engine, sampling: dict[str, Any]) -> SamplingParams:
    given = {name: value for name, value in sampling.items() if value is not None and value != ()}
    try:
        return engine.params(**given)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(message)


def main(arguments: Iterable[str] | None = None) -> None:
    """The command `ramekin`: every problem that is not a bug is one line on stderr."""
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a letter that the encoding lacks must not cost the results
            stream.reconfigure(errors="backslashreplace")
    with Stopping(ends=arguments is None) as stopping:  # the arguments of the process: it is nothing but this command
        _run(None if arguments is None else list(arguments), stopping)


def _run(arguments: list[str] | None, stopping: Stopping) -> None:
    try:
        cli.main(args=arguments, prog_name="ramekin", standalone_mode=False, obj=stopping)
        if sys.stdout:
            sys.stdout.flush()
    except click.UsageError as error:
        hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        say(f"{error.format_message()}{hint}")
        sys.exit(2)
    except click.ClickException as error:
        say(error.format_message())
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        say("stopped")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (RamekinError, FileExistsError) as error:
        say(error)
        sys.exit(1)
    except OSError as error:
        say(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error)
        sys.exit(1)
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        say(f"not enough memory{reason}; ask for fewer samples or shorter ones, or take a smaller model")
        sys.exit(1)


if __name__ == "__main__":
    main()
