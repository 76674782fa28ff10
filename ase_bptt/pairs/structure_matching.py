"""Which structures are duplicates, up to rigid motions, symmetry, the order of their atoms and the choice of cell."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.geometry import find_mic, minkowski_reduce
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ..neighbors.lattice import periodic_cell

TOLERANCE = 0.05
"""Å: two structures are the same if their distances differ by less, as root mean square."""
LARGEST = 4
"""Tolerances by which no single distance may differ. The noise that relaxations leave (0.02 Å in each direction)
reaches three of them among hundreds of atoms; one atom half an Å away exceeds six."""
EQUAL = 1e-4
"""Difference of projections (of order 1) below which structures are equal: about 0.002 Å of one atom of a hundred."""
NEIGHBORS = 12
"""Nearest neighbours of each element, whose distances are compared atom by atom."""
SHORTEST_VECTORS = 13
"""Lattice vectors whose lengths are compared, of a vector and its opposite one: as many as surround a cell."""
SHORTEST = 30
"""Distances per atom that are compared as one sorted list: more would fill the memory in large cells."""


class Equals:
    """Finds structures, or tuples of them, that were given before: the same atoms in the same order at the same places.

    Positions may be wrapped, and rounded to five digits as in an OUTCAR. A smooth function of all positions is
    compared, a few hundred bytes a structure, so that none of them is kept.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[bytes, int], list[tuple[int, np.ndarray]]] = {}
        self._n = 0

    def add(self, *structures: Atoms, number: float = 0.0) -> int:
        """The place in order of the first that is equal, and has the same number, or that of this one where none is."""
        atoms = hashlib.sha256(b"".join(a.numbers.tobytes() for a in structures)).digest()
        vector = np.concatenate([[number], *(_projection(a) for a in structures)])
        place, self._n = self._n, self._n + 1
        cell = int(np.floor(vector[1] / EQUAL))
        for k in (cell - 1, cell, cell + 1):
            for first, other in self._found.get((atoms, k), ()):
                if np.abs(other - vector).max() < EQUAL:
                    return first
        self._found.setdefault((atoms, cell), []).append((place, vector))
        return place


def _projection(atoms: Atoms) -> np.ndarray:
    """Sums over all atoms of random weights times the phases of their fractions, and the cell: smooth and periodic."""
    lattice = periodic_cell(atoms.cell.array, atoms.pbc)
    fractions = atoms.positions @ np.linalg.inv(lattice) / np.where(atoms.pbc, 1.0, 100.0)
    weights = np.random.default_rng(len(atoms)).normal(size=(6, *fractions.shape))
    sums = np.tensordot(weights, np.exp(2j * np.pi * fractions), axes=2) / np.sqrt(len(atoms))
    return np.concatenate([sums.real, sums.imag, (lattice * atoms.pbc[:, None]).ravel()])


def composition(atoms: Atoms) -> bytes:
    """A hash of the elements of all atoms, whatever their order."""
    return hashlib.sha256(np.sort(atoms.numbers).tobytes()).digest()[:16]


def find_duplicates(
    compositions: Sequence[bytes], structure: Callable[[int], Atoms], keep: int | None = None
) -> list[int]:
    """For each structure the index of the first that is the same, by `same_structure` or a chain of such matches.

    Parameters
    ----------
    compositions : sequence of bytes
        As `composition` gives them.
    structure : callable
        ``structure(k)`` returns one; it is called only for those that share their composition with another.
    keep : int or None
        For how many structures of a composition the full descriptor is kept, about 200 bytes an atom. For the others
        a few hundred bytes are, and ``structure`` is called again where those are close. None keeps all.
    """
    members: dict[bytes, list[int]] = {}
    for k, name in enumerate(compositions):
        members.setdefault(name, []).append(k)
    return first_connected(len(compositions), (m for some in members.values() for m in _matches(structure, some, keep)))


def same_structure(a: Atoms, b: Atoms, tolerance: float = TOLERANCE) -> bool:
    """Whether two structures are the same up to rigid motions, symmetry, the order of atoms and the choice of the cell.

    Compares the lengths of the shortest lattice vectors, and the sorted distances (nearest images) between each two
    elements: their root mean square difference must stay below the tolerance, in Å, and the largest below four times
    that. Moreover, each atom must have a counterpart whose nearest neighbours are as far away, within four times the
    tolerance, so that one displaced atom counts in a large cell, too.

    >>> from ase.build import bulk
    >>> from ase_bptt.pairs.structure_matching import same_structure
    >>> same_structure(bulk("Si", cubic=True), bulk("Si", cubic=True)[[3, 0, 1, 2, 4, 5, 6, 7]])
    True
    """
    if sorted(a.numbers) != sorted(b.numbers):
        return False
    return next(_matches((a, b).__getitem__, [0, 1], None, tolerance), None) is not None


def first_connected(n: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """For each of n items the lowest index in its connected component."""
    ends = np.array(list(links), dtype=np.int64).reshape(-1, 2).T
    _, component = connected_components(coo_matrix((np.ones(ends.shape[1]), ends), shape=(n, n)), directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component].tolist()


def _matches(
    structure: Callable[[int], Atoms], members: list[int], keep: int | None, tolerance: float = TOLERANCE
) -> Iterator[tuple[int, int]]:
    """Members, all of one composition, that are the same structure: enough of them to connect all that are."""
    if len(members) < 2:
        return
    kept: list[_Descriptor] = []
    cells, few = [], []
    for k in members:
        atoms = structure(k)
        descriptor = _descriptor(atoms)
        cells.append(_lattice(atoms))
        few.append(descriptor.distances[:: max(1, len(descriptor.distances) // 100)].copy())
        if keep is None or len(kept) < keep:
            kept.append(descriptor)

    def descriptor_of(a: int) -> _Descriptor:
        return kept[a] if a < len(kept) else _descriptor(structure(members[a]))

    for a, b in _close(np.stack(cells), np.stack(few), descriptor_of, tolerance):
        yield members[a], members[b]


def _close(
    cells: np.ndarray, few: np.ndarray, descriptor_of: Callable[[int], _Descriptor], tolerance: float
) -> Iterator[tuple[int, int]]:
    """Matches by lattice, a few distances and, where these agree, the full descriptors; one for each two components."""
    label = np.arange(len(cells))
    for b in range(1, len(cells)):
        near = np.flatnonzero((np.abs(cells[:b] - cells[b]) < tolerance).all(axis=1))
        # A few distances distinguish most structures.
        near = near[(np.abs(few[near] - few[b]) < LARGEST * tolerance).all(axis=1)]
        if not len(near):
            continue
        descriptor = descriptor_of(b)
        for a in near:
            if label[a] != label[b] and descriptor_of(a).matches(descriptor, tolerance):
                label[label == label[b]] = label[a]
                yield int(a), b


@dataclass(frozen=True, eq=False)
class _Descriptor:
    """Distances in Å, invariant under rigid motions and the order of the atoms.

    Attributes
    ----------
    distances : ndarray, shape (m,)
        The shortest distances between each two elements, sorted.
    environments : list of ndarray, shape (n_atoms of the element, k) each
        For each element the sorted distances from its atoms to their nearest neighbours of each element.
    """

    distances: np.ndarray
    environments: list[np.ndarray]

    def matches(self, other: _Descriptor, tolerance: float) -> bool:
        """Whether both may be of the same structure. Noise changes sorted numbers no more than unsorted ones."""
        change = self.distances - other.distances
        largest = LARGEST * tolerance
        if np.abs(change).max(initial=0.0) >= largest or np.sum(change**2) > tolerance**2 * change.size:
            return False
        return all(_rows_match(x, y, largest) for x, y in zip(self.environments, other.environments, strict=True))


def _descriptor(atoms: Atoms) -> _Descriptor:
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
                between = block[np.triu_indices(len(first), 1)] if q == p else block
                every.append(np.sort(between, axis=None)[: SHORTEST * len(atoms)])
        environments.append(np.concatenate(around, axis=1).astype(np.float32))
    return _Descriptor(np.concatenate(every).astype(np.float32), environments)


def _lattice(atoms: Atoms) -> np.ndarray:
    """Lengths in Å of the shortest lattice vectors, which do not depend on the vectors that the cell is given by.

    Seven of them, shortest of their classes modulo two, determine a lattice (Conway and Sloane, Proc. R. Soc. Lond. A
    436, 55 (1992)). Vectors that are not periodic do not count.
    """
    lengths = np.zeros(SHORTEST_VECTORS)
    if not atoms.pbc.any():
        return lengths
    reduced, _ = minkowski_reduce(periodic_cell(atoms.cell.array, atoms.pbc), atoms.pbc)
    steps = [np.arange(-2, 3) if periodic else np.zeros(1) for periodic in atoms.pbc]
    vectors = np.stack(np.meshgrid(*steps), axis=-1).reshape(-1, 3) @ reduced
    shortest = np.sort(np.linalg.norm(vectors, axis=1))[1 : 2 * SHORTEST_VECTORS : 2]
    lengths[: len(shortest)] = shortest
    return lengths


def _rows_match(x: np.ndarray, y: np.ndarray, largest: float) -> bool:
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
    """Distances between the nearest images of each two atoms, shape (n, n), in Å."""
    x, found = atoms.positions, np.zeros((len(atoms), len(atoms)))
    lattice = periodic_cell(atoms.cell.array, atoms.pbc)
    metric = lattice @ lattice.T
    if np.abs(metric - np.diag(metric.diagonal())).max() < 1e-9 * metric.max():
        # Right angles, as in most supercells: one direction after the other, tens of times as fast.
        for fractions, length, periodic in zip(
            (x @ np.linalg.inv(lattice)).T, metric.diagonal(), atoms.pbc, strict=True
        ):
            apart = fractions[:, None] - fractions
            found += length * (apart - np.rint(apart) * periodic) ** 2
        return np.sqrt(found)
    # In blocks of rows: the images of all atoms of a large structure at once would fill the memory.
    rows = max(1, 20_000 // len(atoms))
    for k in range(0, len(atoms), rows):
        vectors = x[None] - x[k : k + rows, None]
        found[k : k + rows] = find_mic(vectors.reshape(-1, 3), lattice, atoms.pbc)[1].reshape(-1, len(atoms))
    return found
