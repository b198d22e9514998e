"""What the export measured of a model's quality: a table for people, and whether it is within the recipe's limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ramekin.errors import VerificationError

_COLUMNS = {
    "tokens": ("tokens", "{:,.0f}"),
    "kl": ("KL mean", "{:.2e}"),
    "kl_p99": ("KL p99", "{:.2e}"),
    "first_choice": ("same first choice", "{:.2%}"),
    "top50": ("top 50 in common", "{:.1%}"),
    "nll_change": ("NLL change", "{:+.4f}"),
    "non_finite": ("not finite", "{:,.0f}"),
}


def table(quality: Mapping[str, Any]) -> list[str]:
    """Lines of a table: one row for each length of prompts, and one for all.

    KL is the divergence from the float32 model in nats per token. No lines if nothing was measured, or nothing readable.
    """
    try:
        lengths = dict(quality["by_source_tokens"])
        rows = [[f"to {int(length)} tokens", *_row(each)] for length, each in lengths.items()]
        rows.append(["all", *_row(quality["all"])])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return []
    rows.insert(0, ["prompt", *(title for title, _ in _COLUMNS.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def check(quality: Mapping[str, Any]) -> None:
    """Compare a fresh measurement with its limit.

    Raises:
        VerificationError: the predictions are too far from float32's.
    """
    found, most = quality["all"], quality["most_kl"]
    if found["non_finite"] or not found["kl"] <= most:
        raise VerificationError(
            f"too far from float32: mean KL {found['kl']:.3g} nats per token (limit {most:g}), the same first choice in "
            f"{found['first_choice']:.1%}, {found['non_finite']} predictions not finite, on {quality['papers']} papers. "
            "Judge on papers of the model's own kind (--papers), or export in a higher precision"
        )


def _row(figures: Mapping[str, Any]) -> list[str]:
    return [form.format(float(figures[name])) for name, (_, form) in _COLUMNS.items()]
