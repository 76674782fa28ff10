"""Pairs of an initial structure and the structure that a reference relaxation ended in."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms

log = logging.getLogger(__name__)

RESIDUAL = 0.05
"""eV/Å: references whose last forces exceed this are named in a warning."""


@dataclass(frozen=True, eq=False)
class RelaxationPair:
    """One reference relaxation.

    Attributes
    ----------
    initial, relaxed : Atoms
        The same atoms in the same order and the same cell.
    id : str
        Names it in tables and messages.
    group : str
        Pairs of one group never stand on both sides of a split.
    """

    initial: Atoms
    relaxed: Atoms
    id: str
    group: str = ""


class InvalidPair(ValueError):
    """A pair that cannot be used, said in one sentence."""


def check_pair(initial: Atoms, relaxed: Atoms, name: str) -> None:
    """Raise InvalidPair where the two cannot be the ends of one relaxation at a fixed cell."""
    if len(initial) != len(relaxed):
        raise InvalidPair(f"{name}: {len(initial)} atoms begin and {len(relaxed)} end; check the two structures.")
    if not np.array_equal(initial.numbers, relaxed.numbers):
        raise InvalidPair(
            f"{name}: its atoms change from {initial.symbols} to {relaxed.symbols}; "
            "write both structures with their atoms in the same order."
        )
    if not (np.isfinite(initial.positions).all() and np.isfinite(relaxed.positions).all()):
        raise InvalidPair(f"{name}: a position is not a finite number; write the file again.")
    if not np.array_equal(initial.pbc, relaxed.pbc):
        raise InvalidPair(f"{name}: periodic boundaries change from {initial.pbc} to {relaxed.pbc}.")
    change = np.abs(initial.cell.array - relaxed.cell.array).max()
    if not change <= 1e-3:
        raise InvalidPair(
            f"{name}: its cell changes by {change:.3f} Å; only relaxations at a fixed cell can be used so far."
        )
    if "forces" in getattr(relaxed.calc, "results", {}):
        residual = np.linalg.norm(relaxed.get_forces(), axis=1).max()
        if residual > RESIDUAL:
            log.warning("%s: the reference still has a force of %.3f eV/Å; is it relaxed?", name, residual)


def fingerprint(pairs: Sequence[RelaxationPair]) -> str:
    """A hash of the pairs' atoms, positions and cells."""
    digest = hashlib.sha256()
    for pair in pairs:
        for atoms in (pair.initial, pair.relaxed):
            for array in (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc):
                digest.update(array.tobytes())
    return digest.hexdigest()
