"""Which pairs belong together, and splits that keep them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from ase import Atoms

from .pairs import InvalidPair, RelaxationPair


def with_groups(pairs: Sequence[RelaxationPair]) -> list[RelaxationPair]:
    """Give every pair without a group one: same composition and same final structure, by `same_structure`."""
    together = classes(len(pairs), lambda a, b: same_structure(pairs[a].relaxed, pairs[b].relaxed))
    names: dict[int, str] = {}
    for pair, first in zip(pairs, together, strict=True):
        names[first] = names.get(first) or pair.group
    return [
        dataclasses.replace(p, group=p.group or names[first] or pairs[first].id)
        for p, first in zip(pairs, together, strict=True)
    ]


def classes(n: int, related: Callable[[int, int], bool]) -> list[int]:
    """For each of n items the first item that it is related to, in one or more steps."""
    first = list(range(n))
    for b in range(n):
        for a in range(b):
            if first[a] != first[b] and related(a, b):
                low, high = sorted((first[a], first[b]))
                first = [low if f == high else f for f in first]
    return first


def same_structure(a: Atoms, b: Atoms, tolerance: float = 0.05) -> bool:
    """Whether two structures are one up to motions, symmetry and the order of their atoms.

    Compares the sorted interatomic distances (nearest images) of each pair of elements: their root
    mean square difference must stay below the tolerance, in Å.
    """
    if sorted(a.numbers) != sorted(b.numbers) or not np.allclose(a.cell.cellpar(), b.cell.cellpar(), atol=0.05):
        return False
    return bool(np.sqrt(np.mean((_distances(a) - _distances(b)) ** 2)) < tolerance) if len(a) > 1 else True


def _distances(atoms: Atoms) -> np.ndarray:
    i, j = np.triu_indices(len(atoms), 1)
    d = atoms.get_all_distances(mic=bool(atoms.pbc.any()))[i, j]
    z = np.sort(atoms.numbers[np.stack((i, j))], axis=0)
    return d[np.lexsort((d, z[1], z[0]))]


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
    groups = sorted({p.group for p in pairs})
    if len(groups) < 3:
        raise InvalidPair(
            f"The {len(pairs)} pairs form {len(groups)} group(s) by composition and final structure; "
            "training, validation and test need one each: give more kinds of structures, or name the groups "
            "yourself (--group KEY in the shell, RelaxationPair(group=...) in Python)."
        )
    order = [groups[k] for k in np.random.default_rng(seed).permutation(len(groups))]
    n_valid, n_test = (max(1, round(f * len(groups))) for f in fractions)
    side = {g: "test" if k < n_test else "valid" if k < n_test + n_valid else "train" for k, g in enumerate(order)}
    return {name: [p for p in pairs if side[p.group] == name] for name in ("train", "valid", "test")}
