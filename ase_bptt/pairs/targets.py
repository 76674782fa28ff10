"""Targets: relaxed structures alone, without the path that led there; each training epoch draws a start for them."""

from __future__ import annotations

import dataclasses
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from ase import Atoms
from ase.db import connect
from ase.formula import Formula
from ase.io import read
from ase.io.cif import parse_cif
from ase.io.formats import open_with_compression

from ..cells.row_maps import allowed
from ..displacements import KNOWN
from ..utils import in_short
from . import MAX_REFERENCE_FORCE, InvalidPair, RelaxationPair, check_converged, check_distances, check_freedom
from .groups import with_groups
from .symmetry import check_symmetry, with_symmetry

log = logging.getLogger(__name__)
STRAIN = 0.02
"""Largest component of the strain of a start."""
RATTLE = 0.03
"""Å, standard deviation of the displacements of a start."""
MOST_STRAIN = 0.5
FULL = 0.999
"""Occupancies of sites above this are full."""
ENDINGS = (".cif", ".vasp", ".poscar", ".xyz", ".extxyz", ".db", ".json", ".traj")
"""Of the files that are read in a folder, beside those whose names begin as VASP's do."""


@dataclass(frozen=True, eq=False)
class Target(RelaxationPair):
    """A relaxed structure, of which no relaxation is known.

    Attributes
    ----------
    initial : Atoms
        A start drawn once, from which it is evaluated; `start` draws others.
    strain, rattle : float, Å
        Largest component of the strain of a start, where the cell moves, and standard deviation of the displacements.

    The other attributes are those of `RelaxationPair`.
    """

    strain: float = STRAIN
    rattle: float = RATTLE

    def start(self, rng: np.random.Generator) -> Atoms:
        """The target, strained and rattled; constraints and what is fixed of the cell hold."""
        atoms = self.relaxed.copy()
        atoms.set_positions(atoms.positions + rng.normal(0, self.rattle, atoms.positions.shape))
        if self.freedom.moves:
            drawn = rng.uniform(-self.strain, self.strain, (3, 3))
            strain = allowed(np.triu(drawn) + np.triu(drawn, 1).T, atoms, self.freedom)
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True, apply_constraint=False)
        return atoms

    def digest(self) -> bytes:
        """A hash of the relaxed structure, of what of it is known and of how starts are drawn."""
        digest = super().digest()
        known = self.relaxed.info.get("known", KNOWN[0])
        return digest + f"{known} {self.strain} {self.rattle}".encode()


def read_targets(
    files: str | Path | Sequence[str | Path],
    *,
    skip_invalid: bool = False,
    cell: Any = None,
    pressure: float = 0.0,
    strain: float = STRAIN,
    rattle: float = RATTLE,
    max_reference_force: float | None = MAX_REFERENCE_FORCE,
    symmetry: str | None = None,
) -> list[RelaxationPair]:
    """Read relaxed structures to train towards, such as experimental crystals or published geometries.

    Parameters
    ----------
    files : path, or several
        Files of structures in formats that ASE reads (CIF, POSCAR, extxyz, an ase.db), all that are in each, or folders
        of such files. ``info["known"]`` (in a database, the key ``known``) says what of a structure is known: "volume",
        "cell", or "all", the default. Losses and measures then count that part alone.
    skip_invalid : bool
        Leave out what cannot be used, with a warning for each, instead of raising.
    cell, pressure : str or mask, float
        As for `relax`; by default the cell moves fully where all three directions are periodic, and else is fixed.
    strain, rattle : float
        Of the starts: the largest component of their strain, and the standard deviation of the displacements in Å.
    max_reference_force : float or None
        eV/Å: a structure that holds a larger force than this is refused; None takes all.
    symmetry : str or None
        "keep" relaxes within the space group of the target; any other lets the start leave it.

    Returns
    -------
    list of Target
        As pairs; a training draws new starts in each epoch, or begins where the potential's own relaxation ended
        (``Trainer(warm_start_every=...)``).

    Raises
    ------
    FileNotFoundError
        Where there is nothing to read.
    ValueError
        For a strain that is not from 0 to 0.5, a rattle below 0, and an unknown symmetry.
    InvalidPair
        Naming the file and what to do: for sites that are occupied in part, missing hydrogen, atoms too near to each
        other, cells without volume.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from ase.build import bulk
    >>> from ase_bptt import read_targets
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     bulk("Cu", cubic=True).write(Path(folder) / "copper.cif")
    ...     target = read_targets(folder)[0]
    >>> target.id, target.freedom.name
    ('copper', 'full')
    """
    if not 0 <= strain <= MOST_STRAIN or not 0 <= rattle < np.inf:
        raise ValueError(
            f"Starts are strained by 0 to {MOST_STRAIN} and rattled by 0 Å or more; got {strain:g} and {rattle:g}."
        )
    check_symmetry(symmetry)
    given = [files] if isinstance(files, str | Path) else list(files)
    found = []
    for path in map(Path, given):
        for where, name, atoms in _structures(path):
            try:
                if isinstance(atoms, InvalidPair):
                    raise atoms
                _check(atoms, where, max_reference_force)
                chosen = cell if cell is not None else "full" if atoms.pbc.all() else "fixed"
                target = Target(atoms, atoms, name, cell=chosen, pressure=pressure, strain=strain, rattle=rattle)
                check_freedom(target, where)
                target = cast(Target, with_symmetry(target, "keep")) if symmetry == "keep" else target
                # The same in every process and run, and another for each target.
                rng = np.random.default_rng(zlib.crc32(name.encode()))
                found.append(dataclasses.replace(target, initial=target.start(rng)))
            except InvalidPair as problem:
                if not skip_invalid:
                    raise
                log.warning("Left out: %s", problem)
    if not found:
        raise InvalidPair(
            f"{', '.join(map(str, given))}: there is no target that can be used; give relaxed structures."
        )
    return with_groups(found)


def _check(atoms: Atoms, name: str, max_reference_force: float | None) -> None:
    """Raise InvalidPair where a structure is no target."""
    atoms.info.setdefault("known", KNOWN[0])
    if not len(atoms):
        raise InvalidPair(f"{name}: it has no atoms; check the file.")
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        raise InvalidPair(f"{name}: a position or a cell vector is not a finite number; write the file again.")
    _check_occupancies(atoms, name)
    check_distances(atoms, f"{name}: in the target")
    check_converged(atoms, name, max_reference_force)


def _structures(path: Path) -> Iterator[tuple[str, str, Atoms | InvalidPair]]:
    """Where each structure of a file or folder is, its name, and itself; a problem where it cannot be read."""
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}: give a file or folder of relaxed structures.")
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if path.is_dir() and not (file.is_file() and _is_structure(file.name)):
            continue
        plain = file.with_name(file.name.removesuffix(".gz"))
        name = str(plain.relative_to(path).with_suffix("") if path.is_dir() else plain.stem)
        try:
            found = list(_in_file(file))
        except InvalidPair as problem:
            yield str(file), name, problem
        except Exception as error:  # whatever ASE's readers raise
            why = f"{file} cannot be read as a structure ({in_short(error)}); write it again."
            yield str(file), name, InvalidPair(why)
        else:
            for k, atoms in enumerate(found):
                alone = len(found) == 1
                named = atoms.info.get("id") or atoms.info.get("name") or (name if alone else f"{name}:{k}")
                yield str(file) if alone else f"structure {k} of {file}", str(named), atoms


def _is_structure(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(ENDINGS) or name.upper().startswith(("POSCAR", "CONTCAR"))


def _in_file(file: Path) -> Iterator[Atoms]:
    ending = file.name.lower().removesuffix(".gz")
    if ending.endswith(".cif"):
        with open_with_compression(str(file), "rb") as stream:
            for block in parse_cif(stream):
                if block.has_structure():
                    atoms = block.get_atoms()
                    _check_hydrogen(atoms, str(block.get("_chemical_formula_sum", "")), str(file))
                    yield atoms
    elif ending.endswith((".db", ".json")):
        for row in connect(file).select():
            atoms = row.toatoms()
            atoms.info |= {key: row.key_value_pairs[key] for key in ("known", "name") if key in row.key_value_pairs}
            yield atoms
    else:
        yield from read(file, index=":")


def _check_occupancies(atoms: Atoms, name: str) -> None:
    """Raise for a site that several elements share, or that is empty in part."""
    for site in atoms.info.get("occupancy", {}).values():
        # "." and "?" stand for what is not said.
        site = {element: 1.0 if isinstance(share, str) else share for element, share in site.items()}
        if len(site) > 1 or min(site.values()) < FULL:
            shares = ", ".join(f"{element} {share:g}" for element, share in site.items())
            raise InvalidPair(
                f"{name}: a site is occupied in part ({shares}), and a relaxation needs whole atoms; give an ordered "
                "structure."
            )


def _check_hydrogen(atoms: Atoms, formula: str, name: str) -> None:
    """Raise where the formula in a CIF has more hydrogen, for its other atoms, than the sites."""
    counts = {element: float(n or 1) for element, n in re.findall(r"([A-Z][a-z]?)([\d.]*)", formula)}
    stated = counts.pop("H", 0.0) + counts.pop("D", 0.0)
    others = sum(symbol != "H" for symbol in atoms.symbols)
    there = len(atoms) - others
    if stated and sum(counts.values()) and there < 0.99 * stated * others / sum(counts.values()):
        raise InvalidPair(
            f"{name}: its formula is {formula}, but the sites are {Formula(str(atoms.symbols)).format('hill')}, so "
            "hydrogen is missing; add it, or leave the target out."
        )
