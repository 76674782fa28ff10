"""Numbers that a person gives."""

from __future__ import annotations

import math
import operator
from typing import Any


def check_positive(**numbers: Any) -> None:
    """Raise ValueError for a number that is given and not positive, or not finite; None is not given."""
    for name, given in numbers.items():
        value = given.item() if hasattr(given, "item") else given
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive, got {value:g}.")


def check_count(**numbers: Any) -> None:
    """Raise ValueError for a number that is given and not whole, or below 1; None is not given."""
    for name, given in numbers.items():
        try:
            good = given is None or operator.index(given) >= 1
        except TypeError:
            good = False
        if not good:
            raise ValueError(f"{name} must be a whole number, at least 1, got {given}.")
