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
        Å, largest displacement of an atom where the potential relaxes the reference itself.
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
    reference, start = known_part(end, pair.relaxed), known_part(pair.initial, pair.relaxed)
    return Row(
        id=pair.id,
        group=pair.group,
        # The orientation of an isolated molecule is arbitrary: its ends may be rotated.
        unrelaxed=delta_q(pair.initial, start, align=True, cell_weight=1.0),
        delta_q=delta_q(end, reference, align=True, cell_weight=1.0),
        rmsd=rmsd(end, reference, align=True),
        max_displacement=max_displacement(end, reference, align=True),
        right_basin=max_displacement(end, control, align=True) < SAME_END and _shift(end, control) < SAME_END,
        reference_moves=max_displacement(control, pair.relaxed, align=True),
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
    length = (reference.get_volume() / len(reference)) ** (1 / 3)
    return found | {
        "volume_error": volume_error(end, reference),
        "scaled_rmsd": float(rmsd(end, reference, align=True) / length),
    }


def _shift(a: Atoms, b: Atoms) -> float:
    """How far the strain between two cells displaces neighbours, in Å; zero where the cells are equal."""
    strain = cell_strain(a, b)
    return float(strain * (b.get_volume() / len(b)) ** (1 / 3)) if strain else 0.0


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
