"""Relaxing many structures without a gradient: in batches, or by ASE's drivers where that must be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.calculators.singlepoint import SinglePointCalculator

from .calculator import TorchCalculator
from .constraints import unknown_of
from .frames import IteratedMap
from .moving import Stopped
from .optimizer import BPTTOptimizer
from .planning import Planner
from .potential import Potential
from .relaxation import relax
from .result import Status
from .stability import steady
from .steppers import Stepper, make_stepper
from .stream import Stream

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
    iterated = IteratedMap(potential, steady(make_stepper(stepper), potential, some))
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
