"""The training pairs of an epoch: their order, their batches, and the starts that are varied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import nan
from typing import Any

import numpy as np
import torch

from ..losses import displacements
from ..pairs import RelaxationPair
from ..pairs.lazy import DeferredPair
from ..steppers import Stepper
from ..terms import Term


class Order:
    """Training pairs in batches, in another order and from other starts in each epoch.

    Parameters
    ----------
    batch_size, along, rattle, seed
        As for `Trainer`.

    Attributes
    ----------
    generator : torch.Generator
        Draws the order; its state belongs into a checkpoint.
    """

    def __init__(self, batch_size: int, along: float, rattle: float, seed: int):
        self.batch_size, self.along, self.rattle, self.seed = batch_size, along, rattle, seed
        self.generator = torch.Generator().manual_seed(seed)

    def batches(self, pairs: Sequence[RelaxationPair], epoch: int) -> Iterator[tuple[float, list[RelaxationPair]]]:
        """Each batch of an epoch, after the share of the epoch that is done before it."""
        order = torch.randperm(len(pairs), generator=self.generator).tolist()
        pairs = VariedStarts(pairs, self.along, self.rattle, np.random.default_rng([self.seed, epoch]))
        firsts = range(0, len(order), self.batch_size)
        for number, first in enumerate(firsts):
            yield number / len(firsts), [pairs[k] for k in order[first : first + self.batch_size]]


class Tally:
    """Adds up the steps of an epoch.

    Parameters
    ----------
    pairs : int
        How many there are to train on.
    terms : sequence of Term
        Further terms of the loss.

    Attributes
    ----------
    losses : list of float
        Of the pairs that counted so far.
    """

    def __init__(self, pairs: int, terms: Sequence[Term]):
        self.losses: list[float] = []
        self._pairs = pairs
        self._norms: list[float] = []
        self._further: dict[str, list[float]] = {term.name: [] for term in terms}

    def add(self, losses: Sequence[float], norm: float, further: Mapping[str, float]) -> None:
        """Count a step: the losses of its pairs, its gradient's norm, and its further terms."""
        self.losses += losses
        self._norms.append(norm)
        for name, value in further.items():
            self._further[name].append(value)

    def row(self, epoch: int, lr: float, counts: Mapping[str, float], stepper: Stepper) -> dict[str, float]:
        """The epoch as a row of metrics.csv, with the numbers of the stepper where some are learnt."""
        return {
            "epoch": epoch,
            "train_loss": _mean(self.losses),
            "gradient_norm": _mean(self._norms),
            "skipped": self._pairs - len(self.losses),
            "lr": lr,
            **counts,
            **{f"term_{name}": _mean(values) for name, values in self._further.items()},
            **(stepper.hyperparameters() if any(p.requires_grad for p in stepper.parameters()) else {}),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else nan


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


class VariedPair(DeferredPair):
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
