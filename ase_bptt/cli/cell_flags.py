"""What the shell reads as the degrees of freedom of a cell, and as its pressure."""

from __future__ import annotations

import argparse
import math

from ase import units

from ..cells import CellFreedom


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
