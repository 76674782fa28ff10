"""Where the relaxations begin that a potential is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..losses import displacements
from ..pairs import RelaxationPair


def varied_starts(
    pairs: Sequence[RelaxationPair], along: float, rattle: float, rng: np.random.Generator
) -> list[RelaxationPair]:
    """The pairs with starts drawn on the straight line to the reference (a share of them), and rattled."""
    varied = []
    for pair in pairs:
        way = displacements(pair.relaxed, pair.initial).numpy()
        share = rng.uniform() if rng.uniform() < along else 0.0
        start = pair.initial.copy()
        # Constraints hold what they hold here, too.
        start.set_positions(start.positions + share * way + rng.normal(0, rattle, way.shape))
        varied.append(dataclasses.replace(pair, initial=start))
    return varied
