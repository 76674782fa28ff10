"""Which files of an archive belong to one relaxation: copies, legs that continue each other, further calculations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from ase import Atoms

from ..cells import CELLS
from . import Loaded
from .formats import format_of
from .methods import CHARGE, contradict
from .sources import File
from .structure_matching import Equals

FURTHER = "further calculation of a relaxed structure"


@dataclass
class Chains:
    """The files of relaxations, by where they begin and end."""

    _names: list[str] = field(default_factory=list)
    _whole: Equals = field(default_factory=Equals)
    _single: Equals = field(default_factory=Equals)
    _first: list[int] = field(default_factory=list)
    _starts: list[set[int]] = field(default_factory=list)
    _ends: list[set[int]] = field(default_factory=list)
    _settings: list[dict[str, str]] = field(default_factory=list)

    def add(self, name: str, found: Loaded) -> str | None:
        """Take a file; the name of the one before it that holds the same relaxation, if there is one."""
        energy = getattr(found.relaxed.calc, "results", {}).get("energy", 0.0)
        self._first.append(self._whole.add(found.initial, found.relaxed, number=energy))
        self._names.append(name)
        for places, end, other in zip(
            (self._starts, self._ends), (found.initial, found.relaxed), found.others, strict=True
        ):
            # Of an extxyz or .traj nobody knows what made it: it is a relaxation of its own.
            known = () if format_of(Path(name)) in ("extxyz", "traj", None) else (end, other)
            places.append({self._single.add(atoms) for atoms in known if atoms is not None})
        self._settings.append(found.settings or {})
        k = len(self._names) - 1
        return self._names[self._first[k]] if self._first[k] != k else None

    def joined(self) -> tuple[list[list[str]], list[str]]:
        """The files of each relaxation, from its first to its last, and those that compute a relaxed structure again.

        A file continues another one of the same method that ended, in any folder, where it begins. With another
        functional or with spin-orbit coupling it is a further calculation of what is relaxed already; with another
        charge it is a relaxation of its own.
        """
        own = [k for k, first in enumerate(self._first) if first == k]
        ending: dict[int, list[int]] = {}
        for k in own:
            for place in self._ends[k]:
                ending.setdefault(place, []).append(k)
        following: dict[int, int] = {}
        continued: set[int] = set()
        further: set[int] = set()
        for k in sorted(own, key=lambda k: self._names[k]):
            before = [j for place in sorted(self._starts[k]) for j in ending.get(place, ()) if j != k]
            before = [j for j in dict.fromkeys(before) if not self._leads(following, k, j)]
            before = [j for j in before if self._alike(j, k, CHARGE)]
            before.sort(key=lambda j: -_nearness(self._names[j], self._names[k]))
            same = [j for j in before if not contradict(self._settings[j], self._settings[k])]
            free = [j for j in same if j not in following]
            if free:
                following[free[0]] = k
                continued.add(k)
            elif before and not same:
                further.add(k)
        chains = []
        for k in own:
            if k not in continued:
                chains.append([k])
                while chains[-1][-1] in following:
                    chains[-1].append(following[chains[-1][-1]])
        again = [self._names[k] for chain in chains if chain[0] in further for k in chain]
        return [[self._names[k] for k in chain] for chain in chains if chain[0] not in further], again

    def _alike(self, j: int, k: int, name: str) -> bool:
        a, b = self._settings[j], self._settings[k]
        return name not in a or name not in b or a[name] == b[name]

    @staticmethod
    def _leads(following: dict[int, int], k: int, j: int) -> bool:
        """Whether j continues k already, directly or by way of others."""
        while k in following:
            k = following[k]
            if k == j:
                return True
        return False


def _nearness(one: str, other: str) -> int:
    """How many folders two files share."""
    same = (a == b for a, b in zip(Path(one).parts, Path(other).parts, strict=False))
    return sum(takewhile(bool, same))


@dataclass(frozen=True)
class Legs:
    """A relaxation that was continued from file to file: it begins as the first does and ends as the last does."""

    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """For messages."""
        return self.names[-1]

    def load(self) -> Loaded:
        return joined_legs([File(name).load() for name in self.names])


def joined_legs(legs: Sequence[Loaded]) -> Loaded:
    """One relaxation of several that continue each other."""
    # A last leg at a fixed cell often follows others in which it moved; what moved by turns has moved in full.
    moving = [leg.cell for leg in legs if leg.cell is not None and leg.cell.moves]
    frames = LegFrames([leg.frames for leg in legs])
    cell = [legs[-1].cell, *moving][-1]
    if len({replace(each, pressure=0.0) for each in moving}) > 1:
        cell = replace(CELLS["full"], pressure=moving[-1].pressure)
    return legs[-1]._replace(initial=legs[0].initial, frames=frames, cell=cell)


class LegFrames(Sequence[Atoms]):
    """The frames of all legs, in order, read on each access."""

    def __init__(self, legs: Sequence[Sequence[Atoms]]):
        self._legs = legs

    def __len__(self) -> int:
        return sum(map(len, self._legs))

    def __getitem__(self, k: Any) -> Any:
        return list(self)[k]

    def __iter__(self) -> Iterator[Atoms]:
        return chain.from_iterable(self._legs)
