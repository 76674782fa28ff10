"""Pairs of an initial structure and the structure that a reference relaxation ended in."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.io.jsonio import encode

from ..cells import CellFreedom
from ..cells.row_maps import check_movable
from ..charges import charge_and_spin, info_of
from ..displacements import KNOWN
from ..neighbors import find_edges
from ..neighbors.lattice import check_lattices
from ..structures import Structures
from ..suggestions import unknown_name
from .cell_changes import SAME_CELL, cell_change, cell_problem

log = logging.getLogger(__name__)

RESIDUAL = 0.05
"""eV/Å: references whose last forces exceed this are named in a warning."""
MAX_REFERENCE_FORCE = 0.5
"""eV/Å: what is left with more is no reference. At a force constant of 5 eV/Å^2 an atom is then 0.1 Å from its minimum,
as far as two ends of one basin may be apart."""
CLASH = 0.5
"""Å: atoms nearer than this are a mistake."""


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
    symmetry : str, optional
        "keep" or "free": whether the run kept the space group of its start. `symmetry.with_symmetry` does likewise.

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
    symmetry: str | None = None

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
        """Elements, constraints, "cell" where it moves, charge and spin: by which a potential can treat it or not."""
        numbers = np.union1d(self.initial.numbers, self.relaxed.numbers)
        constraints = {type(c).__name__ for atoms in (self.initial, self.relaxed) for c in atoms.constraints}
        specified = info_of(*charge_and_spin(self.initial))
        words = [*sorted(constraints), *["cell"] * self.freedom.moves, *(f"{k}={v:g}" for k, v in specified.items())]
        return " ".join(map(str, [*numbers, *words]))

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


class Loaded(NamedTuple):
    """What is read of one relaxation.

    Attributes
    ----------
    initial, relaxed, frames
        As of a `RelaxationPair`.
    settings : dict
        What it was computed with, as `methods.settings_of` says it.
    others : tuple of Atoms
        Its first frame, where the file says that it began elsewhere; and where a run that continues it begins, if not
        at the relaxed structure. None where there is no such structure.
    cell : CellFreedom or None
        What of the cell was relaxed, where the run says so.
    symmetry : str or None
        "keep" or "free", where the run says so.
    left : float or None
        The largest component of a force at the end, eV/Å, where the run says it without the forces.
    """

    initial: Atoms
    relaxed: Atoms
    frames: Sequence[Atoms] = ()
    settings: dict[str, str] | None = None
    others: tuple[Atoms | None, Atoms | None] = (None, None)
    cell: CellFreedom | None = None
    symmetry: str | None = None
    left: float | None = None


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
    """Raise InvalidPair where a cell cannot move as it is said to, or changes or is known though it is fixed."""
    change, known = cell_change(pair.initial, pair.relaxed), str(pair.relaxed.info.get("known", KNOWN[0]))
    try:
        moves, ends = pair.freedom.moves, Structures.from_atoms((pair.initial, pair.relaxed))
        check_lattices(ends)
        if moves:
            check_movable(ends, 0, pair.freedom)
        if known not in KNOWN:
            raise unknown_name("known part", known, KNOWN)
    except (ValueError, NotImplementedError) as error:
        raise InvalidPair(f"{name}: {error}") from error
    if known != KNOWN[0] and not (moves and pair.relaxed.pbc.all()):
        raise InvalidPair(
            f"{name}: only its {known} is said to be known, which a cell that is fixed never reaches; let the cell "
            "move, or leave it out."
        )
    if change > SAME_CELL and not moves:
        raise InvalidPair(
            f"{name}: its cell changes by {change:.3f} Å though it is said to be fixed: take --cell full, or give both "
            "structures of one run."
        )


def check_converged(relaxed: Atoms, name: str, max_force: float | None, said: float | None = None) -> None:
    """Raise NotARelaxation where a force above max_force (eV/Å; None: any) is left, or `said` to be if it has none."""
    has_forces = "forces" in getattr(relaxed.calc, "results", {})
    known = has_forces or said is not None
    # What is no number is refused for that.
    if max_force is None or not known or not np.isfinite([*relaxed.positions, *relaxed.cell.array]).all():
        return
    left = float(np.linalg.norm(relaxed.get_forces(), axis=1).max(initial=0.0)) if has_forces else said or 0.0
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
