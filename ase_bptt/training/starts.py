"""Where the relaxations begin that a potential is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..lazy import Later
from ..losses import displacements
from ..pairs import RelaxationPair


class VariedStarts(Sequence[RelaxationPair]):
    """Pairs with starts drawn on the straight line to the reference (a share of them), and rattled.

    Each start is made when it is asked for, and is the same in whatever order they are: only where the generator stands
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
        return varied_pair(self._pairs[k], partial(self._made, k))

    def _made(self, k: int) -> RelaxationPair:
        pair = self._pairs[k]
        self._rng.bit_generator.state = self._begin | {"state": self._begin["state"] | {"state": self._places[k]}}
        share, noise = self._draw(pair.n_atoms)
        start = pair.initial.copy()
        # True minimum images take long.
        way = share * displacements(pair.relaxed, pair.initial).numpy() if share else 0.0
        # Constraints hold what they hold here, too.
        start.set_positions(start.positions + way + noise)
        return dataclasses.replace(pair, initial=start)

    def _draw(self, n_atoms: int) -> tuple[float, np.ndarray]:
        share = self._rng.uniform() if self._rng.uniform() < self._along else 0.0
        return share, self._rng.normal(0, self._rattle, (n_atoms, 3))


class VariedPair(Later):
    """A pair whose start is made, and whose structures are read, when one of them is asked for; they are kept then."""

    __slots__ = ("_full", "_make", "_of")
    _of: RelaxationPair
    _make: Callable[[], RelaxationPair]
    _full: RelaxationPair | None

    def made(self) -> RelaxationPair:
        """The pair as an ordinary one."""
        if self._full is None:
            object.__setattr__(self, "_full", self._make())
        assert self._full is not None
        return self._full

    @property
    def id(self) -> str:  # type: ignore[override]
        return self._of.id

    @property
    def group(self) -> str:  # type: ignore[override]
        return self._of.group

    @property
    def n_atoms(self) -> int:
        return self._of.n_atoms

    @property
    def kind(self) -> str:
        return self._of.kind

    def __reduce__(self) -> tuple[Any, ...]:
        full = self.made()
        return RelaxationPair, (full.initial, full.relaxed, full.id, full.group, full.frames)


def varied_pair(of: RelaxationPair, make: Callable[[], RelaxationPair]) -> VariedPair:
    """The pair that `make` gives, known by what `of` knows without being read."""
    pair: VariedPair = object.__new__(VariedPair)
    # A pair is frozen.
    for name, value in (("_of", of), ("_make", make), ("_full", None)):
        object.__setattr__(pair, name, value)
    return pair
