"""Where the time goes, kernel by kernel, next to the least that it could take: a section of `docs/speed.md`, from `run --kernels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels import REST
from benchmarks.plotting import pyplot

Row = Mapping[str, Any]
_COLUMNS = "| | nodes | time | has to read | has to compute | the least | share |\n|---|---|---|---|---|---|---|"


def section(rows: Sequence[Row]) -> str:
    """The section.

    Args:
        rows: what `run --kernels` wrote, one object for each of our engines and each number of samples.
    """
    head, rates = rows[0], rows[0]["ceiling"]
    parts = [
        "## Kernel by kernel\n",
        f"A job of {head['tokens']} tokens after {head['source']}, under onnxruntime's profiler, which adds some microseconds to every node. The least is what "
        "reading the weights, keys and values once takes, or multiplying, whichever takes longer, at the rates that this machine reached in the same "
        f"process ({rates['bandwidth'] / 1e9:.1f} GB/s, {rates['int8'] / 1e9:,.0f} G int8 and {rates['float32'] / 1e9:,.0f} G float32 operations per second in the "
        f"first of these jobs). Each node's time is the median of all steps, or of a prompt that was read four times. {REST.capitalize()} is norms, activations, softmax and what rounds numbers to 8 bits.\n",
        f"### The prompt\n\n{_table(head, 'encoder')}",
    ]
    for row in rows:
        n, name = row["n"], row["engine"]
        parts.append(f"### A step of {n} sample{'s'[: n > 1]}, {name}\n\n{_table(row, 'decoder')}")
        parts.append(f"Without the profiler a step takes {row['step_ms']:.1f} ms.\n")
    return "\n".join(parts)


def _table(row: Row, part: str) -> str:
    lines, whole = [_COLUMNS], [0.0, 0.0]
    for kernel in row["kernels"][part]:
        least = least_ms(kernel, row["ceiling"])
        whole = [whole[0] + kernel["ms"], whole[1] + least]
        bounds = "| | | | |"
        if kernel["name"] != REST:
            computes = " and ".join(f"{kernel[kind] / 1e9:,.2f} G {kind}" for kind in ("int8", "float32") if kernel[kind])
            bounds = f"| {kernel['read'] / 1e6:,.0f} MB | {computes} | {least:.1f} ms | {least / kernel['ms']:.0%} |"
        lines.append(f"| {kernel['name']} | {kernel['nodes']} | {kernel['ms']:.1f} ms {bounds}")
    lines.append(f"| all | | {whole[0]:.1f} ms | | | {whole[1]:.1f} ms | {whole[1] / whole[0]:.0%} |")
    return "\n".join(lines) + "\n"


def least_ms(kernel: Mapping[str, float], rates: Mapping[str, float]) -> float:
    """The least that a kernel could take on a machine of these rates, in milliseconds."""
    computing = kernel["int8"] / rates["int8"] + kernel["float32"] / rates["float32"]
    return 1e3 * max(kernel["read"] / rates["bandwidth"], computing)


def plot(figure_path: Path, rows: Sequence[Row]) -> None:
    """A bar for each kernel of a step, as long as it takes; the dark part is the least."""
    plt = pyplot(figure_path)
    most = max(len(row["kernels"]["decoder"]) for row in rows)
    figure, axes = plt.subplots(1, len(rows), figsize=(3.6 * len(rows), 0.9 + 0.3 * most), squeeze=False, sharex=True)
    for axis, row in zip(axes[0], rows, strict=True):
        kernels = row["kernels"]["decoder"][::-1]
        times = [kernel["ms"] for kernel in kernels]
        axis.barh(range(len(kernels)), times, color="#fdba74")
        axis.barh(range(len(kernels)), [least_ms(each, row["ceiling"]) for each in kernels], color="#c2410c")
        for place, time in enumerate(times):
            axis.annotate(f"{time:.1f}", (time, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
        names = [kernel["name"] for kernel in kernels]
        axis.set_yticks(range(len(kernels)), names if axis is axes[0][0] else [""] * len(kernels), fontsize=8)
        axis.set_title(f"{row['engine']}, n={row['n']}", fontsize=9)
        axis.set_xlabel("milliseconds of a step; dark: the least", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(figure_path, metadata={"Date": None})
    plt.close(figure)
