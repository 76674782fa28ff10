"""A batch in which cells move: the rows that steppers move are atoms, and three rows of each cell that is relaxed.

A structure is (s, L): positions s in the cell before the deformation, and the logarithmic strain L. With F = expm(L) it
stands at X = s F^T in the cell C = C0 F^T, and -dE/ds and -dE/dL are plain derivatives of E(X, C) + p V: those of ASE's
`FrechetCellFilter`, to rounding. The three rows hold L times a factor that makes it a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..neighbors.lattice import SMALLEST
from ..structures import LASTING, PER_STRUCTURE, Structures
from ..utils import lasting_property
from . import CellFreedom
from .row_maps import check_movable, maps_of_rows

Self = TypeVar("Self", bound="Strained")
LARGEST = 2.0
"""Norm of the logarithmic strain above which a structure counts as diverged."""


@dataclass(eq=False)
class Strained(Structures):
    """A batch of structures some of whose cells move; a structure has as many rows as atoms, or three more.

    Attributes
    ----------
    positions : Tensor, shape (n_rows, 3)
        s of each atom in Å, and after those of a structure whose cell moves the three rows of L times `factors`.
    cells : Tensor, shape (n, 3, 3)
        C0: the cells before the deformation, as rows, in Å.
    source : Structures
        The structures as they stand without deformation.
    freedoms : tuple of CellFreedom, length n
    pressures : Tensor or None, shape (n,)
        In eV/Å^3; None where there is none. May require gradients.
    balanced : bool
        Whether the cell rows are scaled for gradient descent, rather than as ASE does.

    The other attributes are those of `Structures`, for rows instead of atoms; a cell row has the atomic number 0.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from ase_bptt.cells import CellFreedom
    >>> start = Structures.from_atoms([bulk("Ar"), bulk("Ar")])
    >>> batch = Strained.of(start, [CellFreedom.of("full"), CellFreedom.of("fixed")])
    >>> batch.counts, tuple(batch.positions.shape)
    ((4, 1), (5, 3))
    >>> batch.placed().counts
    (1, 1)
    """

    source: Structures = None  # type: ignore[assignment]
    freedoms: tuple[CellFreedom, ...] = ()
    pressures: Tensor | None = None
    balanced: bool = False

    lasting: ClassVar[frozenset[str]] = LASTING | {"moving", "atom_rows", "cell_rows", "smallest_volumes"}

    @classmethod
    def of(
        cls,
        structures: Structures,
        freedoms: Sequence[CellFreedom],
        *,
        pressures: Tensor | None = None,
        balanced: bool = False,
    ) -> Strained:
        """The rows of structures that are not deformed, attached to their positions and cells.

        Parameters
        ----------
        structures : Structures
            n of them, whose positions and cells may require gradients.
        freedoms : sequence of CellFreedom, length n
        pressures : Tensor, shape (n,), optional
            In eV/Å^3, in place of those of the freedoms, where a gradient is to reach them.
        balanced : bool
            Scale the strain by sqrt(n_atoms) (V / n_atoms)^(1/3), so that its curvature is like that of the atoms',
            which gradient descent needs; otherwise by n_atoms, as ASE does.

        Raises
        ------
        ValueError
            For a cell that moves and has nothing periodic, or no volume under pressure.
        NotImplementedError
            For constraints that act otherwise when the cell is deformed, by name.
        """
        moves = [freedom.moves for freedom in freedoms]
        for k in np.flatnonzero(moves).tolist():
            check_movable(structures, k, freedoms[k])
        counts = tuple(n + 3 * m for n, m in zip(structures.counts, moves, strict=True))
        atoms, _ = _places(structures.counts, moves)
        rows = torch.as_tensor(atoms, device=structures.numbers.device)
        given = [freedom.pressure for freedom in freedoms]
        if pressures is None and any(given):
            pressures = torch.tensor(given, dtype=torch.float64)
        return cls(
            positions=structures.positions.new_zeros(sum(counts), 3).index_copy(0, rows, structures.positions),
            **{name: getattr(structures, name) for name in PER_STRUCTURE},
            numbers=structures.numbers.new_zeros(sum(counts)).index_copy(0, rows, structures.numbers),
            masses=structures.masses.new_zeros(sum(counts)).index_copy(0, rows, structures.masses),
            counts=counts,
            constraints=structures.constraints,
            maps=maps_of_rows(structures, freedoms),
            source=structures,
            freedoms=tuple(freedoms),
            pressures=None if pressures is None else pressures.to(structures.masses),
            balanced=balanced,
        )

    # Where the rows are -----------------------------------------------------------------------

    @lasting_property
    def moving(self) -> Tensor:
        """Indices of the structures whose cells move, shape (m,)."""
        found = [k for k, freedom in enumerate(self.freedoms) if freedom.moves]
        return torch.tensor(found, dtype=torch.int64, device=self.numbers.device)

    @lasting_property
    def atom_rows(self) -> Tensor:
        """The rows that are atoms, shape (n_atoms,)."""
        return torch.as_tensor(self._rows[0], device=self.numbers.device)

    @lasting_property
    def cell_rows(self) -> Tensor:
        """The rows that are cells, shape (3 m,)."""
        return torch.as_tensor(self._rows[1], device=self.numbers.device)

    @lasting_property
    def smallest_volumes(self) -> Tensor:
        """Å^3, below which a cell that moves has collapsed, shape (m,); 0 where it is not periodic throughout."""
        counts = torch.tensor(self.source.counts, device=self.numbers.device)
        return (SMALLEST * counts * self.source.pbc.all(1)).to(self.cells.dtype)[self.moving]

    @property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        return _places(self.source.counts, [freedom.moves for freedom in self.freedoms])

    @property
    def factors(self) -> Tensor:
        """The length in Å that a strain of 1 is held as, of each cell that moves, shape (m,)."""
        n = torch.tensor(self.source.counts).to(self.cells)[self.moving]
        if not self.balanced:
            return n
        volumes = torch.linalg.det(self.cells[self.moving]).abs()
        # A slab may have no third vector, and with it no volume.
        return n.sqrt() * torch.where(volumes > 0, torch.where(volumes > 0, volumes, n) / n, 1.0) ** (1 / 3)

    # What they describe -----------------------------------------------------------------------

    @property
    def strains(self) -> Tensor:
        """L of each cell that moves, shape (m, 3, 3)."""
        return self.positions[self.cell_rows].view(-1, 3, 3) / self.factors[:, None, None]

    @property
    def deformations(self) -> Tensor:
        """F = expm(L) of each structure, shape (n, 3, 3)."""
        return self._exponentials(self.strains)

    def _exponentials(self, strains: Tensor) -> Tensor:
        """Of each cell that moves, shape (m, 3, 3), and the identity for the others, shape (n, 3, 3)."""
        found = torch.matrix_exp(strains)
        if len(self.moving) == len(self):
            return found
        unit = torch.eye(3).to(found).expand(len(self), 3, 3)
        return unit.index_copy(0, self.moving, found)

    def placed(self) -> Structures:
        """The structures as they stand, attached to the rows and to C0."""
        f = self.deformations
        s = self.positions[self.atom_rows]
        return self.source.replace(positions=(f[self.source.batch] @ s[:, :, None]).squeeze(2), cells=self.cells @ f.mT)

    def undeformed(self) -> Structures:
        return self.source

    @torch.no_grad()
    def atomic_forces(self, forces: Tensor) -> Tensor:
        """-dE/dX = -dE/ds F^-1."""
        inverse = self._exponentials(-self.strains)
        return (forces[self.atom_rows].unsqueeze(1) @ inverse[self.source.batch]).squeeze(1)

    def work(self) -> Tensor | None:
        """p V of each structure in eV, shape (n,); None where no cell is under pressure."""
        if self.pressures is None:
            return None
        return self.pressures * torch.linalg.det(self.cells @ self.deformations.mT).abs()

    def largest_force(self, forces: Tensor) -> Tensor:
        """The largest norm of a row, with cell rows as ASE scales them (virial / n_atoms), in eV/Å, shape (n,)."""
        return super().largest_force(forces.index_copy(0, self.cell_rows, self._as_ase(forces)))

    def reach(self) -> Tensor:
        """Largest coordinate of each structure in Å, shape (n,); too large for any precision where its cell diverged.

        That is where it is strained by more than `LARGEST`, or has collapsed.
        """
        placed = self.placed()
        collapsed = torch.linalg.det(placed.cells[self.moving]).abs() < self.smallest_volumes
        far = (self.strains.square().sum((1, 2)) > LARGEST**2) | collapsed
        found = placed.reach()
        beyond = torch.where(far, torch.finfo(found.dtype).max, found[self.moving])
        return found.index_copy(0, self.moving, beyond)

    def cell_rotations(self) -> list[np.ndarray]:
        """Changes of L that only turn F: dexp(L)[dL] = w F, for three antisymmetric w; at L = 0 alone they are w."""
        if not len(self.moving):
            return []
        strain = self.strains[0].detach().double().cpu()
        derivative = torch.autograd.functional.jacobian(torch.matrix_exp, strain).reshape(9, 9).numpy()
        f = torch.matrix_exp(strain).numpy()
        turns = [np.cross(np.eye(3), axis) @ f for axis in np.eye(3)]
        changes = [np.linalg.solve(derivative, turn.ravel()).reshape(3, 3) for turn in turns]
        rows, scale = self.cell_rows.cpu().numpy(), float(self.factors[0].detach())
        found = [np.zeros((len(self.positions), 3)) for _ in changes]
        for motion, change in zip(found, changes, strict=True):
            motion[rows] = scale * change
        return found

    def _as_ase(self, forces: Tensor) -> Tensor:
        cells = forces[self.cell_rows]
        if not self.balanced:
            return cells
        n = torch.tensor(self.source.counts).to(self.cells)[self.moving]
        return cells * (self.factors.detach() / n).repeat_interleave(3)[:, None]

    def conditions(self) -> list[Tensor]:
        """The cells C0, and the pressures where there are any."""
        return [self.cells] if self.pressures is None else [self.cells, self.pressures]

    def under(self: Self, conditions: Sequence[Tensor]) -> Self:
        cells, *pressures = conditions
        return self.replace(cells=cells, pressures=pressures[0] if pressures else None)

    def formulas(self, most: int | None = None) -> list[str]:
        return self.source.formulas(most)

    # Parts and unions -------------------------------------------------------------------------

    def select(self: Self, keep: Sequence[int]) -> Self:
        found = super().select(keep)
        if found is self:
            return self
        return replace(
            found,
            source=self.source.select(keep),
            freedoms=tuple(self.freedoms[k] for k in keep),
            pressures=None if self.pressures is None else self.pressures[list(keep)],
        )

    def joined(self: Self, other: Self) -> Self:
        assert other.balanced == self.balanced
        pressures = None
        if self.pressures is not None or other.pressures is not None:
            pressures = torch.cat(
                [of.masses.new_zeros(len(of)) if of.pressures is None else of.pressures for of in (self, other)]
            )
        return replace(
            super().joined(other),
            source=self.source.joined(other.source),
            freedoms=self.freedoms + other.freedoms,
            pressures=pressures,
        )


def _places(counts: Sequence[int], moves: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the atoms, and of the cells."""
    sizes = [n + 3 * m for n, m in zip(counts, moves, strict=True)]
    firsts = np.cumsum([0, *sizes])
    atoms = [first + np.arange(n) for first, n in zip(firsts, counts)]
    cells = [first + n + np.arange(3) for first, n, m in zip(firsts, counts, moves) if m]
    none = np.zeros(0, dtype=np.int64)
    return np.concatenate([none, *atoms]), np.concatenate([none, *cells])
