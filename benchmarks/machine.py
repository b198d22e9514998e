"""The machine that is measured on."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

_ARCH_PRCTL = 158  # on x86-64, the only architecture that has it
_LEVELS = {"amx": "amx_int8", "vnni": "avx512_vnni", "avx2": "avx2"}


def machine() -> dict[str, Any]:
    """What a reader has to know of this machine."""
    cpu, flags = platform.processor(), ""
    if Path("/proc/cpuinfo").exists():
        facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        names = {name.strip(): value.strip() for name, value in facts.items()}
        cpu, flags = names.get("model name", cpu), names.get("flags", "")
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    found = [each for each in wanted if each in flags.split()]
    if any(each.startswith("amx") for each in found) and not _amx_granted():
        found = [each for each in found if not each.startswith("amx")]
    return {"processor": cpu, "extensions": found, "cores": os.cpu_count(), "system": platform.system()}


def _amx_granted() -> bool:
    """Whether the system lets processes use AMX, which they have to ask for; a sandbox may refuse, and then engines do without.

    Source: Linux, Documentation/arch/x86/xstate.rst.
    """
    permit, tiles = 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, permit, tiles) == 0)


def level() -> str:
    """The instructions that decide how fast int8 is here: results of machines that differ in them have files of their own."""
    found = machine()["extensions"]
    return next((name for name, extension in _LEVELS.items() if extension in found), platform.machine())
