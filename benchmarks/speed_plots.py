"""The plots of `docs/speed.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.cells import best_of, cut, in_seconds, is_ours, job_s, next_to, ratio
from benchmarks.engines import LEVERS
from benchmarks.jobs import JOBS, QUICK
from benchmarks.plotting import pyplot
from benchmarks.results import Rows, in_turn, times_as_long


def jobs_plot(figure_path: Path, engines: Sequence[str], found: Mapping[tuple[str, str], Rows]) -> None:
    """How long each engine takes next to our fastest, as in the tables; logarithmic, since that differs a hundredfold."""
    plt = pyplot(figure_path)
    from matplotlib import ticker

    jobs = [job for job in {**JOBS, **QUICK} if any(job == each for each, _ in found)]
    shown = [job for job in jobs if job.startswith("900 n=")] or jobs
    size = (3.2 * len(shown), 0.9 + 0.32 * len(engines))
    figure, axes = plt.subplots(1, len(shown), figsize=size, squeeze=False, sharex=True)
    places = {engine: place for place, engine in enumerate(reversed(engines))}
    for axis, job in zip(axes[0], shown, strict=True):
        best = best_of([(engine, runs) for (each, engine), runs in found.items() if each == job and is_ours(engine)])
        for engine, place in places.items():
            runs = found.get((job, engine), ())
            label = ratio(runs, best) if runs else ""
            if label:
                length, colour = times_as_long(runs, best[1]), "#c2410c" if is_ours(engine) else "#94a3b8"
                rounds = in_turn(runs, best[1]) or [length]
                reach = [[length - min(rounds)], [max(rounds) - length]]
                inside = "white" if cut(runs) else colour
                axis.errorbar(length, place, xerr=reach, fmt="o", ms=5, color=colour, mfc=inside, elinewidth=0.8)
                axis.annotate(label, (length, place), (7, 0), textcoords="offset points", va="center", fontsize=7)
        axis.set_xlabel(next_to(best), fontsize=8)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.set_title(job, fontsize=10)
        axis.set_yticks(list(places.values()), list(places) if axis is axes[0][0] else [""] * len(places), fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.margins(x=0.3)
        axis.grid(axis="y", lw=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("how many times as long, logarithmic; hollow: extrapolated", fontsize=8)
    figure.tight_layout()
    figure.savefig(figure_path, metadata={"Date": None})
    plt.close(figure)


def levers_plot(figure_path: Path, found: Mapping[tuple[str, str], Rows]) -> None:
    """Job time as lever after lever is switched on."""
    plt = pyplot(figure_path)
    times = {name: (job_s(runs), cut(runs)) for name in LEVERS for (_, each), runs in found.items() if each == name}
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.34 * len(times)))
    for place, (name, (seconds, mark)) in enumerate(reversed(times.items())):
        axis.barh(place, seconds, color="#c2410c")
        axis.text(seconds * 1.01, place, f"{mark}{in_seconds(seconds)}", va="center", fontsize=8)
        axis.text(0, place, f"{name}  ", va="center", ha="right", fontsize=8)
    axis.set_yticks([])
    axis.set_xlabel("seconds for 16 samples of natural lengths after 900 tokens", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(figure_path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
