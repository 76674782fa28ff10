"""How far a relaxation moves its cell and its atoms from its first to its last structure."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import find_mic
from scipy.optimize import linear_sum_assignment

from ..cells import CellFreedom
from ..displacements import lattice_translations, shortest_lattice_vector
from ..neighbors.lattice import periodic_cell
from ..structures import Structures

log = logging.getLogger(__name__)
LARGEST_STRAIN = 0.7
"""Green-Lagrange strain between the cells of a pair above which they are other choices of vectors, or lattices."""
OTHER_VECTORS = 0.1
"""Likewise, above which another choice of vectors is looked for by which the cells are much more alike."""
OUT_OF_REACH = 5e-3
"""Logarithmic strain by which a cell may change in what is said to be fixed of it."""
SAME_CELL = 1e-3
"""Å: cells whose vectors differ by less are one cell, written with fewer digits."""
STILL = 1e-4
"""Å: where no atom has moved farther, beyond the drift, a relaxation has not run."""
FAR = 1.5
"""Å: the largest displacement, beyond the drift, above which the order of the atoms is checked."""


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
    if np.linalg.det(np.linalg.solve(before, after)) <= 0:
        return "its cell changes handedness; write both structures with the same cell vectors."
    strain, vectors = _strain(before, after), np.rint(before @ np.linalg.inv(after))
    if strain > OTHER_VECTORS and round(np.linalg.det(vectors)) == 1:
        other = _strain(before, vectors @ after)
        if other < strain / 2:
            return (
                f"its cell changes by a strain of {strain:.2f}, and by {other:.2f} with other vectors of the same "
                "lattice: write both structures with the same choice of cell vectors."
            )
    volumes = [abs(float(np.linalg.det(cell))) for cell in (before, after)]
    if strain > LARGEST_STRAIN and periodic.all() and not 0.5 < volumes[1] / volumes[0] < 2:
        return (
            f"its volume changes from {volumes[0]:.3g} to {volumes[1]:.3g} Å^3, as no relaxation does: "
            "write both structures with the same cell vectors and units, or leave out a run whose cell has collapsed."
        )
    if strain > LARGEST_STRAIN:
        return (
            f"its cell changes by a strain of {strain:.2f}, more than {LARGEST_STRAIN}, as no relaxation does: "
            "write both structures with the same choice of cell vectors."
        )
    return ""


def _strain(before: np.ndarray, after: np.ndarray) -> float:
    """Frobenius norm of the Green-Lagrange strain between two cells, of the larger of the two ways."""
    # Of a cell that shrinks the strain is at most 0.5 in a direction, however far; that of the inverse has no limit.
    gradient = np.linalg.solve(before, after)
    return float(max(np.linalg.norm(f @ f.T - np.eye(3)) / 2 for f in (gradient, np.linalg.inv(gradient))))


def warn_of_freedom(
    initial: Atoms, relaxed: Atoms, freedom: CellFreedom, name: str, warn: Callable[..., None] = log.warning
) -> None:
    """Warn where a cell changes in what is said to be fixed of it."""
    projection = freedom.projection(initial.cell.array[initial.pbc]) if freedom.moves else None
    if projection is None:
        return
    before, after = (periodic_cell(atoms.cell.array, initial.pbc) for atoms in (initial, relaxed))
    gradient = np.linalg.solve(before, after)
    # A cell that turns as a whole is not strained.
    squares, axes = np.linalg.eigh(gradient @ gradient.T)
    strain = ((axes * np.log(squares) / 2) @ axes.T).ravel()
    left = np.abs(strain - projection @ strain).max()
    if left > OUT_OF_REACH:
        warn(
            "%s: its cell changes by a strain of %.3f that is not among what moves (%s), so that no relaxation reaches "
            "its end; give what moved by --cell.", name, left, freedom.name,
        )  # fmt: skip


def unwrapped(initial: Atoms, relaxed: Atoms) -> Atoms:
    """The relaxed structure with each atom at the periodic image nearest to its initial position.

    Nearest is measured after the drift of the whole structure is removed. Positions change by lattice vectors only, so
    none changes where no atom was wrapped; the results of the calculator stay with the structure.
    """
    difference = positions_in(initial, relaxed) - initial.positions
    # So it is for nearly all of the many thousands of pairs that may be read: each displacement is within a quarter of
    # a lattice vector of the drift, and the drift within half of one.
    if np.linalg.norm(difference, axis=1).max(initial=0.0) < shortest_lattice_vector(initial) / 8:
        return relaxed
    free = Structures.from_atoms(Atoms(initial.numbers, cell=initial.cell, pbc=initial.pbc))
    moves = torch.from_numpy(difference)
    nearest, translations = moves, torch.ones_like(moves)
    while translations.any():
        mean = nearest.mean(dim=0)
        translations = lattice_translations(nearest - mean, free, torch.ones_like(free.masses))
        nearest = nearest - translations
    # A drift by a whole cell vector is none.
    lattice = periodic_cell(initial.cell.array, initial.pbc)
    whole = mean.numpy() - find_mic(mean.numpy(), lattice, initial.pbc)[0]
    shifts = np.rint(((nearest - moves).numpy() - whole) @ np.linalg.inv(lattice)) * initial.pbc
    if not shifts.any():
        return relaxed
    found = relaxed.copy()
    found.positions += shifts @ relaxed.cell.array
    if relaxed.calc is not None:
        found.calc = SinglePointCalculator(found, **relaxed.calc.results)
    return found


def warn_of_moves(initial: Atoms, relaxed: Atoms, name: str, warn: Callable[..., None] = log.warning) -> None:
    """Warn where no atom has moved, and where the atoms of an element seem to be in another order at the end."""
    moves = positions_in(initial, relaxed) - initial.positions
    lengths = np.linalg.norm(moves - moves.mean(axis=0), axis=1)
    if lengths.max() < STILL and cell_change(initial, relaxed) <= SAME_CELL:
        warn(
            "%s: its relaxed structure is its initial one; did the relaxation run, or was one file copied over the "
            "other? It teaches nothing about a path.", name,
        )  # fmt: skip
    if lengths.max() <= FAR:
        return
    reassigned, direct = _reassigned(initial, relaxed), np.sqrt(np.mean(lengths**2))
    if reassigned < direct / 2:
        warn(
            "%s: its atoms seem to be stored in another order at the end, for they move by %.2f Å (root mean square) "
            "and by %.2f Å if reassigned; write both structures in the same order.", name, direct, reassigned,
        )  # fmt: skip


def _reassigned(initial: Atoms, relaxed: Atoms) -> float:
    """Root mean square displacement in Å with the atoms of each element assigned to its final sites at least cost."""
    total, lattice = 0.0, periodic_cell(initial.cell.array, initial.pbc)
    for z in np.unique(initial.numbers):
        of = initial.numbers == z
        ends = positions_in(initial, relaxed)[of]
        squares = np.stack([find_mic(ends - x, lattice, initial.pbc)[1] ** 2 for x in initial.positions[of]])
        total += squares[linear_sum_assignment(squares)].sum()
    return float(np.sqrt(total / len(initial)))
