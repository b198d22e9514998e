"""`ramekin export` and `ramekin demo`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from ramekin.cli import questions
from ramekin.manifest import DEFAULT_PROMPT
from ramekin.paper import check_prompt
from ramekin.terminal import is_terminal
from ramekin_export.pipeline import Progress
from ramekin_export.pipeline import export as run_export
from ramekin_export.recipe import RECIPES

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def _progress_bar(label: str) -> Iterator[Progress]:
    """A bar on stderr if a person watches, from the first progress on."""
    with ExitStack() as stack:
        bars: list[Any] = []

        def advance(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(click.progressbar(length=total, label=label, file=sys.stderr, width=30)))
            bars[0].update(done)

        yield advance if is_terminal(sys.stderr) else lambda _done, _total: None


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--precision", type=click.Choice(list(RECIPES)), default="int8", show_default=True)
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option("--prompt", default=DEFAULT_PROMPT, help="Template for papers.  [default: the model card's]")
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
def export(source: str, out: Path, precision: str, revision: str | None, prompt: str, force: bool) -> None:
    """Turn a T5 checkpoint into a model folder: two ONNX graphs, a tokenizer and a manifest.

    SOURCE is a folder as save_pretrained writes it, or a Hub id.

    \b
    Examples:
      ramekin export ./my-finetuned-t5 model
      ramekin export UNIST-Eunchan/FLAN-T5-NLP-Paper-to-Question-Generation model --precision int4
    """
    try:
        check_prompt(prompt)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with _progress_bar(f"export {precision}") as advance:
        manifest = run_export(source, out, precision, revision, force, prompt, advance)
    size = sum(record.bytes for record in manifest.files.values())
    click.echo(f"{out}: {manifest.variant}, {precision}, {size / 1e6:,.1f} MB", err=True)


@click.command()
@click.option("--precision", type=click.Choice(list(RECIPES)), default="int8", show_default=True)
@click.option("-n", "n", type=click.IntRange(1), default=8, show_default=True, help="Samples.")
@click.option("--seed", type=int, default=7, show_default=True)
@click.pass_context
def demo(ctx: click.Context, precision: str, n: int, seed: int) -> None:
    """Export the small demo checkpoint and ask it about an invented paper, end to end.

    The demo model was trained on synthetic papers. It shows that everything works; it knows nothing of real papers.
    """
    checkpoint, paper = EXAMPLES / "checkpoint", EXAMPLES / "paper.json"
    if not checkpoint.is_dir():
        raise click.ClickException("the demo model lies in the repository, not in the package: run `make demo` in a clone")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        ctx.invoke(export, source=str(checkpoint), out=model, precision=precision)
        click.echo(f"a demo model, trained on synthetic papers, asks about {paper.name}:\n", err=True)
        ctx.invoke(questions, model=model, paper=paper, n=n, seed=seed, on_long="truncate")
