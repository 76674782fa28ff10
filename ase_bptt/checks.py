"""Whether a potential can relax a pair with a gradient, said before any work is lost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from ase import Atoms

from .constraints import KNOWN, unknown
from .pairs import InvalidPair, RelaxationPair, check_distances
from .potential import Potential
from .structures import Structures

log = logging.getLogger(__name__)


def check_structure(potential: Potential, atoms: Atoms, name: str) -> None:
    """Raise InvalidPair or NotImplementedError, naming the structure, where it cannot be relaxed."""
    if not len(atoms):
        raise InvalidPair(f"{name}: it has no atoms; leave it out.")
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        raise InvalidPair(f"{name}: a position or its cell is not a finite number; write the file again.")
    check_distances(atoms, f"{name}:")
    _check_elements(potential, Structures.from_atoms(atoms), name)


def check_usable(potential: Potential, pair: RelaxationPair) -> None:
    """Raise NotImplementedError, naming the pair, for elements or constraints that cannot be treated."""
    ends = Structures.from_atoms((pair.initial, pair.relaxed))
    _check_elements(potential, ends, pair.id)
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
    """The pairs that the potential can treat; the others are left out with a warning each, or the first of them raises.

    Raises
    ------
    NotImplementedError
        As `check_usable`, without skip_invalid.
    InvalidPair
        Where none is left.
    """
    kept = []
    fine: set[str] = set()
    problem = ""
    for pair in pairs:
        try:
            # Of one kind all can be treated or none: a pair that is read when it is asked for need not be read.
            if pair.kind not in fine:
                check_usable(potential, pair)
            fine.add(pair.kind)
            kept.append(pair)
        except NotImplementedError as error:
            if not skip_invalid:
                raise
            problem = str(error)
            log.warning("Left out: %s", problem)
    if not kept:
        raise InvalidPair(f"None of the {len(pairs)} pairs can be used; the last: {problem}")
    return kept


def check_apart(**splits: Sequence[RelaxationPair]) -> None:
    """Raise ValueError where a group stands in two of the named splits."""
    for (one, a), (other, b) in combinations(splits.items(), 2):
        shared = sorted({p.group for p in a} & {p.group for p in b} - {""})
        if shared:
            raise ValueError(f"{one.capitalize()} and {other} share the group {shared[0]}: split by group.")
