"""Where one relaxation is: in a file, in rows of a database, or in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ase import Atoms

from .databases import relaxations_in
from .folders import VASP
from .formats import read_frames
from .pairs import InvalidPair, RelaxationPair


class Source(Protocol):
    """One relaxation."""

    @property
    def name(self) -> str:
        """For messages."""

    def load(self) -> tuple[Atoms, Atoms, Sequence[Atoms]]:
        """The initial and the relaxed structure, and all frames where there are more; InvalidPair where it cannot."""


class Frames(Sequence[Atoms]):
    """The frames of a file, read anew by each who asks: those of many relaxations would fill the memory."""

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
class Held:
    """A relaxation in memory."""

    name: str
    initial: Atoms
    relaxed: Atoms

    def load(self) -> tuple[Atoms, Atoms, Sequence[Atoms]]:
        return self.initial, self.relaxed, ()


@dataclass(frozen=True)
class Refused:
    """What cannot be used."""

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


def two_files(initial: Path, relaxed: Path) -> list[Held]:
    """The relaxations between the structures of two files, in order."""
    folder = next((path for path in (initial, relaxed) if path.is_dir()), None)
    if folder is not None:
        raise InvalidPair(f"{folder} is a folder; give one folder of relaxations, or two files in the same order.")
    first, last = read_frames(initial), read_frames(relaxed)
    if len(first) != len(last):
        raise InvalidPair(
            f"{initial} holds {len(first)} structures and {relaxed} {len(last)}; both need the same, in the same order."
        )
    return [Held(f"structure {k} of {relaxed}", a, b) for k, (a, b) in enumerate(zip(first, last, strict=True))]


def loaded(source: Source, root: Path) -> RelaxationPair:
    """The pair, unwrapped and named but not yet looked at, without a group."""
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
            yield found if not isinstance(found, InvalidPair) else Refused(str(path), found)
    except InvalidPair as problem:
        yield Refused(str(path), problem)


def _ends(path: Path) -> tuple[Atoms, Atoms, Frames]:
    frames = read_frames(path)
    if "relaxation_frames" in frames[-1].info:
        raise InvalidPair(
            f"{path}: ase-bptt relax wrote it, a structure after the other; a reference is the file of one relaxation."
        )
    if len(frames) < 2:
        raise InvalidPair(
            f"{path}: it holds {len(frames)} structure; a relaxation needs its first and its last frame, "
            "or give initial and relaxed structures as two files."
        )
    return frames[0], frames[-1], Frames(path, len(frames))
