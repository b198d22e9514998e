"""Numbers that a caller gives: of the right type, in their range, and Python's own."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """An argument as a Python integer, since NumPy's wrap around; refused if it is not one from `low` to `high`.

    Raises:
        ValueError, TypeError: says so.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not low <= int(value) <= high:
        raise ValueError(f"{name} must be from {low} to {high}, not {value}")
    return int(value)


def check_number(name: str, value: object, low: float, high: float, wanted: str) -> float:
    """An argument as a float; refused if it is not a number from `low` to `high`, which `wanted` puts into words.

    Raises:
        ValueError, TypeError: says so.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {wanted}, not {value!r}")
    # Compared as it is: not every integer is a float, and NumPy would round the limits to its own type.
    number: Any = value.item() if isinstance(value, np.generic) else value
    if not low <= number <= high:
        raise ValueError(f"{name} must be {wanted}, not {value}")
    return float(number)
