"""Which structure is where: a batch that structures leave when they have stopped and others may join."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from .iterated_map import End, IteratedMap, Status
from .neighbors import Edges, NeighborList
from .neighbors.lattice import farthest
from .steppers import State
from .structures import Structures

RISE = 0.05
"""eV per atom above the start at which a run that did not converge counts as diverged."""


class Batch:
    """Structures that relax together; the path of none of them depends on the others.

    Parameters
    ----------
    iterated : IteratedMap
    structures : Structures
    fmax : float
        eV/Å below which a structure stops.
    steps : int
        Frames of each structure at most.
    members : sequence of int, optional
        An index for each structure, by which the caller knows it; 0 to n - 1 if not given.
    explosion : float
        eV per atom: a structure whose energy has risen by more has diverged, and stops.

    Attributes
    ----------
    structures : Structures
        Where they are.
    state : State
        The stepper's, before the next frame.
    energies, forces : Tensor, shapes (n,) and (n_atoms, 3)
        At `structures`; valid after `evaluate`.
    members : list of int, length n
        The index of the structure in each place.
    frames : list of int, length n
        How many each has taken.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import Structures, load_potential
    >>> from ase_bptt.batch import Batch
    >>> from ase_bptt.iterated_map import IteratedMap
    >>> from ase_bptt.steppers import FIRE
    >>> batch = Batch(IteratedMap(load_potential("emt"), FIRE()), Structures.from_atoms([molecule("N2")]), 0.05, 100)
    >>> len(batch), batch.frames
    (1, [0])
    """

    def __init__(
        self,
        iterated: IteratedMap,
        structures: Structures,
        fmax: float,
        steps: int,
        members: Sequence[int] | None = None,
        *,
        explosion: float = math.inf,
    ):
        self.map, self.fmax, self.steps = iterated, fmax, steps
        self.structures, self.state = structures, iterated.start(structures)
        self.members = list(range(len(structures)) if members is None else members)
        self.frames = [0] * len(structures)
        self.energies = self.forces = structures.positions.new_empty(0)
        self.explosion = explosion
        self._first_energies = [math.nan] * len(structures)
        self._neighbors: NeighborList = iterated.neighbor_list()
        self._edges: Edges | None = None
        self._evaluated = False
        self._answer: list[float] | None = None

    def __len__(self) -> int:
        return len(self.members)

    def evaluate(self) -> Tensor:
        """Compute energies and forces, unless they are known; the forces, in eV/Å, shape (n_atoms, 3)."""
        if self._evaluated and not torch.is_grad_enabled():
            return self.forces
        if self._edges is None:
            self._edges = self._neighbors(self.structures)
        self.energies, self.forces = self.map.potential.energy_and_forces(
            self.structures, self._edges, create_graph=torch.is_grad_enabled()
        )
        self._evaluated = True
        return self.forces

    def stopped(self, following: tuple[Structures, State]) -> dict[int, Status]:
        """Which structures stop here, by their place in the batch, after `evaluate`; this is not differentiated.

        Where each would go next (`following`) is found before it is known whether any stops, so that the stop test
        and the neighbour list need one transfer from the device, the only one of a frame.
        """
        with torch.no_grad():
            question = self._neighbors.question(following[0])
            found = torch.cat((self._measures(following[0]).double(), question)).tolist()
        n = len(self)
        self._answer = found[4 * n :]
        force, energy, total, reach = (found[first : first + n] for first in range(0, 4 * n, n))
        stopping = {}
        for k in range(n):
            if self.frames[k] == 0:
                self._first_energies[k] = energy[k]
            finite = all(map(math.isfinite, (force[k], energy[k], total[k])))
            status = self._status(k, force[k], energy[k]) if finite else Status.DIVERGED
            # No edges can be searched for so far away, and the others must continue.
            if status is None and self._limit < reach[k] < math.inf:
                status = Status.DIVERGED
            if status is not None:
                stopping[k] = status
        return stopping

    def move(self, following: tuple[Structures, State]) -> None:
        """Take a frame, to where the map has found that it leads."""
        answer = self._answer or self._neighbors.question(following[0]).tolist()
        # Nothing has changed before there are edges for it: memory may run out there.
        self._edges = self._neighbors.edges(following[0], answer)
        self.structures, self.state = following
        self._evaluated, self._answer = False, None
        self.frames = [t + 1 for t in self.frames]

    def ends(self, stopped: dict[int, Status]) -> dict[int, End]:
        """Where the structures in these places are, after `evaluate`, by their members' indices."""
        found = {}
        for k, status in stopped.items():
            atoms = self.structures.atoms_of([k])
            energy, forces = self.energies[k].detach(), self.forces[atoms].detach()
            found[self.members[k]] = End(self.structures.positions[atoms], energy, forces, status, self.frames[k])
        return found

    def remove(self, stopped: dict[int, Status]) -> dict[int, End]:
        """Continue without the structures in these places, by the forces that `evaluate` found; `ends` of those."""
        if not stopped:
            return {}
        found = self.ends(stopped)
        stay = [k for k in range(len(self)) if k not in stopped]
        if not stay:
            self.members, self.frames = [], []
            return found
        atoms = self.structures.atoms_of(stay)
        places = torch.tensor(stay, dtype=torch.int64, device=atoms.device)
        self.energies, self.forces = self.energies[places], self.forces[atoms]
        self._keep(stay)
        if Status.DIVERGED in stopped.values() and torch.is_grad_enabled():
            # A tape must not contain an evaluation that was not finite: 0 * inf is NaN.
            self.evaluate()
        return found

    def join(self, other: Batch) -> None:
        """Have the structures of another batch continue in this one, behind its own, before `evaluate`."""
        self.structures = self.structures.joined(other.structures)
        self.state = self.state.joined(other.state)
        self.members = self.members + other.members
        self.frames += other.frames
        self._first_energies += other._first_energies
        self._neighbors.extend(self.structures)
        self._edges, self._evaluated = None, False

    def split(self) -> Batch:
        """The second half of the structures, as a batch of its own, before `evaluate` or after it failed."""
        half = (len(self) + 1) // 2
        other = copy(self)
        for one in (self, other):
            one._neighbors, one._evaluated = self.map.neighbor_list(), False
        other._keep(list(range(half, len(self))))
        self._keep(list(range(half)))
        return other

    def restart(self, iterated: IteratedMap) -> None:
        """Continue by another map, from the first state of its stepper."""
        self.map, self.state, self._answer = iterated, iterated.start(self.structures), None

    def _keep(self, stay: Sequence[int]) -> None:
        places = torch.tensor(stay, dtype=torch.int64, device=self.structures.positions.device)
        self.state = self.state.select(self.structures.atoms_of(stay), places)
        self.structures = self.structures.select(stay)
        self.members = [self.members[k] for k in stay]
        self.frames = [self.frames[k] for k in stay]
        self._first_energies = [self._first_energies[k] for k in stay]
        self._neighbors.keep(stay, self.structures)
        self._edges = self._answer = None

    def _measures(self, following: Structures) -> Tensor:
        """Largest force, energy and sum of the coordinates of each, and its largest coordinate next, shape (4 n,)."""
        # An atom at NaN has no neighbours and so no force: the positions are asked, too.
        total = self.structures.sum(self.structures.positions).sum(1)
        return torch.cat((self.structures.largest_force(self.forces), self.energies, total, following.reach()))

    @property
    def _limit(self) -> float:
        return farthest(self.structures.positions.dtype)

    def _status(self, k: int, largest_force: float, energy: float) -> Status | None:
        if largest_force < self.fmax:
            return Status.CONVERGED
        change = (energy - self._first_energies[k]) / self.structures.counts[k]
        if change > self.explosion:
            return Status.DIVERGED
        if self.frames[k] < self.steps:
            return None
        risen = change > RISE
        return Status.DIVERGED if risen else Status.OUT_OF_STEPS
