"""Relaxing and evaluating many structures without a gradient: in batches, by a queue, or by ASE's drivers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor

from ..batch import Moving, Stopped
from ..calculator import TorchCalculator
from ..constraints import unknown_of
from ..iterated_map import IteratedMap
from ..neighbors import NeighborList
from ..optimize.bptt_optimizer import BPTTOptimizer
from ..potential import Potential
from ..relaxation import relax
from ..result import Status
from ..stability import resolve_step_size
from ..steppers import Stepper, make_stepper
from ..structures import Structures
from .memory import fits, in_parts, report_out_of_memory
from .packing import Planner

LARGE = 400
"""Atoms above which structures are given to BFGS one by one."""
ATOMS = 256
"""Atoms relaxed together where nothing is said."""
SAMPLED = 8
"""Structures on which a step size that is "auto" is found."""


class End(NamedTuple):
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
) -> Iterator[tuple[int, End]]:
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
        Structures relaxed together. None takes as many as fit into the memory of a GPU, or as a processor does well
        with.
    memory : float or None
        GiB that they may take; None is 80 % of what is free on a GPU.

    Raises
    ------
    NotImplementedError
        For elements that the potential does not know.
    MemoryError
        Where a single structure does not fit into memory.
    """
    alone = [k for k, atoms in enumerate(structures) if unknown_of(atoms)]
    together = sorted(set(range(len(structures))) - set(alone))
    if together:
        batch = [structures[k] for k in together]
        for k, stopped, nsteps in _stream(potential, batch, stepper, fmax, steps, (batch_size, memory)).run():
            yield together[k], _end(batch[k], stopped, nsteps)
    for k in alone:
        yield k, _by_ase(potential, structures[k], stepper, fmax, steps)


def _stream(
    potential: Potential,
    structures: Sequence[Atoms],
    stepper: Stepper | str,
    fmax: float,
    steps: int,
    limits: tuple[int | None, float | None],
) -> Stream:
    some = structures[:: max(1, len(structures) // SAMPLED)]
    iterated = IteratedMap(potential, resolve_step_size(make_stepper(stepper), potential, some))
    costs, room = _costs(iterated, structures, *limits)
    if iterated.stepper.name == "bfgs":
        # A Hessian of (3 n)^2 numbers a structure: for large ones, many together would fill the memory.
        costs = [max(room, cost) if len(atoms) > LARGE else cost for atoms, cost in zip(structures, costs, strict=True)]
    return Stream(iterated, structures, costs=costs, room=room, fmax=fmax, steps=steps)


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


def _end(start: Atoms, stopped: Stopped, nsteps: int) -> End:
    """Everything of the structure that was given, where it stopped."""
    atoms = start.copy()
    atoms.positions = stopped.positions.cpu().double().numpy()
    forces = stopped.forces.cpu().double().numpy()
    atoms.calc = SinglePointCalculator(atoms, energy=float(stopped.energy), forces=forces)
    return End(atoms, stopped.status, nsteps)


def _by_ase(potential: Potential, start: Atoms, stepper: Stepper | str, fmax: float, steps: int) -> End:
    atoms = start.copy()
    atoms.calc = TorchCalculator(potential)
    with BPTTOptimizer(atoms, stepper=make_stepper(stepper), logfile=None, record=False) as optimizer:
        try:
            status = Status.CONVERGED if optimizer.run(fmax=fmax, steps=steps) else Status.OUT_OF_STEPS
            results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(apply_constraint=False)}
        except CalculationFailed:
            status = Status.DIVERGED
            results = {"energy": float("nan"), "forces": np.full((len(atoms), 3), np.nan)}
        if not np.isfinite(results["forces"]).all():
            status = Status.DIVERGED
        end = atoms.copy()
        end.calc = SinglePointCalculator(end, **results)
        return End(end, status, optimizer.nsteps)


class Stream:
    """Structures that relax together, as many as there is room for, and a queue of those that wait.

    The expensive ones come first, so that none is left to run alone at the end. Where memory runs out half of them
    are set aside as they stand, and there is less room from then on.

    Parameters
    ----------
    iterated : IteratedMap
    structures : sequence of Atoms
    costs : sequence of float
        Of each structure, in the unit of `room`.
    room : float
        What structures that relax together may cost; a single one may cost more.
    fmax : float
        eV/Å at which a structure stops.
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
        self._moving: Moving | None = None
        self._members: list[int] = []
        self._aside: list[tuple[Moving, list[int]]] = []

    @torch.no_grad()
    def run(self) -> Iterator[tuple[int, Stopped, int]]:
        """Each structure's index, where it stopped, and after how many frames, as soon as it has.

        Raises
        ------
        MemoryError
            Where a single structure does not fit, naming the mend.
        """
        while (moving := self._filled()) is not None:
            looked = fits(moving.look)
            if looked is None:
                self._halve(moving)
                continue
            (stopping,) = looked
            for k, status in stopping.items():
                yield self._members[k], Stopped.of(moving, k, status), moving.frames[k]
            self._members = [whole for k, whole in enumerate(self._members) if k not in stopping]
            if not self._members:
                self._moving = None
                continue
            if stopping:
                moving.leave(stopping)
            if fits(moving.advance) is None:
                self._halve(moving)

    def _filled(self) -> Moving | None:
        """Those that move, joined by as many of those that wait as there is room for; None where none is left."""
        while self._aside and (not self._members or self._has_room(self._aside[-1][1])):
            self._take_in(*self._aside.pop())
        members: list[int] = []
        while not self._aside and self._queue and self._has_room([*members, self._queue[0]]):
            members.append(self._queue.popleft())
        if members:
            batch = self.map.potential.batch([self.structures[k] for k in members])
            self.map.potential.check(batch)
            self._take_in(Moving(self.map, batch, self.fmax, self.steps), members)
        return self._moving

    def _has_room(self, new: Sequence[int]) -> bool:
        alone = not self._members and len(new) == 1
        return alone or sum(self.costs[k] for k in (*self._members, *new)) <= self.room

    def _take_in(self, moving: Moving, members: list[int]) -> None:
        if self._moving is None:
            self._moving, self._members = moving, members
        else:
            self._moving.join(moving)
            self._members = self._members + members

    def _halve(self, moving: Moving) -> None:
        """Set half of those that move aside."""
        report_out_of_memory(len(moving))
        other = moving.split()
        self._aside.append((other, self._members[len(moving) :]))
        self._members = self._members[: len(moving)]
        self.room = sum(self.costs[k] for k in self._members)


TOGETHER = 16
"""Structures in one batch."""


def single_points(
    potential: Potential, atoms: Sequence[Atoms], size: int = TOGETHER
) -> Iterator[tuple[Structures, Tensor, Tensor]]:
    """Each batch of so many structures, its energies (n,) in eV and its forces (n_atoms, 3) in eV/Å, detached.

    Where memory runs out a batch is halved.
    """

    def run(some: Sequence[Atoms]) -> tuple[Structures, Tensor, Tensor]:
        batch = potential.batch(some)
        return batch, *potential.energy_and_forces(batch, NeighborList(potential.cutoff, skin=0.0)(batch))

    for first in range(0, len(atoms), size):
        for _, found in in_parts(run, atoms[first : first + size]):
            yield found
