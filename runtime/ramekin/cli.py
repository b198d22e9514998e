"""The commands. Results go to stdout, all else to stderr; exit status 0, 1 for a failed job, 2 for wrong use."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from io import TextIOWrapper

import click

import ramekin
from ramekin.bench_cli import bench
from ramekin.errors import RamekinError
from ramekin.folder_cli import info, verify
from ramekin.options import Command
from ramekin.sample_cli import generate, questions
from ramekin.stopping import Stopping
from ramekin.terminal import say


class _Commands(click.Group):
    """The runtime's commands, and those that other parts of the distribution register, loaded when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(each.name for each in entry_points(group="ramekin.commands"))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own:
            return own
        for each in entry_points(group="ramekin.commands", name=cmd_name):
            try:
                command: click.Command = each.load()
            except ImportError as error:
                reason = f"`ramekin {cmd_name}` needs {error.name}: pip install '.[cpu,export]' in ramekin's clone"
                anything = {"ignore_unknown_options": True, "allow_extra_args": True}
                return click.Command(
                    cmd_name, anything, _refuse(reason), short_help=f"(needs {error.name})", add_help_option=False
                )
            return command
        return None


def _refuse(reason: str) -> Command:
    def refuse() -> None:
        raise click.ClickException(reason)

    return refuse


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(ramekin.__version__, prog_name="ramekin")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run fine-tuned T5 and FLAN-T5 models without PyTorch."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _command in (generate, questions, info, verify, bench):
    cli.add_command(_command)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(message)


def main(arguments: Iterable[str] | None = None) -> None:
    """The command `ramekin`: every problem that is not a bug is one line on stderr."""
    ends = arguments is None  # the arguments of the process: it is nothing but this command
    if ends:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.30 and newer writes to HOME and calls home
    with _own_voice(ends=ends), Stopping(ends=ends) as stopping:
        _run(None if arguments is None else list(arguments), stopping)


@contextmanager
def _own_voice(*, ends: bool) -> Iterator[None]:
    """Warnings are lines of ours, and a letter that an encoding lacks costs no results; a host's own are as before then."""
    streams = [(each, each.errors) for each in (sys.stdout, sys.stderr) if isinstance(each, TextIOWrapper)]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        for stream, _ in streams:
            stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            for stream, errors in () if ends else streams:
                with suppress(OSError, ValueError):  # its reader has left, or it was closed
                    stream.reconfigure(errors=errors)


def _run(arguments: list[str] | None, stopping: Stopping) -> None:
    try:
        cli.main(args=arguments, prog_name="ramekin", standalone_mode=False, obj=stopping)
        if sys.stdout:
            sys.stdout.flush()
    except click.UsageError as error:
        hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        say(f"{error.format_message()}{hint}")
        sys.exit(2)
    except click.ClickException as error:
        say(error.format_message())
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        say("stopped")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout has left, as `head` does
        _flush_or_drop_stdout()
        sys.exit(1)
    except (RamekinError, FileExistsError) as error:
        say(error)
        sys.exit(1)
    except OSError as error:
        say(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error)
        _flush_or_drop_stdout()
        sys.exit(1)
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        say(f"not enough memory{reason}; ask for less at once, or take a smaller model or a larger machine")
        sys.exit(1)


def _flush_or_drop_stdout() -> None:
    """Drop what stdout cannot take: Python would try again as it ends, with messages and an exit status of its own."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
