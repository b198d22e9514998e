"""`ramekin export --via optimum`: graphs as optimum's own exporter traces them, in a folder with a manifest."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ramekin import golden
from ramekin.config_files import CONFIG, GENERATION
from ramekin.engine import Engine
from ramekin.errors import CheckpointError, one_line
from ramekin.manifest import TOKENIZER, FileRecord, Manifest
from ramekin_export.checkpoint import Checkpoint
from ramekin_export.target import check_target, scratch, whole_or_not_at_all
from ramekin_export.vocabulary import write_vocabulary
from ramekin_export.writer import save, tools

PRECISIONS = ("fp32", "int8")


def export_via_optimum(source: str, out: Path, precision: str, revision: str | None, force: bool, prompt: str) -> Manifest:
    """Turn a checkpoint into a folder of optimum's graphs, whole or not at all.

    int8 is what optimum's `ORTQuantizer` makes: dynamic, per channel, its recommended settings for AVX2, which no x86
    processor saturates on. It is not compared with float32: that is for our own recipes.

    Raises:
        CheckpointError: the checkpoint cannot be exported, or optimum fails; the text says why.
        FileExistsError: `out` is there and `force` was not asked for, or it holds something else than a model.
        ImportError: optimum, torch or transformers are not installed.
        ValueError: `precision` is not one of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"--via optimum writes {' or '.join(PRECISIONS)}, not {precision}")
    from optimum.onnxruntime import ORTModelForSeq2SeqLM  # noqa: PLC0415  # torch comes with it

    out = out.resolve()
    check_target(out, force)
    checkpoint = Checkpoint.open(source, revision)
    with whole_or_not_at_all(out, force) as folder:
        try:
            if precision == "fp32":
                ORTModelForSeq2SeqLM.from_pretrained(checkpoint.folder, export=True).save_pretrained(folder)
            else:
                with scratch(out) as exact:
                    ORTModelForSeq2SeqLM.from_pretrained(checkpoint.folder, export=True).save_pretrained(exact)
                    _quantize(exact, folder)
        except Exception as error:  # optimum, torch and transformers have no error in common
            raise CheckpointError(f"{source}: optimum cannot export it: {one_line(error)}") from error
        write_vocabulary(checkpoint.folder, checkpoint.config, checkpoint.generation, folder / TOKENIZER)
        engine = Engine.load(folder)
        manifest = replace(
            engine.manifest,
            files={path.name: FileRecord.of(path) for path in sorted(folder.iterdir())},
            prompt=prompt,
            source=checkpoint.source,
            tools=tools("optimum", "optimum-onnx", "torch", "transformers"),
            golden=golden.record(engine),
        )
        save(folder, manifest)
    return manifest


def _quantize(exact: Path, folder: Path) -> None:
    from optimum.onnxruntime import ORTQuantizer  # noqa: PLC0415
    from optimum.onnxruntime.configuration import AutoQuantizationConfig  # noqa: PLC0415

    settings: Any = AutoQuantizationConfig.avx2(is_static=False, per_channel=True)
    for graph in sorted(exact.glob("*.onnx")):
        ORTQuantizer.from_pretrained(exact, file_name=graph.name).quantize(quantization_config=settings, save_dir=folder)
    for name in (CONFIG, GENERATION):
        if (exact / name).is_file():
            shutil.copy(exact / name, folder)
