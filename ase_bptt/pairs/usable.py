"""Checks of pairs and structures against a potential, before any of them is relaxed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ..cells import CellFreedom
from ..constraints import KNOWN, unknown
from ..iterated_map import IteratedMap
from ..neighbors.lattice import check_lattices
from ..potential import Potential
from ..relaxation import rows_of
from ..steppers import make_stepper
from ..structures import Structures
from . import InvalidPair, RelaxationPair, check_distances, check_freedom

log = logging.getLogger(__name__)


def check_structure(potential: Potential, atoms: Atoms, name: str) -> None:
    """Raise InvalidPair or NotImplementedError, naming the structure, where it cannot be relaxed."""
    if not len(atoms):
        raise InvalidPair(f"{name}: it has no atoms; leave it out.")
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        raise InvalidPair(f"{name}: a position or its cell is not a finite number; write the file again.")
    check_distances(atoms, f"{name}:")
    structures = potential.batch(atoms)
    _check_elements(potential, structures, name)
    try:
        check_lattices(structures)
    except ValueError as error:
        raise InvalidPair(f"{name}: {error}") from error


def check_cell(potential: Potential, atoms: Atoms, cell: CellFreedom, name: str) -> None:
    """Raise InvalidPair, naming the structure, where its cell cannot be relaxed."""
    try:
        rows_of(potential.batch(atoms), [cell], IteratedMap(potential, make_stepper(None)))
    except (ValueError, NotImplementedError) as error:
        raise InvalidPair(f"{name}: {error}") from error


def check_made(pairs: Sequence[RelaxationPair]) -> None:
    """Raise InvalidPair where pairs that were made in Python have cells that those of files are refused for."""
    for pair in pairs:
        # Those that are read on access were checked when they were first read.
        if "initial" in vars(pair):
            check_freedom(pair, pair.id)


def check_usable(potential: Potential, pair: RelaxationPair) -> None:
    """Raise NotImplementedError or InvalidPair, naming the pair, for what of it cannot be treated."""
    ends = Structures.from_atoms((pair.initial, pair.relaxed))
    _check_elements(potential, ends, pair.id)
    charges, spins = ends.charges.tolist(), ends.spins.tolist()
    if potential.inputs and (charges[0] != charges[1] or spins[0] != spins[1]):
        raise InvalidPair(f"{pair.id}: its initial and its relaxed structure differ in charge or spin; set both alike.")
    if pair.freedom.moves:
        check_cell(potential, pair.initial, pair.freedom, pair.id)
    names = unknown(ends.constraint_names)
    if names:
        raise NotImplementedError(
            f"{pair.id}: the constraints {', '.join(names)} cannot be differentiated, and are not ignored: "
            f"remove them, take one of {', '.join(KNOWN)}, or leave the pair out (--skip-invalid in the shell)."
        )


def _check_elements(potential: Potential, structures: Structures, name: str) -> None:
    try:
        potential.check(structures)
    except NotImplementedError as error:
        raise NotImplementedError(f"{name}: {error}") from error


def usable(
    potential: Potential, pairs: Sequence[RelaxationPair], *, skip_invalid: bool = False
) -> list[RelaxationPair]:
    """The pairs that the potential can treat; the first of the others raises, or each is left out with a warning.

    Raises
    ------
    NotImplementedError, InvalidPair
        As `check_usable` and `check_made`, without skip_invalid.
    InvalidPair
        Where none is left.
    """
    kept = []
    fine: set[str] = set()
    problem = ""
    for pair in pairs:
        try:
            # All of one kind can be treated, or none: so a pair that is read on access need not be read.
            check_made([pair])
            if pair.kind not in fine:
                check_usable(potential, pair)
            fine.add(pair.kind)
            kept.append(pair)
        except (InvalidPair, NotImplementedError) as error:
            if not skip_invalid:
                raise
            problem = str(error)
            log.warning("Left out: %s", problem)
    if not kept:
        raise InvalidPair(f"None of the {len(pairs)} pairs can be used; the last: {problem}")
    return kept
