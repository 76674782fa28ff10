"""Relaxing many structures without a gradient: in batches, or by ASE's drivers where that must be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.calculators.singlepoint import SinglePointCalculator

from .calculator import TorchCalculator
from .constraints import unknown_of
from .optimizer import BPTTOptimizer
from .potential import Potential
from .relaxation import relax_each
from .result import Status
from .steppers import Stepper, make_stepper

LARGE = 400
"""Atoms above which structures are given to BFGS one by one."""


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
    batch_size: int = 16,
) -> Iterator[tuple[int, End]]:
    """Relax structures, and give each one's index and end as soon as it has stopped.

    Parameters
    ----------
    potential : Potential
    structures : sequence of Atoms
        Those with constraints that `relax` does not know are moved one by one by ASE's driver, which knows all.
    stepper : Stepper or str
        A stepper or its name.
    fmax : float
        eV/Å.
    steps : int
        Frames at most.
    batch_size : int
        Structures relaxed together.

    Raises
    ------
    NotImplementedError
        For elements that the potential does not know.
    """
    alone = [k for k, atoms in enumerate(structures) if unknown_of(atoms)]
    together = sorted(set(range(len(structures))) - set(alone))
    largest = max((len(structures[k]) for k in together), default=0)
    # A Hessian of (3 n)^2 numbers a structure: for large ones, many together would fill the memory.
    size = 1 if getattr(stepper, "name", stepper) == "bfgs" and largest > LARGE else batch_size
    for first in range(0, len(together), size):
        members = together[first : first + size]
        batch = [structures[k] for k in members]
        for k, run in relax_each(potential, batch, stepper=stepper, fmax=fmax, steps=steps):
            yield members[k], End(run.to_atoms(), run.status[0], int(run.nsteps[0]))
    for k in alone:
        yield k, _by_ase(potential, structures[k], stepper, fmax, steps)


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
