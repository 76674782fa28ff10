"""How good an epoch is, and whether the validation pairs can tell it from the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np

from ..displacements import known_part
from ..losses import SCALE, delta_q
from ..pairs import RelaxationPair
from ..potential import Potential
from ..throughput import relax_all
from .distributed import Ranks


@dataclass(frozen=True)
class Validation:
    """Where the relaxations of the validation pairs end.

    Parameters
    ----------
    scores : sequence of float
        log(1 + Delta-Q / 0.1 amu^1/2 Å) of each pair: one structure in a far basin must not decide for all.
    kinds : sequence of str
        The group of each pair.
    delta_q : float
        Their mean Delta-Q, amu^1/2 Å; NaN without pairs.

    Examples
    --------
    >>> best = Validation([1.0, 2.0, 1.5], ["a", "b", "c"], 0.3)
    >>> Validation([0.8, 2.3, 1.6], ["a", "b", "c"], 0.3).as_good_as(best)  # 0.07 worse, give or take 0.15
    True
    >>> Validation([1.1, 2.1, 1.6], ["a", "b", "c"], 0.4).as_good_as(best)  # 0.1 worse throughout
    False
    """

    scores: Sequence[float]
    kinds: Sequence[str]
    delta_q: float

    @property
    def row(self) -> dict[str, float]:
        """The columns of metrics.csv; NaN without pairs."""
        return {"valid_score": self.score, "valid_delta_q": self.delta_q}

    @property
    def score(self) -> float:
        """The mean of the scores, by which epochs are compared."""
        return fmean(self.scores) if self.scores else math.nan

    def as_good_as(self, best: Validation) -> bool:
        """Whether it is better on these pairs, or worse by no more than one standard error of the difference.

        Few kinds cannot tell neighbouring epochs apart, and to take the lowest score picks noise. The error is that of
        a mean whose members are independent from kind to kind, but not within one; one kind alone has none, and
        decides by its score. That such a choice errs towards the simpler model is the one-standard-error rule of
        Breiman et al., Classification and Regression Trees (1984), section 3.4.3.
        """
        difference = np.subtract(self.scores, best.scores)
        worse = difference.mean()
        _, kind = np.unique(self.kinds, return_inverse=True)
        n = kind.max() + 1
        deviations = np.bincount(kind, difference - worse)
        error = math.sqrt((deviations**2).sum() * n / (n - 1)) / len(difference) if n > 1 else 0.0
        return bool(worse <= error)


def validate(
    potential: Potential, pairs: Sequence[RelaxationPair], ranks: Ranks, memory: float | None = None
) -> Validation:
    """Relax from the initial structures by FIRE, each rank its share, and compare the ends with the references.

    Parameters
    ----------
    potential : Potential
    pairs : sequence of RelaxationPair
    ranks : Ranks
    memory : float or None
        GiB that may be taken at once, as for `relax_all`.
    """
    if not pairs:
        return Validation([], [], math.nan)
    found = ranks.dealt(pairs, [p.n_atoms for p in pairs], partial(_distances, potential, memory))
    return Validation([math.log1p(d / SCALE) for d in found], [p.group for p in pairs], fmean(found))


def _distances(potential: Potential, memory: float | None, pairs: list[RelaxationPair]) -> list[float]:
    starts = [p.initial for p in pairs]
    cells = [p.freedom for p in pairs]
    ends = dict(relax_all(potential, starts, stepper="fire", fmax=0.02, steps=200, cells=cells, memory=memory))
    reached = [ends[k].atoms for k in range(len(pairs))]
    references = [known_part(end, pair.relaxed) for end, pair in zip(reached, pairs, strict=True)]
    found: list[float] = delta_q(reached, references, cell_weight=1.0).tolist()
    return found
