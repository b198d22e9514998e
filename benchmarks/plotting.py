"""Matplotlib, which is not installed where nothing is drawn, set so that the same results give the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pyplot(figure_path: Path) -> Any:
    """`matplotlib.pyplot` for one figure; its folder is made."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = figure_path.stem
    from matplotlib import pyplot as plt

    figure_path.parent.mkdir(parents=True, exist_ok=True)
    return plt
