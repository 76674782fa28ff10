"""Which structures are the same, up to motions and the order of their atoms."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.geometry import find_mic
from scipy.optimize import linear_sum_assignment

TOLERANCE = 0.05
"""Å: two structures are one if their distances differ by less, as root mean square."""
LARGEST = 4
"""Tolerances by which no single distance may differ. The noise that relaxations leave (0.02 Å in each direction)
reaches three in hundreds of atoms; one atom half an Å away exceeds six."""
NEIGHBORS = 12
"""Of each atom and of each element, whose distances are compared atom by atom."""
SHORTEST = 30
"""Distances per atom that are compared all together: more would fill the memory in large cells."""


def composition(atoms: Atoms) -> bytes:
    """Equal for structures of the same atoms in any order, and as short for large ones."""
    return hashlib.sha256(np.sort(atoms.numbers).tobytes()).digest()[:16]


def alike(compositions: Sequence[bytes], structure: Callable[[int], Atoms], looks: int | None = None) -> list[int]:
    """For each of some structures the first one that is the same, by `same_structure`, in one or more steps.

    Parameters
    ----------
    compositions : sequence of bytes
        As `composition` gives them.
    structure : callable
        ``structure(k)`` gives one; only those are asked for that share their composition with another.
    looks : int or None
        Of how many structures all that is compared is kept, about 200 bytes an atom; of the others of a composition
        only a few hundred bytes are, and they are asked for again where those are close. None keeps all.
    """
    members: dict[bytes, list[int]] = {}
    for k, name in enumerate(compositions):
        members.setdefault(name, []).append(k)
    return joined(len(compositions), (edge for some in members.values() for edge in _same(structure, some, looks)))


def same_structure(a: Atoms, b: Atoms, tolerance: float = TOLERANCE) -> bool:
    """Whether two structures are one up to motions, symmetry and the order of their atoms.

    Compares the sorted distances (nearest images) of each pair of elements: their root mean square
    difference must stay below the tolerance, in Å, and the largest below four times that. And each
    atom must have a partner whose nearest neighbours are as far away, within four times the
    tolerance: so one atom that sits elsewhere counts in a large cell, too.
    """
    if sorted(a.numbers) != sorted(b.numbers):
        return False
    return next(_same((a, b).__getitem__, [0, 1], None, tolerance), None) is not None


def _same(
    structure: Callable[[int], Atoms], members: list[int], most: int | None, tolerance: float = TOLERANCE
) -> Iterator[tuple[int, int]]:
    """Enough of the members, all of one composition, that are the same structure to join all that are."""
    if len(members) < 2:
        return
    kept: list[_Look] = []
    cells, few = [], []
    for k in members:
        atoms = structure(k)
        look = _look(atoms)
        cells.append(atoms.cell.cellpar())
        few.append(look.distances[:: max(1, len(look.distances) // 100)].copy())
        if most is None or len(kept) < most:
            kept.append(look)

    def look_at(a: int) -> _Look:
        return kept[a] if a < len(kept) else _look(structure(members[a]))

    for a, b in _close(np.stack(cells), np.stack(few), look_at, tolerance):
        yield members[a], members[b]


def _close(
    cells: np.ndarray, few: np.ndarray, look_at: Callable[[int], _Look], tolerance: float
) -> Iterator[tuple[int, int]]:
    label = np.arange(len(cells))
    for b in range(1, len(cells)):
        near = np.flatnonzero(np.isclose(cells[:b], cells[b], atol=0.05).all(axis=1))
        # A few distances tell most structures apart.
        near = near[(np.abs(few[near] - few[b]) < LARGEST * tolerance).all(axis=1)]
        if not len(near):
            continue
        look = look_at(b)
        for a in near:
            if label[a] != label[b] and look_at(a).is_of(look, tolerance):
                label[label == label[b]] = label[a]
                yield int(a), b


def joined(n: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """For each of n items the first item that these edges lead to."""
    first = list(range(n))

    def find(k: int) -> int:
        while first[k] != k:
            first[k] = first[first[k]]
            k = first[k]
        return k

    for a, b in edges:
        low, high = sorted((find(a), find(b)))
        first[high] = low
    return [find(k) for k in range(n)]


@dataclass(frozen=True, eq=False)
class _Look:
    """What motions and the order of the atoms do not change; in Å.

    Attributes
    ----------
    distances : ndarray, shape (m,)
        The shortest distances of each pair of elements, sorted.
    environments : list of ndarray, shape (n_atoms of the element, k) each
        For each element the sorted distances from its atoms to their nearest neighbours of each element.
    """

    distances: np.ndarray
    environments: list[np.ndarray]

    def is_of(self, other: _Look, tolerance: float) -> bool:
        """Whether this may be another look at the same structure. Noise moves sorted numbers as little as others."""
        change = self.distances - other.distances
        largest = LARGEST * tolerance
        if np.abs(change).max(initial=0.0) >= largest or np.sum(change**2) > tolerance**2 * change.size:
            return False
        return all(_matches(x, y, largest) for x, y in zip(self.environments, other.environments, strict=True))


def _look(atoms: Atoms) -> _Look:
    distances = _distances(atoms)
    elements = [np.flatnonzero(atoms.numbers == z) for z in np.unique(atoms.numbers)]
    every: list[np.ndarray] = []
    environments: list[np.ndarray] = []
    for p, first in enumerate(elements):
        around = []
        for q, second in enumerate(elements):
            block = distances[np.ix_(first, second)]
            # An atom is no neighbour of itself.
            around.append(np.sort(block, axis=1)[:, int(q == p) :][:, :NEIGHBORS])
            if q >= p:
                pairs = block[np.triu_indices(len(first), 1)] if q == p else block
                every.append(np.sort(pairs, axis=None)[: SHORTEST * len(atoms)])
        environments.append(np.concatenate(around, axis=1).astype(np.float32))
    return _Look(np.concatenate(every).astype(np.float32), environments)


def _matches(x: np.ndarray, y: np.ndarray, largest: float) -> bool:
    """Whether the rows of x can be put into an order in which no number differs from y's by the largest or more."""
    if not x.shape[1]:
        return True
    if np.abs(np.sort(x, axis=0) - np.sort(y, axis=0)).max() >= largest:
        return False
    apart = np.zeros((len(x), len(y)), bool)
    for column in range(x.shape[1]):
        apart |= np.abs(x[:, None, column] - y[None, :, column]) >= largest
    return not apart[linear_sum_assignment(apart)].any()


def _distances(atoms: Atoms) -> np.ndarray:
    """Distance of the nearest images of each two atoms, shape (n, n), in Å."""
    x, found = atoms.positions, np.zeros((len(atoms), len(atoms)))
    # Row by row: the images of all pairs of a large structure at once would fill the memory.
    rows = max(1, 20_000 // len(atoms))
    for k in range(0, len(atoms), rows):
        vectors = x[None] - x[k : k + rows, None]
        found[k : k + rows] = find_mic(vectors.reshape(-1, 3), atoms.cell, atoms.pbc)[1].reshape(-1, len(atoms))
    return found
