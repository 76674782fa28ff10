"""The frames of a batch, until every structure has stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from ase import Atoms
from torch import Tensor

from .frames import IteratedMap, Keep, Record
from .result import Relaxation, Status, largest_force
from .structures import Structures

RISE = 0.05
"""eV per atom above the start at which a run that did not converge counts as diverged."""


class Run:
    """Frames until every structure has stopped; those that stop leave the batch.

    Parameters
    ----------
    iterated : IteratedMap
    start : Structures
    fmax : float
        eV/Å at which a structure stops.
    steps : int
        Frames at most.
    keep : Keep or None
        Which frames' states are stored.
    first : int or None
        Take note of where the structures stand after so many frames.
    tail : IteratedMap or None
        Goes on after those, from a state of its own.
    """

    def __init__(
        self,
        iterated: IteratedMap,
        start: Structures,
        fmax: float,
        steps: int,
        *,
        keep: Keep | None = None,
        first: int | None = None,
        tail: IteratedMap | None = None,
    ):
        self.map, self.fmax, self.steps, self.keep = iterated, fmax, steps, keep
        self.first, self.tail = first, tail
        self.record = Record(iterated, start, nsteps=[0] * len(start), kept=keep or Keep())
        self.ends: dict[int, _End] = {}
        self.early_ends: dict[int, _End] = {}
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
            if t == self.first:
                for k, whole in enumerate(moving):
                    status = stopping.get(k, Status.OUT_OF_STEPS)
                    self.early_ends[whole] = _End.of(structures, energies, forces, k, status)
            if stopping:
                for k, status in stopping.items():
                    self.record.nsteps[moving[k]] = t
                    self.ends[moving[k]] = _End.of(structures, energies, forces, k, status)
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
            if t == self.first and self.tail is not None:
                self.map = self.tail
                state = self.map.start(structures)
            if self.keep is not None and (self.first is None or t < self.first):
                self.record.keep(structures.positions, state)
            structures, state = self.map.advance(structures, state, forces)
        _conclude(self.record, self.ends)

    @cached_property
    def early(self) -> Record:
        """The record of the first frames alone."""
        assert self.first is not None
        record = replace(self.record, nsteps=[min(n, self.first) for n in self.record.nsteps])
        _conclude(record, self.ends | self.early_ends)
        return record

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

    def relaxation(
        self,
        sources: tuple[Atoms, ...] | None,
        single: bool,
        positions: Tensor | None = None,
        early: Tensor | None = None,
    ) -> Relaxation:
        """The whole batch; with these positions, where a gradient is attached to them."""
        before = None
        if early is not None:
            ends = self.ends | self.early_ends
            before = _relaxation(self.early, ends, range(len(ends)), early, sources, single)
        final = self.record.final if positions is None else positions
        return _relaxation(self.record, self.ends, range(len(self.ends)), final, sources, single, before)

    def member(self, k: int, sources: tuple[Atoms, ...] | None) -> Relaxation:
        """The relaxation of one member that has stopped, while others may still move."""
        return _relaxation(self.record, self.ends, [k], self.ends[k].positions, sources and (sources[k],), single=True)


@dataclass(eq=False)
class _End:
    positions: Tensor
    energy: Tensor
    forces: Tensor
    status: Status

    @classmethod
    def of(cls, now: Structures, energies: Tensor, forces: Tensor, k: int, status: Status) -> _End:
        """Of member k as it is now."""
        atoms = now.atoms_of([k])
        return cls(now.positions[atoms], energies[k].detach(), forces[atoms].detach(), status)


def _conclude(record: Record, ends: dict[int, _End]) -> None:
    every = [ends[k] for k in range(len(record.start))]
    record.final = torch.cat([end.positions for end in every])
    record.relaxed = [end.status is Status.CONVERGED for end in every]


def _relaxation(
    record: Record,
    every: dict[int, _End],
    members: Sequence[int],
    positions: Tensor,
    sources: tuple[Atoms, ...] | None,
    single: bool,
    early: Relaxation | None = None,
) -> Relaxation:
    ends = [every[k] for k in members]
    return Relaxation(
        start=record.start.select(members),
        positions=positions,
        forces=torch.cat([end.forces for end in ends]),
        nsteps=torch.tensor([record.nsteps[k] for k in members], device=positions.device),
        status=tuple(end.status for end in ends),
        early=early,
        _energies=torch.stack([end.energy for end in ends]),
        _record=record,
        _sources=sources,
        _single=single,
        _members=tuple(members),
    )
