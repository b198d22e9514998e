"""The options that several commands share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click

from ramekin.engine import Engine
from ramekin.manifest import MOST_SOURCE_TOKENS, PROVIDERS
from ramekin.provider import AUTO
from ramekin.sampling import SamplingParams
from ramekin.session import MOST_THREADS
from ramekin.terminal import say

Command = Callable[..., None]
PATH = click.Path(path_type=Path, readable=False)
"""A path that the command itself opens: one that cannot be read is a failed job, as one that is not there."""


def options(*several: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which the help tells of them."""

    def add(command: Command) -> Command:
        for option in reversed(several):
            command = option(command)
        return command

    return add


threads_option = click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="Threads that compute.  [default: the usable cores]"
)
provider_option = click.option(
    "--provider",
    type=click.Choice([AUTO, *PROVIDERS]),
    help="Where to compute.  [default: cuda if the model is made for it and it works here, else cpu]",
)
model_options = options(
    threads_option,
    provider_option,
    click.option(
        "--max-source-tokens",
        type=click.IntRange(1, MOST_SOURCE_TOKENS),
        help="Longest prompt.  [default: the model's, 1024 as a rule]",
    ),
    click.option(
        "--on-long",
        type=click.Choice(["truncate", "error"]),
        default="truncate",
        show_default=True,
        help="What to do with a longer prompt.",
    ),
)
"""How a model is loaded."""

sampling_options = options(
    click.option("-n", "n", type=int, help="Samples for each prompt.  [default: 1; of questions 16, or 1 if greedy]"),
    click.option("--seed", type=int, help="The same seed gives the same samples.  [default: a new one]"),
    click.option(
        "--max-new-tokens", type=int, help=f"Longest sample.  [default: the model's, else {SamplingParams.max_new_tokens}]"
    ),
    click.option("--min-new-tokens", type=int, help="Shortest sample."),
    click.option(
        "--temperature", type=float, help=f"Divides the logits.  [default: the model's, else {SamplingParams.temperature}]"
    ),
    click.option(
        "--top-k",
        type=int,
        help=f"Draw from the k most likely; 0: all.  [default: the model's, else {SamplingParams.top_k}]",
    ),
    click.option(
        "--top-p", type=float, help=f"Draw from this much probability.  [default: the model's, else {SamplingParams.top_p}]"
    ),
    click.option("--min-p", type=float, help="Draw only what has this share of the most likely one's probability."),
    click.option("--repetition-penalty", type=float, help="Above 1: makes tokens that the sample has already less likely."),
    click.option("--no-repeat-ngram-size", type=int, help="No n-gram of this size twice."),
    click.option("--greedy", is_flag=True, default=None, help="Always the most likely token."),
    click.option("--stop", multiple=True, help="End a sample at this text; may be given several times."),
)
"""One for each sampling parameter; one that is not given is the model's, or else the usual one."""


def hush() -> None:
    """Let onnxruntime log errors only, which a command may do in its own process.

    Version 1.31 warns, whenever CUDA is used, of a plugin that is not needed.
    """
    with suppress(ImportError, AttributeError):  # missing, or not whole: told where it is needed
        importlib.import_module("onnxruntime").set_default_logger_severity(3)


def open_engine(model: Path, provider: str | None, threads: int | None, max_source_tokens: int | None = None) -> Engine:
    """Load a model; tell where it computes if that is not plain to see."""
    hush()
    engine = Engine.load(model, provider or AUTO, threads, max_source_tokens)
    if provider == AUTO or (provider is None and "cuda" in engine.manifest.providers):
        say(f"computing on {engine.provider}{engine.not_on_cuda and f': {engine.not_on_cuda}'}")
    return engine
