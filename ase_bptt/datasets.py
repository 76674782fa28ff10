"""The embedded reference relaxations.

>>> from ase_bptt import datasets
>>> datasets.si_defects("train")[0]
RelaxationPair('Al-As_nn1_28', AlAsSi6, group 'Al-As_nn1')
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from .pairs import RelaxationPair
from .pairs.groups import classes, sides
from .pairs.reading import read_pairs
from .pairs.structure_matching import same_structure
from .suggestions import unknown_name

__all__ = ["CRYSTALS", "DEMO_FOLD", "FOLDER", "FOLDS", "SPLITS", "folds", "pbesol_crystals", "si_defects"]
FOLDER = Path(__file__).parent / "data" / "si_defects"
CRYSTALS = FOLDER.with_name("pbesol_crystals")
FOLDS = 5
DEMO_FOLD = 0
"""The fold of the demo: the first, not chosen by its result. benchmarks/study.py measures all five."""
SPLITS = ("train", "valid", "test", "all")


def si_defects(split: str = "all", *, fold: int = DEMO_FOLD) -> list[RelaxationPair]:
    """Silicon point defects, dopant pairs and rattled crystals, relaxed with DFT (GPAW, PBE).

    92 relaxations of 6 to 9 atoms, in the 8-site cubic cell; data/si_defects/README.md says how
    they were made. Kinds of defect are never split: all relaxations of a kind, and all that end in
    the same structure, are one group. The groups are sorted by family (native, substituted,
    interstitial, vacancy complex, pair) and name and assigned to five folds in turn; fold k is
    "test", every second group of fold k+1 "valid", the others "train".

    Parameters
    ----------
    split : "train", "valid", "test" or "all"
    fold : int
        0 to 4, together a five-fold cross-validation; the demo's by default.

    Raises
    ------
    ValueError
        For an unknown split or fold.

    Examples
    --------
    >>> from ase_bptt import datasets
    >>> len(datasets.si_defects()), len(datasets.si_defects("test"))
    (92, 20)
    """
    _check(split, fold)
    pairs = _grouped_by_kind()
    return of_split(pairs, folds(pairs), split, fold)


def pbesol_crystals(split: str = "all", *, fold: int = 0) -> list[RelaxationPair]:
    """Small crystals relaxed in cell and positions with DFT (GPAW, PBEsol), for training on cells that move.

    45 relaxations of 2 or 4 atoms, each frame with energy, forces and stress; data/pbesol_crystals/README.md says
    how they were made. A compound (a set of elements) is one group, whatever its structure type. The compounds
    are sorted by name and assigned to five folds in turn; fold k is "test", fold k+1 "valid", the others "train".

    Parameters
    ----------
    split : "train", "valid", "test" or "all"
    fold : int
        0 to 4.

    Raises
    ------
    ValueError
        For an unknown split or fold.

    Examples
    --------
    >>> from ase_bptt import datasets
    >>> datasets.pbesol_crystals()[0], datasets.pbesol_crystals()[0].freedom.name
    (RelaxationPair('AlP_zincblende', AlP, group 'Al-P'), 'full')
    """
    _check(split, fold)
    found = read_pairs(CRYSTALS)
    pairs = [dataclasses.replace(p, group="-".join(sorted({*p.relaxed.get_chemical_symbols()}))) for p in found]
    groups = sorted({p.group for p in pairs})
    return of_split(pairs, [groups.index(p.group) % FOLDS for p in pairs], split, fold)


def _check(split: str, fold: int) -> None:
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if fold not in range(FOLDS):
        raise ValueError(f"There is no fold {fold!r}; there are 0 to {FOLDS - 1}.")


def of_split(pairs: list[RelaxationPair], of: list[int], split: str, fold: int) -> list[RelaxationPair]:
    """The pairs of one side, where one fold is "test" and some of the next "valid"; `of` has the fold of each pair."""
    part = {p.group: k for p, k in sorted(zip(pairs, of, strict=True), key=lambda found: found[0].group)}
    side = sides(part, fold, FOLDS)
    return [p for p in pairs if split in ("all", side[p.group])]


def folds(pairs: list[RelaxationPair]) -> list[int]:
    """The fold of each pair, by the fixed rule of `si_defects`.

    >>> from ase_bptt import datasets
    >>> sorted(set(datasets.folds(datasets.si_defects())))
    [0, 1, 2, 3, 4]
    """
    groups = sorted({p.group for p in pairs}, key=lambda kind: (_family(kind), kind))
    return [groups.index(p.group) % FOLDS for p in pairs]


def _grouped_by_kind() -> list[RelaxationPair]:
    return grouped_by_kind(read_pairs(FOLDER))


def grouped_by_kind(pairs: list[RelaxationPair]) -> list[RelaxationPair]:
    """With groups named by the kinds; kinds of which some relaxations end in the same structure are one group."""
    kinds = [p.relaxed.info["kind"] for p in pairs]

    def related(a: int, b: int) -> bool:
        return kinds[a] == kinds[b] or same_structure(pairs[a].relaxed, pairs[b].relaxed)

    first = classes(len(pairs), related)
    return [dataclasses.replace(p, group=kinds[k]) for p, k in zip(pairs, first, strict=True)]


def _family(kind: str) -> int:
    """Native, substituted, interstitial, vacancy complex, pair; in this order."""
    patterns = (r"V|V2|I_.|crystal", r"[A-Z][a-z]?_s", r"[A-Z][a-z]?_i", r"[A-Z][a-z]?V")
    return next((k for k, p in enumerate(patterns) if re.fullmatch(p, kind)), len(patterns))
