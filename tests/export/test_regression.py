"""A loss of speed shows: our times next to a fixed workload in the same run, never in seconds, with a generous margin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.random_checkpoint import config_of, write_checkpoint
from ramekin.cli import cli
from ramekin_export.pipeline import export
from ramekin_export.verify import Checks
from tests.export.conftest import SPIECE


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What `ramekin bench` tells of FLAN-T5-small's shape with one thread, by n."""
    folder: Path = tmp_path_factory.mktemp("regression")
    checkpoint = write_checkpoint(folder / "checkpoint", config_of("flan-t5-small"), SPIECE)
    export(str(checkpoint), folder / "model", "int8", checks=Checks(verify=False))
    job = ["-n", "1", "-n", "16", "--source", "256", "--tokens", "16", "--threads", "1", "--json"]
    result = CliRunner().invoke(cli, ["bench", str(folder / "model"), *job])
    assert result.exit_code == 0, result.output
    return {job["n"]: job for job in json.loads(result.stdout)["jobs"]}


@pytest.mark.parametrize(("n", "least"), [(1, 0.2), (16, 0.12)])
def test_share_of_what_the_machine_can_do(n: int, least: float, measured: dict[int, dict[str, Any]]) -> None:
    """The ceiling is measured right after the job: reading memory, and one large matrix product."""
    assert measured[n]["of_the_ceiling"] > least


def test_more_samples_cost_less_than_their_number(measured: dict[int, dict[str, Any]]) -> None:
    """The prompt is encoded once, and its keys and values are shared."""
    assert measured[16]["job_s"] < 6 * measured[1]["job_s"]


def test_the_loop_is_not_the_bottleneck(measured: dict[int, dict[str, Any]]) -> None:
    assert all(job["python_share"] < 0.25 for job in measured.values())
