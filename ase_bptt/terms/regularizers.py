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
from .probes import KINDS, LARGEST_FORCE, Targets, energies_and_forces, make_probes

log = logging.getLogger(__name__)

CHANGE = 0.01
"""Relative change of a weight that contributes 1. A default fine-tuning changes weights by about as much."""


class WeightAnchor:
    """A weight anchor: squared distance from the pretrained weights (L2-SP, Li et al., arXiv 1802.01483).

    The mean over all trained parameters of their squared change, each in units of `CHANGE` times the root mean
    square that its tensor had before training (that of all trained parameters, for a tensor of zeros): 4 means that
    weights have changed by 2 % of their size.

    Parameters
    ----------
    weight : float

    Examples
    --------
    >>> import numpy as np
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.terms import WeightAnchor
    >>> potential, anchor = load_potential("lj"), WeightAnchor(1.0)
    >>> anchor.prepare(potential, [])
    >>> potential.sigma.data *= 1.02
    >>> print(f"{anchor.loss(potential, [], np.random.default_rng(0)):.2f}")  # one of two weights, by 2 %
    2.00
    """

    name: ClassVar[str] = "weight_anchor"

    def __init__(self, weight: float = 1.0):
        check_positive(weight=weight)
        self.weight = weight
        self._start: dict[str, Tensor] = {}
        self._scales: dict[str, float] = {}
        self._count = 0

    def check(self, pairs: Sequence[RelaxationPair]) -> None:
        """Any pairs will do."""

    def prepare(self, potential: Potential, pairs: Sequence[RelaxationPair]) -> None:
        """Remember the weights that are trained, unless `load` restored them."""
        trained = {name: weight for name, weight in weights(potential).items() if weight.requires_grad}
        if not self._start:
            self._start = {name: p.detach().clone() for name, p in trained.items()}
        lost = trained.keys() ^ self._start.keys()
        if lost:
            raise ValueError(
                f"The weight anchor was started with other trained weights, such as {min(lost)}: start a new run."
            )
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
        """The pretrained weights: those of the potential in the run folder change with the training."""
        return {"start": {name: value.cpu() for name, value in self._start.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; call it before `prepare`."""
        self._start = dict(state["start"])

    def todict(self) -> dict[str, Any]:
        return {"name": self.name, "weight": self.weight}


def _scale(start: Tensor, whole: float) -> float:
    """Mean square of a tensor; of all weights where it is zero, and 1 where those are."""
    return float(start.double().square().mean()) or whole or 1.0


FORCE, ENERGY = 0.5, 0.25
"""eV/Å and eV per atom: root-mean-square changes of all forces, and of all energies, that contribute 1."""


class Distillation:
    """Distillation: energies and forces of the pretrained potential on a probe set (`ase_bptt.terms.probes`).

    The mean over the components of the forces of their squared change in units of `FORCE`, plus the mean over the
    structures of the squared change of the energy per atom in units of `ENERGY`. Squares, since a few large changes
    make up most of a drift, and these are not needed for the relaxations: they arise where atoms are close.

    Parameters
    ----------
    weight : float
    batch : int
        Probes in one step, drawn at random in each.
    size : int
        Probes of each kind at most: rattled training structures, crystals, molecules.
    seed : int
        Of the probe set.
    kinds : str or sequence of str
        Which of `probes.KINDS` are taken. Without "structures" it does not oppose what is to be learnt.

    Examples
    --------
    >>> import numpy as np
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.terms import Distillation
    >>> potential, term = load_potential("emt"), Distillation(1.0, kinds="crystals")
    >>> term.prepare(potential, [])
    >>> term.loss(potential, [], np.random.default_rng(0)).item()  # nothing has changed yet
    0.0
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
        self.targets: Targets | None = None
        """The probes with the energies and forces of the pretrained potential, once prepared."""
        self._state: dict[str, Any] | None = None

    def check(self, pairs: Sequence[RelaxationPair]) -> None:
        """Any pairs will do."""

    def prepare(self, potential: Potential, pairs: Sequence[RelaxationPair]) -> None:
        """Make the probes and evaluate the potential on them, unless `load` restored both."""
        if self._state is not None:
            self.targets = Targets.from_state(self._state, potential)
            # One copy is enough: that on the potential's device.
            self._state = None
            return
        probes = [
            p.atoms for p in make_probes(potential, pairs, size=self.size, seed=self.seed) if p.kind in self.kinds
        ]
        if not probes:
            raise ValueError(f"The potential knows no probes of the kinds {', '.join(self.kinds)}: take others.")
        targets = Targets.of(potential, probes)
        valid = targets.valid()
        if not valid:
            raise ValueError(
                f"On no probe are the pretrained potential's forces below {LARGEST_FORCE:g} eV/Å: leave the "
                "distillation (teacher) out."
            )
        n, left = len(targets), len(targets) - len(valid)
        if left:
            log.info("left out %d of %d probes, with forces above %g eV/Å", left, n, LARGEST_FORCE)
        self.targets = targets.select(valid)

    def loss(self, potential: Potential, pairs: Sequence[RelaxationPair], rng: np.random.Generator) -> Tensor:
        """Distance of the potential from the pretrained one on some probes; without a unit.

        The gradient is computed at once, in parts that fit into the memory, and is all that the graph holds.
        """
        assert self.targets is not None, "call prepare first"
        n = min(self.batch, len(self.targets))
        chosen = sorted(int(k) for k in rng.choice(len(self.targets), n, replace=False))
        targets = self.targets.select(chosen)
        trained = [p for p in potential.parameters() if p.requires_grad]
        value = targets.energies.new_zeros(())
        gradients: list[Tensor | None] = [None] * len(trained)
        for _, (part, of_part) in in_parts(partial(_value_and_gradients, potential, targets, trained), range(n)):
            value, gradients = value + part, added(gradients, of_part)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                # Zero, with this gradient.
                value = value + ((parameter - parameter.detach()) * gradient).sum()
        return value

    def state(self) -> dict[str, Any]:
        """Probes, energies and forces: a potential that has been trained no longer gives them."""
        return self.targets.state() if self.targets is not None else {}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; call it before `prepare`."""
        self._state = state or None

    def todict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("name", "weight", "batch", "size", "seed", "kinds")}


def _value_and_gradients(
    potential: Potential, targets: Targets, parameters: Sequence[Tensor], some: list[int]
) -> tuple[Tensor, Gradients]:
    """What some of the targets contribute to the value of all, and its gradients with respect to the parameters."""
    part = targets.select(some)
    energies, forces = energies_and_forces(potential, part.structures)
    sizes = torch.tensor(part.structures.counts, device=energies.device)
    off = (energies - part.energies) / sizes / ENERGY
    value = off.square().sum() / len(targets) + ((forces - part.forces) / FORCE).square().sum() / targets.forces.numel()
    return value.detach(), vjp([value], [torch.ones_like(value)], parameters)
