"""What an ASE optimizer moves, where that can be differentiated: Atoms, or Atoms in ASE's FrechetCellFilter.

ASE's rows are s, and e log(n F) for n atoms and the filter's exp_cell_factor e: with e = n they are those of
`ase_bptt.cells.strained.Strained` plus the constant n ln(n) on the diagonal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.filters import FrechetCellFilter
from torch import Tensor

from ..calculator import TorchCalculator
from ..cells import CellFreedom
from ..cells.row_maps import SELECTIVE, turned_constraints
from ..cells.strained import Strained
from ..constraints import KNOWN, unknown_of
from ..structures import Structures


def atoms_of(target: Any) -> Atoms | None:
    """The Atoms that are moved, by themselves or in a FrechetCellFilter; None where it is anything else."""
    # A class derived from the filter may move the cell by other rules.
    atoms = target.atoms if type(target) is FrechetCellFilter else target
    return atoms if isinstance(atoms, Atoms) else None


def check_differentiable(target: Any) -> Atoms:
    """The Atoms of a target, which can be differentiated.

    Raises
    ------
    RuntimeError, NotImplementedError
        For other targets, calculators and constraints, by name.
    """
    atoms = atoms_of(target)
    if atoms is None or not isinstance(atoms.calc, TorchCalculator):
        raise RuntimeError(
            "Only a run on Atoms or on their FrechetCellFilter, with a TorchCalculator, can be differentiated; this "
            f"one moves a {type(target).__name__} with {type(getattr(atoms or target, 'calc', None)).__name__}."
        )
    names = unknown_of(atoms)
    if names:
        raise NotImplementedError(
            f"The constraints {', '.join(names)} cannot be differentiated; {', '.join(KNOWN)} can."
        )
    return atoms


@dataclass(frozen=True)
class CellRows:
    """The rows in which a FrechetCellFilter holds its atoms and their cell.

    Attributes
    ----------
    freedom : CellFreedom
        What of the cell it relaxes.
    cell : 3 x 3 of float
        From which it measures the deformation, in Å.
    factor : float
        Its exp_cell_factor, by which it holds a strain as a length.
    """

    freedom: CellFreedom
    cell: tuple[tuple[float, ...], ...]
    factor: float

    @classmethod
    def of(cls, target: Atoms | FrechetCellFilter) -> CellRows | None:
        """Those of a filter; None for Atoms, whose cell does not move.

        Raises
        ------
        ValueError, NotImplementedError
            For masks and combinations of them that cannot be differentiated.
        """
        if isinstance(target, Atoms):
            return None
        return cls(freedom_of(target), _nested(target.orig_cell), float(target.exp_cell_factor))

    def check_factor(self, n: int) -> None:
        """Refuse an exp_cell_factor other than the number of atoms, on which the path depends."""
        if self.factor != n:
            raise NotImplementedError(
                f"The exp_cell_factor of this FrechetCellFilter is {self.factor:g} for {n} atoms, and a run through "
                "its frames can be differentiated with ASE's default alone: leave it out, or take adjoint='implicit'."
            )

    def starting(self, atoms: Atoms) -> CellRows:
        """The same with the deformation measured from the cell of these atoms."""
        return replace(self, cell=_nested(atoms.cell))

    def from_ase(self, rows: Tensor) -> Tensor:
        """ASE's rows, shape (n + 3, 3), without their constant."""
        n = len(rows) - 3
        found = rows.clone()
        found[n:] -= self.factor * math.log(n) * torch.eye(3).to(rows)
        return found

    def strained(self, structures: Structures) -> Strained:
        """One structure as it stands, as rows that are attached to its positions and its cell.

        A structure that stands in the reference cell takes that along where it changes, as in `relax`: a filter would
        be made of it. From any other cell the deformation is measured by a reference that stays.
        """
        if SELECTIVE in turned_constraints(structures, 0, self.freedom):
            raise NotImplementedError(
                f"{structures.formulas()[0]} has the constraint FixScaled, whose forces in ASE do not follow a cell "
                "that turns or shears, so that a run on ASE's filter minimises no energy: relax(..., cell='full') "
                "does, and can be differentiated."
            )
        reference = torch.tensor(self.cell, dtype=torch.float64).to(structures.cells)
        if torch.equal(structures.cells[0], reference):
            return Strained.of(structures, [self.freedom])
        f = torch.linalg.solve(reference, structures.cells[0]).mT
        change = f.detach().cpu() - torch.eye(3)
        if self.freedom.mask is not None and bool((change[~torch.tensor(self.freedom.mask)].abs() > 1e-5).any()):
            raise ValueError(
                f"The cell of {structures.formulas()[0]} has changed in what the mask of its FrechetCellFilter fixes: "
                "make the filter of the atoms as they are where the relaxation starts."
            )
        undone = torch.linalg.solve(f, structures.positions.mT).mT
        rows = Strained.of(structures.replace(positions=undone, cells=reference[None]), [self.freedom])
        strain = logarithm(f) * rows.factors
        return rows.replace(positions=rows.positions.index_copy(0, rows.cell_rows, strain))


def freedom_of(target: FrechetCellFilter) -> CellFreedom:
    """What a filter relaxes of its cell, and at what pressure.

    Raises
    ------
    ValueError
        For a mask of other numbers than zeros and ones, and for a cell that is not periodic where the filter moves it.
    NotImplementedError
        For strains that are not closed under composition.
    """
    named = CellFreedom.of(np.asarray(target.mask).tolist())  # refuses what is no mask, or not closed
    freedom = CellFreedom(
        moves=True,
        hydrostatic=bool(target.hydrostatic_strain),
        constant_volume=bool(target.constant_volume),
        mask=named.mask if named.moves else tuple((False,) * 3 for _ in range(3)),
        pressure=float(target.scalar_pressure),
    )
    periodic = target.atoms.cell.array[target.atoms.pbc]
    if not np.allclose(_projection(freedom, periodic), _projection(freedom, np.eye(3))):
        raise ValueError(
            f"{target.atoms.symbols} is periodic along {len(periodic)} of 3 directions, and this FrechetCellFilter "
            "moves its cell along the others, too: give it a mask of the periodic ones, such as [1, 1, 0, 0, 0, 1]."
        )
    return freedom


def _projection(freedom: CellFreedom, periodic: np.ndarray) -> np.ndarray:
    found = freedom.projection(periodic)
    return np.eye(9) if found is None else found


def _nested(cell: Any) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, np.asarray(cell, dtype=float).tolist()))


def logarithm(f: Tensor) -> Tensor:
    """L with expm(L) = F, shape (3, 3), once differentiable: dL solves Dexp(L)[dL] = dF."""
    from scipy.linalg import logm

    exact = f.detach().double().cpu()
    strain = torch.from_numpy(np.real(logm(exact.numpy())))
    derivative = torch.autograd.functional.jacobian(torch.matrix_exp, strain).reshape(9, 9)
    change = torch.linalg.solve(derivative.to(f), (f - f.detach()).reshape(9))
    return strain.to(f) + change.view(3, 3)
