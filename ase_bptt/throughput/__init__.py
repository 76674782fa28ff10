"""Relaxing and evaluating many structures without a gradient: in batches, by a queue, or by ASE's drivers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor

from ..batch import Batch
from ..calculator import TorchCalculator
from ..constraints import unknown_of
from ..iterated_map import End, IteratedMap, Status
from ..neighbors import NeighborList
from ..optimize.bptt_optimizer import BPTTOptimizer
from ..potential import Potential
from ..relaxation import relax
from ..stability import resolve_step_size, sample
from ..steppers import State, Stepper, make_stepper
from ..structures import Structures
from ..utils import unrounded
from .memory import fits, in_parts, report_out_of_memory
from .packing import Planner

LARGE = 400
"""Atoms above which structures are given to BFGS one by one."""
ATOMS = 256
"""Atoms relaxed together by default on a processor."""


class Relaxed(NamedTuple):
    """Where one structure ended: its atoms with energy and forces, how, and after how many frames."""

    atoms: Atoms
    status: Status
    nsteps: int


def relax_all(
    potential: Potential,
    structures: Sequence[Atoms],
    *,
    stepper: Stepper | str = "fire",
    fmax: float = 0.05,
    steps: int = 500,
    batch_size: int | None = None,
    memory: float | None = None,
) -> Iterator[tuple[int, Relaxed]]:
    """Relax structures, and give each one's index and end as soon as it has stopped.

    Parameters
    ----------
    potential : Potential
    structures : sequence of Atoms
        Those with constraints that `relax` does not know are moved one by one by ASE's driver, which knows all.
    stepper : Stepper or str
        A stepper or its name; a step size that is "auto" is found on some of the structures.
    fmax : float
        eV/Å.
    steps : int
        Frames at most.
    batch_size : int or None
        Structures relaxed together. None takes as many as fit into the memory of a GPU, or 256 atoms
        on a CPU.
    memory : float or None
        GiB that they may take; None is 80 % of what is free on a GPU.

    Raises
    ------
    NotImplementedError
        For elements that the potential does not know.
    MemoryError
        Where a single structure does not fit into memory.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.throughput import relax_all
    >>> found = dict(relax_all(load_potential("emt"), [molecule("N2"), molecule("CO")]))
    >>> [found[k].status.value for k in sorted(found)]
    ['converged', 'converged']
    """
    alone = [k for k, atoms in enumerate(structures) if unknown_of(atoms)]
    together = sorted(set(range(len(structures))) - set(alone))
    if together:
        batch = [structures[k] for k in together]
        for k, end in _in_flight(potential, batch, stepper, fmax, steps, (batch_size, memory)).run():
            yield together[k], _relaxed(batch[k], end)
    for k in alone:
        yield k, _by_ase(potential, structures[k], stepper, fmax, steps)


def _in_flight(
    potential: Potential,
    structures: Sequence[Atoms],
    stepper: Stepper | str,
    fmax: float,
    steps: int,
    limits: tuple[int | None, float | None],
) -> InFlight:
    some = sample(structures)
    iterated = IteratedMap(potential, resolve_step_size(make_stepper(stepper), potential, some))
    costs, room = _costs(iterated, structures, *limits)
    if iterated.stepper.name == "bfgs":
        # A Hessian of (3 n)^2 numbers a structure: for large ones, many together would fill the memory.
        costs = [max(room, cost) if len(atoms) > LARGE else cost for atoms, cost in zip(structures, costs, strict=True)]
    return InFlight(iterated, structures, costs=costs, room=room, fmax=fmax, steps=steps)


def _costs(
    iterated: IteratedMap, structures: Sequence[Atoms], batch_size: int | None, memory: float | None
) -> tuple[list[float], float]:
    """What each structure costs, and what those that relax together may cost."""
    if batch_size is not None:
        return [1.0] * len(structures), float(batch_size)

    def run(batch: list[Atoms]) -> None:
        with torch.no_grad():
            relax(iterated.potential, batch, stepper=iterated.stepper, steps=1)

    planner = Planner(iterated.potential, run, lambda atoms: atoms, memory)
    if planner.limit == float("inf"):
        return [float(len(atoms)) for atoms in structures], float(ATOMS)
    return planner.costs(structures)


def _relaxed(start: Atoms, end: End) -> Relaxed:
    """Everything of the structure that was given, where it ended."""
    atoms = start.copy()
    atoms.positions = unrounded(end.positions, start.positions)
    forces = end.forces.cpu().double().numpy()
    atoms.calc = SinglePointCalculator(atoms, energy=float(end.energy), forces=forces)
    return Relaxed(atoms, end.status, end.nsteps)


def _by_ase(potential: Potential, start: Atoms, stepper: Stepper | str, fmax: float, steps: int) -> Relaxed:
    atoms = start.copy()
    atoms.calc = TorchCalculator(potential)
    with BPTTOptimizer(atoms, stepper=make_stepper(stepper), logfile=None, record=False) as optimizer:
        try:
            status = Status.CONVERGED if optimizer.run(fmax=fmax, steps=steps) else Status.OUT_OF_STEPS
            # Of the potential alone: the atoms keep their constraints, and ASE adds the energy of those that have one.
            results = {name: atoms.calc.get_property(name, atoms) for name in ("energy", "forces")}
        except CalculationFailed:
            status = Status.DIVERGED
            results = {"energy": float("nan"), "forces": np.full((len(atoms), 3), np.nan)}
        if not np.isfinite(results["forces"]).all():
            status = Status.DIVERGED
        end = atoms.copy()
        end.calc = SinglePointCalculator(end, **results)
        return Relaxed(end, status, optimizer.nsteps)


class InFlight:
    """Structures that relax together, as many as there is room for, and a queue from which others take their places.

    The expensive ones come first, so that none is left to run alone at the end. Where memory runs out half of them
    are set aside as they are, and there is less room from then on.

    Parameters
    ----------
    iterated : IteratedMap
    structures : sequence of Atoms
    costs : sequence of float
        Of each structure, in the unit of `room`.
    room : float
        What structures that relax together may cost; a single one may cost more.
    fmax : float
        eV/Å below which a structure stops.
    steps : int
        Frames of each structure at most.
    """

    def __init__(
        self,
        iterated: IteratedMap,
        structures: Sequence[Atoms],
        *,
        costs: Sequence[float],
        room: float,
        fmax: float,
        steps: int,
    ):
        self.map, self.structures, self.costs, self.room = iterated, structures, costs, room
        self.fmax, self.steps = fmax, steps
        self._queue = deque(sorted(range(len(structures)), key=lambda k: -costs[k]))
        self._batch: Batch | None = None
        self._aside: list[Batch] = []

    @torch.no_grad()
    def run(self) -> Iterator[tuple[int, End]]:
        """Each structure's index and where it ended, as soon as it has stopped.

        Raises
        ------
        MemoryError
            Where a single structure does not fit, naming the mend.
        """
        while (batch := self._filled()) is not None:
            found = fits(partial(self._evaluate, batch))
            if found is None:
                self._halve(batch)
                continue
            following: tuple[Structures, State] | None
            ((following, stopped),) = found
            # The step of a batch that has changed must not fill the memory beside the next one.
            del found
            if stopped:
                following = None
            yield from batch.remove(stopped).items()
            if not len(batch):
                self._batch = None
                continue
            moved = fits(partial(self._move, batch, following))
            following = None
            if moved is None:
                self._halve(batch)

    def _evaluate(self, batch: Batch) -> tuple[tuple[Structures, State], dict[int, Status]]:
        forces = batch.evaluate()
        following = self.map.advance(batch.structures, batch.state, forces)
        return following, batch.stopped(following)

    def _move(self, batch: Batch, following: tuple[Structures, State] | None) -> None:
        batch.move(following or self.map.advance(batch.structures, batch.state, batch.forces))

    def _filled(self) -> Batch | None:
        """The batch, joined by as many of the queue as there is room for; None where none is left."""
        while self._aside and (self._batch is None or self._has_room(self._aside[-1].members)):
            self._take_in(self._aside.pop())
        members: list[int] = []
        while not self._aside and self._queue and self._has_room([*members, self._queue[0]]):
            members.append(self._queue.popleft())
        if members:
            structures = self.map.potential.batch([self.structures[k] for k in members])
            self.map.potential.check(structures)
            self._take_in(Batch(self.map, structures, self.fmax, self.steps, members))
        return self._batch

    def _has_room(self, new: Sequence[int]) -> bool:
        there = [] if self._batch is None else self._batch.members
        return (not there and len(new) == 1) or sum(self.costs[k] for k in (*there, *new)) <= self.room

    def _take_in(self, batch: Batch) -> None:
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.join(batch)

    def _halve(self, batch: Batch) -> None:
        """Set half of the batch aside."""
        report_out_of_memory(len(batch))
        self._aside.append(batch.split())
        self.room = sum(self.costs[k] for k in batch.members)


TOGETHER = 16
"""Structures in one batch."""


def single_points(
    potential: Potential, atoms: Sequence[Atoms], size: int = TOGETHER, *, forces: bool = True
) -> Iterator[tuple[Structures, Tensor, Tensor]]:
    """Evaluate structures as they stand: each batch, its energies (n,) in eV and forces (n_atoms, 3) in eV/Å, detached.

    Where memory runs out a batch is halved.

    Parameters
    ----------
    potential : Potential
    atoms : sequence of Atoms
    size : int
        Structures in one batch.
    forces : bool
        False leaves out the differentiation; the forces are then of shape (0, 3).
    """

    def run(some: Sequence[Atoms]) -> tuple[Structures, Tensor, Tensor]:
        batch = potential.batch(some)
        edges = NeighborList(potential.cutoff, skin=0.0)(batch)
        if forces:
            return batch, *potential.energy_and_forces(batch, edges)
        with torch.no_grad():
            return batch, potential(batch, edges).energy, batch.positions.new_zeros(0, 3)

    for first in range(0, len(atoms), size):
        for _, found in in_parts(run, atoms[first : first + size]):
            yield found
