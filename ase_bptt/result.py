"""What a relaxation gives back: where a batch of structures ended, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from .adjoints import Attached, Solve
from .iterated_map import Status, Trajectory
from .structures import Structures
from .utils import counted, unrounded

__all__ = ["Relaxation", "Status"]
SHOWN = 20
"""Lines that a Relaxation prints at most."""


@dataclass(eq=False)
class Relaxation:
    """Where a batch of structures ended.

    Attributes
    ----------
    start : Structures
        Where it started, n structures of n_atoms atoms in all.
    positions : Tensor, shape (n_atoms, 3)
        The relaxed positions in Å, with the gradient that the adjoint attached.
    cells : Tensor, shape (n, 3, 3)
        The relaxed cells in Å, likewise; those of the start where the cell is fixed.
    forces : Tensor, shape (n_atoms, 3)
        There, in eV/Å, detached; constraints are not applied to them.
    nsteps : Tensor of int64, shape (n,)
        Frames that each structure took.
    status : tuple of Status, length n
    trajectory : Trajectory
        What the run has left, of all structures that were relaxed together.
    members : tuple of int, length n
        The index of each structure in the trajectory.
    early : Relaxation or None
        Where the batch was after its first frames, with a gradient of its own; the adjoint `Guided` asks for
        it. None where nothing requires gradients.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import relax
    >>> relaxation = relax("emt", [molecule("N2"), molecule("CO")], fmax=0.01)
    >>> relaxation.positions.shape, relaxation.energies.shape
    (torch.Size([4, 3]), torch.Size([2]))
    >>> relaxation[1]
    Relaxation: CO, converged after 18 frames, energy 0.6703 eV, fmax 0.0099 eV/Å
    >>> [len(atoms) for atoms in relaxation.to_atoms()]
    [2, 2]
    """

    start: Structures
    positions: Tensor
    cells: Tensor
    forces: Tensor
    nsteps: Tensor
    status: tuple[Status, ...]
    trajectory: Trajectory
    members: tuple[int, ...]
    early: Relaxation | None
    _rows: Structures
    _row_forces: Tensor
    _energies: Tensor
    _sources: tuple[Atoms, ...] | None
    _single: bool

    @classmethod
    def of(
        cls,
        attached: Attached,
        sources: tuple[Atoms, ...] | None = None,
        single: bool = False,
        start: Structures | None = None,
    ) -> Relaxation:
        """The Relaxation of a whole trajectory.

        Parameters
        ----------
        attached : Attached
            The trajectory, with an end for each structure, and the relaxed rows.
        sources : tuple of Atoms or None, length n
            The Atoms that were relaxed, where it were Atoms.
        single : bool
            Whether it was one Atoms object, rather than a list.
        start : Structures, optional
            Where it started; the trajectory's start without any deformation if not given.
        """
        trajectory, positions, early = attached
        start = trajectory.start.undeformed() if start is None else start
        ends = [trajectory.ends[k] for k in range(len(start))]
        rows = trajectory.start.replace(positions=positions)
        placed, work = rows.placed(), rows.work()
        energies = torch.stack([end.energy for end in ends])
        row_forces = torch.cat([end.forces for end in ends])
        return cls(
            start=start,
            positions=placed.positions,
            cells=placed.cells,
            forces=rows.atomic_forces(row_forces),
            nsteps=torch.tensor([end.nsteps for end in ends], device=positions.device),
            status=tuple(end.status for end in ends),
            trajectory=trajectory,
            members=tuple(range(len(ends))),
            early=None if early is None else cls.of(early, sources, single),
            _rows=rows,
            _row_forces=row_forces,
            _energies=energies if work is None else energies - work.detach(),
            _sources=sources,
            _single=single,
        )

    def __len__(self) -> int:
        return len(self.start)

    def __repr__(self) -> str:
        """A line for each structure, and of many the first."""
        shown = len(self) if len(self) <= SHOWN else SHOWN - 1
        fmax = self._rows.largest_force(self._row_forces).tolist()
        lines = [
            f"Relaxation{'' if self._single else f'[{k}]'}: {formula}, {self.status[k].value} after "
            f"{counted(int(self.nsteps[k]), 'frame')}, energy "
            f"{float(self._energies[k]):.4f} eV, fmax {fmax[k]:.4f} eV/Å"
            for k, formula in enumerate(self.start.formulas(shown))
        ]
        return "\n".join(lines if shown == len(self) else [*lines, f"Relaxation: and {len(self) - shown} others"])

    @property
    def structures(self) -> Structures:
        """The relaxed batch."""
        return self.start.replace(positions=self.positions, cells=self.cells)

    @property
    def energies(self) -> Tensor:
        """Energies of the relaxed structures in eV, shape (n,), without p V; attached where positions are."""
        if not self.positions.requires_grad:
            return self._energies
        return self._attached(self.structures, self._energies, self.forces)[0]

    @property
    def fmax(self) -> Tensor:
        """Largest force on an atom of each relaxed structure, under its constraints, in eV/Å, shape (n,); attached
        likewise. Where the cell moves, the rows of its virial divided by the number of atoms count, too, as in ASE.
        """
        forces = self._row_forces
        if self.positions.requires_grad:
            forces = self._attached(self._rows, self._energies, forces)[1]
        return self._rows.largest_force(forces)

    @property
    def diverged(self) -> list[bool]:
        """Whether each structure diverged, at its end or within its first frames."""
        runs = [self] if self.early is None else [self, self.early]
        return [any(run.status[k] is Status.DIVERGED for run in runs) for k in range(len(self))]

    def _attached(self, structures: Structures, energies: Tensor, forces: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and forces with a graph, of those structures where they are finite."""
        self.trajectory.check_weights()
        finite = structures.sum(forces).sum(1) + energies
        sound = [k for k, value in enumerate(finite.tolist()) if math.isfinite(value)]
        if not sound:
            return energies, forces
        # A member that is not finite must not touch the others' gradients: 0 * inf is NaN.
        some = structures.select(sound)
        edges = self.trajectory.map.neighbor_list()(some)
        found = self.trajectory.map.potential.energy_and_forces(some, edges, create_graph=torch.is_grad_enabled())
        members = torch.tensor(sound, dtype=torch.int64, device=energies.device)
        return (
            energies.index_copy(0, members, found[0]),
            forces.index_copy(0, structures.atoms_of(sound), found[1]),
        )

    @property
    def adjoint_norms(self) -> Tensor | None:
        """|dL/dX(t)| of each structure before each frame and at the end, shape (n_frames + 1, n), after a backward pass
        through the frames; None before. Whether it grows or vanishes towards the first frames shows what the gradient
        can know.
        """
        norms = self.trajectory.adjoint_norms
        return None if norms is None else norms[:, list(self.members)]

    @property
    def solves(self) -> tuple[Solve, ...]:
        """How the gradient of each structure was solved for, after a backward pass by `Implicit`; empty before."""
        solves = self.trajectory.solves
        return tuple(solves[k] for k in self.members) if solves else ()

    def __getitem__(self, k: int) -> Relaxation:
        """The relaxation of structure k, attached to the same run."""
        k = range(len(self))[k]
        atoms = self.start.atoms_of([k])
        return Relaxation(
            start=self.start.select([k]),
            positions=self.positions[atoms],
            cells=self.cells[k : k + 1],
            forces=self.forces[atoms],
            nsteps=self.nsteps[k : k + 1],
            status=self.status[k : k + 1],
            trajectory=self.trajectory,
            members=self.members[k : k + 1],
            early=None if self.early is None else self.early[k],
            _rows=self._rows.select([k]),
            _row_forces=self._row_forces[self._rows.atoms_of([k])],
            _energies=self._energies[k : k + 1],
            _sources=None if self._sources is None else (self._sources[k],),
            _single=True,
        )

    @property
    def moved_cells(self) -> list[bool]:
        """Whether each structure's cell was free to move."""
        return [rows > atoms for rows, atoms in zip(self._rows.counts, self.start.counts, strict=True)]

    def to_atoms(self) -> Any:
        """The relaxed Atoms with energy and forces, and stress where the cell moved: one for Atoms, a list for a list.

        Everything else of the Atoms that were given (info, arrays, constraints) is kept, and atoms that have not moved
        are where they were to the last bit.
        """
        relaxed = self.structures.to_atoms()
        positions = self.positions.split(self.start.counts)
        energies = self._energies.cpu().double().tolist()
        forces = self.forces.cpu().double().split(self.start.counts)
        stresses = self._stresses()
        for k, atoms in enumerate(relaxed):
            if self._sources is not None:
                relaxed[k] = atoms = self._sources[k].copy()
                atoms.positions = unrounded(positions[k], atoms.positions)
                if k in stresses:
                    atoms.set_cell(unrounded(self.cells[k], atoms.cell.array), apply_constraint=False)
            atoms.calc = SinglePointCalculator(
                atoms, energy=energies[k], forces=forces[k].numpy(), **stresses.get(k, {})
            )
        return relaxed[0] if self._single else relaxed

    def _stresses(self) -> dict[int, dict[str, Any]]:
        """ASE's stress of each structure whose cell moved, where it ended, by its index."""
        moved = [k for k, found in enumerate(self.moved_cells) if found]
        if not moved:
            return {}
        some, iterated = self.structures.select(moved), self.trajectory.map
        stress = iterated.potential.results(some, iterated.neighbor_list()(some))["stress"].cpu().double().numpy()
        return {k: {"stress": full_3x3_to_voigt_6_stress(found)} for k, found in zip(moved, stress, strict=True)}
