"""How one structure ended, measured against its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import spglib
from ase import Atoms

from ..displacements import displacements, known_part
from ..iterated_map import Status
from ..losses import SAME_END, cell_strain, delta_q, lattice_error, max_displacement, rmsd, volume_error
from ..pairs import RelaxationPair
from ..threads import quiet
from ..throughput import Relaxed

BASIN_RULE = (
    "right basin: the relaxation from the initial structure reaches the same local minimum as one from the "
    f"reference structure, within {SAME_END} Å at the farthest atom (drift removed)"
)


@dataclass(frozen=True)
class Row:
    """How one structure ended.

    Attributes
    ----------
    id, group : str
    unrelaxed : float
        Delta-Q of the initial structure to the reference, amu^1/2 Å: what no relaxation at all would give.
    delta_q : float
        Delta-Q of the end to the reference, amu^1/2 Å. Where the cell moves its strain counts as the displacement that
        it causes (`losses.delta_q` with cell_weight=1), here and in `unrelaxed`.
    rmsd, max_displacement : float
        Of the end from the reference, Å.
    right_basin : bool
        By `BASIN_RULE`.
    reference_moves : float
        Å between the reference and where the potential relaxes it, by `farthest`.
    residual_force : float
        The potential's largest force on an atom at the reference, eV/Å.
    space_group, reference_space_group : str
        Of end and reference, as "Fd-3m (227)"; empty where the structure is not a crystal.
    status : str
    nsteps : int
    displacements : tuple of float
        Of each atom from the reference, Å.
    volume_error, cell_strain : float or None
        Of the end's cell against the reference's: V / V_ref - 1, and the norm of the Green-Lagrange strain; None where
        the cell is fixed. Slabs and wires have no volume.
    lattice_error : tuple of 6 float, or None
        Differences of a, b, c in Å and of alpha, beta, gamma in degrees; None where the cell is fixed.
    scaled_rmsd : float or None
        RMSD of the atoms in the reference's cell over (V/n)^(1/3) of the reference, by which crystals of different
        density compare; None where the cell is fixed or there is no volume.
    """

    id: str
    group: str
    unrelaxed: float
    delta_q: float
    rmsd: float
    max_displacement: float
    right_basin: bool
    reference_moves: float
    residual_force: float
    space_group: str
    reference_space_group: str
    status: str
    nsteps: int
    displacements: tuple[float, ...]
    volume_error: float | None = None
    cell_strain: float | None = None
    lattice_error: tuple[float, ...] | None = None
    scaled_rmsd: float | None = None

    @property
    def cell_moves(self) -> bool:
        """Whether its cell was relaxed."""
        return self.cell_strain is not None

    @property
    def converged(self) -> bool:
        """Whether the forces fell below fmax within the steps that were allowed."""
        return self.status == Status.CONVERGED.value

    @property
    def symmetry_kept(self) -> bool:
        """Whether the end has the reference's space group."""
        return self.space_group == self.reference_space_group


def row_of(pair: RelaxationPair, found: Relaxed, control: Atoms, residual: float) -> Row:
    """The measures of one end.

    Parameters
    ----------
    pair : RelaxationPair
    found : Relaxed
        From the initial structure.
    control : Atoms
        Where the potential relaxes the reference.
    residual : float
        The potential's largest force at the reference, eV/Å.
    """
    end, status, nsteps = found
    reference, start, kept = (known_part(atoms, pair.relaxed) for atoms in (end, pair.initial, control))
    return Row(
        id=pair.id,
        group=pair.group,
        # The orientation of an isolated molecule is arbitrary: its ends may be rotated.
        unrelaxed=delta_q(pair.initial, start, align=True, cell_weight=1.0),
        delta_q=delta_q(end, reference, align=True, cell_weight=1.0),
        rmsd=rmsd(end, reference, align=True),
        max_displacement=max_displacement(end, reference, align=True),
        right_basin=farthest(end, control) < SAME_END,
        reference_moves=farthest(control, kept),
        residual_force=residual,
        space_group=space_group(end),
        reference_space_group=space_group(pair.relaxed),
        status=status.value,
        nsteps=nsteps,
        displacements=tuple(displacements(end, reference, by_mass=False, align=True).norm(dim=1).tolist()),
        **(_of_cell(end, reference) if pair.freedom.moves else {}),
    )


def _of_cell(end: Atoms, reference: Atoms) -> dict[str, Any]:
    """The measures of a cell that moved."""
    found = {"cell_strain": cell_strain(end, reference), "lattice_error": tuple(lattice_error(end, reference).tolist())}
    # A slab has no volume: what lies above it is of no meaning.
    if not reference.pbc.all():
        return found
    return found | {
        "volume_error": volume_error(end, reference),
        "scaled_rmsd": float(rmsd(end, reference, align=True) / spacing(reference)),
    }


def farthest(a: Atoms, b: Atoms) -> float:
    """Å between two structures: at the farthest atom, or by the strain between their cells where that is more.

    A strain counts as the displacement of an atom from a neighbour at the `spacing` of b. An isolated molecule may be
    rotated.

    >>> from ase.build import bulk
    >>> round(farthest(bulk("Cu", a=3.7), bulk("Cu", a=3.6)), 3)
    0.112
    """
    # NaN, of a relaxation that diverged, must not get lost in max().
    return float(np.maximum(max_displacement(a, b, align=True), cell_strain(a, b) * spacing(b)))


def spacing(atoms: Atoms) -> float:
    """(V/n)^(1/3) in Å; 1 where a slab or wire has no volume."""
    return float(abs(np.linalg.det(atoms.cell)) / len(atoms)) ** (1 / 3) or 1.0


SYMPREC = 0.05
"""Å: displacements below this do not break a symmetry; the noise of relaxed positions is smaller."""


def space_group(atoms: Atoms, symprec: float = SYMPREC) -> str:
    """International symbol and number, as "Fd-3m (227)"; empty where the structure is not periodic in all directions.

    Also empty where no symmetry can be found, as for positions that are not finite.

    Examples
    --------
    >>> from ase.build import bulk
    >>> space_group(bulk("Si"))
    'Fd-3m (227)'
    """
    if not atoms.pbc.all() or not np.isfinite(atoms.positions).all():
        return ""
    crystal = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
    # By its version, spglib returns None with a DeprecationWarning where it finds none, or raises.
    with quiet():
        try:
            return spglib.get_spacegroup(crystal, symprec=symprec) or ""
        except spglib.SpglibError:
            return ""
