"""The commands that look at a model folder: `ramekin info` and `ramekin verify`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

import click

from ramekin import golden
from ramekin.engine import Engine
from ramekin.errors import ModelFormatError
from ramekin.manifest import Manifest
from ramekin.optimum_folder import OptimumFolder
from ramekin.options import PATH, open_engine, provider_option, threads_option
from ramekin.provider import AUTO
from ramekin.quality import check, table
from ramekin.terminal import json_text, printable, write


@click.command()
@click.argument("model", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="The manifest as it is.")
def info(model: Path, as_json: bool) -> None:
    """Tell what a MODEL folder holds and where it came from."""
    # What optimum's own folders hold is told by their graphs.
    manifest = Engine.load(model).manifest if OptimumFolder.without_manifest(model) else Manifest.load(model)
    if as_json:
        write(json_text(asdict(manifest), indent=2))
        return
    dims = manifest.dims
    size = sum(record.bytes for record in manifest.files.values())
    rows = [
        ("variant", manifest.variant),
        ("precision", manifest.precision),
        ("computed on", " or ".join(manifest.providers)),
        ("size", f"{size / 1e6:,.1f} MB in {len(manifest.files)} files"),
        ("layers", f"{dims.encoder_layers} encoder, {dims.decoder_layers} decoder"),
        ("width", f"{dims.d_model}, {dims.num_heads} heads of {dims.head_dim}, feed-forward {dims.d_ff}"),
        ("vocabulary", f"{dims.vocab_size:,}"),
        ("longest prompt", f"{manifest.max_source_tokens} tokens"),
        (
            "generation",
            ", ".join(f"{name}={value}" for name, value in manifest.generation.items()) or "the usual defaults",
        ),
        *([("texts", "without blanks before punctuation")] if manifest.clean_up_tokenization_spaces else []),
        ("onnxruntime", str(manifest.onnxruntime)),
        *(
            (f"source {name}", ", ".join(value) if isinstance(value, dict) else str(value))
            for name, value in manifest.source.items()
        ),
        *((f"recipe {name}", str(value)) for name, value in manifest.recipe.items()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        write(printable(f"{name:<{width}}  {value}"))
    lines = table(manifest.quality)
    if lines:
        papers = printable(str(manifest.quality.get("papers")))
        papers = "built-in papers" if papers == "built-in" else f"papers of {papers}"
        write(f"\nnext to float32, at export, on the {papers}:")
    for line in lines:
        write(line)


@click.command(short_help="Check that a model folder is intact, and predicts what it should.")
@click.argument("model", type=PATH)
@click.option("--reference", metavar="CHECKPOINT", help="Compare predictions with this checkpoint's in float32.")
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option(
    "--papers", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Papers to compare on (.jsonl)."
)
@click.option("--json", "as_json", is_flag=True, help="The comparison as one JSON object.")
@threads_option
@provider_option
def verify(
    model: Path,
    reference: str | None,
    revision: str | None,
    papers: Path | None,
    as_json: bool,
    threads: int | None,
    provider: str | None,
) -> None:
    """Check a MODEL folder: the SHA-256 of every file, and that it computes what it did when it was exported.

    With --reference also that it predicts what the checkpoint does: KL divergence, first choices, likelihood. That needs
    the extra [export], a temporary copy in float32 beside MODEL, and some minutes for a large model.

    \b
    Examples:
      ramekin verify model
      ramekin verify model --reference ./my-finetuned-t5 --papers papers.jsonl
    """
    if reference is None and (revision or papers or as_json):
        raise click.UsageError("--revision, --papers and --json belong to --reference")
    if OptimumFolder.without_manifest(model):
        raise ModelFormatError(f"{model}: optimum's own folder; it records neither hashes nor a golden run to verify")
    manifest = Manifest.load(model)
    manifest.check_files(model, hash_up_to=None)
    tell = partial(click.echo, err=True) if as_json else write
    tell(f"files: {len(manifest.files)} intact")
    difference = golden.check(open_engine(model, provider, threads), manifest.golden)
    tell(f"golden run: log-probabilities within {difference:.1e} of those at export")
    if reference is None:
        return
    try:
        (found,) = entry_points(group="ramekin.reference")
        against = found.load()
    except ImportError as error:
        raise click.ClickException(
            f"--reference needs the package {error.name}: pip install '.[cpu,export]' in ramekin's clone"
        ) from None
    quality = against(model, reference, revision, papers, threads, provider or AUTO)
    if as_json:
        write(json_text(quality))
    else:
        for line in table(quality):
            write(line)
    check(quality)
