"""How the cell of a relaxation changes from its first to its last structure."""

from __future__ import annotations

import numpy as np
from ase import Atoms

from ..neighbors.lattice import periodic_cell

LARGEST_STRAIN = 0.7
"""Green-Lagrange strain between the cells of a pair above which they are other choices of vectors, or lattices."""
SAME_CELL = 1e-3
"""Å: cells whose vectors differ by less are one cell, written with fewer digits."""


def cell_change(initial: Atoms, relaxed: Atoms) -> float:
    """Largest change of a component of the cell vectors, Å."""
    return float(np.abs(initial.cell.array - relaxed.cell.array).max())


def positions_in(initial: Atoms, relaxed: Atoms) -> np.ndarray:
    """Positions of the relaxed structure at the same fractional coordinates in the initial cell, Å."""
    if cell_change(initial, relaxed) <= SAME_CELL:
        return relaxed.positions
    return relaxed.positions @ (np.eye(3) + np.linalg.pinv(relaxed.cell.array) @ (initial.cell - relaxed.cell))


def cell_problem(initial: Atoms, relaxed: Atoms) -> str:
    """What is wrong where the cell changes as no relaxation changes it, and what to do; empty where nothing is."""
    change = cell_change(initial, relaxed)
    if change <= SAME_CELL:
        return ""
    periodic = initial.pbc
    if not periodic.any():
        return f"its cell changes by {change:.3f} Å though nothing is periodic; set its pbc."
    before, after = (periodic_cell(atoms.cell.array, periodic) for atoms in (initial, relaxed))
    if not all(np.isfinite(c).all() and np.linalg.matrix_rank(c) == 3 for c in (before, after)):
        return "a cell has no volume, or is not finite; write the file again."
    stresses = [getattr(atoms.calc, "results", {}).get("stress", 0.0) for atoms in (initial, relaxed)]
    if not all(np.isfinite(stress).all() for stress in stresses):
        return "its cell moves, and a stress is not a finite number; write the file again, or leave the stress out."
    gradient = np.linalg.solve(before, after)
    if np.linalg.det(gradient) <= 0:
        return "its cell changes handedness; write both structures with the same cell vectors."
    strain = np.linalg.norm(gradient @ gradient.T - np.eye(3)) / 2
    if strain > LARGEST_STRAIN:
        return (
            f"its cell changes by a strain of {strain:.2f}, more than {LARGEST_STRAIN}, as no relaxation does: "
            "write both structures with the same choice of cell vectors."
        )
    return ""
