"""The file of relaxed structures that `relax` and `merge` write, structure by structure."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
from ase import Atoms
from ase.io import read, write
from ase.io.extxyz import write_extxyz
from ase.io.formats import filetype, ioformats
from ase.io.trajectory import Trajectory

from ..throughput import Relaxed
from ..utils import replacing

log = logging.getLogger(__name__)


def format_of(out: Path, n: int) -> str:
    """ASE's name of the format in which so many structures are written into a file of this name.

    Raises
    ------
    ValueError
        Where ASE cannot write it, or not so many.
    """
    if out.is_dir() or not out.name:
        raise ValueError(f"{out} is a folder: give --out the name of a file, as {out / 'relaxed.extxyz'}.")
    try:
        found = filetype(str(out), read=False)
    except Exception as error:  # ASE's UnknownFileTypeError and others
        raise ValueError(f"{out}: ASE knows no format for this name: take .extxyz, .traj or .db.") from error
    kind = ioformats.get(found)
    if kind is None or not kind.can_write:
        raise ValueError(f"{out}: ASE cannot write this format: take a name that ends with .extxyz, .traj or .db.")
    if n > 1 and kind.single:
        raise ValueError(f"{out}: this format holds one structure, and there are {n}: take .extxyz.")
    return found


def write_ends(out: Path, ends: Iterable[Relaxed], format: str) -> None:
    """Write where structures ended, with how they ended in ``info``."""
    write_atoms(out, map(_with_end, ends), format)


def write_atoms(out: Path, structures: Iterable[Atoms], format: str) -> None:
    """Write structures, in the formats that are for many one after the other, so that they need not fit in memory."""
    with replacing(out) as path:
        if format not in ("extxyz", "xyz", "traj", "db"):
            frames = list(structures)
            write(path, frames if len(frames) > 1 else frames[0], format=format)
            return
        with _opened(path, format) as add:
            for atoms in structures:
                add(atoms)


def _with_end(end: Relaxed) -> Atoms:
    end.atoms.info |= {"relaxation": end.status.value, "relaxation_frames": end.nsteps}
    return end.atoms


@contextmanager
def _opened(path: Path, format: str) -> Iterator[Any]:
    """A function that adds a structure to a file."""
    if format == "traj":
        with Trajectory(path, "w") as frames:
            yield frames.write
    elif format == "db":
        with ase.db.connect(path, serial=True, append=False) as database:
            yield database.write
    elif format == "extxyz":
        with path.open("w") as file:
            yield lambda atoms: write_extxyz(file, [atoms])
    else:
        with path.open("w") as file:
            yield lambda atoms: write(file, atoms, format=format)


def warn_of_lost_constraints(out: Path, format: str, structures: Sequence[Atoms]) -> None:
    """Warn where a file of this format does not give back all constraints that are on these structures.

    Found by writing and reading one structure of each kind of constraints: what a format holds is the business of ASE.
    """
    kinds: dict[tuple[str, ...], list[Atoms]] = {}
    for atoms in structures:
        if atoms.constraints:
            kinds.setdefault(tuple(sorted(map(_kind, atoms.constraints))), []).append(atoms)
    lost = {names: _lost(some[0], out.name, format) for names, some in kinds.items()}
    names = sorted(set().union(*lost.values()))
    if names:
        n = sum(len(kinds[kind]) for kind in lost if lost[kind])
        log.warning(
            "%s: this format cannot hold the constraints %s, which %d of the structures %s; they are obeyed here, but "
            "they will be missing in the file: a name that ends with .traj or .db keeps all.",
            out, ", ".join(names), n, "has" if n == 1 else "have",
        )  # fmt: skip


def _kind(constraint: Any) -> str:
    """Of a constraint all that a format's room for it may depend on: atoms apart, its axes."""
    return f"{type(constraint).__name__} {getattr(constraint, 'mask', '')} {getattr(constraint, 'dir', '')}"


def _lost(atoms: Atoms, name: str, format: str) -> set[str]:
    """Class names of the constraints that are not the same after writing and reading."""
    every = atoms.constraints
    if _same_constraints(atoms, every, name, format):
        return set()
    alone = {type(c).__name__ for c in every if not _same_constraints(atoms, [c], name, format)}
    return alone or {type(c).__name__ for c in every}


def _same_constraints(atoms: Atoms, constraints: list[Any], name: str, format: str) -> bool:
    """Whether these constraints, written and read, change positions and forces as they did."""
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, constraint=constraints)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / name, bare, format=format)
            found = bare.copy()
            back: Any = read(Path(folder) / name, format=format)
            found.set_constraint(back.constraints)
        return bool(np.allclose(_effect(bare), _effect(found), atol=1e-4))
    # A format that cannot be read, or one that refuses the constraint.
    except Exception:
        return False


def _effect(atoms: Atoms) -> np.ndarray:
    """Where the constraints let the atoms move, and the forces that they leave, for fixed random ones."""
    steps, forces = np.random.default_rng(0).normal(0.0, 0.1, (2, len(atoms), 3))
    for constraint in atoms.constraints:
        constraint.adjust_forces(atoms, forces)
    atoms.set_positions(atoms.positions + steps)
    return np.stack([atoms.positions, forces])
