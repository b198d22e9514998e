"""`ramekin export`, `ramekin convert` and `ramekin demo`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from ramekin.errors import RamekinError
from ramekin.manifest import DEFAULT_PROMPT, Manifest
from ramekin.options import hush, options
from ramekin.paper import check_prompt
from ramekin.quality import table
from ramekin.sample_cli import questions
from ramekin.terminal import is_terminal
from ramekin_export.formats import FORMATS
from ramekin_export.pipeline import Progress
from ramekin_export.pipeline import export as run_export
from ramekin_export.recipe import RECIPES
from ramekin_export.verify import Checks, against
from ramekin_export.via_optimum import export_via_optimum

_PAPERS = click.Path(path_type=Path, exists=True, dir_okay=False)

EXAMPLES = Path(__file__).parents[2] / "examples"


class _Out(click.Path):
    """A folder to make; an empty name, of a variable that is not set perhaps, is not this folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A path."""
        if value == "":
            self.fail("it is empty", param, ctx)
        return super().convert(value, param, ctx)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar on stderr for each stage, one after the other, if a person watches."""
    with ExitStack() as stack:
        bars: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                stack.close()
                bar = click.progressbar(length=total, label=f"{stage:<20}", file=sys.stderr, width=30)
                bars[stage] = stack.enter_context(bar)
            bars[stage].update(done)

        yield advance if is_terminal(sys.stderr) else lambda _stage, _done, _total: None


export_options = options(
    click.option(
        "--precision",
        type=click.Choice([*RECIPES, *FORMATS]),
        default="int8",
        show_default=True,
        help="For the CPU fp32, int8 or int4; for CUDA bf16, fp16 (before Ampere) or fp32-cuda.",
    ),
    click.option(
        "--prompt",
        default=DEFAULT_PROMPT,
        help="Template of {title}, {abstract}, {introduction}.  [default: the model card's]",
    ),
    click.option("--force", is_flag=True, help="Replace OUT if it is there."),
    click.option(
        "--calibrate",
        type=_PAPERS,
        help="Up to 32 papers: int4 weights are rounded, int8 caches scaled for them.  [default: an invented one]",
    ),
    click.option("--papers", type=_PAPERS, help="Up to 32 papers to judge the model on.  [default: another invented one]"),
    click.option(
        "--verify/--no-verify",
        default=True,
        help="Compare with float32: minutes for a large model.  [default: yes]",
    ),
    click.option("--allow-quality-loss", is_flag=True, help="Keep a model that is too far from float32."),
)
"""What `export` and `convert` have in common."""


@click.command(short_help="Turn a T5 checkpoint into a model folder.")
@click.argument("source")
@click.argument("out", type=_Out(path_type=Path))
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option(
    "--via",
    type=click.Choice(["ramekin", "optimum"]),
    default="ramekin",
    show_default=True,
    help="Whose graphs: ours, or those that optimum traces (slower ones, fp32 or int8; needs the extra [reference]).",
)
@export_options
def export(
    source: str,
    out: Path,
    revision: str | None,
    via: str,
    precision: str,
    prompt: str,
    force: bool,
    **checks: Any,
) -> None:
    """Turn a T5 checkpoint into a model folder: two ONNX graphs, a tokenizer and a manifest.

    SOURCE is a folder as save_pretrained writes it, or a Hub id. A quantized model's predictions are compared with those
    of the float32 model; `ramekin info` shows the figures, and a model that is too far off is not kept.

    \b
    Examples:
      ramekin export ./my-finetuned-t5 model
      ramekin export ./my-finetuned-t5 model --precision int4 --calibrate papers.jsonl
      ramekin export UNIST-Eunchan/FLAN-T5-NLP-Paper-to-Question-Generation model --precision int4
    """
    _check_prompt(prompt)
    hush()
    if via == "ramekin":
        with progress_bars() as advance:
            manifest = run_export(source, out, precision, revision, force, prompt, Checks(**checks), advance)
    else:
        if Checks(**checks) != Checks():
            raise click.UsageError("--via optimum neither calibrates nor verifies: leave those options out")
        try:
            manifest = export_via_optimum(source, out, precision, revision, force, prompt)
        except ImportError as error:
            raise click.ClickException(
                f"--via optimum needs {error.name}: pip install '.[cpu,reference]' in ramekin's clone"
            ) from None
        except ValueError as error:
            if isinstance(error, RamekinError):
                raise
            raise click.UsageError(str(error)) from None
    _tell(out, manifest)


@click.command(short_help="Turn optimum's float32 export into a model folder of ours.")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=_Out(path_type=Path))
@export_options
def convert(folder: Path, out: Path, precision: str, prompt: str, force: bool, **checks: Any) -> None:
    """Turn optimum's float32 export in FOLDER into a model folder of ours, where the checkpoint is gone.

    The graphs are ours; the weights are those in optimum's graphs. See `ramekin export` for the rest.

    \b
    Example:
      ramekin convert ./my-t5-onnx model --precision int4
    """
    _check_prompt(prompt)
    hush()
    with progress_bars() as advance:
        manifest = run_export(str(folder), out, precision, None, force, prompt, Checks(**checks), advance)
    _tell(out, manifest)


def _check_prompt(prompt: str) -> None:
    try:
        check_prompt(prompt)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _tell(out: Path, manifest: Manifest) -> None:
    size = sum(record.bytes for record in manifest.files.values())
    click.echo(f"{out}: {manifest.variant}, {manifest.precision}, {size / 1e6:,.1f} MB", err=True)
    for line in table(manifest.quality):
        click.echo(line, err=True)
    if not manifest.quality and not manifest.precision.startswith("fp32"):
        where = "" if "cpu" in manifest.providers else " on a GPU"
        click.echo(f"not compared with float32; `ramekin verify --reference` does that{where}", err=True)


def against_reference(
    model: Path, source: str, revision: str | None, papers: Path | None, threads: int | None, provider: str
) -> dict[str, Any]:
    """What `ramekin verify --reference` measures."""
    with progress_bars() as advance:
        return against(model, source, revision, papers, threads, provider, advance)


@click.command(short_help="Export the small demo model and ask it about a paper.")
@click.option("--precision", type=click.Choice(list(RECIPES)), default="int8", show_default=True)
@click.option("-n", "n", type=click.IntRange(1, 1 << 16), default=8, show_default=True, help="Samples.")
@click.option("--seed", type=click.IntRange(0, (1 << 64) - 1), default=7, show_default=True)
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
        ctx.invoke(questions, model=model, paper=paper, n=n, seed=seed)
