"""Where the engines run: a virtual environment for each set of packages that does not get along with the others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ENVIRONMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "peers": (),  # the one that the benchmarks themselves run in
    "openvino": (
        ("torch==2.13.0",),
        ("openvino", "nncf", "transformers>=4.51,<5", "sentencepiece", "setuptools"),
        # optimum-intel asks for torchvision, which it uses for pictures only and which has no CPU build where torch has one
        ("--no-deps", "optimum-intel", "optimum"),
    ),
}
"""By name: the arguments of each `pip install`."""

_INSTALLED = """
import importlib.metadata as m, json, re, sys
from pathlib import Path
from packaging.requirements import Requirement
seen, todo, versions = {}, sys.argv[1:], {}
while todo:
    name = re.sub("[-_.]+", "-", todo.pop()).lower()
    if name in seen:
        continue
    try:
        found = m.distribution(name)
    except m.PackageNotFoundError:
        continue
    versions[name] = found.version
    files = {Path(found.locate_file(f)).resolve() for f in found.files or ()}
    seen[name] = sum(f.stat().st_size for f in files if f.is_file())
    for line in found.requires or ():
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            todo.append(wanted.name)
print(json.dumps({"bytes": sum(seen.values()), "versions": {n: versions[n] for n in sys.argv[1:] if n in versions}}))
"""


def interpreter(name: str, folder: Path) -> Path:
    """The Python of an environment, which is made in `folder` if it is not there."""
    if not ENVIRONMENTS[name]:
        return Path(sys.executable)
    home = folder / name
    python, done = home / "bin" / "python", home / "done"
    if not done.exists():
        print(f"making the environment {name} in {home}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        for arguments in (("-U", "pip"), *ENVIRONMENTS[name]):
            subprocess.run([str(python), "-m", "pip", "-q", "install", *arguments], check=True)
        done.touch()
    return python


def installed(python: Path, packages: Sequence[str]) -> dict[str, object]:
    """Versions of the packages, and the bytes of them and all that they require.

    Raises:
        RuntimeError: this Python cannot tell.
    """
    done = subprocess.run([str(python), "-c", _INSTALLED, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{python.name} of this environment fails: {(done.stderr.splitlines() or ['?'])[-1]}")
    result: dict[str, object] = json.loads(done.stdout)
    return result
