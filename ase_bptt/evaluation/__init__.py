"""Evaluation of a potential: where its relaxations end, compared with the reference."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, median
from typing import Any

import numpy as np
from ase import Atoms
from tqdm import tqdm

from ..pairs import RelaxationPair
from ..pairs.usable import check_made
from ..potential import Potential
from ..steppers import Stepper
from ..throughput import TOGETHER, Relaxed, relax_all, single_points
from ..throughput.journal import Part
from .row import BASIN_RULE, Row, row_of, space_group

__all__ = ["BASIN_RULE", "FLOOR", "Evaluation", "Row", "evaluate", "space_group"]

FLOOR = 1e-3
"""amu^1/2 Å: the least Delta-Q of which a logarithm is taken; smaller values count as this."""


@dataclass(frozen=True)
class Evaluation:
    """Rows of `evaluate` with their summary; `ends` are the relaxed structures, if they were kept."""

    rows: tuple[Row, ...]
    ends: Sequence[Atoms] = field(default=(), compare=False, repr=False)

    def __repr__(self) -> str:
        return (
            f"Evaluation({len(self.rows)} in all, Delta-Q {self.mean:.2f} on average, median {self.median:.2f} "
            f"amu^1/2 Å, right basins {self.basins:.0%})"
        )

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]]) -> Evaluation:
        """From the rows that `todict` gives."""
        # JSON knows no tuples.
        plain: list[dict[str, Any]]
        plain = [{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        return cls(tuple(Row(**row) for row in plain))

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
    def cells_move(self) -> bool:
        """Whether any structure's cell was relaxed."""
        return any(row.cell_moves for row in self.rows)

    def by_cell(self) -> tuple[Evaluation, Evaluation]:
        """The structures whose cells are fixed, and those whose cells move; either may have no rows."""
        fixed, moved = (tuple(row for row in self.rows if row.cell_moves is which) for which in (False, True))
        return Evaluation(fixed), Evaluation(moved)

    @property
    def volume_error(self) -> float:
        """Mean absolute error of the volumes of cells that move, as a share; NaN where none has a volume."""
        errors = [abs(row.volume_error) for row in self.rows if row.volume_error is not None]
        return fmean(errors) if errors else math.nan

    @property
    def cell_strain(self) -> float:
        """Median strain of the cells that move; NaN where none does."""
        return _median([row.cell_strain for row in self.rows if row.cell_strain is not None])

    @property
    def scaled_rmsd(self) -> float:
        """Median of RMSD / (V/n)^(1/3) of the structures whose cells move; NaN where none does."""
        return _median([row.scaled_rmsd for row in self.rows if row.scaled_rmsd is not None])

    @property
    def lattice_errors(self) -> tuple[float, float]:
        """Mean absolute errors of a, b, c in Å and of the angles in degrees; NaN where no cell moves."""
        errors = [row.lattice_error for row in self.rows if row.lattice_error is not None]
        if not errors:
            return math.nan, math.nan
        found = np.abs(errors).mean(0)
        return float(found[:3].mean()), float(found[3:].mean())

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
            **self._of_cells(),
            "rows": [{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(row).items()} for row in self.rows],
        }

    def _of_cells(self) -> dict[str, Any]:
        """The figures of cells that move; none where all are fixed."""
        if not self.cells_move:
            return {}
        lengths, angles = self.lattice_errors
        return {
            "n_cells_moved": len(self.by_cell()[1].rows),
            "volume_error": self.volume_error,
            "cell_strain": self.cell_strain,
            "length_error": lengths,
            "angle_error": angles,
            "scaled_rmsd": self.scaled_rmsd,
        }


def _median(values: Sequence[float]) -> float:
    # NaN cannot be sorted.
    return median(values) if values and all(map(math.isfinite, values)) else math.nan


def evaluate(
    potential: Potential,
    pairs: Sequence[RelaxationPair],
    *,
    stepper: Stepper | str = "fire",
    fmax: float = 0.02,
    steps: int = 500,
    batch_size: int | None = None,
    memory: float | None = None,
    compile: bool = False,
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
    batch_size, memory, compile : int or None, float or None, bool
        As for `relax_all`: structures relaxed together, GiB that they may take, and whether forces are compiled.
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
        For an unknown name of a stepper, and for cells that cannot move as their pair says, by its id.

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
    check_made(pairs)
    starts, ends = Starts(pairs), {}
    shown = sys.stderr.isatty() if progress is None else progress
    cells = 2 * [p.freedom for p in pairs]
    with tqdm(total=len(starts), unit="structure", disable=not shown, leave=False) as bar:
        for k, end in relax_all(
            potential, starts, stepper=stepper, fmax=fmax, steps=steps, cells=cells, batch_size=batch_size,
            memory=memory, compile=compile,
        ):  # fmt: skip
            ends[k] = end
            bar.update()
    found = evaluation_of(potential, pairs, [ends[k] for k in range(len(starts))], batch_size)
    return replace(found, ends=tuple(found.ends))


def evaluation_of(
    potential: Potential, pairs: Sequence[RelaxationPair], ends: Sequence[Relaxed], batch_size: int | None = None
) -> Evaluation:
    """The evaluation that the ends of `Starts` give; its own are read when they are asked for."""
    n, size = len(pairs), batch_size or TOGETHER
    rows = []
    for first in range(0, n, size):
        some = range(first, min(first + size, n))
        residuals = _residual_forces(potential, [pairs[k].relaxed for k in some], size)
        rows += [row_of(pairs[k], ends[k], ends[n + k].atoms, force) for k, force in zip(some, residuals, strict=True)]
    return Evaluation(tuple(rows), Part(ends, range(n), lambda end: end.atoms))


class Starts(Sequence[Atoms]):
    """The structures that an evaluation relaxes, each read when it is asked for: initial ones, then references.

    Parameters
    ----------
    pairs : sequence of RelaxationPair
    """

    def __init__(self, pairs: Sequence[RelaxationPair]):
        self.pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        second, pair = divmod(range(len(self))[k], len(self.pairs))
        return self.pairs[pair].relaxed if second else self.pairs[pair].initial


def _residual_forces(potential: Potential, structures: Sequence[Atoms], size: int) -> list[float]:
    batches = single_points(potential, structures, size)
    return [force for batch, _, forces in batches for force in batch.largest_force(forces).tolist()]
