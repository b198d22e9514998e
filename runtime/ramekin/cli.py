"""The commands. Results go to stdout, all else to stderr; exit status 0, 1 for a failed job, 2 for wrong use."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

import click

import ramekin
from ramekin import golden
from ramekin.engine import Completion, Engine, TruncationWarning
from ramekin.errors import RamekinError
from ramekin.inputs import read_papers, read_prompts
from ramekin.manifest import Manifest
from ramekin.options import Command, model_options, sampling_options
from ramekin.paper import QAPair, build_prompt
from ramekin.sampling import SamplingParams

Item = TypeVar("Item")


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
                return click.Command(cmd_name, callback=_refuse(reason), short_help=f"(needs {error.name})")
            return command
        return None


def _refuse(reason: str) -> Command:
    def refuse() -> None:
        raise click.ClickException(reason)

    return refuse


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(ramekin.__version__, prog_name="ramekin")
def cli() -> None:
    """Run fine-tuned T5 and FLAN-T5 models without PyTorch."""


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
    max_source_tokens: int | None,
    on_long: str,
    as_json: bool,
    stream: bool,
    **sampling: Any,
) -> None:
    r"""Continue the prompt in FILE (- or nothing: stdin); a .jsonl FILE holds many, each a text or an object with "prompt".

    \b
    Examples:
      echo "Translate to German: Hello." | ramekin generate model
      ramekin generate model prompts.jsonl -n 4 --seed 7 --json
    """
    prompts = read_prompts(file)
    engine = _load(model, threads, max_source_tokens, on_long)
    params = _params(engine, sampling)
    for prompt in _progress(prompts, "prompts"):
        done: list[Completion] = []
        try:
            for event in engine.stream(prompt, params):
                if isinstance(event, Completion):
                    done.append(event)
                    if stream and not as_json and params.n > 1:
                        click.echo(f"[{event.index}] {event.text}")
                elif stream and not as_json and params.n == 1:
                    click.echo(event.text, nl=False)
        except KeyboardInterrupt:
            _tell(prompt, done, as_json, params.n, streamed=stream)  # what is finished is not lost
            raise
        _tell(prompt, done, as_json, params.n, streamed=stream)


def _tell(prompt: str, done: list[Completion], as_json: bool, n: int, streamed: bool) -> None:
    done.sort(key=lambda completion: completion.index)
    if as_json:
        samples = [_completion_json(completion) for completion in done]
        click.echo(json.dumps({"prompt": prompt, "samples": samples}, ensure_ascii=False))
    elif streamed and n == 1:
        click.echo()
    elif not streamed:
        for completion in done:
            click.echo(completion.text)


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
    max_source_tokens: int | None,
    on_long: str,
    as_json: bool,
    show_all: bool,
    **sampling: Any,
) -> None:
    r"""Ask and answer questions about a PAPER: JSON with title, abstract, introduction; text with such headings; or .jsonl.

    \b
    Examples:
      ramekin questions model paper.json -n 16
      ramekin questions model papers.jsonl -n 8 --seed 7 --json > pairs.jsonl
    """
    papers = read_papers(paper)
    engine = _load(model, threads, max_source_tokens, on_long)
    params = _params(engine, {**sampling, "n": 16 if sampling["n"] is None else sampling["n"]})
    malformed = total = 0

    def tell(title: str, done: list[Completion]) -> None:
        nonlocal malformed, total
        done.sort(key=lambda completion: completion.index)
        pairs = [QAPair.parse(sample.text, cut=sample.finish_reason == "length") for sample in done]
        total, malformed = total + len(pairs), malformed + sum(not pair.well_formed for pair in pairs)
        if as_json:
            rows = [
                {"question": pair.question, "answer": pair.answer, "problem": pair.problem, **_completion_json(sample)}
                for pair, sample in zip(pairs, done, strict=True)
            ]
            click.echo(json.dumps({"title": title, "pairs": rows}, ensure_ascii=False))
            return
        if len(papers) > 1:
            click.echo(f"# {title}\n")
        for pair in pairs:
            if show_all or pair.well_formed:
                note = f"\n   ({pair.problem})" if pair.problem else ""
                click.echo(f"Q: {pair.question}\nA: {pair.answer}{note}\n")

    for each in _progress(papers, "papers"):
        done: list[Completion] = []
        try:
            events = engine.stream(build_prompt(each, engine.manifest.prompt), params)
            done.extend(event for event in events if isinstance(event, Completion))
        except KeyboardInterrupt:
            tell(each.title, done)
            raise
        tell(each.title, done)
    if malformed and not as_json:
        hint = "" if show_all else "; --all prints them"
        click.echo(f"{malformed} of {total} samples were not a question and a whole answer{hint}", err=True)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The manifest as it is.")
def info(model: Path, as_json: bool) -> None:
    """Tell what a MODEL folder holds and where it came from."""
    manifest = Manifest.load(model)
    if as_json:
        click.echo(manifest.to_json(), nl=False)
        return
    dims = manifest.dims
    size = sum(record.bytes for record in manifest.files.values())
    rows = [
        ("variant", manifest.variant),
        ("precision", manifest.precision),
        ("size", f"{size / 1e6:,.1f} MB in {len(manifest.files)} files"),
        ("layers", f"{dims.encoder_layers} encoder, {dims.decoder_layers} decoder"),
        ("width", f"{dims.d_model}, {dims.num_heads} heads of {dims.head_dim}, feed-forward {dims.d_ff}"),
        ("vocabulary", f"{dims.vocab_size:,}"),
        ("longest prompt", f"{manifest.max_source_tokens} tokens"),
        (
            "generation",
            ", ".join(f"{name}={value}" for name, value in manifest.generation.items()) or "the usual defaults",
        ),
        ("onnxruntime", str(manifest.onnxruntime)),
        *((f"source {name}", str(value)) for name, value in manifest.source.items()),
        *((f"recipe {name}", str(value)) for name, value in manifest.recipe.items()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(1), help="Threads that compute.  [default: the usable cores]")
def verify(model: Path, threads: int | None) -> None:
    """Check a MODEL folder: the SHA-256 of every file, and that it computes what it did when it was exported."""
    manifest = Manifest.load(model)
    manifest.check_files(model, hash_up_to=None)
    click.echo(f"files: {len(manifest.files)} intact")
    difference = golden.check(Engine.load(model, threads=threads), manifest.golden)
    click.echo(f"golden run: log-probabilities within {difference:.1e} of those at export")


def _load(model: Path, threads: int | None, max_source_tokens: int | None, on_long: str) -> Engine:
    if on_long == "error":
        warnings.simplefilter("error", TruncationWarning)
    return Engine.load(model, threads=threads, max_source_tokens=max_source_tokens)


def _params(engine: Engine, sampling: dict[str, Any]) -> SamplingParams:
    given = {name: value for name, value in sampling.items() if value is not None and value != ()}
    try:
        return engine.params(**given)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None


def _progress(items: list[Item], what: str) -> Iterator[Item]:
    """The items, with a progress bar on stderr if there are several and a person watches."""
    if len(items) < 2 or not sys.stderr.isatty():
        yield from items
        return
    with click.progressbar(items, label=what, file=sys.stderr, show_pos=True) as bar:
        yield from bar


def _say(problem: object) -> None:
    click.echo(f"ramekin: {' '.join(str(problem).split())}", err=True)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(message)


def main(arguments: Iterable[str] | None = None) -> None:
    """The command `ramekin`: every problem that is not a bug is one line on stderr."""
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", TruncationWarning)
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="ramekin", standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        _say(f"{error.format_message()}{hint}")
        sys.exit(2)
    except click.ClickException as error:
        _say(error.format_message())
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        _say("stopped")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (RamekinError, TruncationWarning, OSError) as error:
        _say(error)
        sys.exit(1)
    except MemoryError as error:
        _say(f"not enough memory ({error}); ask for fewer samples or shorter ones")
        sys.exit(1)


if __name__ == "__main__":
    main()
