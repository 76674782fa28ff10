"""Terms that keep a potential near the pretrained one: in its weights, and in what it gives on probes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..pairs import RelaxationPair
from ..positive import check_positive
from ..potential import Potential
from ..tuning.lora import weights
from .matching import SOUND, Points, mismatch
from .probes import KINDS, make_probes

log = logging.getLogger(__name__)
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


class Teacher:
    """Energies and forces of the pretrained potential on a probe set (`ase_bptt.guard.probes`), as in `mismatch`.

    Parameters
    ----------
    weight : float
    batch : int
        Probes in one step, drawn anew.
    size : int
        Probes of each kind: rattled training structures, crystals, molecules.
    seed : int
        Of the probe set.
    kinds : sequence of str
        Which of `probes.KINDS` are taken. Without "structures" it does not pull against what is to be learnt.
    """

    name: ClassVar[str] = "teacher"

    def __init__(
        self, weight: float = 1.0, *, batch: int = 4, size: int = 24, seed: int = 0, kinds: Sequence[str] = KINDS
    ):
        check_positive(weight=weight, batch=batch, size=size)
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown or not kinds:
            raise ValueError(f"The kinds of probes are {', '.join(KINDS)}; got {', '.join(kinds) or 'none'}.")
        self.weight, self.batch, self.size, self.seed, self.kinds = weight, batch, size, seed, list(kinds)
        self.points: Points | None = None
        """The probes and what the pretrained potential gives there, once prepared."""
        self._state: dict[str, Any] | None = None

    def check(self, pairs: Sequence[RelaxationPair]) -> None:
        """Any pairs will do."""

    def prepare(self, potential: Potential, pairs: Sequence[RelaxationPair]) -> None:
        """Make the probes and ask the potential what it gives there, unless `load` gave both."""
        if self._state is not None:
            self.points = Points.from_state(self._state, potential)
            # They are kept once, on the potential's device.
            self._state = None
            return
        probes = [
            p.atoms for p in make_probes(potential, pairs, size=self.size, seed=self.seed) if p.kind in self.kinds
        ]
        if not probes:
            raise ValueError(f"The potential knows no probes of the kinds {', '.join(self.kinds)}: take others.")
        points = Points.of(potential, probes)
        good = points.sound()
        if not good:
            raise ValueError(
                f"On no probe are the pretrained potential's forces below {SOUND:g} eV/Å: leave the teacher out."
            )
        if len(good) < len(points):
            log.info("left out %d of %d probes, with forces above %g eV/Å", len(points) - len(good), len(points), SOUND)
        self.points = points.select(good)

    def loss(self, potential: Potential, pairs: Sequence[RelaxationPair], rng: np.random.Generator) -> Tensor:
        """How far the potential is from the pretrained one on some probes; without a unit."""
        assert self.points is not None, "call prepare first"
        n = min(self.batch, len(self.points))
        chosen = sorted(int(k) for k in rng.choice(len(self.points), n, replace=False))
        return mismatch(potential, self.points.select(chosen))

    def state(self) -> dict[str, Any]:
        """Probes, energies and forces: a potential that has been trained cannot tell them any more."""
        return self.points.state() if self.points is not None else {}

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; call it before `prepare`."""
        self._state = state or None

    def todict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("name", "weight", "batch", "size", "seed", "kinds")}
