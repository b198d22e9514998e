"""The folder that an export makes: whole or not at all."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ramekin.manifest import MANIFEST

_TEMPORARY = ".partial", ".scratch", ".old"


def check_target(out: Path, force: bool) -> None:
    """Nothing but a model folder is ever replaced, and only by force.

    Raises:
        FileExistsError: `out` is there, and may not be replaced.
    """
    beside = next((folder for folder in out.parents if folder.exists()), out)
    if not beside.is_dir():
        raise FileExistsError(f"{beside}: a file, so nothing can be written into it; choose another place for the model")
    if not out.exists():
        return
    entries = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    others = entries - _model_files(out)
    if others:
        raise FileExistsError(
            f"{out}: holds other things than a model ({min(others)!r}); choose another place for the model"
        )
    if _is_mounted(out):
        raise FileExistsError(f"{out}: something is mounted there, which cannot be replaced; export into a folder in it")
    with suppress(FileNotFoundError):  # the current folder may be gone
        if Path.cwd() == out.resolve():
            raise FileExistsError(f"{out}: is the current folder, which cannot be replaced; choose another place")
    if entries and not force:
        raise FileExistsError(f"{out}: is there already; --force replaces it")


def _is_mounted(out: Path) -> bool:
    """Whether `out` is a mount point: of another disk, or (Linux: proc(5), mountinfo) of a folder of the same one."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    except OSError:
        lines = []
    points = (fields[4] for line in lines if len(fields := line.split(b" ")) > 4)
    plain = {re.sub(rb"\\([0-3][0-7]{2})", lambda octal: bytes([int(octal[1], 8)]), point) for point in points}
    return os.path.ismount(out) or os.fsencode(out.resolve()) in plain


def _model_files(out: Path) -> set[str]:
    """What belongs to the model in a folder, be it of an older format; nothing if it holds no model."""
    try:
        raw = json.loads((out / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    listed = raw.get("files") if isinstance(raw, dict) and "format_version" in raw else None
    return {MANIFEST, *listed} if isinstance(listed, dict) else set()


@contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `beside`, gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}.", suffix=".scratch", dir=beside.parent))
    try:
        with _told_when_full(beside.parent):
            yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Take a folder away, also if a signal comes meanwhile; a second one is not heard at once (`ramekin.stopping`)."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def whole_or_not_at_all(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, and vanishes if anything goes wrong before."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _tell_of_leftovers(out)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:  # the name of the temporary folder says nothing to anybody
        raise OSError(error.errno, error.strerror, str(out.parent)) from None
    try:
        os.umask(umask := os.umask(0))
        folder.chmod(0o777 & ~umask)
        with _told_when_full(out.parent):
            yield folder
        check_target(out, force)  # somebody may have put something there meanwhile
        _take_place(folder, out)
    finally:
        _remove(folder)


def _tell_of_leftovers(out: Path) -> None:
    """Warn of what an export to `out` that was killed has left: its temporary folders may be large, and begin with a dot."""
    for folder in sorted(out.parent.glob(f".{glob.escape(out.name)}.*")):
        if folder.suffix in _TEMPORARY and folder.is_dir():
            told = f"{folder}: is of another export, or was left by one that was killed; then it can be removed"
            warnings.warn(told, RuntimeWarning, stacklevel=2)


@contextmanager
def _told_when_full(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        # Without a number, so that what contains this does not tell it again.
        raise OSError(f"{place}: {error.strerror}; make room for larger files and try again") from None


def _take_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; the model that was there is given up only once the new one stands in its place.

    Raises:
        FileExistsError: somebody put something else there at this moment.
    """
    retired = folder.with_suffix(".old")
    try:
        if out.exists():
            out.rename(retired)
        folder.rename(out)
    except BaseException as error:  # an interrupt may come between the two
        if folder.exists() and retired.exists():
            if out.exists():
                raise FileExistsError(
                    f"{out}: something was put there meanwhile; the model before is in {retired}"
                ) from error
            retired.rename(out)
        raise
    finally:
        if not folder.exists():
            shutil.rmtree(retired, ignore_errors=True)
