"""Where a potential's relaxations end, beside where the reference's end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.optimize import BFGS

from .calculator import TorchCalculator
from .losses import delta_q, max_displacement, rmsd
from .pairs import RelaxationPair
from .potential import Potential
from .relaxation import relax
from .result import Status
from .steppers import Stepper

SAME_END = 0.1
"""Å: ends of two relaxations that differ by less, at the farthest atom, are in one basin."""
BASIN_RULE = (
    "right basin: relaxed from the initial and from the reference structure, the two ends are within "
    f"{SAME_END} Å of each other at the farthest atom (drift removed)"
)


@dataclass(frozen=True)
class Row:
    """How one structure ended: Delta-Q in amu^1/2 Å, RMSD and largest displacement in Å."""

    id: str
    group: str
    delta_q: float
    rmsd: float
    max_displacement: float
    right_basin: bool
    status: str
    nsteps: int


@dataclass(frozen=True)
class Evaluation:
    """Rows of `evaluate`, and their summary."""

    rows: tuple[Row, ...]

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]]) -> Evaluation:
        """From the rows that `todict` gives."""
        return cls(tuple(Row(**row) for row in rows))

    @property
    def mean(self) -> float:
        """Mean Delta-Q, amu^1/2 Å."""
        return fmean(row.delta_q for row in self.rows)

    @property
    def median(self) -> float:
        """Median Delta-Q, amu^1/2 Å."""
        return median(row.delta_q for row in self.rows)

    @property
    def basins(self) -> float:
        """Share of structures in the right basin."""
        return fmean(row.right_basin for row in self.rows)

    def todict(self) -> dict[str, Any]:
        """Rows and summary, as JSON."""
        return {
            "n": len(self.rows),
            "mean": self.mean,
            "median": self.median,
            "basins": self.basins,
            "rows": [asdict(row) for row in self.rows],
        }


def evaluate(
    potential: Potential,
    pairs: Sequence[RelaxationPair],
    *,
    stepper: Stepper | str = "fire",
    fmax: float = 0.02,
    steps: int = 500,
    batch_size: int = 16,
) -> Evaluation:
    """Relax from each initial and each reference structure, and compare the ends.

    Parameters
    ----------
    stepper : Stepper or str
        A stepper of ours, or "bfgs" for ASE's BFGS, one structure at a time.
    fmax : float
        eV/Å.
    steps : int
        Frames at most.
    batch_size : int
        Structures relaxed together.
    """
    starts = [p.initial for p in pairs] + [p.relaxed for p in pairs]
    ends = list(_ends(potential, starts, stepper, fmax, steps, batch_size))
    rows = []
    for pair, (end, status, nsteps), (control, _, _) in zip(pairs, ends[: len(pairs)], ends[len(pairs) :], strict=True):
        rows.append(
            Row(
                id=pair.id,
                group=pair.group,
                delta_q=delta_q(end, pair.relaxed),
                rmsd=rmsd(end, pair.relaxed),
                max_displacement=max_displacement(end, pair.relaxed),
                right_basin=max_displacement(end, control) < SAME_END,
                status=status.value,
                nsteps=nsteps,
            )
        )
    return Evaluation(tuple(rows))


def unrelaxed(pairs: Sequence[RelaxationPair]) -> list[float]:
    """Delta-Q of each start to its reference, amu^1/2 Å: what no relaxation at all would give."""
    return [delta_q(p.initial, p.relaxed) for p in pairs]


End = tuple[Atoms, Status, int]


def _ends(
    potential: Potential, starts: Sequence[Atoms], stepper: Stepper | str, fmax: float, steps: int, size: int
) -> Iterator[End]:
    if stepper == "bfgs":
        yield from (_by_bfgs(potential, atoms, fmax, steps) for atoms in starts)
        return
    for first in range(0, len(starts), size):
        with torch.no_grad():
            run = relax(potential, starts[first : first + size], stepper=stepper, fmax=fmax, steps=steps)
        yield from zip(run.to_atoms(), run.status, run.nsteps.tolist(), strict=True)


def _by_bfgs(potential: Potential, start: Atoms, fmax: float, steps: int) -> End:
    atoms = start.copy()
    atoms.calc = TorchCalculator(potential)
    with BFGS(atoms, logfile=None) as optimizer:
        try:
            status = Status.CONVERGED if optimizer.run(fmax=fmax, steps=steps) else Status.OUT_OF_STEPS
        except (CalculationFailed, np.linalg.LinAlgError):
            status = Status.DIVERGED
        return atoms, status, optimizer.nsteps
