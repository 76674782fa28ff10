"""Relaxation as an iterated map: X(t+1) = step(X(t), F(X(t))) until the forces vanish.

This is the loop of arXiv 2512.01067. How one frame moves is the stepper's business, how the loop
is differentiated the adjoint's; here frames run until every structure has stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn

from .adjoints import Adjoint, Replay, make_adjoint
from .constraints import KNOWN, unknown
from .frames import IteratedMap, Record
from .loading import as_potential
from .potential import Potential
from .result import Relaxation, Status, largest_force
from .steppers import Stepper, make_stepper
from .structures import Structures

RISE = 0.05
"""eV per atom above the start at which a run that did not converge counts as diverged."""


def relax(
    potential: Potential | nn.Module | str,
    structures: Structures | Atoms | Sequence[Atoms],
    *,
    stepper: Stepper | str | None = None,
    fmax: float = 0.05,
    steps: int = 200,
    adjoint: Adjoint | str | None = None,
    cell: str = "fixed",
) -> Relaxation:
    """Relax structures, differentiably; many are one batch.

    Parameters
    ----------
    potential : Potential, module or spec
        As for `load_potential`.
    structures : Structures, Atoms or list of Atoms
        The positions of Structures may require gradients.
    stepper : Stepper or str
        "fire" by default.
    fmax : float
        A structure stops where all its atoms feel less than this, in eV/Å.
    steps : int
        Frames at most.
    adjoint : Adjoint or str
        `Replay` by default; none under ``torch.no_grad()`` and where nothing requires gradients.
    cell : "fixed"
        Reserved for variable cells.

    Raises
    ------
    NotImplementedError
        For variable cells, and for constraints and elements that are not known, by name.
    """
    if cell != "fixed":
        raise NotImplementedError(f"Only cell='fixed' relaxes so far, got {cell!r}.")
    potential = as_potential(potential)
    start, sources, single = _batch(structures, potential)
    _refuse_constraints(start)
    potential.check(start)
    iterated = IteratedMap(potential, make_stepper(stepper).to(start.positions.device))
    chosen = make_adjoint(adjoint) or Replay()
    inputs = (start.positions, start.cells, *iterated.parameters())
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if differentiable and not iterated.stepper.differentiable:
        name = iterated.stepper.name
        raise TypeError(f"The stepper {name!r} cannot be differentiated: use torch.no_grad().")
    with torch.set_grad_enabled(differentiable and chosen.on_tape):
        run = _Run(iterated, start, fmax, steps, keep=differentiable and chosen.keeps_frames)
        for _ in run.go():
            pass
    positions = chosen.attach(run.record, run.record.final) if differentiable else run.record.final
    return run.relaxation(positions, sources, single)


@torch.no_grad()
def relax_each(
    potential: Potential,
    structures: Sequence[Atoms],
    *,
    stepper: Stepper | str | None = None,
    fmax: float = 0.05,
    steps: int = 200,
) -> Iterator[tuple[int, Relaxation]]:
    """Relax a batch without a gradient; gives each structure's index and relaxation as soon as it has stopped.

    Parameters and errors are those of `relax`.
    """
    batch, sources, _ = _batch(structures, potential)
    _refuse_constraints(batch)
    potential.check(batch)
    iterated = IteratedMap(potential, make_stepper(stepper).to(batch.positions.device))
    run = _Run(iterated, batch, fmax, steps, keep=False)
    for stopped in run.go():
        for k in stopped:
            yield k, run.member(k, sources)


class _Run:
    """Frames until every structure has stopped; those that stop leave the batch."""

    def __init__(self, iterated: IteratedMap, start: Structures, fmax: float, steps: int, keep: bool):
        self.map, self.fmax, self.steps, self.keep = iterated, fmax, steps, keep
        self.record = Record(iterated, start, nsteps=[0] * len(start))
        self.ends: dict[int, _End] = {}
        self.first_energies: list[float] = []

    def go(self) -> Iterator[list[int]]:
        """Run all frames; gives the members that stopped, as they do."""
        structures = self.record.start
        moving = list(range(len(structures)))
        state = self.map.start(structures)
        neighbors = self.map.neighbor_list()
        for t in range(self.steps + 1):
            energies, forces = self._evaluate(structures, neighbors)
            stopping = self._stopping(structures, energies, forces, moving, t)
            if stopping:
                for k, status in stopping.items():
                    self._leave(moving[k], t, structures, energies, forces, k, status)
                yield [moving[k] for k in stopping]
                stay = [k for k in range(len(moving)) if k not in stopping]
                if not stay:
                    break
                atoms, members = structures.atoms_of(stay), torch.tensor(stay, device=forces.device)
                structures, state = structures.select(stay), state.select(atoms, members)
                moving = [moving[k] for k in stay]
                broken = Status.DIVERGED in stopping.values() and torch.is_grad_enabled()
                # A tape must not hold an evaluation that was not finite: 0 * inf is NaN.
                forces = self._evaluate(structures, neighbors)[1] if broken else forces[atoms]
            if self.keep:
                self.record.keep(structures.positions, state)
            structures, state = self.map.advance(structures, state, forces)
        ends = [self.ends[k] for k in range(len(self.record.start))]
        self.record.final = torch.cat([end.positions for end in ends])

    def _evaluate(self, structures: Structures, neighbors: Any) -> tuple[Tensor, Tensor]:
        return self.map.potential.energy_and_forces(
            structures, neighbors(structures), create_graph=torch.is_grad_enabled()
        )

    def _stopping(
        self, structures: Structures, energies: Tensor, forces: Tensor, moving: list[int], t: int
    ) -> dict[int, Status]:
        """Which members stop before frame t, and why. The stop test is not differentiated."""
        with torch.no_grad():
            # One transfer to the host for the whole batch.
            # An atom at NaN has no neighbours and so no force: the positions are asked, too.
            place = structures.sum(structures.positions).sum(1)
            fmax, energy, place = torch.stack((largest_force(structures, forces), energies, place)).tolist()
        if t == 0:
            self.first_energies = energy
        stopping = {}
        for k, whole in enumerate(moving):
            rise = energy[k] - self.first_energies[whole]
            if not all(map(math.isfinite, (fmax[k], energy[k], place[k]))):
                stopping[k] = Status.DIVERGED
            elif fmax[k] < self.fmax:
                stopping[k] = Status.CONVERGED
            elif t == self.steps:
                risen = rise > RISE * structures.counts[k]
                stopping[k] = Status.DIVERGED if risen else Status.OUT_OF_STEPS
        return stopping

    def _leave(
        self, whole: int, t: int, now: Structures, energies: Tensor, forces: Tensor, k: int, status: Status
    ) -> None:
        atoms = now.atoms_of([k])
        self.record.nsteps[whole] = t
        self.ends[whole] = _End(now.positions[atoms], energies[k].detach(), forces[atoms].detach(), status)

    def relaxation(self, positions: Tensor, sources: tuple[Atoms, ...] | None, single: bool) -> Relaxation:
        return self._relaxation(range(len(self.record.start)), positions, sources, single)

    def member(self, k: int, sources: tuple[Atoms, ...] | None) -> Relaxation:
        """The relaxation of one member that has stopped, while others may still move."""
        return self._relaxation([k], self.ends[k].positions, sources and (sources[k],), single=True)

    def _relaxation(
        self, members: Sequence[int], positions: Tensor, sources: tuple[Atoms, ...] | None, single: bool
    ) -> Relaxation:
        ends = [self.ends[k] for k in members]
        return Relaxation(
            start=self.record.start.select(members),
            positions=positions,
            forces=torch.cat([end.forces for end in ends]),
            nsteps=torch.tensor([self.record.nsteps[k] for k in members], device=positions.device),
            status=tuple(end.status for end in ends),
            _energies=torch.stack([end.energy for end in ends]),
            _record=self.record,
            _sources=sources,
            _single=single,
        )


@dataclass(eq=False)
class _End:
    positions: Tensor
    energy: Tensor
    forces: Tensor
    status: Status


def _batch(
    structures: Structures | Atoms | Sequence[Atoms], potential: Potential
) -> tuple[Structures, tuple[Atoms, ...] | None, bool]:
    if isinstance(structures, Structures):
        return structures.to(potential.device, potential.dtype), None, False
    single = isinstance(structures, Atoms)
    sources = (structures,) if isinstance(structures, Atoms) else tuple(structures)
    batch = Structures.from_atoms(sources, device=potential.device, dtype=potential.dtype)
    return batch, sources, single


def _refuse_constraints(structures: Structures) -> None:
    names = unknown(structures.constraint_names)
    if names:
        raise NotImplementedError(
            f"relax knows no way through the constraints {', '.join(names)}, and will not ignore them: "
            f"remove them, take one of {', '.join(KNOWN)}, or relax without a gradient by BPTTOptimizer."
        )
