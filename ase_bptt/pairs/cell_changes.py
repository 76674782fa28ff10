"""How the cell of a relaxation changes from its first to its last structure, and how far its atoms move within it."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.geometry import find_mic
from scipy.optimize import linear_sum_assignment

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


def least_moves(initial: Atoms, relaxed: Atoms) -> float:
    """Root mean square displacement in Å with the atoms of each element assigned to its final sites at least cost."""
    total, lattice = 0.0, periodic_cell(initial.cell.array, initial.pbc)
    for z in np.unique(initial.numbers):
        of = initial.numbers == z
        ends = positions_in(initial, relaxed)[of]
        squares = np.stack([find_mic(ends - x, lattice, initial.pbc)[1] ** 2 for x in initial.positions[of]])
        total += squares[linear_sum_assignment(squares)].sum()
    return float(np.sqrt(total / len(initial)))
