"""By what the best epoch is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean

from ..batches import relax_all
from ..losses import SCALE, delta_q
from ..pairs import RelaxationPair
from ..potential import Potential
from .ranks import Ranks


def validate(
    potential: Potential, pairs: Sequence[RelaxationPair], ranks: Ranks, memory: float | None = None
) -> dict[str, float]:
    """Relax from the initial structures by FIRE, each rank its share, and compare the ends with the references.

    Parameters
    ----------
    potential : Potential
    pairs : sequence of RelaxationPair
    ranks : Ranks
    memory : float or None
        GiB that may be taken at once, as for `relax_all`.

    Returns
    -------
    dict
        "valid_score", the mean of log(1 + Delta-Q / 0.1 amu^1/2 Å), and "valid_delta_q", the mean Delta-Q in
        amu^1/2 Å; NaN without pairs. One structure in a far basin must not decide for all, so the score is
        what epochs are judged by.
    """
    if not pairs:
        return {"valid_score": float("nan"), "valid_delta_q": float("nan")}
    distances = ranks.dealt(pairs, [p.n_atoms for p in pairs], partial(_distances, potential, memory))
    return {"valid_score": fmean(math.log1p(d / SCALE) for d in distances), "valid_delta_q": fmean(distances)}


def _distances(potential: Potential, memory: float | None, pairs: list[RelaxationPair]) -> list[float]:
    starts = [p.initial for p in pairs]
    ends = dict(relax_all(potential, starts, stepper="fire", fmax=0.02, steps=200, memory=memory))
    found: list[float] = delta_q([ends[k].atoms for k in range(len(pairs))], [p.relaxed for p in pairs]).tolist()
    return found
