"""Numbers that a person gives."""

from __future__ import annotations

import math
from typing import Any


def check_positive(**numbers: Any) -> None:
    """Raise ValueError for a number that is given and not positive, or not finite; None is not given."""
    for name, given in numbers.items():
        value = given.item() if hasattr(given, "item") else given
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive, got {value:g}.")
