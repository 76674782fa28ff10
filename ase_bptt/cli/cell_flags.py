"""What the shell reads as the degrees of freedom of a cell, as its pressure, and as charges."""

from __future__ import annotations

import argparse
import math

from ase import units

from ..cells import CellFreedom
from ..pairs.charges import CHOICES


def cell(text: str) -> str | tuple[int, ...]:
    """What of a cell is relaxed: a name, or a mask of six numbers with commas between."""
    given = tuple(int(part) if part in ("0", "1") else 2 for part in text.split(",")) if "," in text else text
    try:
        CellFreedom.of(given)
    except (ValueError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return given


def pressure(text: str) -> float:
    """GPa, as eV/Å^3."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of GPa, got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number of GPa, got {text}")
    return value * units.GPa


def charges(text: str) -> str | float:
    """A name, or a charge."""
    if text in CHOICES:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {', '.join(CHOICES)} or a charge as -1, got {text!r}") from None
