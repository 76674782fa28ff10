"""The frames of a batch, until every structure has stopped."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from ase import Atoms
from torch import Tensor

from .frames import IteratedMap, Keep, Record
from .moving import Moving, Stopped
from .result import Relaxation, Status
from .structures import Structures


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
        self.ends: dict[int, Stopped] = {}
        self.early_ends: dict[int, Stopped] = {}

    def go(self) -> None:
        """Run all frames."""
        moving = Moving(self.map, self.record.start, self.fmax, self.steps)
        members = list(range(len(moving)))
        for t in range(self.steps + 1):
            stopping = moving.look()
            if t == self.first:
                for k, whole in enumerate(members):
                    self.early_ends[whole] = Stopped.of(moving, k, stopping.get(k, Status.OUT_OF_STEPS))
            if stopping:
                for k, status in stopping.items():
                    self.record.nsteps[members[k]] = t
                    self.ends[members[k]] = Stopped.of(moving, k, status)
                members = [whole for k, whole in enumerate(members) if k not in stopping]
                if not members:
                    break
                moving.leave(stopping)
            if t == self.first and self.tail is not None:
                moving.turn(self.tail)
            if self.keep is not None and (self.first is None or t < self.first):
                self.record.keep(moving.structures.positions, moving.state, moving.forces)
            moving.advance()
        _conclude(self.record, self.ends)

    @cached_property
    def early(self) -> Record:
        """The record of the first frames alone."""
        assert self.first is not None
        record = replace(self.record, nsteps=[min(n, self.first) for n in self.record.nsteps])
        _conclude(record, self.ends | self.early_ends)
        return record

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
            before = _relaxation(self.early, self.ends | self.early_ends, early, sources, single)
        final = self.record.final if positions is None else positions
        return _relaxation(self.record, self.ends, final, sources, single, before)


def _conclude(record: Record, ends: dict[int, Stopped]) -> None:
    every = [ends[k] for k in range(len(record.start))]
    record.final = torch.cat([end.positions for end in every])
    record.relaxed = [end.status is Status.CONVERGED for end in every]


def _relaxation(
    record: Record,
    every: dict[int, Stopped],
    positions: Tensor,
    sources: tuple[Atoms, ...] | None,
    single: bool,
    early: Relaxation | None = None,
) -> Relaxation:
    ends = [every[k] for k in range(len(record.start))]
    return Relaxation(
        start=record.start,
        positions=positions,
        forces=torch.cat([end.forces for end in ends]),
        nsteps=torch.tensor(record.nsteps, device=positions.device),
        status=tuple(end.status for end in ends),
        early=early,
        _energies=torch.stack([end.energy for end in ends]),
        _record=record,
        _sources=sources,
        _single=single,
        _members=tuple(range(len(ends))),
    )
