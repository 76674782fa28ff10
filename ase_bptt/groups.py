"""Which pairs belong together, and splits that keep them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.geometry import find_mic
from scipy.optimize import linear_sum_assignment

from .pairs import InvalidPair, RelaxationPair

TOLERANCE = 0.05
"""Å: two structures are one if their distances differ by less, as root mean square."""
LARGEST = 4
"""Tolerances by which no single distance may differ. The noise that relaxations leave (0.02 Å in each direction)
reaches three in hundreds of atoms; one atom half an Å away exceeds six."""
NEIGHBORS = 12
"""Of each atom and of each element, whose distances are compared atom by atom."""
SHORTEST = 30
"""Distances per atom that are compared all together: more would fill the memory in large cells."""


def with_groups(pairs: Sequence[RelaxationPair]) -> list[RelaxationPair]:
    """Give every pair without a group one: same composition and same final structure, by `same_structure`."""
    relaxed = [pair.relaxed for pair in pairs]
    alike: dict[bytes, list[int]] = {}
    for k, atoms in enumerate(relaxed):
        alike.setdefault(np.sort(atoms.numbers).tobytes(), []).append(k)
    together = _joined(len(pairs), (edge for members in alike.values() for edge in _same(relaxed, members)))
    names: dict[int, str] = {}
    for pair, first in zip(pairs, together, strict=True):
        names[first] = names.get(first) or pair.group
    return [
        dataclasses.replace(p, group=p.group or names[first] or pairs[first].id)
        for p, first in zip(pairs, together, strict=True)
    ]


def classes(n: int, related: Callable[[int, int], bool]) -> list[int]:
    """For each of n items the first item that it is related to, in one or more steps."""
    return _joined(n, ((a, b) for b in range(n) for a in range(b) if related(a, b)))


def _joined(n: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    first = np.arange(n)
    for a, b in edges:
        low, high = sorted((first[a], first[b]))
        if low != high:
            first[first == high] = low
    return first.tolist()


def same_structure(a: Atoms, b: Atoms, tolerance: float = TOLERANCE) -> bool:
    """Whether two structures are one up to motions, symmetry and the order of their atoms.

    Compares the sorted distances (nearest images) of each pair of elements: their root mean square
    difference must stay below the tolerance, in Å, and the largest below four times that. And each
    atom must have a partner whose nearest neighbours are as far away, within four times the
    tolerance: so one atom that sits elsewhere counts in a large cell, too.
    """
    if sorted(a.numbers) != sorted(b.numbers):
        return False
    return next(_same([a, b], [0, 1], tolerance), None) is not None


def _same(structures: Sequence[Atoms], members: list[int], tolerance: float = TOLERANCE) -> Iterator[tuple[int, int]]:
    """Enough of the members, all of one composition, that are the same structure to join all that are."""
    if len(members) < 2:
        return
    cells = np.stack([structures[k].cell.cellpar() for k in members])
    looks = [_look(structures[k]) for k in members]
    few = np.stack([look.distances[:: max(1, len(look.distances) // 100)] for look in looks])
    label = np.arange(len(members))
    for b in range(1, len(members)):
        near = np.flatnonzero(np.isclose(cells[:b], cells[b], atol=0.05).all(axis=1))
        # A few distances tell most structures apart.
        near = near[(np.abs(few[near] - few[b]) < LARGEST * tolerance).all(axis=1)]
        for a in near:
            if label[a] != label[b] and looks[a].is_of(looks[b], tolerance):
                label[label == label[b]] = label[a]
                yield members[a], members[b]


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


def split_by_group(
    pairs: Sequence[RelaxationPair], *, seed: int = 0, fractions: tuple[float, float] = (0.2, 0.2)
) -> dict[str, list[RelaxationPair]]:
    """Split into "train", "valid" and "test" so that no group stands on two sides.

    Parameters
    ----------
    pairs : list of RelaxationPair
    seed : int
        Of the order of the groups.
    fractions : two floats
        Shares of the groups for "valid" and "test"; each gets one at least.
    """
    order = _shuffled(pairs, 3, "training, validation and test need one each", seed)
    n_valid, n_test = (max(1, round(f * len(order))) for f in fractions)
    side = {g: "test" if k < n_test else "valid" if k < n_test + n_valid else "train" for k, g in enumerate(order)}
    return {name: [p for p in pairs if side[p.group] == name] for name in ("train", "valid", "test")}


def split_into_folds(
    pairs: Sequence[RelaxationPair], k: int, *, seed: int = 0
) -> list[dict[str, list[RelaxationPair]]]:
    """Split k times into "train", "valid" and "test" so that each pair is in one "test", for a cross-validation.

    The groups, shuffled and the largest first, go to the part that has the fewest pairs so far. In
    fold i, part i is "test", part i+1 "valid" (the first follows the last) and the others "train".
    No group is in two parts.

    Parameters
    ----------
    pairs : list of RelaxationPair
    k : int
        Number of folds, 3 at least.
    seed : int
        Of the order of the groups.

    Raises
    ------
    ValueError
        Where k is less than 3.
    InvalidPair
        Where there are fewer groups than folds.
    """
    if k < 3:
        raise ValueError(f"A cross-validation needs 3 folds at least, for training, validation and test; got {k}.")
    order = _shuffled(pairs, k, f"{k} folds need one each", seed)
    size = dict.fromkeys(order, 0)
    for pair in pairs:
        size[pair.group] += 1
    filled, part = [0] * k, {}
    for group in sorted(order, key=lambda group: -size[group]):
        part[group] = filled.index(min(filled))
        filled[part[group]] += size[group]
    sides = [{i: "test", (i + 1) % k: "valid"} for i in range(k)]
    return [
        {name: [p for p in pairs if side.get(part[p.group], "train") == name] for name in ("train", "valid", "test")}
        for side in sides
    ]


def _shuffled(pairs: Sequence[RelaxationPair], least: int, purpose: str, seed: int) -> list[str]:
    """The groups in a random order, or InvalidPair where they are too few."""
    groups = sorted({p.group for p in pairs})
    if len(groups) < least:
        raise InvalidPair(
            f"The {len(pairs)} pairs form {len(groups)} group(s) by composition and final structure; "
            f"{purpose}: give more kinds of structures, or name the groups "
            "yourself (--group KEY or --group folder in the shell, RelaxationPair(group=...) in Python)."
        )
    return [groups[k] for k in np.random.default_rng(seed).permutation(len(groups))]
