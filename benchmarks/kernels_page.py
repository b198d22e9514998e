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
        rows: what `run --kernels` wrote: objects for each of our engines and each number of samples, and for each call.
    """
    profiles = profiled(rows)
    head, rates = profiles[0], profiles[0]["ceiling"]
    called = {row["call"] for row in profiles}
    calls = [f"{row['call'][:10]}, commit {row['commit']}" for row in rows if "commit" in row and row["call"] in called]
    parts = [
        "## Kernel by kernel\n",
        f"A job of {head['tokens']} tokens after {head['source']}, under onnxruntime's profiler, which adds some microseconds to every node, in an hour of its own, so that times are not those of the tables above "
        f"({'; '.join(calls) or 'commit not known'}). The least is what reading the weights, keys and values once takes, or multiplying, whichever takes longer, at the rates "
        f"that this machine reached in the same process ({rates['bandwidth'] / 1e9:.1f} GB/s, {rates['int8'] / 1e9:,.0f} G int8 and "
        f"{rates['float32'] / 1e9:,.0f} G float32 operations per second in the first of these jobs). Times are medians: of five prompts, of all "
        f"steps but the first. {REST.capitalize()} is looking up embeddings and biases, norms, activations, softmax, ranking logits, and what "
        "rounds numbers to 8 bits and puts them together again.\n",
        f"### The prompt\n\n{_table(head, 'encoder')}",
    ]
    for row in profiles:
        n, name = row["n"], row["engine"]
        parts.append(f"### A step of {n} sample{'s'[: n > 1]}, {name}\n\n{_table(row, 'decoder')}")
        parts.append(
            f"Without the profiler {row['step_ms']:.1f} ms pass from token to token, with what lies between nodes and choosing tokens.\n"
        )
    return "\n".join(parts)


def profiled(rows: Sequence[Row]) -> list[Row]:
    """The rows that tell of a job that did not fail."""
    return [row for row in rows if "graphs" in row]


def _table(row: Row, part: str) -> str:
    graph, lines, whole = row["graphs"][part], [_COLUMNS], 0.0
    for kernel in graph["kernels"]:
        bounds = "| | | | |"
        if kernel["name"] != REST:
            least = least_ms(kernel, row["ceiling"])
            whole += least
            computes = " and ".join(f"{kernel[kind] / 1e9:,.2f} G {kind}" for kind in ("int8", "float32") if kernel[kind])
            bounds = f"| {kernel['read'] / 1e6:,.0f} MB | {computes} | {least:.1f} ms | {least / kernel['ms']:.0%} |"
        lines.append(f"| {kernel['name']} | {kernel['nodes']} | {kernel['ms']:.1f} ms {bounds}")
    nodes = sum(kernel["nodes"] for kernel in graph["kernels"])
    lines.append(f"| all | {nodes} | {graph['ms']:.1f} ms | | | {whole:.1f} ms | {whole / graph['ms']:.0%} |")
    return "\n".join(lines) + "\n"


def least_ms(kernel: Mapping[str, float], rates: Mapping[str, float]) -> float:
    """The least that a kernel could take on a machine of these rates, in milliseconds."""
    computing = kernel["int8"] / rates["int8"] + kernel["float32"] / rates["float32"]
    return 1e3 * max(kernel["read"] / rates["bandwidth"], computing)


def plot(figure_path: Path, rows: Sequence[Row]) -> None:
    """A bar for each kernel of a step, as long as it takes; the dark part is the least."""
    plt, profiles = pyplot(figure_path), profiled(rows)
    most = max(len(row["graphs"]["decoder"]["kernels"]) for row in profiles)
    figure, axes = plt.subplots(
        1, len(profiles), figsize=(3.6 * len(profiles), 0.9 + 0.3 * most), squeeze=False, sharex=True
    )
    for axis, row in zip(axes[0], profiles, strict=True):
        kernels = row["graphs"]["decoder"]["kernels"][::-1]
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
