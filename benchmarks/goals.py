"""What issue D asks for, and what was reached: a section of `docs/speed.md`, from the results of `speed.py` and `ramekin bench`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.cells import is_ours
from benchmarks.results import Figure, by_round, job_time

Runs = Sequence[Mapping[str, Any]]
Found = Mapping[tuple[str, str], Runs]
_BASELINE = "bitsandbytes fp4"
_OTHER_PATH = "bitsandbytes fp4, dequantizing"


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        name: what is compared.
        goal, floor: what it should be, and the least that counts.
        unit: what stands behind the numbers; "x" means "times as fast", and more is better. Of all else less is better.
        reached: the figure; None if it was not measured.
        by: which of our precisions reached it, and next to whom.
        of_the_ceiling: the share of what the machine could do, if that was measured.
        rounds: the figure in each round in which both took turns.
    """

    name: str
    goal: float
    floor: float
    unit: str
    reached: float | None
    by: str = ""
    of_the_ceiling: float | None = None
    rounds: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        """Goal, floor or neither."""
        if self.reached is None:
            return "not measured"
        more = self.unit == "x"
        for word, bound in (("goal", self.goal), ("floor", self.floor)):
            if self.reached >= bound if more else self.reached <= bound:
                always = all(each >= bound for each in self.rounds)  # only ratios have rounds
                return word if always else f"{word}, not in every round"
        return "**below the floor**"

    def line(self) -> str:
        """The row in Markdown."""
        sign = "at least" if self.unit == "x" else "at most"
        share = "" if self.of_the_ceiling is None else f"{self.of_the_ceiling:.0%}"
        reached = "" if self.reached is None else self._show(self.reached)
        if self.rounds:
            count = len(self.rounds)
            spread = f"{min(self.rounds):.2f} to {max(self.rounds):.2f} in {count} rounds" if count > 1 else "1 round"
            reached += f" ({spread})"
        bounds = f"{sign} {self._show(self.goal)} | {sign} {self._show(self.floor)}"
        return f"| {self.name} | {bounds} | {reached} | {self.verdict} | {self.by} | {share} |"

    def missed(self) -> str:
        """What the floor would take, if a ratio is below it; nothing otherwise."""
        if self.unit != "x" or not self.reached or not self.of_the_ceiling or self.reached >= self.floor:
            return ""
        needed = self.of_the_ceiling * self.floor / self.reached
        return f"{self.name[0].upper()}{self.name[1:]}: the floor asks for {needed:.0%} of what this machine could do"

    def _show(self, value: float) -> str:
        if self.unit == "%":
            return f"{value:.1%}"
        return f"{value:.2f} {self.unit}"


def section(found: Found, own: Sequence[Mapping[str, Any]], more: str = "") -> str:
    """The section.

    Args:
        found: the runs by job and engine.
        own: what `run --own` wrote, one object for each of our engines and each length of the prompt.
        more: where more is told of floors that are missed.
    """
    goals = list(_goals(found, own))
    lines = [
        "## Goals\n",
        "Next to others: the best of our precisions and, whatever their bits, the fastest of all peers in each round: the median of the "
        "rounds (their range in brackets; named is who was the fastest most often), or what their medians say where results tell of no round in turn. Memory and cold start: the best of "
        "our precisions; Python's share and what grows: the worst of those measured. The last column is the share of what "
        "this machine could do: for times, reading the weights or multiplying, whichever takes longer; for memory, the weights, keys "
        "and values of the job. Lines that are not rates have no such share.\n",
        "| | goal | floor | reached | | by | of the ceiling |",
        "|---|---|---|---|---|---|---|",
        *(goal.line() for goal in goals),
    ]
    lines += [f"\n{missed}{more and f'; {more}'}." for goal in goals if (missed := goal.missed())]
    other = _ratio(found, "900 n=16", job_time, (_OTHER_PATH,))
    if other.value:
        lines.append(
            f"\nbitsandbytes is measured as pip installs it, with the model card's arguments. With its other path ({_OTHER_PATH.partition(', ')[2]}; "
            "what that is: [Settings](../benchmarks/README.md#settings)), which a user has to find first, the line of bitsandbytes would be "
            f"**{other.value:.2f} x**."
        )
    return "\n".join(lines) + "\n"


def _goals(found: Found, own: Sequence[Mapping[str, Any]]) -> Iterator[Goal]:
    at = {(each["engine"], each["source"]): each for each in own}
    jobs = {key: {job["n"]: job for job in each["jobs"]} for key, each in at.items()}

    def share(reached: _Ratio, n: int, figure: str) -> float | None:
        engine = reached.by.partition(",")[0]
        return jobs[engine, 900][n].get(figure) if (engine, 900) in jobs else None

    for name, job, goal, floor, n, peers in (
        ("16 samples of 100 tokens, next to the fastest peer", "900 n=16", 4.0, 2.5, 16, ()),
        ("4 samples", "900 n=4", 2.5, 1.5, 4, ()),
        ("1 sample", "900 n=1", 2.0, 1.5, 1, ()),
        ("16 samples, next to bitsandbytes fp4", "900 n=16", 25.0, 13.0, 16, (_BASELINE,)),
    ):
        reached = _ratio(found, job, job_time, peers)
        yield Goal(name, goal, floor, "x", reached.value, reached.by, share(reached, n, "of_the_ceiling"), reached.rounds)
    reached = _ratio(found, "900 n=16 natural", job_time)
    engine = reached.by.partition(",")[0]
    least = at.get((engine, 900), {}).get("natural_ceiling_s")
    natural = least and least / _medians(found, "900 n=16 natural", job_time)[engine]
    yield Goal("16 samples of natural lengths", 5.0, 3.0, "x", reached.value, reached.by, natural, reached.rounds)
    for name, goal, floor, n in (
        ("first token of 1 sample, next to the fastest peer", 1.3, 1.0, 1),
        ("first token of 16 samples", 4.0, 3.0, 16),
    ):
        first = _ratio(found, f"900 n={n}", _first)
        of_the_ceiling = share(first, n, "first_token_of_the_ceiling")
        yield Goal(name, goal, floor, "x", first.value, first.by, of_the_ceiling, first.rounds)
    peak, by = _least(found, "900 n=16", lambda run: run["peak_mb"] / 1e3)
    held = at.get((by, 900), {}).get("held_bytes")
    yield Goal("peak memory with 16 samples", 1.1, 1.5, "GB", peak, by, held and peak and held / 1e9 / peak)
    yield Goal(
        "cold start to first token, without the encoder's time",
        0.6,
        1.2,
        "s",
        *_least(found, "900 n=1", lambda run: run["cold_start_s"] - _prefill(run)),
    )
    python = [(job["python_share"], engine) for (engine, _), group in jobs.items() for job in group.values()]
    yield Goal("Python's share of a step, the largest of all jobs", 0.03, 0.06, "%", *max(python, default=(None, "")))
    for name, goal, floor, (more, n), (less, m), figure in (
        ("16 samples, next to 1 (job time)", 3.0, 4.0, (900, 16), (900, 1), "job_s"),
        ("prompt of 512 tokens, next to 256 (first token)", 2.0, 2.2, (512, 1), (256, 1), "first_token_s"),
    ):
        growth = {
            engine: jobs[engine, more][n][figure] / jobs[engine, less][m][figure]
            for engine in dict.fromkeys(name for name, _ in jobs)
            if {(engine, more), (engine, less)} <= jobs.keys()
        }
        worst = max(growth, key=lambda name: growth[name], default="")
        yield Goal(name, goal, floor, "times", growth.get(worst), worst)


def _first(run: Mapping[str, Any]) -> float:
    return float(run["requests"][0][0])


def _prefill(run: Mapping[str, Any]) -> float:
    """The first token's time without its step, which is as long as those after it."""
    return _first(run) - float(np.median(np.diff(run["requests"][0])))


def _medians(found: Found, job: str, figure: Figure) -> dict[str, float]:
    return {engine: float(np.median([figure(run) for run in runs])) for (each, engine), runs in found.items() if each == job}


@dataclass(frozen=True)
class _Ratio:
    """How many times as fast one of ours is as a peer; which two these are; the same in each round in turn."""

    value: float | None = None
    by: str = ""
    rounds: tuple[float, ...] = ()


def _ratio(found: Found, job: str, figure: Figure, peers: Sequence[str] = ()) -> _Ratio:
    """Our fastest, by its median, next to the fastest of all peers, or of `peers`.

    In turn that is whichever was the fastest in a round, in all rounds of ours that one of the two fastest by their medians
    took part in. Of several, `by` names the one that was the fastest most often.
    """
    medians = _medians(found, job, figure)
    ours = {engine: value for engine, value in medians.items() if is_ours(engine)}
    others = {engine: value for engine, value in medians.items() if engine in (peers or medians.keys() - ours.keys())}
    if not ours or not others:
        return _Ratio()
    best = min(ours, key=lambda name: ours[name])
    ranked = sorted(others, key=lambda name: others[name])
    mine, theirs = by_round(found[job, best], figure), {name: by_round(found[job, name], figure) for name in ranked}
    rounds = [each for each in mine if any(each in theirs[name] for name in ranked[:2])]
    fastest = [min((theirs[name][each], name) for name in ranked if each in theirs[name]) for each in rounds]
    if not rounds:
        return _Ratio(others[ranked[0]] / ours[best], f"{best}, {ranked[0]}")
    ((name, _),) = Counter(name for _, name in fastest).most_common(1)
    in_turn = tuple(seconds / mine[each] for each, (seconds, _) in zip(rounds, fastest, strict=True))
    return _Ratio(float(np.median(in_turn)), f"{best}, {name}", in_turn)


def _least(found: Found, job: str, figure: Figure) -> tuple[float | None, str]:
    """Our least figure, and which precision has it."""
    ours = {engine: value for engine, value in _medians(found, job, figure).items() if is_ours(engine)}
    best = min(ours, key=lambda name: ours[name], default=None)
    return (None, "") if best is None else (ours[best], best)
