"""One epoch: which pairs come in which order and from which starts, and the row of metrics that they leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import nan

import numpy as np
import torch

from ..guard.terms import Term
from ..pairs import RelaxationPair
from ..steppers import Stepper
from .starts import VariedStarts


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
            **(stepper.numbers() if any(p.requires_grad for p in stepper.parameters()) else {}),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else nan
