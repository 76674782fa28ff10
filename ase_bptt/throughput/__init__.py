"""Relaxing and evaluating many structures without a gradient: in batches, by a queue, or by ASE's drivers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from ..calculator import TorchCalculator
from ..cells import CELLS, CellFreedom, ase_filter, freedoms
from ..constraints import unknown_of
from ..iterated_map import End, IteratedMap, Status
from ..neighbors import NeighborList
from ..neighbors.lattice import check_lattices
from ..optimize.bptt_optimizer import BPTTOptimizer
from ..potential import Potential
from ..relaxation import relax, rows_of
from ..stability import resolve_step_size, sample
from ..steppers import Stepper, make_stepper
from ..structures import Structures
from ..utils import unrounded
from .compilation import compiled
from .in_flight import InFlight, Waiting
from .memory import in_parts
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
    cells: Any = "fixed",
    batch_size: int | None = None,
    memory: float | None = None,
    compile: bool = False,
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
    cells : str, mask or CellFreedom, or a sequence of them
        What of each structure's cell is relaxed, as for `relax`, and at what pressure.
    batch_size : int or None
        Structures relaxed together. None takes as many as fit into the memory of a GPU, or 256 atoms
        on a CPU.
    memory : float or None
        GiB that they may take; None is 80 % of what is free on a GPU.
    compile : bool
        Compute forces by code that is compiled first (`compilation.compiled`), which pays for many structures.

    Raises
    ------
    NotImplementedError, ValueError
        Before any is relaxed, for elements that the potential does not know and cells that it cannot be in.
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
    structures = list(structures)
    cells = freedoms("fixed" if cells is None else cells, 0.0, len(structures))
    if structures:
        _check_starts(potential, structures, cells)
    yield from relax_stream(
        potential, [[(k, *work) for k, work in enumerate(zip(structures, cells, strict=True))]], stepper=stepper,
        fmax=fmax, steps=steps, cells_move=any(cell.moves for cell in cells), batch_size=batch_size, memory=memory,
        compile=compile,
    )  # fmt: skip


def _check_starts(potential: Potential, structures: Sequence[Atoms], cells: Sequence[CellFreedom]) -> None:
    """Raise for what cannot be relaxed, while its place in the batch is that in the list."""
    starts = Structures.from_atoms(structures, dtype=potential.dtype)
    potential.check(starts)
    check_lattices(starts)
    # Those with other constraints are moved by ASE's filter.
    ours = [CELLS["fixed"] if unknown_of(atoms) else cell for atoms, cell in zip(structures, cells, strict=True)]
    if any(cell.moves for cell in ours):
        rows_of(starts, ours, IteratedMap(potential, make_stepper(None)))


Work = Iterable[list[tuple[int, Atoms, CellFreedom]]]
"""Portions of the structures to relax, each with its number and what of its cell is relaxed."""


def relax_stream(
    potential: Potential,
    work: Work,
    *,
    stepper: Stepper | str = "fire",
    fmax: float = 0.05,
    steps: int = 500,
    cells_move: bool = False,
    explosion: float = float("inf"),
    batch_size: int | None = None,
    memory: float | None = None,
    compile: bool = False,
) -> Iterator[tuple[int, Relaxed]]:
    """Relax structures of which a portion is asked for whenever there is room, as `relax_all`; any number of them.

    Parameters
    ----------
    potential : Potential
    work : iterable of lists of (int, Atoms, CellFreedom)
        Portions; only those that are being relaxed are kept in memory.
    stepper, fmax, steps, batch_size, memory, compile
        As for `relax_all`. A step size that is "auto" is found on structures of the first portion.
    cells_move : bool
        Whether the cell of any structure is relaxed.
    explosion : float
        eV/atom: a structure whose energy has risen by more has diverged, and stops.
    """
    portions = iter(work)
    first = next((some for some in portions if some), None)
    if first is None:
        return
    known = sample([(atoms, cell) for _, atoms, cell in first if not unknown_of(atoms)])
    iterated = IteratedMap(potential, make_stepper(stepper))
    if known:
        iterated = IteratedMap(potential, resolve_step_size(iterated.stepper, potential, *zip(*known, strict=True)))
    costs = _Costs(iterated, batch_size, memory)
    waiting: dict[int, tuple[Atoms, CellFreedom]] = {}
    alone: list[tuple[int, Atoms, CellFreedom]] = []

    def queue() -> Iterator[list[Waiting]]:
        for portion in chain([first], portions):
            alone.extend(some for some in portion if unknown_of(some[1]))
            together = [some for some in portion if not unknown_of(some[1])]
            waiting.update({k: (atoms, cell) for k, atoms, cell in together})
            of = costs([(atoms, cell) for _, atoms, cell in together])
            yield [Waiting(k, atoms, cost, cell) for (k, atoms, cell), cost in zip(together, of, strict=True)]

    def those_alone() -> Iterator[tuple[int, Relaxed]]:
        while alone:
            k, atoms, cell = alone.pop(0)
            yield k, _by_ase(potential, atoms, stepper, fmax, steps, cell)

    portioned = queue()
    begin = next((some for some in portioned if some), [])
    moving = replace(iterated, potential=compiled(potential)) if compile else iterated
    run = InFlight(
        moving, chain([begin], portioned), room=costs.room, fmax=fmax, steps=steps, cells_move=cells_move,
        explosion=explosion,
    )  # fmt: skip
    for k, end in run.run():
        yield k, _relaxed(iterated, *waiting.pop(k), end)
        yield from those_alone()
    yield from those_alone()


class _Costs:
    """What each structure costs, and what those that relax together may cost (`room`), known after the first call."""

    def __init__(self, iterated: IteratedMap, batch_size: int | None, memory: float | None):
        self.iterated, self.batch_size = iterated, batch_size
        self.planner = Planner(iterated.potential, self._one_frame, lambda item: item[0], memory)
        self.room = 0.0

    def __call__(self, structures: Sequence[tuple[Atoms, CellFreedom]]) -> list[float]:
        """In the unit of `room`."""
        if self.batch_size is not None:
            costs, room = [1.0] * len(structures), float(self.batch_size)
        elif self.planner.limit == float("inf"):
            costs, room = [float(len(atoms)) for atoms, _ in structures], float(ATOMS)
        elif structures:
            costs, room = self.planner.costs(structures)
        else:
            return []
        # Later less memory is free, since the first ones are being relaxed in it.
        self.room = self.room or room
        if self.iterated.stepper.name == "bfgs":
            # A Hessian of (3 n)^2 numbers a structure: for large ones, many together would fill the memory.
            return [
                max(self.room, cost) if len(atoms) > LARGE else cost
                for (atoms, _), cost in zip(structures, costs, strict=True)
            ]
        return costs

    def _one_frame(self, batch: list[tuple[Atoms, CellFreedom]]) -> None:
        structures, cells = zip(*batch, strict=True)
        with torch.no_grad():
            relax(self.iterated.potential, structures, stepper=self.iterated.stepper, steps=1, cell=cells)


def _relaxed(iterated: IteratedMap, start: Atoms, cell: CellFreedom, end: End) -> Relaxed:
    """Everything of the structure that was given, where it ended, with the stress where its cell moved."""
    atoms = start.copy()
    results = {"energy": float(end.energy)}
    positions, forces = end.positions, end.forces
    if cell.moves:
        potential = iterated.potential
        rows = rows_of(potential.batch(start), [cell], iterated).replace(positions=positions)
        placed, work = rows.placed(), rows.work()
        positions, forces = placed.positions, rows.atomic_forces(forces)
        atoms.set_cell(unrounded(placed.cells[0], start.cell.array), apply_constraint=False)
        if work is not None:
            results["energy"] -= float(work)
        if end.status is not Status.DIVERGED:
            stress = potential.results(placed, iterated.neighbor_list()(placed))["stress"][0]
            results["stress"] = full_3x3_to_voigt_6_stress(stress.cpu().double().numpy())
    atoms.positions = unrounded(positions, start.positions)
    atoms.calc = SinglePointCalculator(atoms, **results, forces=forces.cpu().double().numpy())
    return Relaxed(atoms, end.status, end.nsteps)


def _by_ase(
    potential: Potential, start: Atoms, stepper: Stepper | str, fmax: float, steps: int, cell: CellFreedom
) -> Relaxed:
    atoms = start.copy()
    atoms.calc = TorchCalculator(potential)
    with BPTTOptimizer(ase_filter(atoms, cell), stepper=make_stepper(stepper), logfile=None, record=False) as optimizer:
        wanted = ("energy", "forces", "stress") if cell.moves else ("energy", "forces")
        try:
            status = Status.CONVERGED if optimizer.run(fmax=fmax, steps=steps) else Status.OUT_OF_STEPS
            # Of the potential alone: the atoms keep their constraints, and ASE adds the energy of those that have one.
            results = {name: atoms.calc.get_property(name, atoms) for name in wanted}
        except CalculationFailed:
            status = Status.DIVERGED
            results = {"energy": float("nan"), "forces": np.full((len(atoms), 3), np.nan)}
        if not np.isfinite(results["forces"]).all():
            status = Status.DIVERGED
        end = atoms.copy()
        end.calc = SinglePointCalculator(end, **results)
        return Relaxed(end, status, optimizer.nsteps)


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
