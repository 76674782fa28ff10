"""What a relaxation gives back: where a batch of structures ended, and how."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor

from .adjoints import Solve
from .iterated_map import Record
from .structures import Structures


class Status(enum.Enum):
    """How the relaxation of a structure ended; `sentence` says what that means."""

    CONVERGED = "converged"
    OUT_OF_STEPS = "out of steps"
    DIVERGED = "diverged"

    @property
    def sentence(self) -> str:
        return {
            Status.CONVERGED: "All forces fell below fmax.",
            Status.OUT_OF_STEPS: "The last step was taken before all forces fell below fmax: give it more steps.",
            Status.DIVERGED: "Its forces are not finite, or it ended higher in energy than it began: "
            "the step size is too large for its stiffest bond, or the potential has a hole there.",
        }[self]


@dataclass(eq=False)
class Relaxation:
    """Where a batch of structures ended.

    Attributes
    ----------
    start : Structures
        Where it began, n structures of n_atoms atoms in all.
    positions : Tensor, shape (n_atoms, 3)
        The relaxed positions in Å, with the gradient that the adjoint attached.
    forces : Tensor, shape (n_atoms, 3)
        There, in eV/Å, detached; constraints are not applied to them.
    nsteps : Tensor of int64, shape (n,)
        Frames that each structure took.
    status : tuple of Status, length n
    early : Relaxation or None
        Where the batch stood after its first frames, with a gradient of its own; the adjoint `Guided` asks for
        it. None where nothing requires gradients.
    """

    start: Structures
    positions: Tensor
    forces: Tensor
    nsteps: Tensor
    status: tuple[Status, ...]
    _energies: Tensor
    _record: Record
    _sources: tuple[Atoms, ...] | None = None
    _single: bool = False
    early: Relaxation | None = None
    _members: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.start)

    @property
    def structures(self) -> Structures:
        """The relaxed batch."""
        return self.start.replace(positions=self.positions)

    @property
    def energies(self) -> Tensor:
        """Energies of the relaxed structures in eV, shape (n,); attached where positions are."""
        return self._attached()[0] if self.positions.requires_grad else self._energies

    @property
    def fmax(self) -> Tensor:
        """Largest force on an atom of each relaxed structure, under its constraints, in eV/Å, shape (n,); attached
        likewise.
        """
        forces = self._attached()[1] if self.positions.requires_grad else self.forces
        return largest_force(self.structures, forces)

    def _attached(self) -> tuple[Tensor, Tensor]:
        self._record.check_weights()
        finite = self.start.sum(self.forces).sum(1) + self._energies
        sound = [k for k, value in enumerate(finite.tolist()) if math.isfinite(value)]
        if not sound:
            return self._energies, self.forces
        # A member that is not finite must not touch the others' gradients: 0 * inf is NaN.
        structures = self.structures.select(sound)
        edges = self._record.map.neighbor_list()(structures)
        energies, forces = self._record.map.potential.energy_and_forces(
            structures, edges, create_graph=torch.is_grad_enabled()
        )
        members = torch.tensor(sound, dtype=torch.int64, device=energies.device)
        return (
            self._energies.index_copy(0, members, energies),
            self.forces.index_copy(0, self.start.atoms_of(sound), forces),
        )

    @property
    def adjoint_norms(self) -> Tensor | None:
        """|dL/dX(t)| of each structure before each frame and at the end, shape (n_frames + 1, n), after a backward pass
        through the frames; None before. How it grows or fades on the way back says what the gradient knows.
        """
        norms = self._record.adjoint_norms
        return None if norms is None else norms[:, list(self._members)]

    @property
    def solves(self) -> tuple[Solve, ...]:
        """How the gradient of each structure was solved for, after a backward pass by `Implicit`; empty before."""
        solves = self._record.solves
        return tuple(solves[k] for k in self._members) if solves else ()

    def __getitem__(self, k: int) -> Relaxation:
        """The relaxation of structure k, attached to the same run."""
        k = range(len(self))[k]
        atoms = self.start.atoms_of([k])
        return Relaxation(
            start=self.start.select([k]),
            positions=self.positions[atoms],
            forces=self.forces[atoms],
            nsteps=self.nsteps[k : k + 1],
            status=self.status[k : k + 1],
            _energies=self._energies[k : k + 1],
            _record=self._record,
            _sources=None if self._sources is None else (self._sources[k],),
            _single=True,
            early=None if self.early is None else self.early[k],
            _members=self._members[k : k + 1],
        )

    def to_atoms(self) -> Any:
        """The relaxed Atoms with energy and forces: one for Atoms, a list for a list.

        Everything else of the Atoms that were given (info, arrays, constraints) is kept.
        """
        relaxed = self.structures.to_atoms()
        energies = self._energies.cpu().double().tolist()
        forces = self.forces.cpu().double().split(self.start.counts)
        for k, atoms in enumerate(relaxed):
            if self._sources is not None:
                positions = atoms.positions
                relaxed[k] = atoms = self._sources[k].copy()
                atoms.positions = positions
            atoms.calc = SinglePointCalculator(atoms, energy=energies[k], forces=forces[k].numpy())
        return relaxed[0] if self._single else relaxed


def largest_force(structures: Structures, forces: Tensor) -> Tensor:
    """Norm of the largest force on an atom of each structure, under its constraints, in eV/Å, shape (n,)."""
    square = structures.project_forces(forces).square().sum(1)
    largest = structures.max(square)
    # sqrt has no finite slope at zero, where the forces of symmetry sit exactly.
    return torch.where(largest > 0, torch.where(largest > 0, largest, 1.0).sqrt(), largest)
