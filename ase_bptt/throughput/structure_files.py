"""Structures of files and folders, each read when it is asked for, however many there are."""

from __future__ import annotations

import hashlib
import io
import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import read_xyz
from ase.io.formats import filetype
from ase.io.trajectory import Trajectory

from ..pairs import InvalidPair
from ..pairs.calculations import ZIPPED
from ..pairs.formats import HEAVIEST, KEPT, WHOLE, check_content, format_of, read_frames, readable

IN_FOLDERS = ("*.extxyz", "*.xyz", "*.traj", "*.db", "*.cif", "*.vasp", "POSCAR*")
"""What is taken for structures in a folder, at any depth: what a calculation was given, not what it has left."""
BYTES = 80
"""Of a file for each atom, about, where it is not read to count them."""
BLOCK = 2**20


class StructureFiles(Sequence[Atoms]):
    """All structures of some files and folders, in order.

    Parameters
    ----------
    paths : sequence of Path
        Of a folder, all files that `IN_FOLDERS` names, sorted.
    refused : callable, optional
        ``refused(problem)`` is called with the InvalidPair of a file that cannot be read, which is left out; without
        it, that is raised.

    Attributes
    ----------
    sizes : array of int, shape (n,)
        Atoms of each; an estimate for formats of one structure, which are not read for it.
    digest : str
        A hash of the files' bytes.

    Raises
    ------
    FileNotFoundError
        Where there is no such file, or nothing in a folder.
    InvalidPair
        Where a file cannot be read.
    """

    def __init__(self, paths: Sequence[Path], refused: Callable[[InvalidPair], None] | None = None):
        self._files: list[tuple[Path, _Frames]] = []
        self._first: list[int] = []
        sizes: list[np.ndarray] = []
        n, digest = 0, hashlib.sha256()
        for path in _files_of(paths):
            try:
                check_content(path)
                frames = _frames_of(path)
            except InvalidPair as problem:
                if refused is None:
                    raise
                refused(problem)
                continue
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
            digest.update(b"|")
            self._files.append((path, frames))
            self._first.append(n)
            n += len(frames.sizes)
            sizes.append(np.asarray(frames.sizes, dtype=np.int64))
        self.sizes = np.concatenate(sizes) if sizes else np.zeros(0, np.int64)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        k = range(len(self))[k]
        file, frame = self._place(k)
        with readable(self._files[file][0]):
            atoms = self._files[file][1].read(frame)
        if not ((atoms.numbers >= 0) & (atoms.numbers <= HEAVIEST)).all():
            raise InvalidPair(f"{self.name(k)}: an element is not possible; copy the file again.")
        if atoms.calc is not None:
            found = {n: v for n, v in getattr(atoms.calc, "results", {}).items() if n in KEPT and v is not None}
            atoms.calc = SinglePointCalculator(atoms, **found)
        return atoms

    def name(self, k: int) -> str:
        """For messages."""
        file, frame = self._place(k)
        path, frames = self._files[file]
        return str(path) if len(frames.sizes) == 1 else f"structure {frame} of {path}"

    def _place(self, k: int) -> tuple[int, int]:
        file = bisect_right(self._first, k) - 1
        return file, k - self._first[file]


def _files_of(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        inside = {file for name in IN_FOLDERS for file in path.rglob(name) if file.is_file()}
        # What a run of ours keeps while it is going is no input.
        inside = {file for file in inside if not any(".part" in part for part in file.relative_to(path).parts)}
        if not inside:
            raise InvalidPair(
                f"{path} is a folder without structures: no file in it is called {', '.join(IN_FOLDERS)}; name the "
                f"files, as {path}/*/CONTCAR."
            )
        yield from sorted(inside)


class _Frames:
    """What is read from one file, and the sizes of its structures."""

    def __init__(self, path: Path, sizes: Sequence[int]):
        self.path, self.sizes = path, sizes

    def read(self, k: int) -> Atoms:
        raise NotImplementedError


class _Xyz(_Frames):
    """An extxyz file, of which only the places of the structures are in memory."""

    def __init__(self, path: Path):
        self.places, sizes = array("q", [0]), array("l")
        with path.open("rb") as file:
            place, line = 0, file.readline()
            while line.strip():
                sizes.append(self._atoms(path, line, len(sizes)))
                place += len(line)
                before, row = b"", line
                for _ in range(sizes[-1] + 1):
                    before, row = row, file.readline()
                    place += len(row)
                cut = not row.endswith(b"\n") and len(row.rstrip()) < len(before.rstrip()) and sizes[-1] > 1
                if not row or cut:
                    raise InvalidPair(f"{path}: it is cut within structure {len(sizes) - 1}; copy or write it again.")
                while (line := file.readline()).lstrip().startswith(b"VEC"):
                    place += len(line)
                self.places.append(place)
            if file.read().strip():
                lines = sum(sizes) + 2 * len(sizes) + 1
                raise InvalidPair(f"{path}: line {lines} is empty and ASE would read no further; remove the line.")
        if not sizes:
            raise InvalidPair(f"{path}: it holds 0 structures; leave it out.")
        super().__init__(path, sizes)

    @staticmethod
    def _atoms(path: Path, line: bytes, k: int) -> int:
        try:
            return int(line)
        except ValueError as error:
            raise InvalidPair(
                f"{path}: ASE cannot read it, as structure {k} does not begin with its number of atoms; write it again."
            ) from error

    def read(self, k: int) -> Atoms:
        with self.path.open("rb") as file:
            file.seek(self.places[k])
            text = file.read(self.places[k + 1] - self.places[k])
        return next(read_xyz(io.StringIO(text.decode()), slice(None)))


class _Trajectory(_Frames):
    def __init__(self, path: Path):
        WHOLE["traj"](path)
        with Trajectory(path) as frames:
            # The shape alone: to read all positions would take minutes.
            shapes = [frames.backend[k]._data["positions"].shape for k in range(len(frames))]
        super().__init__(path, [shape[0] for shape in shapes])

    def read(self, k: int) -> Atoms:
        with Trajectory(self.path) as frames:
            return frames[k]


class _Database(_Frames):
    """Rows of an ase.db, in the order of their ids."""

    def __init__(self, path: Path):
        with ase.db.connect(path, use_lock_file=False) as database:
            rows = database.select(columns=["id", "numbers"], include_data=False)
            sizes = {row.id: len(row.numbers) for row in rows}
        self.ids = list(sizes)
        super().__init__(path, list(sizes.values()))

    def read(self, k: int) -> Atoms:
        with ase.db.connect(self.path, use_lock_file=False) as database:
            row = database.get(id=self.ids[k])
        atoms = row.toatoms()
        atoms.info |= row.key_value_pairs
        return atoms


class _One(_Frames):
    """A format that holds one structure: the file is not read before it is needed."""

    def __init__(self, path: Path):
        super().__init__(path, [max(1, path.stat().st_size // BYTES)])

    def read(self, k: int) -> Atoms:
        return read_frames(self.path, limit=math.inf)[0]


class _Whole(_Frames):
    """Any other file, all of which is in memory."""

    def __init__(self, path: Path):
        self.frames = read_frames(path, limit=math.inf)
        super().__init__(path, [len(atoms) for atoms in self.frames])

    def read(self, k: int) -> Atoms:
        return self.frames[k].copy() if self.frames[k].calc is None else self.frames[k]


LAZY: dict[str, Callable[[Path], _Frames]] = {
    "extxyz": _Xyz, "xyz": _Xyz, "db": _Database, "traj": _Trajectory, "vasp": _One,
}  # fmt: skip
"""How the structures of each format (ASE's name) are read one by one; all of another file are read at once."""


def _frames_of(path: Path) -> _Frames:
    with readable(path):
        kind = format_of(path) or filetype(str(path))
        return LAZY.get("" if path.suffix in ZIPPED else kind, _Whole)(path)
