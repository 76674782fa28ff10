"""How the relaxation of one structure went, in a word."""

from __future__ import annotations

import math

import numpy as np

from ..evaluation import SAME_END, Row
from ..pairs import RelaxationPair
from ..result import Status
from .labels import reference_forces
from .landscape import LEFT

RIGHT = 0.05
"""Å at the farthest atom: as near as relaxations of different codes and settings come to each other."""
SOFT = 1.0
"""eV/Å^2: where a force of f is left in the reference, its minimum can be f / SOFT farther on."""
CLASSES = {
    "right": f"ends within {RIGHT} Å of the reference (more if it has forces)",
    "shifted": "finds the minimum near the reference, which is displaced",
    "wrong path": "has a minimum near the reference, but falls into another",
    "no minimum": f"has no minimum within {LEFT} Å of the reference",
    "failed": "forces not finite, or energy rising",
}
"""What each class means, said of the potential's relaxation."""


def classify(row: Row, pair: RelaxationPair) -> str:
    """The class of a relaxation, one of `CLASSES`."""
    if failed(row):
        return "failed"
    if row.max_displacement <= allowance(pair):
        return "right"
    # Also where both relaxations meet there: a basin so far from the reference is not the reference's.
    if not row.reference_moves < LEFT:
        return "no minimum"
    return "shifted" if row.right_basin else "wrong path"


def failed(row: Row) -> bool:
    """Whether a relaxation says nothing about where the potential would end."""
    return row.status == Status.DIVERGED.value or not math.isfinite(row.delta_q)


def allowance(pair: RelaxationPair) -> float:
    """Å by which a right end may differ: `RIGHT`, or more where forces were left in the reference."""
    forces = reference_forces(pair.relaxed)
    residual = 0.0 if forces is None else float(np.linalg.norm(forces, axis=1).max())
    # Beyond SAME_END it would be called another basin.
    return min(max(RIGHT, residual / SOFT), SAME_END)


def went_farther(row: Row) -> bool:
    """Whether the relaxation ended farther from the reference than it began."""
    return failed(row) or row.delta_q > row.unrelaxed
