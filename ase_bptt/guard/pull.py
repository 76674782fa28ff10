"""A term that keeps the weights of a potential near the pretrained ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..pairs import RelaxationPair
from ..positive import check_positive
from ..potential import Potential
from ..tuning.lora import weights

CHANGE = 0.01
"""Of its size: a weight that changes so much costs 1. A default fine-tuning changes them about as much."""


class Pull:
    """A pull to the pretrained weights.

    The mean over all trained numbers of their squared change, each in units of `CHANGE` times the root mean
    square that its tensor had before training (of all trained numbers, for a tensor of zeros): 4 means that
    weights have changed by 2 % of their size.

    Parameters
    ----------
    weight : float
    """

    name: ClassVar[str] = "pull"

    def __init__(self, weight: float = 1.0):
        check_positive(weight=weight)
        self.weight = weight
        self._start: dict[str, Tensor] = {}
        self._scales: dict[str, float] = {}
        self._count = 0

    def check(self, pairs: Sequence[RelaxationPair]) -> None:
        """Any pairs will do."""

    def prepare(self, potential: Potential, pairs: Sequence[RelaxationPair]) -> None:
        """Remember the weights that are trained, unless `load` gave them."""
        trained = {name: weight for name, weight in weights(potential).items() if weight.requires_grad}
        if not self._start:
            self._start = {name: p.detach().clone() for name, p in trained.items()}
        lost = trained.keys() ^ self._start.keys()
        if lost:
            raise ValueError(f"The pull was begun with other trained weights, as {min(lost)}: begin a new run.")
        self._start = {name: value.to(trained[name]) for name, value in self._start.items()}
        self._count = sum(value.numel() for value in self._start.values())
        whole = float(sum(value.double().square().sum() for value in self._start.values())) / max(self._count, 1)
        self._scales = {name: _scale(start, whole) for name, start in self._start.items()}

    def loss(self, potential: Potential, pairs: Sequence[RelaxationPair], rng: np.random.Generator) -> Tensor:
        """Mean squared relative change of the trained weights, in units of `CHANGE`."""
        now = weights(potential)
        off = [
            (now[name] - start).square().sum() / self._scales[name] / CHANGE**2 / self._count
            for name, start in self._start.items()
        ]
        return torch.stack(off).sum() if off else torch.zeros((), dtype=potential.dtype, device=potential.device)

    def state(self) -> dict[str, Any]:
        """The pretrained weights: the run folder's own potential is soon another."""
        return {"start": {name: value.cpu() for name, value in self._start.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; call it before `prepare`."""
        self._start = dict(state["start"])

    def todict(self) -> dict[str, Any]:
        return {"name": self.name, "weight": self.weight}


def _scale(start: Tensor, whole: float) -> float:
    """Mean square of a tensor; of all weights where it is zero, and 1 where those are."""
    return float(start.double().square().mean()) or whole or 1.0
