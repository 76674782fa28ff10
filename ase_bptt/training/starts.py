"""Where the relaxations begin that a potential is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..losses import displacements
from ..pairs import RelaxationPair


class VariedStarts(Sequence[RelaxationPair]):
    """Pairs with starts drawn on the straight line to the reference (a share of them), and rattled.

    Each is made when it is asked for, and is the same in whatever order they are: only where the generator stands
    before each draw is kept.

    Parameters
    ----------
    pairs : sequence of RelaxationPair
    along : float
        Share of the starts that are drawn on the line.
    rattle : float
        Å.
    rng : numpy.random.Generator
        Of NumPy's default kind; drawn from for one pair after the other.
    """

    def __init__(self, pairs: Sequence[RelaxationPair], along: float, rattle: float, rng: np.random.Generator):
        self._pairs, self._along, self._rattle, self._rng = pairs, along, rattle, rng
        self._begin: dict[str, Any] = dict(rng.bit_generator.state)
        self._places: list[int] = []
        for pair in pairs:
            self._places.append(rng.bit_generator.state["state"]["state"])
            self._draw(pair.n_atoms)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, k: Any) -> Any:
        pair = self._pairs[k]
        self._rng.bit_generator.state = self._begin | {"state": self._begin["state"] | {"state": self._places[k]}}
        share, noise = self._draw(pair.n_atoms)
        start = pair.initial.copy()
        way = displacements(pair.relaxed, pair.initial).numpy()
        # Constraints hold what they hold here, too.
        start.set_positions(start.positions + share * way + noise)
        return dataclasses.replace(pair, initial=start)

    def _draw(self, n_atoms: int) -> tuple[float, np.ndarray]:
        share = self._rng.uniform() if self._rng.uniform() < self._along else 0.0
        return share, self._rng.normal(0, self._rattle, (n_atoms, 3))
