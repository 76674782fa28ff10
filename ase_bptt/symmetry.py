"""The space group of a relaxed structure."""

from __future__ import annotations

import warnings

import numpy as np
import spglib
from ase import Atoms

SYMPREC = 0.05
"""Å: displacements below this do not break a symmetry. Relaxations end with less noise."""


def space_group(atoms: Atoms, symprec: float = SYMPREC) -> str:
    """International symbol and number, as "Fd-3m (227)"; empty where the structure is not periodic in all directions.

    Also empty where no symmetry can be found, as for positions that are not finite.
    """
    if not atoms.pbc.all() or not np.isfinite(atoms.positions).all():
        return ""
    crystal = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
    with warnings.catch_warnings():
        # spglib is between two ways of saying "none found": None with a DeprecationWarning, and an exception.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return spglib.get_spacegroup(crystal, symprec=symprec) or ""
        except spglib.SpglibError:
            return ""
