"""The benchmarks' commands: `python -m benchmarks --help`."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.engines import ENGINES, LEVERS
from benchmarks.environments import ENVIRONMENTS
from benchmarks.jobs import JOBS, QUICK
from benchmarks.machine import level
from benchmarks.random_checkpoint import SHAPES, config_of, write_checkpoint
from benchmarks.results import read
from benchmarks.speed import Plan, run_kernels, run_own
from benchmarks.speed import run as run_plan
from ramekin.errors import RamekinError
from ramekin.session import MOST_THREADS, usable_cores
from ramekin.stopping import Stopping
from ramekin_export.checkpoint import Checkpoint

_ROOT = Path(__file__).parents[1]
_DEMO = _ROOT / "examples" / "checkpoint"
_BEGIN, _END = "<!-- speed: made by python -m benchmarks report -->", "<!-- speed: end -->"
_RESULTS = _ROOT / "benchmarks" / "results" / "speed"
_OURS = ("ramekin int4", "ramekin int8")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Time ramekin and its peers on the same jobs; see benchmarks/README.md for what is timed and what is not."""


@cli.command()
@click.argument("checkpoint", required=False)
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Instead of a CHECKPOINT: random weights, made once.")
@click.option("--quick", is_flag=True, help="The demo model and small jobs, to try it.")
@click.option("--levers", is_flag=True, help="Not the engines, but our own levers, switched on one by one.")
@click.option("--own", is_flag=True, help="Not the engines, but what `ramekin bench` tells of ours, for the page's goals.")
@click.option("--kernels", is_flag=True, help="Not the engines, but where the time of ours goes, kernel by kernel.")
@click.option("--engine", "engines", multiple=True, type=click.Choice(list(ENGINES)), help="Only these.  [default: all]")
@click.option(
    "--job",
    "jobs",
    multiple=True,
    help=f"Only these, or 'all': {', '.join(JOBS)}.  [default: those of the README's table, after 900 tokens]",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="For every engine.  [default: the usable cores]")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=30,
    show_default=True,
    help="Seconds after which a job of equal lengths is cut.",
)
@click.option(
    "--work", type=click.Path(path_type=Path), default=_ROOT / ".bench", help="For converted models, environments."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The results.  [default: benchmarks/results/speed/MODEL-LEVEL.jsonl]",
)
@click.option("--python", "pythons", multiple=True, metavar="NAME=PATH", help="Use this interpreter for an environment.")
def run(
    checkpoint: str | None,
    shape: str | None,
    quick: bool,
    levers: bool,
    own: bool,
    kernels: bool,
    engines: tuple[str, ...],
    jobs: tuple[str, ...],
    rounds: int,
    threads: int | None,
    limit: int,
    work: Path,
    out: Path | None,
    pythons: tuple[str, ...],
) -> None:
    """Measure CHECKPOINT (a folder or a Hub id), or --shape, with every engine on every job.

    \b
    Examples:
      python -m benchmarks run --shape flan-t5-large
      python -m benchmarks run ./my-t5 --engine "ramekin int8" --engine "bitsandbytes fp4, padded"
    """
    if sum(map(bool, (checkpoint, shape, quick))) != 1:
        raise click.UsageError("give a CHECKPOINT, or --shape, or --quick")
    if (levers, own, kernels, bool(engines)).count(True) > 1:
        raise click.UsageError("choose one of --levers, --own, --kernels and --engine")
    offered = QUICK if quick else JOBS
    unknown = set(jobs) - {*offered, "all"}
    if unknown:
        raise click.UsageError(f"no job {min(unknown)!r}; there are {', '.join(offered)}")
    if "all" in jobs or (quick and not jobs):
        jobs = tuple(offered)
    elif not jobs:
        jobs = tuple(each for each in offered if each.startswith("900 ") and (not levers or "natural" in each))
    chosen = {name: Path(path) for name, _, path in (each.partition("=") for each in pythons)}
    if not chosen.keys() <= ENVIRONMENTS.keys() or not all(path.is_file() for path in chosen.values()):
        raise click.UsageError(f"--python takes NAME=PATH of an interpreter; names are {', '.join(ENVIRONMENTS)}")
    folder = _DEMO if quick else _random(work, shape) if shape else _local(str(checkpoint))
    model = "demo" if quick else shape or folder.name
    plan = Plan(
        model=model,
        random=bool(shape),
        checkpoint=folder.resolve(),
        work=work.resolve(),
        engines=tuple(LEVERS) if levers else _OURS if own or kernels else engines or tuple(ENGINES),
        jobs={name: offered[name] for name in jobs},
        rounds=rounds,
        threads=threads or usable_cores(),
        limit_s=limit,
        pythons=chosen,
    )
    kind = "-levers" if levers else "-own" if own else "-kernels" if kernels else ""
    out = out or _RESULTS / f"{model}-{level()}{kind}.jsonl"
    click.echo(f"results: {out}", err=True)
    before = len(read(out))
    (run_own if own else run_kernels if kernels else run_plan)(plan, out)
    new = read(out)[before:]
    if any("error" in row for row in new) and not any("engine" in row and "error" not in row for row in new):
        raise click.ClickException("no engine ran; what failed stands above and in the results")


@cli.command()
@click.argument("results", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="A folder for plots.  [default: none]")
@click.option(
    "--readme", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Renew the table in this file too."
)
def report(results: Path | None, plots: Path | None, readme: Path | None) -> None:
    """The page of a RESULTS file, on stdout; without one, of what was measured of FLAN-T5-large's shape on machines like this one.

    \b
    Examples:
      python -m benchmarks report
      python -m benchmarks report benchmarks/results/speed/flan-t5-large-amx.jsonl --plots docs/plots > docs/speed.md
    """
    results = results or _RESULTS / f"flan-t5-large-{level()}.jsonl"
    if not results.exists():
        raise click.UsageError(f"there is no {results}; measure it with `make bench`, or name a file of results")
    from benchmarks.speed_page import page, summary

    try:
        click.echo(page(results, plots), nl=False)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    if readme:
        text = readme.read_text("utf-8")
        if text.count(_BEGIN) != 1 or text.count(_END) != 1:
            raise click.UsageError(f"{readme}: has no place for a table (between {_BEGIN} and {_END})")
        before, after = text.partition(_BEGIN)[0], text.partition(_END)[2]
        readme.write_text(f"{before}{_BEGIN}\n{summary(results)}{_END}{after}", "utf-8")


def _random(work: Path, shape: str) -> Path:
    folder = work / shape / "checkpoint"
    if not (folder / "spiece.model").exists():
        click.echo(f"making random weights of {shape}'s shape in {folder}", err=True)
        write_checkpoint(folder, config_of(shape), _DEMO / "spiece.model")
    return folder


def _local(checkpoint: str) -> Path:
    try:
        return Checkpoint.open(checkpoint).folder
    except RamekinError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    with Stopping(ends=True):  # by SIGTERM too: else the run that it ends would go on beside the next
        cli()
