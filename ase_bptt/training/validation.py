"""By what the best epoch is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean

import torch

from ..losses import SCALE, delta_q
from ..pairs import RelaxationPair
from ..planning import in_parts
from ..potential import Potential
from ..relaxation import relax
from .ranks import Ranks

TOGETHER = 16
"""Validation structures in one batch."""


def validate(potential: Potential, pairs: Sequence[RelaxationPair], ranks: Ranks) -> dict[str, float]:
    """Relax from the initial structures by FIRE, each rank its share, and compare the ends with the references.

    Returns
    -------
    dict
        "valid_score", the mean of log(1 + Delta-Q / 0.1 amu^1/2 Å), and "valid_delta_q", the mean Delta-Q in
        amu^1/2 Å; NaN without pairs. One structure in a far basin must not decide for all, so the score is
        what epochs are judged by.
    """
    if not pairs:
        return {"valid_score": float("nan"), "valid_delta_q": float("nan")}
    distances = ranks.dealt(pairs, [p.n_atoms for p in pairs], partial(_distances, potential))
    return {"valid_score": fmean(math.log1p(d / SCALE) for d in distances), "valid_delta_q": fmean(distances)}


def _distances(potential: Potential, pairs: list[RelaxationPair]) -> list[float]:
    def run(batch: list[RelaxationPair]) -> list[float]:
        with torch.no_grad():
            end = relax(potential, [p.initial for p in batch], stepper="fire", fmax=0.02, steps=200)
        found: list[float] = delta_q(end, [p.relaxed for p in batch]).tolist()
        return found

    batches = [pairs[first : first + TOGETHER] for first in range(0, len(pairs), TOGETHER)]
    return [distance for batch in batches for _, found in in_parts(run, batch) for distance in found]
