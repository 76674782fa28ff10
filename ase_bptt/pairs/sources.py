"""Where relaxations are read from: single files, two files in the same order, and databases of ase.db."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ase.db
from ase import Atoms
from ase.db.row import AtomsRow

from . import InvalidPair, RelaxationPair
from .calculations import CUT, check_kind, check_length
from .formats import VASP, check_content, examined, format_of, read_frames, readable

log = logging.getLogger(__name__)
PAGE = 1000
"""Rows of a database that are read at once."""


class Source(Protocol):
    """One relaxation."""

    @property
    def name(self) -> str:
        """For messages."""

    def load(self) -> tuple[Atoms, Atoms, Sequence[Atoms]]:
        """The initial and the relaxed structure, and all frames where there are more.

        Raises
        ------
        InvalidPair
            Where the relaxation cannot be used.
        """


class Frames(Sequence[Atoms]):
    """The frames of a file, read on each access: those of many relaxations would fill the memory."""

    def __init__(self, path: Path, n: int):
        self.path, self._n = path, n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, k: Any) -> Any:
        return read_frames(self.path)[k]

    def __iter__(self) -> Iterator[Atoms]:
        return iter(read_frames(self.path))

    def __repr__(self) -> str:
        return f"Frames({str(self.path)!r}, {self._n})"


@dataclass(frozen=True, slots=True)
class File:
    """A file of the frames of one relaxation, or a CONTCAR with its POSCAR."""

    name: str

    def load(self) -> tuple[Atoms, Atoms, Sequence[Atoms]]:
        path = Path(self.name)
        if path.name == "CONTCAR":
            return read_frames(path.with_name("POSCAR"))[0], read_frames(path)[0], ()
        return _ends(path)


@dataclass(frozen=True)
class InMemory:
    """A relaxation whose structures are in memory."""

    name: str
    initial: Atoms
    relaxed: Atoms

    def load(self) -> tuple[Atoms, Atoms, Sequence[Atoms]]:
        return self.initial, self.relaxed, ()


@dataclass(frozen=True)
class Unusable:
    """A relaxation that cannot be used; loading it raises its problem."""

    name: str
    problem: InvalidPair

    def load(self) -> tuple[Atoms, Atoms, Sequence[Atoms]]:
        raise self.problem


def sources_in(files: Iterable[Path]) -> Iterator[Source]:
    """Each relaxation in these files."""
    for path in files:
        if path.suffix in (".db", ".json"):
            yield from _of_database(path)
        else:
            yield File(str(path.with_name("CONTCAR") if path.name == "POSCAR" else path))


def two_files(initial: Path, relaxed: Path) -> list[InMemory]:
    """The relaxations between the structures of two files, in order."""
    folder = next((path for path in (initial, relaxed) if path.is_dir()), None)
    if folder is not None:
        raise InvalidPair(f"{folder} is a folder; give one folder of relaxations, or two files in the same order.")
    first, last = read_frames(initial), read_frames(relaxed)
    if len(first) != len(last):
        raise InvalidPair(
            f"{initial} holds {len(first)} structures and {relaxed} {len(last)}; both need the same, in the same order."
        )
    return [InMemory(f"structure {k} of {relaxed}", a, b) for k, (a, b) in enumerate(zip(first, last, strict=True))]


def loaded(source: Source, root: Path) -> RelaxationPair:
    """The pair with its id, before atoms are unwrapped, ends are checked and a group is assigned."""
    initial, relaxed, frames = source.load()
    known = relaxed.info.get("id")
    id = short(source.name if known is None else str(known), root)
    return RelaxationPair(initial, relaxed, id, frames=frames)


def short(name: str, root: Path) -> str:
    """A name that does not depend on how the path to the data was written, nor on what VASP calls its files."""
    short = name.replace(f"{root if root.is_dir() else root.parent}{os.sep}", "", 1)
    kind = next((f"{os.sep}{kind}" for kind in VASP if short.endswith(f"{os.sep}{kind}")), "")
    return short.removesuffix(kind)


def _of_database(path: Path) -> Iterator[Source]:
    try:
        for found in relaxations_in(path):
            yield found if not isinstance(found, InvalidPair) else Unusable(str(path), found)
    except InvalidPair as problem:
        yield Unusable(str(path), problem)


def _ends(path: Path) -> tuple[Atoms, Atoms, Frames]:
    runs = examined(path)
    check_kind(path, runs)
    frames = read_frames(path, runs)
    if "relaxation_frames" in frames[-1].info:
        raise InvalidPair(
            f"{path}: ase-bptt relax wrote it, a structure after the other; a reference is the file of one relaxation."
        )
    check_length(path, runs, len(frames))
    # pw.x says JOB DONE even where its last electronic steps did not converge.
    if format_of(path) == "espresso-out" and "forces" not in getattr(frames[-1].calc, "results", {}):
        raise InvalidPair(f"{path}: its last step has no forces, so {CUT}.")
    if len(frames) < 2:
        raise InvalidPair(
            f"{path}: it holds {len(frames)} structure; a relaxation needs its first and its last frame, "
            "or give initial and relaxed structures as two files."
        )
    return frames[0], frames[-1], Frames(path, len(frames))


@dataclass(frozen=True, slots=True)
class Rows:
    """One relaxation: two rows of a database.

    Attributes
    ----------
    path : str
    first, last : int
        Ids of the rows of the initial and of the relaxed structure.
    label : str
    named : bool
        Whether the user gave the label.
    in_memory : mapping of int to AtomsRow, optional
        Rows that are in memory already, by id; without it they are read each time.
    """

    path: str
    first: int
    last: int
    label: str
    named: bool
    in_memory: Mapping[int, AtomsRow] | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.label} of {self.path}"

    def load(self) -> tuple[Atoms, Atoms, tuple[Atoms, ...]]:
        """The initial and the relaxed structure; a database has no frames in between."""
        rows = self.in_memory or _two(Path(self.path), self.first, self.last)
        last = rows[self.last].toatoms()
        last.info.update(rows[self.last].key_value_pairs, id=self.label if self.named else self.name)
        return rows[self.first].toatoms(), last, ()


def relaxations_in(path: Path) -> Iterator[Rows | InvalidPair]:
    """Each relaxation of a database, or what is wrong with it.

    The rows of a .db are read in pages, and only the id and the keys of each are kept; a JSON database is read whole.

    Raises
    ------
    InvalidPair
        Where the whole database cannot be used.
    """
    in_memory = None if path.suffix == ".db" else {row.id: row for row in _all(path)}
    rows = (lambda: _marks(path)) if in_memory is None else in_memory.values
    for label, named, begin, end in _matched(rows, path):
        if len(begin) == len(end) == 1:
            yield Rows(str(path), begin[0], end[0], label, named, in_memory)
        else:
            yield InvalidPair(
                f"{label} of {path}: {len(begin)} rows have relaxed=False and {len(end)} relaxed=True; a relaxation "
                "needs one of each."
            )


RowIds = tuple[list[int], list[int]]
"""Ids of the rows with relaxed=False, and of those with True."""


def _matched(rows: Callable[[], Iterable[AtomsRow]], path: Path) -> Iterator[tuple[str, bool, list[int], list[int]]]:
    """The rows of each relaxation, with a label and whether the user gave it.

    Rows of one relaxation share their key ``pair`` or ``name``, or else all other keys, or else their formula.
    """
    total, having = 0, Counter[str]()
    for row in rows():
        total += 1
        if "relaxed" in row.key_value_pairs:
            having.update(row.key_value_pairs.keys() & {"relaxed", "pair", "name"})
    marked = having["relaxed"]
    if not marked:
        raise InvalidPair(
            f"{path}: none of its {total} rows has the key relaxed; mark each row with relaxed=False or True."
        )
    if marked < total:
        log.info("%s: left out %d rows, which have no key relaxed.", path, total - marked)
    given = next((key for key in ("pair", "name") if having[key] == marked), None)
    if given is not None:
        for value, (begin, end) in _by_key(rows(), lambda row: row.key_value_pairs[given]).items():
            yield str(value), True, begin, end
        return
    for key in (_other_keys, lambda row: row.formula):
        classes = _by_key(rows(), key).values()
        if all(len(begin) == len(end) == 1 for begin, end in classes):
            for begin, end in classes:
                yield f"row {max(*begin, *end)}", False, begin, end
            return
    raise InvalidPair(
        f"{path}: which of its rows belong together is not clear; give the two rows of each relaxation "
        "a key pair with the same value."
    )


def _by_key(rows: Iterable[AtomsRow], key: Callable[[AtomsRow], object]) -> dict[object, RowIds]:
    found: dict[object, RowIds] = {}
    for row in rows:
        if "relaxed" in row.key_value_pairs:
            found.setdefault(key(row), ([], []))[bool(row.key_value_pairs["relaxed"])].append(row.id)
    return found


def _other_keys(row: AtomsRow) -> frozenset[tuple[str, object]]:
    return frozenset(item for item in row.key_value_pairs.items() if item[0] != "relaxed")


def _marks(path: Path) -> Iterator[AtomsRow]:
    """All rows in order, with their keys and elements but without positions and results."""
    check_content(path)
    uri = f"{path.absolute().as_uri()}?mode=ro"
    # ase.db would write its tables into a database of another program.
    with readable(path), closing(sqlite3.connect(uri, uri=True)) as connection:
        (largest,) = connection.execute("SELECT max(id) FROM systems").fetchone()
    columns = ["id", "numbers", "key_value_pairs"]
    for first in range(1, (largest or 0) + 1, PAGE):
        with readable(path), ase.db.connect(path, use_lock_file=False) as database:
            found = list(database.select(f"id>={first},id<{first + PAGE}", columns=columns, include_data=False))
        yield from sorted(found, key=lambda row: row.id)


def _two(path: Path, first: int, last: int) -> dict[int, AtomsRow]:
    check_content(path)
    # Opened for each: a connection that is kept would be lost or shared in a process that is forked.
    with readable(path), ase.db.connect(path, use_lock_file=False) as database:
        return {id: database.get(id=id, include_data=False) for id in (first, last)}


def _all(path: Path) -> list[AtomsRow]:
    check_content(path)
    with readable(path):
        return list(ase.db.connect(path, use_lock_file=False).select())
