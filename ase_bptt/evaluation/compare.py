"""Two evaluations of the same structures compared: what changed, and whether that could be chance.

Structures of one group are not independent, so intervals and the test are over groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from . import FLOOR, Evaluation

TIED = 0.01, 0.005
"""Share and amu^1/2 Å: a structure whose Delta-Q changed by less than either is neither better nor worse."""
VOLUME_TIED = 1e-3
"""A share of the volume: errors that differ by less are alike."""
RESAMPLES = 5000
LEVEL = 0.95


@dataclass(frozen=True)
class Change:
    """A relative change (-0.32 is 32 % lower) and its bootstrap interval, which is NaN for fewer than two groups."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = (
            f" [{100 * self.low:+.0f}, {100 * self.high:+.0f}]" if np.isfinite((self.low, self.high)).all() else ""
        )
        return f"{100 * self.value:+.0f} %{interval}"


@dataclass(frozen=True)
class Comparison:
    """What changed between two evaluations of the same structures.

    Attributes
    ----------
    n, groups : int
        Structures and groups.
    mean, geometric_mean : Change
        Of the mean and of the geometric mean of Delta-Q, with 95 % intervals from a bootstrap over groups.
    p_value : float
        Of Wilcoxon's signed-rank test (two-sided) on the mean logarithm of the ratio in each group.
    median_improvement : float
        Median over structures of 1 - after / before: 0.32 is 32 % lower.
    better, worse : int
        Structures whose Delta-Q fell and rose by more than 1 % and 0.005 amu^1/2 Å; one that diverged counts as
        risen. The others are tied.
    cells, cells_better, cells_worse : int
        Structures whose cells move, and those of which the absolute volume error fell and rose by more than 0.1 % of
        the volume.
    left_out : int
        Structures that diverged before or after; they are not part of means, intervals and test.
    basins_won, basins_lost : int
        Structures that ended in the right basin only after, and only before.
    """

    n: int
    groups: int
    mean: Change
    geometric_mean: Change
    p_value: float
    median_improvement: float
    better: int
    worse: int
    basins_won: int
    basins_lost: int
    left_out: int = 0
    cells: int = 0
    cells_better: int = 0
    cells_worse: int = 0

    @property
    def improved(self) -> float:
        """Share of all structures that are better."""
        return self.better / self.n if self.n else float("nan")

    @property
    def tied(self) -> int:
        """Structures that are neither better nor worse."""
        return self.n - self.better - self.worse

    @property
    def harmful(self) -> bool:
        """Whether the structures end farther from their references: in the geometric mean, or where none has one."""
        return not self.geometric_mean.value <= 0

    def todict(self) -> dict[str, Any]:
        """As JSON, except for numbers that are not finite."""
        return asdict(self)


def check_same(before: Evaluation, after: Evaluation) -> None:
    """ValueError where the two are not of the same structures in the same order."""
    if [row.id for row in before.rows] != [row.id for row in after.rows]:
        raise ValueError("Only evaluations of the same structures in the same order can be compared.")


def compare(before: Evaluation, after: Evaluation, *, seed: int = 0) -> Comparison:
    """Compare two evaluations row by row.

    Parameters
    ----------
    before, after : Evaluation
        Of the same pairs in the same order.
    seed : int
        Of the bootstrap.

    Raises
    ------
    ValueError
        Where the two are not of the same structures.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import RelaxationPair, compare, evaluate, load_potential
    >>> pairs = [RelaxationPair(molecule(x), molecule(x), x, x) for x in ("N2", "O2", "CO")]
    >>> for pair in pairs:
    ...     pair.initial.positions *= 1.4
    >>> before, after = (evaluate(load_potential("emt"), pairs, steps=steps) for steps in (1, 50))
    >>> print(compare(before, after).mean)
    -64 % [-73, -57]
    """
    check_same(before, after)
    first, last = (np.array([row.delta_q for row in e.rows]) for e in (before, after))
    sound = np.isfinite(first) & np.isfinite(last)
    right = [np.array([row.right_basin for row in e.rows]) for e in (before, after)]
    names = [row.group for row, good in zip(before.rows, sound, strict=True) if good]
    groups = sorted(set(names))
    members = np.array([[name == group for name in names] for group in groups], dtype=float).reshape(
        len(groups), len(names)
    )
    x, y = first[sound], last[sound]
    logs = [np.log(np.maximum(d, FLOOR)) for d in (x, y)]
    counts = members.sum(1)
    volumes = [_volume_errors(e) for e in (before, after)]
    ratio = np.maximum(y, FLOOR) / np.maximum(x, FLOOR)
    return Comparison(
        n=len(first),
        groups=len(groups),
        mean=_change(members @ y, members @ x, counts, lambda a, b: a / b, seed),
        geometric_mean=_change(members @ logs[1], members @ logs[0], counts, lambda a, b: np.exp(a - b), seed),
        p_value=_signed_rank(members @ np.log(ratio) / counts),
        median_improvement=float(np.median(1 - ratio)) if len(ratio) else float("nan"),
        better=int(_clearly_below(y, x).sum() + (np.isfinite(last) & ~np.isfinite(first)).sum()),
        worse=int(_clearly_below(x, y).sum() + (np.isfinite(first) & ~np.isfinite(last)).sum()),
        basins_won=int((~right[0] & right[1]).sum()),
        basins_lost=int((right[0] & ~right[1]).sum()),
        left_out=int((~sound).sum()),
        cells=len(before.by_cell()[1].rows),
        cells_better=int((volumes[0] - volumes[1] > VOLUME_TIED).sum()),
        cells_worse=int((volumes[1] - volumes[0] > VOLUME_TIED).sum()),
    )


def _volume_errors(found: Evaluation) -> np.ndarray:
    """Absolute, of the structures whose cells have a volume and move; as large as can be where they diverged."""
    errors = np.array([abs(row.volume_error) for row in found.rows if row.volume_error is not None])
    return np.where(np.isfinite(errors), errors, np.finfo(float).max)


def _clearly_below(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    share, least = TIED
    below: np.ndarray = (a < (1 - share) * b) & (a < b - least)
    return below


Ratio = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _change(after: np.ndarray, before: np.ndarray, counts: np.ndarray, ratio: Ratio, seed: int) -> Change:
    """Change of a mean over structures, from its sums over groups."""

    def statistic(a: np.ndarray, b: np.ndarray, n: np.ndarray) -> np.ndarray:
        total = n.sum(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return ratio(a.sum(-1) / total, b.sum(-1) / total) - 1

    value = float(statistic(after, before, counts)) if len(counts) else float("nan")
    if len(counts) < 2 or not np.isfinite(value):
        return Change(value, float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(len(counts), size=(RESAMPLES, len(counts)))
    found = statistic(after[drawn], before[drawn], counts[drawn])
    # A draw of exact matches only has no ratio.
    if not np.isfinite(found).all():
        return Change(value, float("nan"), float("nan"))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Change(value, float(low), float(high))


def _signed_rank(differences: np.ndarray) -> float:
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="pratt").pvalue)
