"""Many relaxations in one file: two rows each of a database of ase.db, or frames that name theirs and their role."""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import ase.db
from ase import Atoms
from ase.db.row import AtomsRow

from . import InvalidPair, Loaded
from .calculations import opened
from .formats import check_content, format_of, read_frames, readable

log = logging.getLogger(__name__)
PAGE = 1000
"""Rows of a database that are read at once."""
NAMED_BY = ("pair_id", "id")
"""Keys of a frame's info by which it belongs to a relaxation."""
FIRST, LAST = ("initial", "start", "unrelaxed"), ("relaxed", "final", "end")
"""Roles of the two frames of a relaxation that count."""


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

    def load(self) -> Loaded:
        """The initial and the relaxed structure; a database has no frames in between."""
        rows = self.in_memory or _two(Path(self.path), self.first, self.last)
        last = rows[self.last].toatoms()
        last.info.update(rows[self.last].key_value_pairs, id=self.label if self.named else self.name)
        return Loaded(rows[self.first].toatoms(), last)


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


@dataclass(frozen=True)
class Member:
    """One of many relaxations in a file whose frames name theirs (`NAMED_BY`) and have a role in it.

    Attributes
    ----------
    path : str
    label : str
        What its frames name.
    all_frames : list of Atoms, optional
        Those of the file, where they are in memory; without it they are read each time.
    """

    path: str
    label: str
    all_frames: Sequence[Atoms] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.label} of {self.path}"

    def load(self) -> Loaded:
        """As `Source`."""
        every = self.all_frames or read_frames(Path(self.path))
        frames = [frame for frame in every if label_of(frame) == self.label]
        begin, end = ([f for f in frames if str(f.info["role"]).lower() in words] for words in (FIRST, LAST))
        if not len(begin) == len(end) == 1:
            raise InvalidPair(
                f"{self.name}: {len(begin)} of its frames have the role initial and {len(end)} relaxed; a relaxation "
                "needs one of each."
            )
        end[0].info.setdefault("id", self.label)
        return Loaded(begin[0], end[0], frames if len(frames) > 2 else ())


def label_of(frame: Atoms) -> str | None:
    """What a frame with a role says that it belongs to."""
    return next((str(frame.info[key]) for key in NAMED_BY if key in frame.info), None) if "role" in frame.info else None


def members_of(path: Path) -> list[Member]:
    """The relaxations of a file whose frames have roles; none where it is of one, or cannot be read."""
    # Most files have no roles, and are not read for them.
    if not path.is_file() or format_of(path) not in ("extxyz", "traj"):
        return []
    try:
        with readable(path), opened(path) as file:
            if b"role" not in file.read():
                return []
        frames = read_frames(path)
    except InvalidPair:
        # Which is said where it is read as one relaxation.
        return []
    labels = [label_of(frame) for frame in frames]
    if None in labels or (len(set(labels)) == 1 and len(frames) == 2):
        return []
    return [Member(str(path), str(label), frames) for label in dict.fromkeys(labels)]
