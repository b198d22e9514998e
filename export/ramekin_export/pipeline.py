"""The export, readable as a table of contents."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ramekin import golden
from ramekin.engine import Engine
from ramekin.errors import RamekinError, RuntimeVersionError, VerificationError
from ramekin.manifest import DEFAULT_PROMPT, Manifest, VersionRange
from ramekin.model import COMPACT_RUNTIMES
from ramekin.paper import Paper, check_prompt
from ramekin.provider import cuda_problem
from ramekin.quality import check
from ramekin.session import onnxruntime
from ramekin_export.calibrate import calibrate
from ramekin_export.checkpoint import Checkpoint
from ramekin_export.compact import Units, add_compact
from ramekin_export.formats import PRECISIONS
from ramekin_export.reach import measured_reach
from ramekin_export.recipe import RECIPES
from ramekin_export.target import check_target, scratch, whole_or_not_at_all
from ramekin_export.verify import Checks, judge
from ramekin_export.writer import Writer, save

Progress = Callable[[str, int, int], None]
"""Told which stage is running, how much of it was done since the last call, and how much there is."""


def export(
    source: str,
    out: Path,
    precision: str = "int8",
    revision: str | None = None,
    force: bool = False,
    prompt: str = DEFAULT_PROMPT,
    checks: Checks = Checks(),  # noqa: B008  # frozen
    progress: Progress = lambda _stage, _done, _all: None,
) -> Manifest:
    """Turn a checkpoint into a model folder, whole or not at all.

    Calibration and verification run the model in float32, from a temporary folder beside `out`. Where onnxruntime is not
    installed both are left out, with a warning. So are the compact graphs where it cannot run them, since their scales are
    measured.

    Args:
        source: a folder as `save_pretrained` writes it, or a Hub id.
        out: the folder to make.
        precision: a key of `RECIPES`, for the CPU, or of `FORMATS`, for CUDA.
        revision: branch, tag or commit of a Hub id.
        force: replace `out` if it is there.
        prompt: template for papers, kept in the manifest.
        checks: papers to calibrate and to verify with, and what to do with a model that fails.
        progress: called as the work goes on.

    Raises:
        CheckpointError: the checkpoint cannot be exported; the text says why.
        FileExistsError: `out` is there and `force` was not asked for, or it holds something else than a model.
        ValueError: `precision` or `prompt` is none.
        RuntimeVersionError: onnxruntime is broken or too old, or missing where there are papers to calibrate or verify with.
        VerificationError: the model's predictions are too far from float32's.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    check_prompt(prompt)
    out = Path(out).resolve()
    if Path(source).is_dir() and Path(source).resolve().is_relative_to(out):
        raise FileExistsError(f"{out}: is or holds the checkpoint itself; export to another folder")
    check_target(out, force)
    recipe, runs = PRECISIONS[precision], importlib.util.find_spec("onnxruntime") is not None
    if runs:
        onnxruntime(VersionRange())  # one that cannot be used is no reason to keep what was not compared
    # Nothing is written that could not be looked at.
    compact = recipe.compact and _runs_here(COMPACT_RUNTIMES)
    seen, judged = checks.calibration_papers(), checks.verification_papers()
    if not runs:
        _tell_what_is_missing(checks)
    writer = Writer(Checkpoint.open(source, revision), prompt)
    with whole_or_not_at_all(out, force) as folder:
        manifest = _written(writer, folder, precision, out, seen if runs else (), progress)
        if compact:
            manifest = replace(manifest, golden=golden.record(Engine.load(folder)))  # for an older onnxruntime
            with suppress(RamekinError):  # it cannot write samples: verification tells of that
                reach = measured_reach(folder, seen, partial(progress, "measure keys, values"))
                manifest = add_compact(folder, manifest, Units.of(reach))
            save(folder, manifest)
        able = _runs_here(manifest.onnxruntime)  # graphs for CUDA need a newer one
        here = able and "cpu" in manifest.providers
        if here:
            manifest = replace(manifest, golden={**manifest.golden, **golden.record(Engine.load(folder))})
        if runs and (not here or (recipe.quantized and checks.verify)):
            with scratch(out) as reference:
                writer.write(reference, "fp32", RECIPES["fp32"], partial(progress, "prepare verification"))
                if not here:
                    manifest = replace(manifest, golden=golden.record(Engine.load(reference)))
                if checks.verify and (here or (able and not cuda_problem(onnxruntime(manifest.onnxruntime)))):
                    quality = judge(reference, folder, judged, checks.judged_on, partial(progress, "verify"))
                    manifest = replace(manifest, quality=quality)
            if manifest.quality and not checks.allow_quality_loss:
                _require(manifest.quality)
        save(folder, manifest)
    return manifest


def _written(writer: Writer, folder: Path, precision: str, out: Path, seen: Sequence[Paper], progress: Progress) -> Manifest:
    """The model itself, its weights rounded for `seen` if its recipe asks for that and there are any."""
    recipe = PRECISIONS[precision]
    if recipe.calibrated and seen:
        with scratch(out) as exact:
            same = replace(RECIPES["fp32"], rotated=recipe.rotated, folded=recipe.folded)
            writer.write(exact, "fp32", same, partial(progress, "prepare calibration"))
            recipe = recipe.rounded_by(calibrate(exact, seen, partial(progress, "calibrate")))
    return writer.write(folder, precision, recipe, partial(progress, f"export {precision}"))


def _require(quality: Mapping[str, Any]) -> None:
    try:
        check(quality)
    except VerificationError as error:
        raise VerificationError(f"{error}; --allow-quality-loss keeps the model as it is") from None


def _tell_what_is_missing(checks: Checks) -> None:
    install = "pip install onnxruntime"
    if checks.calibrate or checks.papers:
        raise RuntimeVersionError(f"papers to calibrate or to verify with need onnxruntime: {install}")
    missing = "nothing is calibrated, measured or compared with float32, and `ramekin verify` cannot run it"
    warnings.warn(f"without onnxruntime {missing}: {install}", RuntimeWarning, stacklevel=3)


def _runs_here(supported: VersionRange) -> bool:
    try:
        onnxruntime(supported)
    except RuntimeVersionError:
        return False
    return True
