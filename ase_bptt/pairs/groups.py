"""Groups of pairs that stay together, and splits that keep them together."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
from ase import Atoms
from ase.geometry import find_mic

from . import InvalidPair, RelaxationPair
from .structure_matching import Equals, composition, find_duplicates, first_connected

log = logging.getLogger(__name__)
MANY = 10
"""So many pairs are named and compared in one warning."""
FEW = 5
"""A validation or test set of fewer groups than this is warned of: structures of one group are not independent."""


def with_groups(pairs: Sequence[RelaxationPair]) -> list[RelaxationPair]:
    """Assign pairs without a group to one: that of the same composition and final structure, by `same_structure`.

    Pairs that begin in one structure are of one group as well, and a warning says where they end in several; so are
    pairs of which one begins where the other ended, as in another charge.

    >>> from ase.build import bulk
    >>> from ase_bptt import RelaxationPair
    >>> from ase_bptt.pairs.groups import with_groups
    >>> pairs = [RelaxationPair(bulk(x), bulk(x), f"{x} {k}") for k in range(2) for x in ("Cu", "Au")]
    >>> [pair.group for pair in with_groups(pairs)]
    ['Cu 0', 'Au 0', 'Cu 0', 'Au 0']
    """
    ends = find_duplicates([composition(pair.relaxed) for pair in pairs], lambda k: pairs[k].relaxed)
    seen = Equals()
    places = [(seen.add(pair.initial), seen.add(pair.relaxed)) for pair in pairs]
    starts = [start for start, _ in places]
    warn_of_equal_starts([pair.id for pair in pairs], starts, ends, lambda k: pairs[k].relaxed)
    together = joined(places, ends)
    names: dict[int, str] = {}
    for pair, first in zip(pairs, together, strict=True):
        names[first] = names.get(first) or pair.group
    return [
        dataclasses.replace(p, group=p.group or names[first] or pairs[first].id)
        for p, first in zip(pairs, together, strict=True)
    ]


def joined(places: Sequence[tuple[int, int]], ends: Sequence[int]) -> list[int]:
    """For each pair the first that shares a structure with it, directly or by way of others.

    Parameters
    ----------
    places : sequence of two ints
        What `Equals.add` returned for both ends of each pair.
    ends : sequence of int
        For each pair the first whose relaxed structure is the same by `same_structure`.
    """
    first: dict[int, int] = {}
    links = [(k, first.setdefault(place, k)) for k, both in enumerate(places) for place in both]
    return first_connected(len(ends), [*links, *enumerate(ends)])


def warn_of_equal_starts(
    ids: Sequence[str], starts: Sequence[int], ends: Sequence[int], relaxed: Callable[[int], Atoms]
) -> None:
    """Warn of pairs that begin in one structure and end in several, as of several charges do."""
    members: dict[int, list[int]] = {}
    for k, start in enumerate(starts):
        members.setdefault(start, []).append(k)
    for same in members.values():
        if len({ends[k] for k in same}) < 2:
            continue
        found = [relaxed(k) for k in same[:MANY]]
        farthest = max(_distance(a, b) for a, b in combinations(found, 2))
        log.warning(
            "%s begin in one structure and end up to %.2f Å apart: where their settings of DFT differ, or "
            "charges and spins that the potential does not take, no weights can satisfy all; keep those of one kind.",
            ", ".join(ids[k] for k in same[:MANY]) + ", ..." * (len(same) > MANY), farthest,
        )  # fmt: skip


def _distance(a: Atoms, b: Atoms) -> float:
    """The largest distance in Å between the places of an atom, beyond the drift."""
    moves = find_mic(b.positions - a.positions, a.cell, a.pbc)[0]
    return float(np.linalg.norm(moves - moves.mean(axis=0), axis=1).max())


def classes(n: int, related: Callable[[int, int], bool]) -> list[int]:
    """For each of n items the first item that it is related to, directly or by way of others."""
    return first_connected(n, ((a, b) for b in range(n) for a in range(b) if related(a, b)))


def split_by_group(
    pairs: Sequence[RelaxationPair], *, seed: int = 0, fractions: tuple[float, float] = (0.1, 0.2)
) -> dict[str, list[RelaxationPair]]:
    """Split into "train", "valid" and "test" so that no group is divided.

    Parameters
    ----------
    pairs : list of RelaxationPair
    seed : int
        Of the order of the groups.
    fractions : two floats
        Shares of the groups for "valid" and "test"; each gets one at least, and "valid" five unless "test" has fewer.

    Raises
    ------
    InvalidPair
        Where there are fewer than three groups.

    Examples
    --------
    >>> from ase_bptt import datasets, split_by_group
    >>> splits = split_by_group(datasets.si_defects())
    >>> {name: len(pairs) for name, pairs in splits.items()}
    {'train': 67, 'valid': 8, 'test': 17}
    """
    splits = unwarned_split(pairs, seed=seed, fractions=fractions)
    if caution := too_few(splits):
        log.warning(caution)
    return splits


def unwarned_split(
    pairs: Sequence[RelaxationPair], *, seed: int = 0, fractions: tuple[float, float] = (0.1, 0.2)
) -> dict[str, list[RelaxationPair]]:
    """`split_by_group`, for callers that check more before they warn of what is `too_few`."""
    order = _shuffled(pairs, 3, "training, validation and test need one each", seed)
    n_valid, n_test = (max(1, round(f * len(order))) for f in fractions)
    n_valid = max(n_valid, min(FEW, n_test))
    side = {g: "test" if k < n_test else "valid" if k < n_test + n_valid else "train" for k, g in enumerate(order)}
    return {name: [p for p in pairs if side[p.group] == name] for name in ("train", "valid", "test")}


def too_few(*splits: Mapping[str, Sequence[RelaxationPair]]) -> str:
    """A sentence where "valid" or "test" hold so few groups that what is measured on them tells nothing; or empty.

    Of several splits, the folds of a cross-validation, the "test" sets count together, and the smallest "valid".
    """
    n_valid = min(len({p.group for p in split["valid"]}) for split in splits)
    n_test = len({p.group for split in splits for p in split["test"]})
    n = len({p.group for split in splits for pairs in split.values() for p in pairs})
    if min(n_valid, n_test) >= FEW:
        return ""
    if len(splits) > 1:
        return (
            f"Too few kinds of structure to tell anything about others: of {n}, the validation set of a fold has "
            f"{n_valid}. Add more kinds."
        )
    return (
        f"Too few kinds of structure to tell anything about others: of {n}, the validation set has {n_valid} and the "
        f"test set {n_test}. Hold out each kind once (--folds {min(5, n)} in the shell, split_into_folds in Python), "
        "or add more kinds."
    )


def split_into_folds(
    pairs: Sequence[RelaxationPair], k: int, *, seed: int = 0
) -> list[dict[str, list[RelaxationPair]]]:
    """Split k times into "train", "valid" and "test" so that each pair is in one "test", for a cross-validation.

    The groups, shuffled and the largest first, go to the part that has the fewest pairs so far. In fold i, part i is
    "test", half of the groups of part i+1 (five at least; the first part follows the last) "valid", and all others
    "train". No group is in two parts.

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

    Examples
    --------
    >>> from ase_bptt import datasets, split_into_folds
    >>> [len(fold["test"]) for fold in split_into_folds(datasets.si_defects(), 5)]
    [19, 19, 18, 18, 18]
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
    return [
        {name: [p for p in pairs if side[p.group] == name] for name in ("train", "valid", "test")}
        for side in (sides(part, i, k) for i in range(k))
    ]


def sides(part: Mapping[str, int], fold: int, k: int) -> dict[str, str]:
    """Where each group is in a fold of k: "test", "valid", of which half the next part is enough, or "train"."""
    following = [group for group, i in part.items() if i == (fold + 1) % k]
    chosen = np.linspace(0, len(following) - 1, max(min(FEW, len(following)), -(-len(following) // 2))).round()
    valid = {following[int(n)] for n in chosen}
    return {g: "test" if i == fold else "valid" if g in valid else "train" for g, i in part.items()}


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


def check_apart(**splits: Sequence[RelaxationPair]) -> None:
    """Raise ValueError where a group stands in two of the named splits."""
    for (one, a), (other, b) in combinations(splits.items(), 2):
        shared = sorted({p.group for p in a} & {p.group for p in b} - {""})
        if shared:
            raise ValueError(f"{one.capitalize()} and {other} share the group {shared[0]}: split by group.")
