"""Terms that keep a potential near its pretrained state: an anchor on the weights (L2-SP), and distillation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..pairs import RelaxationPair
from ..potential import Potential
from ..throughput.memory import in_parts
from ..tuning.low_rank import weights
from ..utils import Gradients, added, check_count, check_positive, vjp
from .probes import KINDS, SOUND, Points, answer, make_probes

CHANGE = 0.01
"""Of its size: a weight that changes so much costs 1. A default fine-tuning changes them about as much."""


class WeightAnchor:
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


log = logging.getLogger(__name__)
FORCE, ENERGY = 0.5, 0.25
"""eV/Å and eV an atom: where all forces, or all energies, have changed by so much, they cost 1."""


class Distillation:
    """Energies and forces of the pretrained potential on a probe set (`ase_bptt.terms.probes`).

    The mean over the components of the forces of their squared change in units of `FORCE`, and over the
    structures that of the energy per atom in units of `ENERGY`. Squares, since a few large changes are most
    of a drift, and are not what the relaxations ask for: they arise where atoms are close.

    Parameters
    ----------
    weight : float
    batch : int
        Probes in one step, drawn anew.
    size : int
        Probes of each kind at most: rattled training structures, crystals, molecules.
    seed : int
        Of the probe set.
    kinds : str or sequence of str
        Which of `probes.KINDS` are taken. Without "structures" it does not pull against what is to be learnt.
    """

    name: ClassVar[str] = "teacher"

    def __init__(
        self,
        weight: float = 1.0,
        *,
        batch: int = 16,
        size: int = 100,
        seed: int = 0,
        kinds: str | Sequence[str] = KINDS,
    ):
        check_positive(weight=weight)
        check_count(batch=batch, size=size)
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown or not kinds:
            raise ValueError(f"The kinds of probes are {', '.join(KINDS)}; got {', '.join(kinds) or 'none'}.")
        self.weight, self.batch, self.size, self.seed, self.kinds = weight, batch, size, seed, kinds
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
        """How far the potential is from the pretrained one on some probes; without a unit.

        The gradient is computed at once, in parts that fit into the memory, and the graph holds only that.
        """
        assert self.points is not None, "call prepare first"
        n = min(self.batch, len(self.points))
        chosen = sorted(int(k) for k in rng.choice(len(self.points), n, replace=False))
        points = self.points.select(chosen)
        weights = [p for p in potential.parameters() if p.requires_grad]
        value = points.energies.new_zeros(())
        slopes: list[Tensor | None] = [None] * len(weights)
        for _, (cost, slope) in in_parts(partial(_costs, potential, points, weights), range(n)):
            value, slopes = value + cost, added(slopes, slope)
        for weight, total in zip(weights, slopes, strict=True):
            if total is not None:
                # Adds nothing but its slope.
                value = value + ((weight - weight.detach()) * total).sum()
        return value

    def state(self) -> dict[str, Any]:
        """Probes, energies and forces: a potential that has been trained cannot tell them any more."""
        return self.points.state() if self.points is not None else {}

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; call it before `prepare`."""
        self._state = state or None

    def todict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("name", "weight", "batch", "size", "seed", "kinds")}


def _costs(
    potential: Potential, points: Points, weights: Sequence[Tensor], some: list[int]
) -> tuple[Tensor, Gradients]:
    """What some of the points add to the cost of all, and its gradient by the weights."""
    part = points.select(some)
    energies, forces = answer(potential, part.structures)
    sizes = torch.tensor(part.structures.counts, device=energies.device)
    off = (energies - part.energies) / sizes / ENERGY
    cost = off.square().sum() / len(points) + ((forces - part.forces) / FORCE).square().sum() / points.forces.numel()
    return cost.detach(), vjp([cost], [torch.ones_like(cost)], weights)
