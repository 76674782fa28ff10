"""Structures that relax together, each for itself: frame by frame, with one transfer from the device a frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .iterated_map import IteratedMap
from .neighbors import Edges, NeighborList
from .result import Status, largest_force
from .steppers import State
from .structures import Structures

RISE = 0.05
"""eV per atom above the start at which a run that did not converge counts as diverged."""


class Moving:
    """A batch on its way: those that stop leave it, others join it, and nobody's path depends on the others.

    Parameters
    ----------
    iterated : IteratedMap
    structures : Structures
    fmax : float
        eV/Å at which a structure stops.
    steps : int
        Frames of each structure at most.

    Attributes
    ----------
    structures : Structures
        Where they stand.
    state : State
        The stepper's, before the next frame.
    energies, forces : Tensor, shapes (n,) and (n_atoms, 3)
        There, after `look`.
    frames : list of int, length n
        How many each has taken.
    """

    def __init__(self, iterated: IteratedMap, structures: Structures, fmax: float, steps: int):
        self.map, self.fmax, self.steps = iterated, fmax, steps
        self.structures, self.state = structures, iterated.start(structures)
        self.frames = [0] * len(structures)
        self.energies = self.forces = structures.positions.new_empty(0)
        self._first_energies = [math.nan] * len(structures)
        self._neighbors: NeighborList = iterated.neighbor_list()
        self._edges: Edges | None = None
        self._ahead: tuple[Structures, State] | None = None
        self._answer: list[float] | None = None

    def __len__(self) -> int:
        return len(self.structures)

    def look(self) -> dict[int, Status]:
        """Find energies and forces, and which members stop here, by their place in the batch.

        The stop test is not differentiated.
        """
        if self._edges is None:
            self._edges = self._neighbors(self.structures)
        self.energies, self.forces = self._evaluate()
        # Where each would go next is found before it is known whether any stops: so the stop test and the neighbour
        # list ask the device in one transfer.
        self._ahead = self.map.advance(self.structures, self.state, self.forces)
        with torch.no_grad():
            question = self._neighbors.question(self._ahead[0])
            found = torch.cat((self._measures().double(), question)).tolist()
        n = len(self)
        self._answer = found[3 * n :]
        fmax, energy, place = found[:n], found[n : 2 * n], found[2 * n : 3 * n]
        stopping = {}
        for k in range(n):
            if self.frames[k] == 0:
                self._first_energies[k] = energy[k]
            finite = all(map(math.isfinite, (fmax[k], energy[k], place[k])))
            status = self._status(k, fmax[k], energy[k]) if finite else Status.DIVERGED
            if status is not None:
                stopping[k] = status
        return stopping

    def advance(self) -> None:
        """Take a frame by the forces that `look` found."""
        answer = self._answer
        if self._ahead is None or answer is None:
            self._ahead = self.map.advance(self.structures, self.state, self.forces)
            answer = self._neighbors.question(self._ahead[0]).tolist()
        # Nothing has changed before there are edges for it: memory may run out there.
        self._edges = self._neighbors.edges(self._ahead[0], answer)
        self.structures, self.state = self._ahead
        self._ahead = self._answer = None
        self.frames = [t + 1 for t in self.frames]

    def leave(self, gone: dict[int, Status]) -> None:
        """Go on without these members, from the forces that `look` found."""
        stay = [k for k in range(len(self)) if k not in gone]
        atoms = self.structures.atoms_of(stay)
        members = torch.tensor(stay, dtype=torch.int64, device=atoms.device)
        self.energies, self.forces = self.energies[members], self.forces[atoms]
        self._keep(stay)
        if stay and Status.DIVERGED in gone.values() and torch.is_grad_enabled():
            # A tape must not hold an evaluation that was not finite: 0 * inf is NaN.
            self._edges = self._neighbors(self.structures)
            self.energies, self.forces = self._evaluate()

    def join(self, other: Moving) -> None:
        """Have the members of another batch go on in this one, behind its own, after `advance` or before any look."""
        self.structures = self.structures.joined(other.structures)
        self.state = self.state.joined(other.state)
        self.frames += other.frames
        self._first_energies += other._first_energies
        self._neighbors.extend(self.structures)
        self._edges = None

    def split(self) -> Moving:
        """The second half of the members, as a batch of its own, before `look` or after it failed."""
        half = (len(self) + 1) // 2
        other = copy(self)
        for one in (self, other):
            one._neighbors = self.map.neighbor_list()
        other._keep(list(range(half, len(self))))
        self._keep(list(range(half)))
        return other

    def turn(self, iterated: IteratedMap) -> None:
        """Go on by another map, from a state of its own."""
        self.map, self.state, self._ahead = iterated, iterated.start(self.structures), None

    def _keep(self, stay: Sequence[int]) -> None:
        members = torch.tensor(stay, dtype=torch.int64, device=self.structures.positions.device)
        self.state = self.state.select(self.structures.atoms_of(stay), members)
        self.structures = self.structures.select(stay)
        self.frames = [self.frames[k] for k in stay]
        self._first_energies = [self._first_energies[k] for k in stay]
        self._neighbors.keep(stay, self.structures)
        self._edges = self._ahead = None

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        assert self._edges is not None
        return self.map.potential.energy_and_forces(self.structures, self._edges, create_graph=torch.is_grad_enabled())

    def _measures(self) -> Tensor:
        """Largest force, energy and place of each, shape (3 n,)."""
        # An atom at NaN has no neighbours and so no force: the positions are asked, too.
        place = self.structures.sum(self.structures.positions).sum(1)
        return torch.cat((largest_force(self.structures, self.forces), self.energies, place))

    def _status(self, k: int, fmax: float, energy: float) -> Status | None:
        if fmax < self.fmax:
            return Status.CONVERGED
        if self.frames[k] < self.steps:
            return None
        risen = energy - self._first_energies[k] > RISE * self.structures.counts[k]
        return Status.DIVERGED if risen else Status.OUT_OF_STEPS


@dataclass(eq=False)
class Stopped:
    """Where one member stopped.

    Attributes
    ----------
    positions, forces : Tensor, shape (n_atoms, 3)
        In Å, on whatever graph they are, and in eV/Å, detached.
    energy : Tensor, shape ()
        In eV, detached.
    status : Status
    """

    positions: Tensor
    energy: Tensor
    forces: Tensor
    status: Status

    @classmethod
    def of(cls, moving: Moving, k: int, status: Status) -> Stopped:
        """Of member k, after `Moving.look`."""
        atoms = moving.structures.atoms_of([k])
        energy, forces = moving.energies[k].detach(), moving.forces[atoms].detach()
        return cls(moving.structures.positions[atoms], energy, forces, status)
