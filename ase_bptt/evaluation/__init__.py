"""Evaluation of a potential: where its relaxations end, compared with the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np
import spglib
from ase import Atoms

from ..iterated_map import Status
from ..losses import SAME_END, delta_q, displacements, max_displacement, rmsd
from ..pairs import RelaxationPair
from ..potential import Potential
from ..steppers import Stepper
from ..threads import quiet
from ..throughput import TOGETHER, Relaxed, single_points
from ..throughput.journal import Journal, relax_kept

FLOOR = 1e-3
"""amu^1/2 Å: the least Delta-Q of which a logarithm is taken; smaller values count as this."""
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
        Delta-Q of the end to the reference, amu^1/2 Å.
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

    @property
    def converged(self) -> bool:
        """Whether the forces fell below fmax within the steps that were allowed."""
        return self.status == Status.CONVERGED.value

    @property
    def symmetry_kept(self) -> bool:
        """Whether the end has the reference's space group."""
        return self.space_group == self.reference_space_group


@dataclass(frozen=True)
class Evaluation:
    """Rows of `evaluate` with their summary; `ends` are the relaxed structures, if they were kept."""

    rows: tuple[Row, ...]
    ends: tuple[Atoms, ...] = field(default=(), compare=False, repr=False)

    def __repr__(self) -> str:
        return (
            f"Evaluation({len(self.rows)} in all, Delta-Q {self.mean:.2f} on average, median {self.median:.2f} "
            f"amu^1/2 Å, right basins {self.basins:.0%})"
        )

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]]) -> Evaluation:
        """From the rows that `todict` gives."""
        return cls(tuple(Row(**row | {"displacements": tuple(row["displacements"])}) for row in rows))

    @property
    def mean(self) -> float:
        """Mean Delta-Q, amu^1/2 Å."""
        return fmean(row.delta_q for row in self.rows)

    @property
    def median(self) -> float:
        """Median Delta-Q, amu^1/2 Å."""
        # NaN cannot be sorted: without a mean there is no median.
        return median(row.delta_q for row in self.rows) if math.isfinite(self.mean) else math.nan

    @property
    def geometric_mean(self) -> float:
        """Geometric mean of Delta-Q, amu^1/2 Å, where values below `FLOOR` count as that."""
        if not math.isfinite(self.mean):
            return math.nan
        return math.exp(fmean(math.log(max(row.delta_q, FLOOR)) for row in self.rows))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of Delta-Q, amu^1/2 Å."""
        if not math.isfinite(self.mean):
            return math.nan, math.nan
        low, high = np.quantile([row.delta_q for row in self.rows], [0.25, 0.75])
        return float(low), float(high)

    @property
    def closer_than_start(self) -> float:
        """Share of structures that end closer to the reference than they started."""
        return fmean(row.delta_q < row.unrelaxed for row in self.rows)

    @property
    def mean_unrelaxed(self) -> float:
        """Mean Delta-Q of the starts, amu^1/2 Å."""
        return fmean(row.unrelaxed for row in self.rows)

    @property
    def basins(self) -> float:
        """Share of structures in the right basin."""
        return fmean(row.right_basin for row in self.rows)

    @property
    def symmetry_kept(self) -> float:
        """Share of the crystals that ended in their reference's space group; NaN where there is no crystal."""
        crystals = [row.symmetry_kept for row in self.rows if row.reference_space_group]
        return fmean(crystals) if crystals else math.nan

    def by_group(self) -> dict[str, Evaluation]:
        """An evaluation for each group, in the order of their first rows."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        return {name: Evaluation(tuple(rows)) for name, rows in groups.items()}

    def todict(self) -> dict[str, Any]:
        """Rows and summary, as JSON."""
        return {
            "n": len(self.rows),
            "kinds": len(self.by_group()),
            "mean": self.mean,
            "median": self.median,
            "geometric_mean": self.geometric_mean,
            "quartiles": list(self.quartiles),
            "mean_unrelaxed": self.mean_unrelaxed,
            "closer_than_start": self.closer_than_start,
            "basins": self.basins,
            "symmetry_kept": self.symmetry_kept,
            "rows": [asdict(row) | {"displacements": list(row.displacements)} for row in self.rows],
        }


def evaluate(
    potential: Potential,
    pairs: Sequence[RelaxationPair],
    *,
    stepper: Stepper | str = "fire",
    fmax: float = 0.02,
    steps: int = 500,
    batch_size: int | None = None,
    memory: float | None = None,
    journal: Journal | None = None,
    progress: bool | None = False,
) -> Evaluation:
    """Relax from each initial and each reference structure, and compare the ends.

    Parameters
    ----------
    potential : Potential
        Its weights are not changed.
    pairs : list of RelaxationPair
    stepper : Stepper or str
        A stepper or its name.
    fmax : float
        eV/Å.
    steps : int
        Frames at most.
    batch_size, memory : int or None, float or None
        As for `relax_all`: structures relaxed together, and GiB that they may take.
    journal : Journal, optional
        Keeps the ends as they are found; structures that are in it already are not relaxed again.
    progress : bool or None
        A progress bar on standard error; None shows it only on a terminal.

    Returns
    -------
    Evaluation
        A `Row` for each pair, in order, in amu^1/2 Å, Å and eV/Å.

    Raises
    ------
    NotImplementedError
        For elements that the potential does not know, by name.
    ValueError
        For an unknown name of a stepper.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import RelaxationPair, evaluate, load_potential
    >>> stretched = molecule("N2")
    >>> stretched.set_distance(0, 1, 1.3)
    >>> found = evaluate(load_potential("emt"), [RelaxationPair(stretched, molecule("N2"), "N2", "N2")])
    >>> found
    Evaluation(1 in all, Delta-Q 0.35 on average, median 0.35 amu^1/2 Å, right basins 100%)
    >>> found.rows[0].status
    'converged'
    """
    starts = [p.initial for p in pairs] + [p.relaxed for p in pairs]
    ends = relax_kept(
        potential, starts, journal=journal, progress=progress,
        stepper=stepper, fmax=fmax, steps=steps, batch_size=batch_size, memory=memory,
    )  # fmt: skip
    controls = [end.atoms for end in ends[len(pairs) :]]
    residuals = _residual_forces(potential, [p.relaxed for p in pairs], batch_size or TOGETHER)
    rows = [_row(*found) for found in zip(pairs, ends[: len(pairs)], controls, residuals, strict=True)]
    return Evaluation(tuple(rows), tuple(end.atoms for end in ends[: len(pairs)]))


def _row(pair: RelaxationPair, found: Relaxed, control: Atoms, residual: float) -> Row:
    end, status, nsteps = found
    reference = pair.relaxed
    return Row(
        id=pair.id,
        group=pair.group,
        # The orientation of an isolated molecule is arbitrary: its ends may be rotated.
        unrelaxed=delta_q(pair.initial, reference, align=True),
        delta_q=delta_q(end, reference, align=True),
        rmsd=rmsd(end, reference, align=True),
        max_displacement=max_displacement(end, reference, align=True),
        right_basin=max_displacement(end, control, align=True) < SAME_END,
        reference_moves=max_displacement(control, reference, align=True),
        residual_force=residual,
        space_group=space_group(end),
        reference_space_group=space_group(reference),
        status=status.value,
        nsteps=nsteps,
        displacements=tuple(displacements(end, reference, by_mass=False, align=True).norm(dim=1).tolist()),
    )


def _residual_forces(potential: Potential, structures: Sequence[Atoms], size: int) -> list[float]:
    batches = single_points(potential, structures, size)
    return [force for batch, _, forces in batches for force in batch.largest_force(forces).tolist()]


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
