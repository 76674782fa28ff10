"""Which pairs belong together, and splits that keep them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from .pairs import InvalidPair, RelaxationPair
from .sameness import alike, composition, joined, same_structure

__all__ = ["classes", "same_structure", "split_by_group", "split_into_folds", "with_groups"]


def with_groups(pairs: Sequence[RelaxationPair]) -> list[RelaxationPair]:
    """Give every pair without a group one: same composition and same final structure, by `same_structure`."""
    together = alike([composition(pair.relaxed) for pair in pairs], lambda k: pairs[k].relaxed)
    names: dict[int, str] = {}
    for pair, first in zip(pairs, together, strict=True):
        names[first] = names.get(first) or pair.group
    return [
        dataclasses.replace(p, group=p.group or names[first] or pairs[first].id)
        for p, first in zip(pairs, together, strict=True)
    ]


def classes(n: int, related: Callable[[int, int], bool]) -> list[int]:
    """For each of n items the first item that it is related to, in one or more steps."""
    return joined(n, ((a, b) for b in range(n) for a in range(b) if related(a, b)))


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
