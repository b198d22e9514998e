from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest

from benchmarks.random_checkpoint import write_checkpoint
from ramekin import Engine
from ramekin.manifest import Manifest
from ramekin_export.pipeline import export
from ramekin_export.verify import Checks
from tests.export.variants import VARIANTS
from tests.runtime.conftest import TINY_MODEL

SPIECE = TINY_MODEL / "spiece.model"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint folder of a variant, made once."""
    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            made[variant] = write_checkpoint(tmp_path_factory.mktemp(variant) / "checkpoint", VARIANTS[variant], SPIECE)
        return made[variant]

    return make


@pytest.fixture(scope="session")
def exported(checkpoint: Callable[[str], Path]) -> Callable[[str, str], Engine]:
    """An engine on the export of a variant, made once."""
    made: dict[tuple[str, str], Engine] = {}

    def make(variant: str, precision: str) -> Engine:
        if (variant, precision) not in made:
            folder = checkpoint(variant).parent / precision
            export(str(checkpoint(variant)), folder, precision, checks=Checks(verify=False), force=True)
            supported = Manifest.load(folder).onnxruntime
            if onnxruntime.__version__ not in supported:
                pytest.skip(
                    f"onnxruntime {onnxruntime.__version__} has not all operators of {precision} graphs: {supported}"
                )
            made[variant, precision] = Engine.load(folder, threads=2)
        return made[variant, precision]

    return make
