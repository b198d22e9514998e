"""The proof of a quantized model: its predictions next to float32's, on texts of several lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ramekin.engine import Engine
from ramekin.errors import ModelFormatError, VerificationError
from ramekin.inputs import read_papers
from ramekin.manifest import Manifest
from ramekin.paper import Paper, build_prompt, valid_text
from ramekin.provider import AUTO
from ramekin.tokenizer import Tokenizer
from ramekin_export.checkpoint import Checkpoint
from ramekin_export.fidelity import SAMPLING, Fidelity, compare
from ramekin_export.formats import PRECISIONS
from ramekin_export.recipe import RECIPES
from ramekin_export.target import scratch
from ramekin_export.writer import Writer

LENGTHS = (64, 256, 512, 1024)
"""Source tokens of the texts: each of fewer than four papers is cut to all of these lengths, each of more to one of them."""

MOST_PAPERS = 32
"""Of more papers the first ones are taken: each costs seconds to half a minute with a large model."""


@dataclass(frozen=True)
class Checks:
    """What a quantized model is calibrated and verified with.

    Attributes:
        calibrate: papers whose continuations int4 weights are rounded for and caches scaled by; None: an invented one of the
            package.
        papers: papers that the model is judged on; None: another invented one.
        verify: compare with float32 at all.
        allow_quality_loss: keep a model that is too far from float32.
    """

    calibrate: Path | None = None
    papers: Path | None = None
    verify: bool = True
    allow_quality_loss: bool = False

    def calibration_papers(self) -> list[Paper]:
        """The papers to calibrate with, `MOST_PAPERS` at most."""
        return _built_in()[:1] if self.calibrate is None else read_papers(self.calibrate)[:MOST_PAPERS]

    def verification_papers(self) -> list[Paper]:
        """The papers to verify with, `MOST_PAPERS` at most."""
        return _built_in()[1:] if self.papers is None else read_papers(self.papers)[:MOST_PAPERS]

    @property
    def judged_on(self) -> str:
        """The papers' name, for people."""
        return "built-in" if self.papers is None else valid_text(self.papers.name)


def _built_in() -> list[Paper]:
    lines = files("ramekin_export").joinpath("papers.jsonl").read_text(encoding="utf-8").splitlines()
    return [Paper(**json.loads(line)) for line in lines]


def prompts(tokenizer: Tokenizer, manifest: Manifest, papers: Sequence[Paper], whole: bool) -> list[npt.NDArray[np.int64]]:
    """Prompts for papers as token ids; a prompt that is cut keeps its last token, the eos.

    Args:
        tokenizer: of the model.
        manifest: its template, and its longest prompt.
        papers: fewer than four are cut to each of `LENGTHS` in turn ...
        whole: ... more are left whole, or else cut to one of the lengths each.
    """
    sources, longest = [], manifest.max_source_tokens
    for number, paper in enumerate(papers):
        ids = np.asarray(tokenizer.encode(build_prompt(paper, manifest.prompt)), np.int64)
        lengths = LENGTHS if len(papers) < len(LENGTHS) else (longest if whole else LENGTHS[number % len(LENGTHS)],)
        sizes = sorted({min(each, len(ids), longest) for each in lengths})
        sources += [np.concatenate([ids[: size - 1], ids[-1:]]) for size in sizes]
    return sources


def judge(
    reference: Path,
    model: Path,
    papers: Sequence[Paper],
    judged_on: str,
    progress: Callable[[int, int], None],
    threads: int | None = None,
    provider: str = AUTO,
) -> dict[str, Any]:
    """Compare a model folder with a float32 one of the same checkpoint; what the manifest keeps as its quality."""
    exact, quantized = Engine.load(reference, threads=threads), Engine.load(model, provider, threads)
    sources = prompts(exact.tokenizer, exact.manifest, papers, whole=False)
    steps = SAMPLING.max_new_tokens * len(sources)
    rows = compare(exact, quantized, sources, advance=lambda: progress(1, steps))
    by_length: dict[int, list[Any]] = {}
    for source, each in zip(sources, rows, strict=True):
        by_length.setdefault(min((n for n in LENGTHS if n >= len(source)), default=len(source)), []).append(each)
    return {
        "papers": judged_on,
        "most_kl": PRECISIONS[quantized.manifest.precision].most_divergence,
        "by_source_tokens": {str(length): Fidelity.of(by_length[length]).to_json() for length in sorted(by_length)},
        "all": Fidelity.of(rows).to_json(),
    }


def against(
    model: Path,
    source: str,
    revision: str | None,
    papers: Path | None,
    threads: int | None,
    provider: str,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Compare a model folder with the checkpoint that it was made from.

    Raises:
        ModelFormatError: the folder's manifest names no precision that there is.
        VerificationError: the checkpoint has another shape.
    """
    manifest, checks = Manifest.load(model), Checks(papers=papers)
    if manifest.precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ModelFormatError(f"{model}: precision {manifest.precision!r} is none of {known}; export it again")
    judged = checks.verification_papers()
    writer = Writer(Checkpoint.open(source, revision), manifest.prompt)
    if writer.config.dims != manifest.dims:
        raise VerificationError(f"{source}: another shape than {model} was exported from")
    with scratch(model.resolve()) as reference:
        writer.write(reference, "fp32", RECIPES["fp32"], partial(progress, "prepare verification"))
        return judge(reference, model, judged, checks.judged_on, partial(progress, "verify"), threads, provider)
