"""Pairs whose structures are read on access, and the index by which all else of them is known without reading."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ase

from .. import __version__
from ..utils import replacing
from . import InvalidPair, RelaxationPair
from .cell_changes import unwrapped
from .chains import Legs
from .cp2k import CP2K, files_of_cp2k
from .databases import Member, Rows
from .formats import VaspFile, examined, format_of
from .loading import Choices
from .scans import inputs_of_pw
from .sources import File, Source, loaded
from .survey import Survey
from .symmetry import with_symmetry

log = logging.getLogger(__name__)
RECENT = 64
"""Pairs that stay in memory, of those that were read last."""
DESCRIPTORS = 4000
"""Final structures of one composition whose full descriptors are kept, for `find_duplicates`."""
WIDTH = 32
"""Bytes of a pair's hash."""
FORMAT = 5


class PairTable:
    """Ids, groups, sizes and hashes of all pairs, and the few pairs that were read last.

    Attributes
    ----------
    root : Path
        The file or folder that was given.
    choices : Choices
        With which pairs are read.
    sources : list of Source
    ids, groups, kinds : list of str
    sizes : array of int
        Atoms.
    digests : bytearray
        One hash after the other.
    """

    def __init__(self, root: Path, choices: Choices):
        self.root, self.choices = root, choices
        self.sources: list[Source] = []
        self.ids: list[str] = []
        self.groups: list[str] = []
        self.kinds: list[str] = []
        self.sizes = array("l")
        self.digests = bytearray()
        self._recent: dict[int, RelaxationPair] = {}

    def add(self, source: Source, id: str, group: str, n_atoms: int, kind: str, digest: bytes) -> None:
        """Add a row."""
        # What is read on access is not kept.
        self.sources.append(Member(source.path, source.label) if isinstance(source, Member) else source)
        self.ids.append(id)
        # Many pairs share them.
        self.groups.append(sys.intern(group))
        self.kinds.append(sys.intern(kind))
        self.sizes.append(n_atoms)
        self.digests += digest

    def digest(self, k: int) -> bytes:
        return bytes(self.digests[WIDTH * k : WIDTH * (k + 1)])

    def read(self, k: int) -> RelaxationPair:
        """The pair itself.

        Raises
        ------
        InvalidPair
            Where it cannot be read any more, or has changed.
        """
        pair = self._recent.pop(k, None) or self._read(k)
        self._recent[k] = pair
        if len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        return pair

    def _read(self, k: int) -> RelaxationPair:
        name = self.sources[k].name
        try:
            found = loaded(self.sources[k], self.root)
            # It was checked before; the hash below says whether it is still the same.
            relaxed = unwrapped(found.initial, found.relaxed)
        except (OSError, ValueError) as error:
            raise InvalidPair(
                f"{name}: it could be read before and now it cannot ({str(error).rstrip('.')}); put it back and resume."
            ) from error
        pair = replace(self.choices.with_cell(found), relaxed=relaxed, id=self.ids[k], group=self.groups[k])
        pair = with_symmetry(pair, self.choices.symmetry)
        if pair.digest() != self.digest(k):
            raise InvalidPair(f"{name}: it has changed since it was checked; put back what it was, or begin again.")
        return pair

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_recent": {}}


def _of_the_made_pair(name: str) -> Any:
    """A field that is read on access."""
    return property(lambda self: getattr(self.made(), name))


class DeferredPair(RelaxationPair):
    """A pair whose structures are those of the ordinary pair that `made` returns, which is called on access.

    A copy by `dataclasses.replace` is an ordinary pair with structures of its own.
    """

    __slots__ = ()

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        """An ordinary pair, for `dataclasses.replace`."""
        return RelaxationPair(*arguments, **named)

    def made(self) -> RelaxationPair:
        """The pair as an ordinary one."""
        raise NotImplementedError

    initial, relaxed, frames = map(_of_the_made_pair, ("initial", "relaxed", "frames"))
    cell, pressure, symmetry = map(_of_the_made_pair, ("cell", "pressure", "symmetry"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r}, {self.group!r})"


class LazyPair(DeferredPair):
    """A row of a `PairTable`: its id, group and size are known, its structures are read on access."""

    __slots__ = ("_k", "_table")
    _k: int
    _table: PairTable

    def made(self) -> RelaxationPair:
        """The pair as an ordinary one, read unless it is among the last that were."""
        return self._table.read(self._k)

    @property
    def id(self) -> str:  # type: ignore[override]
        return self._table.ids[self._k]

    @property
    def group(self) -> str:  # type: ignore[override]
        return self._table.groups[self._k]

    @property
    def n_atoms(self) -> int:
        return self._table.sizes[self._k]

    @property
    def kind(self) -> str:
        return self._table.kinds[self._k]

    def digest(self) -> bytes:
        return self._table.digest(self._k)

    def __reduce__(self) -> tuple[Any, ...]:
        return _lazy_pair, (self._table, self._k)


def lazy_pairs(table: PairTable) -> list[RelaxationPair]:
    """A pair for each row of the table."""
    return [_lazy_pair(table, k) for k in range(len(table.sources))]


def _lazy_pair(table: PairTable, k: int) -> LazyPair:
    pair: LazyPair = object.__new__(LazyPair)
    # A pair is frozen.
    object.__setattr__(pair, "_table", table)
    object.__setattr__(pair, "_k", k)
    return pair


class Index:
    """The table of pairs as a file: a line of JSON about the whole, and one for each pair.

    Parameters
    ----------
    root : Path
    files : sequence of Path
        The files of relaxations; the index is out of date where the size or the time of change of one differs.
    choices : Choices
        As for `read_pairs`; each has an index of its own.
    folder : path or None
        Where indexes are kept.
    """

    def __init__(self, root: Path, files: Sequence[Path], choices: Choices, folder: str | Path | None):
        self.root, self.choices = root, choices
        self._base = root if root.is_dir() else root.parent
        key = hashlib.sha256(
            json.dumps([str(root.resolve()), asdict(choices) | {"skip_invalid": None}]).encode()
        ).hexdigest()[:16]
        self.path = (Path(folder) if folder else _cache()) / f"pairs-{key}.jsonl"
        self._stamp = self._stamped(files)

    def read(self) -> tuple[PairTable, Survey] | None:
        """The table, and what else was found; None where the index is missing or out of date."""
        try:
            with self.path.open() as file:
                head = json.loads(next(file))
                if head["stamp"] != self._stamp:
                    log.info("%s: something has changed there, so all pairs are read and checked again.", self.root)
                    return None
                survey, table = Survey(self.root, **head["survey"]), PairTable(self.root, self.choices)
                for line in file:
                    place, id, group, size, kind, digest = json.loads(line)
                    table.add(self._source(place, id), id, group, size, kind, bytes.fromhex(digest))
        except (OSError, ValueError, LookupError, TypeError, StopIteration):
            return None
        return (table, survey) if len(table.sources) == survey.used else None

    def write(self, table: PairTable, survey: Survey) -> None:
        """Write the index; where the folder is not writable, warn that the next start will read all pairs again."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as path, path.open("w") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in self._lines(table, survey))
        except OSError as error:
            log.warning("No index of %s is kept, and the next start will read all pairs again: %s", self.root, error)

    def _lines(self, table: PairTable, survey: Survey) -> Iterator[Any]:
        found = {name: value for name, value in asdict(survey).items() if name != "where"}
        yield {"stamp": self._stamp, "survey": found}
        for k, source in enumerate(table.sources):
            known = table.ids[k], table.groups[k], table.sizes[k], table.kinds[k]
            yield [self._place(source), *known, table.digest(k).hex()]

    def _place(self, source: Source) -> list[Any]:
        """The source as JSON; its path is relative to the one given, which may be written differently next time."""
        if isinstance(source, Rows):
            return [os.path.relpath(source.path, self._base), source.first, source.last, source.label, source.named]
        if isinstance(source, Member):
            return [os.path.relpath(source.path, self._base), source.label]
        if isinstance(source, Legs):
            return [[os.path.relpath(name, self._base) for name in source.names]]
        return [os.path.relpath(source.name, self._base)]

    def _source(self, place: list[Any], id: str) -> Source:
        path, *rows = place
        if isinstance(path, list):
            return Legs(tuple(str(self._base / name) for name in path))
        path = str(self._base / path)
        if not rows:
            return File(path)
        if len(rows) == 1:
            return Member(path, rows[0])
        first, last, label, named = rows
        return Rows(sys.intern(path), first, last, id if label == id else label, named)

    def _stamped(self, files: Sequence[Path]) -> str:
        """A hash of all that the index depends on."""
        digest = hashlib.sha256(json.dumps([FORMAT, __version__, ase.__version__]).encode())
        for file in files:
            for path in _and_beside(file):
                # A missing file is reported where it is read.
                found = (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ()
                digest.update(json.dumps([os.path.relpath(path, self._base), *found]).encode())
        return digest.hexdigest()


def _and_beside(file: Path) -> list[Path]:
    """A file and those beside it from which its relaxation is read, too."""
    vasp = VaspFile.named(file)
    kinds = () if vasp is None or vasp.kind == "vasprun" else ("POSCAR", "CONTCAR", "INCAR")
    found = [vasp.other(kind, tag) for kind in kinds for tag in dict.fromkeys((vasp.tag, ""))] if vasp else []
    others = _inputs_of(file) if vasp is None else sorted(file.parent.glob("error.*"))
    return list(dict.fromkeys([file, *filter(None, found), *others]))


def _inputs_of(path: Path) -> list[Path]:
    """Files beside an output of pw.x or CP2K from which its relaxation is read, too."""
    if format_of(path) != CP2K:
        return inputs_of_pw(path)
    with suppress(InvalidPair):
        return [file for run in examined(path) for file in files_of_cp2k(path, run)]
    return []


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ase_bptt"
