"""Pairs of an initial structure and the structure that a reference relaxation ended in."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import find_mic
from ase.io.jsonio import encode

from ..cells import CellFreedom
from ..charges import charge_and_spin, info_of
from ..displacements import lattice_translations, shortest_lattice_vector
from ..neighbors import find_edges
from ..neighbors.lattice import periodic_cell
from ..structures import Structures
from .cell_changes import SAME_CELL, cell_change, cell_problem, least_moves, positions_in

log = logging.getLogger(__name__)

RESIDUAL = 0.05
"""eV/Å: references whose last forces exceed this are named in a warning."""
MAX_REFERENCE_FORCE = 0.5
"""eV/Å: what is left with more is no reference. At a force constant of 5 eV/Å^2 an atom is then 0.1 Å from its minimum,
as far as two ends of one basin may be apart."""
CLASH = 0.5
"""Å: atoms nearer than this are a mistake."""
STILL = 1e-4
"""Å: where no atom has moved farther, beyond the drift, a relaxation has not run."""
FAR = 1.5
"""Å: the largest displacement, beyond the drift, above which the order of the atoms is checked."""


@dataclass(frozen=True, eq=False)
class RelaxationPair:
    """One reference relaxation.

    Attributes
    ----------
    initial, relaxed : Atoms
        The same atoms in the same order.
    id : str
        Its name in tables and messages.
    group : str
        A group is never divided by a split.
    frames : sequence of Atoms
        All frames of the relaxation, first and last included, with energies and forces where the reference has
        them; empty where there are none. `read_pairs` provides them for files of frames, and reads them on access.
    cell : str, mask or CellFreedom, optional
        What of the cell was relaxed, as for `relax`; None is "full" where the two cells differ, and "fixed" else.
    pressure : float
        At which a cell that moves was relaxed, eV/Å^3.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import RelaxationPair
    >>> pair = RelaxationPair(molecule("N2"), molecule("N2"), "N2 from a guess", group="N2")
    >>> pair
    RelaxationPair('N2 from a guess', N2, group 'N2')
    """

    initial: Atoms
    relaxed: Atoms
    id: str
    group: str = ""
    frames: Sequence[Atoms] = ()
    cell: Any = None
    pressure: float = 0.0

    def __repr__(self) -> str:
        return f"RelaxationPair({self.id!r}, {self.relaxed.symbols}, group {self.group!r})"

    @property
    def n_atoms(self) -> int:
        return len(self.initial)

    @property
    def freedom(self) -> CellFreedom:
        """What of the cell is relaxed, and at what pressure."""
        guess = "full" if self.cell is None and cell_change(self.initial, self.relaxed) > SAME_CELL else "fixed"
        return CellFreedom.of(guess if self.cell is None else self.cell, self.pressure)

    @property
    def kind(self) -> str:
        """Elements, constraints, charge and spin, on which it depends whether a potential can treat the pair."""
        numbers = np.union1d(self.initial.numbers, self.relaxed.numbers)
        constraints = {type(c).__name__ for atoms in (self.initial, self.relaxed) for c in atoms.constraints}
        specified = info_of(*charge_and_spin(self.initial))
        return " ".join(map(str, [*numbers, *sorted(constraints), *(f"{k}={v:g}" for k, v in specified.items())]))

    @property
    def charge(self) -> float:
        """Of its structures, in elementary charges: ``info["charge"]``, or 0."""
        known = dict(word.split("=") for word in self.kind.split() if "=" in word)
        return float(known.get("charge", 0.0))

    def digest(self) -> bytes:
        """A hash of atoms, masses, positions, cells, charges, spins and constraints of both ends."""
        digest = hashlib.sha256()
        add_to_hash(digest, self.initial)
        add_to_hash(digest, self.relaxed)
        if self.freedom.moves:
            digest.update(repr(self.freedom).encode())
        return digest.digest()


class InvalidPair(ValueError):
    """A pair that cannot be used; its message says why and what to do.

    Attributes
    ----------
    survey : Survey or None
        What else there is, where it was found in an archive that was read to its end.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt.pairs import InvalidPair, check_pair
    >>> try:
    ...     check_pair(molecule("N2"), molecule("CO2"), "run_1")
    ... except InvalidPair as problem:
    ...     print(problem)
    run_1: the initial structure has 2 atoms and the relaxed one 3; check both.
    """

    survey: Any = None


class NotARelaxation(InvalidPair):
    """A whole and readable file that holds something else than a relaxation, which a folder may hold beside some.

    Attributes
    ----------
    kind : str
        What it is, as "molecular dynamics".
    detail : str
        What else there is to say of it.
    """

    def __init__(self, message: str, kind: str, detail: str = ""):
        super().__init__(message)
        self.kind, self.detail = kind, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.kind, self.detail)


def check_pair(initial: Atoms, relaxed: Atoms, name: str, warn: Callable[..., None] = log.warning) -> None:
    """Raise InvalidPair where the two cannot be the ends of one relaxation.

    Warns of a reference that still has forces above `RESIDUAL`.
    """
    if len(initial) != len(relaxed):
        raise InvalidPair(
            f"{name}: the initial structure has {len(initial)} atoms and the relaxed one {len(relaxed)}; check both."
        )
    if not len(initial):
        raise InvalidPair(f"{name}: it has no atoms; check the two structures.")
    if not np.array_equal(initial.numbers, relaxed.numbers):
        raise InvalidPair(
            f"{name}: its atoms change from {initial.symbols} to {relaxed.symbols}; "
            "write both structures with their atoms in the same order."
        )
    if not (np.isfinite(initial.positions).all() and np.isfinite(relaxed.positions).all()):
        raise InvalidPair(f"{name}: a position is not a finite number; write the file again.")
    if not np.array_equal(initial.pbc, relaxed.pbc):
        raise InvalidPair(
            f"{name}: periodic boundaries change from {initial.pbc} to {relaxed.pbc}; set both structures' pbc alike."
        )
    if problem := cell_problem(initial, relaxed):
        raise InvalidPair(f"{name}: {problem}")
    for atoms, end in ((initial, "initial"), (relaxed, "relaxed")):
        check_distances(atoms, f"{name}: in its {end} structure")
    if "forces" in getattr(relaxed.calc, "results", {}):
        residual = np.linalg.norm(relaxed.get_forces(), axis=1).max()
        if not residual <= RESIDUAL:
            warn("%s: the reference still has a force of %.3f eV/Å; is it relaxed?", name, residual)


def check_freedom(pair: RelaxationPair, name: str) -> None:
    """Raise InvalidPair where a cell changes that is said to be fixed, or moves in a way that is not known."""
    change = cell_change(pair.initial, pair.relaxed)
    try:
        wrong = change > SAME_CELL and not pair.freedom.moves
    except (ValueError, NotImplementedError) as error:
        raise InvalidPair(f"{name}: {error}") from error
    if wrong:
        raise InvalidPair(
            f"{name}: its cell changes by {change:.3f} Å though it is said to be fixed: take --cell full, or give both "
            "structures of one run."
        )


def check_converged(relaxed: Atoms, name: str, max_force: float | None) -> None:
    """Raise NotARelaxation where a force of more than max_force, in eV/Å, is left; None allows any."""
    known = "forces" in getattr(relaxed.calc, "results", {})
    # What is no number is refused for that.
    if max_force is None or not known or not np.isfinite([*relaxed.positions, *relaxed.cell.array]).all():
        return
    left = float(np.linalg.norm(relaxed.get_forces(), axis=1).max(initial=0.0))
    if not left <= max_force:
        raise NotARelaxation(
            f"{name}: a force of {left:.2f} eV/Å is left, so it is no reference: relax it further, leave it out, or "
            f"allow more than {max_force:g} eV/Å (--max-reference-force).",
            "not converged", f"{left:.2f} eV/Å left",
        )  # fmt: skip


def check_distances(atoms: Atoms, where: str) -> None:
    """Raise InvalidPair where two atoms, or an atom and an image, are nearer than `CLASH`, or the cell is flat."""
    try:
        structures = Structures.from_atoms(atoms)
        found = find_edges(structures, CLASH)
    except ValueError as error:
        raise InvalidPair(f"{where} {error}") from error
    if len(found.i):
        distances = found.vectors(structures).norm(dim=1)
        k = int(distances.argmin())
        raise InvalidPair(
            f"{where} atoms {found.i[k]} and {found.j[k]} are {distances[k]:.2f} Å apart, nearer than {CLASH} Å; "
            "check its positions, its cell and their units."
        )


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
    reassigned, direct = least_moves(initial, relaxed), np.sqrt(np.mean(lengths**2))
    if reassigned < direct / 2:
        warn(
            "%s: its atoms seem to be stored in another order at the end, for they move by %.2f Å (root mean square) "
            "and by %.2f Å if reassigned; write both structures in the same order.", name, direct, reassigned,
        )  # fmt: skip


def fingerprint(pairs: Sequence[RelaxationPair]) -> str:
    """A hash of the pairs' atoms, masses, positions, cells, charges, spins and constraints, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(pair.digest())
    return digest.hexdigest()


def add_to_hash(digest: Any, atoms: Atoms) -> None:
    """Add everything of a structure that a relaxation depends on."""
    for array in (atoms.numbers, atoms.get_masses(), atoms.positions, atoms.cell.array, atoms.pbc):
        digest.update(array.tobytes())
    if specified := info_of(*charge_and_spin(atoms)):
        digest.update(repr(specified).encode())
    if atoms.constraints:
        digest.update(encode([c.todict() for c in atoms.constraints]).encode())
