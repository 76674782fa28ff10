"""Whether the relaxation of a pair keeps the space group of its start, as DFT codes do, or breaks it, or is free."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import spglib
from ase import Atoms
from ase.constraints import FixAtoms, FixSymmetry

from ..cells.row_maps import allowed
from ..suggestions import unknown_name
from ..threads import quiet
from . import RelaxationPair
from .cell_changes import positions_in

log = logging.getLogger(__name__)
SYMMETRIES = ("keep", "break", "free")
SYMPREC = 1e-3
"""Å: above the digits that outputs are written with, and far below what a start is distorted by on purpose."""
RATTLE = 0.05
"""Å: standard deviation of each coordinate where a symmetry is broken. A mode that is unstable by 1 eV/Å^2 then has
forces above the usual fmax, so that a relaxation does not stop at the saddle point."""
STRAIN = 0.005
"""Likewise of each component of the strain of a cell that moves."""
BROKEN = 0.02
"""Å: how far an atom of a relaxed structure may be from where the symmetry of the start puts it."""


def with_symmetry(pair: RelaxationPair, symmetry: str | None = None, *, seed: int = 0) -> RelaxationPair:
    """The pair with its start as a relaxation is to treat the symmetry.

    Parameters
    ----------
    pair : RelaxationPair
    symmetry : str, optional
        "keep" holds the space group of the start with ASE's `FixSymmetry`, on both ends; "break" rattles the atoms of
        the start that are not fixed (0.05 Å), and strains its cell where it moves (0.005), so that no symmetry is
        left; "free" leaves it as it is. By default what the reference did, ``pair.symmetry``, as far as its relaxed
        structure has the symmetry of its start.
    seed : int
        Of the rattle. It is the same for the same atoms, so that equal starts stay equal, and of one group.

    Returns
    -------
    RelaxationPair
        The pair itself where nothing is to be done. Only structures that are periodic in three directions, with
        `FixAtoms` as their only constraints, have a symmetry that is kept; atoms that are fixed, or begin with another
        magnetic moment, count as other elements.

    Raises
    ------
    ValueError
        For another name.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from ase_bptt import RelaxationPair
    >>> from ase_bptt.pairs.symmetry import with_symmetry
    >>> pair = RelaxationPair(bulk("Si"), bulk("Si"), "Si")
    >>> [type(c).__name__ for c in with_symmetry(pair, "keep").initial.constraints]
    ['FixSymmetry']
    """
    asked = pair.symmetry if symmetry is None else symmetry
    check_symmetry(asked)
    if asked == "break":
        return dataclasses.replace(
            pair, initial=_broken(pair, seed), relaxed=_constrained(pair.relaxed, _others(pair.relaxed))
        )
    if asked != "keep" or (held := _fix_symmetry(pair.initial)) is None:
        return pair
    reached = _keeps(pair.initial, pair.relaxed, held)
    if not reached and symmetry is None:
        return pair
    if not reached:
        log.warning(
            "%s: its reference has lost symmetry of its start, so no relaxation that keeps it ends there; take "
            "--symmetry break (symmetry='break' in Python) or leave it out.", pair.id,
        )  # fmt: skip
    ends = [_constrained(atoms, [*_others(atoms), held]) for atoms in (pair.initial, pair.relaxed)]
    return dataclasses.replace(pair, initial=ends[0], relaxed=ends[1] if reached else pair.relaxed)


def check_symmetry(name: str | None) -> None:
    """Raise ValueError for a name that is not one of `SYMMETRIES`."""
    if name not in (None, *SYMMETRIES):
        raise unknown_name("symmetry", name, list(SYMMETRIES))


def _others(atoms: Atoms) -> list[Any]:
    """Its constraints but `FixSymmetry`."""
    return [c for c in atoms.constraints if not isinstance(c, FixSymmetry)]


def _constrained(atoms: Atoms, constraints: list[Any]) -> Atoms:
    """The structure with these constraints, and the results of its calculator."""
    found = atoms.copy()
    found.calc = atoms.calc
    found.set_constraint(constraints)
    return found


def _fix_symmetry(atoms: Atoms) -> FixSymmetry | None:
    """The constraint that keeps its symmetry; None where there is none to keep."""
    if not atoms.pbc.all() or not all(isinstance(c, FixAtoms) for c in _others(atoms)):
        return None
    # It moves the structure that it is made of onto its symmetry.
    kinds = _kinds(atoms)
    with quiet():
        try:
            crystal = kinds.cell.array, kinds.get_scaled_positions(), kinds.numbers
            found = spglib.get_symmetry(crystal, symprec=SYMPREC)
            # Most starts have none, and this is quick.
            if found is None or len(found["rotations"]) < 2:
                return None
            return FixSymmetry(kinds, symprec=SYMPREC)
        except (spglib.SpglibError, RuntimeError, AssertionError, ValueError, AttributeError, TypeError):
            return None


def _kinds(atoms: Atoms) -> Atoms:
    """A bare copy in which atoms that a symmetry must not exchange have other numbers."""
    fixed = np.zeros(len(atoms), dtype=int)
    for constraint in _others(atoms):
        fixed[constraint.index] = 1
    moments = atoms.get_initial_magnetic_moments().reshape(len(atoms), -1).round(2)
    rows = np.column_stack([atoms.numbers, fixed, moments])
    _, kinds = np.unique(rows, axis=0, return_inverse=True)
    numbers = atoms.numbers if not (fixed.any() or moments.any()) else 1 + kinds.ravel()
    return Atoms(numbers, positions=atoms.positions, cell=atoms.cell, pbc=True)


def _keeps(initial: Atoms, relaxed: Atoms, held: FixSymmetry) -> bool:
    """Whether the relaxed structure has the symmetry of the initial one."""
    metric = relaxed.cell.array @ relaxed.cell.array.T
    rotations, maps = np.asarray(held.rotations), np.asarray(held.symm_map)
    cells = np.abs(rotations.transpose(0, 2, 1) @ metric @ rotations - metric).max()
    moves = np.linalg.solve(initial.cell.array.T, (positions_in(initial, relaxed) - initial.positions).T).T
    apart = moves[maps] - np.einsum("kab,nb->kna", rotations, moves)
    # A drift by the whole is none.
    apart -= np.rint(apart - apart[:, :1])
    apart -= apart.mean(axis=1, keepdims=True)
    far = np.linalg.norm(apart @ relaxed.cell.array, axis=2).max(initial=0.0)
    return bool(far < BROKEN and cells < BROKEN * np.sqrt(metric.diagonal().max()))


def _broken(pair: RelaxationPair, seed: int) -> Atoms:
    """The start, distorted by random displacements that its constraints allow, and by a strain that its cell allows."""
    rng = np.random.default_rng([seed, *pair.initial.numbers.tolist()])
    found = _constrained(pair.initial, _others(pair.initial))
    found.calc = None
    if pair.freedom.moves:
        strain = STRAIN * rng.normal(size=(3, 3))
        # A change of volume breaks no symmetry.
        strain = (strain + strain.T) / 2 - np.trace(strain) / 3 * np.eye(3)
        strain = allowed(strain, found, pair.freedom)
        found.set_cell(found.cell.array @ (np.eye(3) + strain), scale_atoms=True, apply_constraint=False)
    found.set_positions(found.positions + RATTLE * rng.normal(size=found.positions.shape))
    return found
