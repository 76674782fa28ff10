"""What a diagnosis found: numbers, and the same as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from ..evaluation import Evaluation, Row
from ..files import without_nan
from ..stability import step_limit
from .classes import CLASSES, failed
from .judgement import Judgement
from .labels import ForceError
from .landscape import Minima, Settling


@dataclass(frozen=True)
class Findings:
    """What `diagnose` found.

    Attributes
    ----------
    evaluation : Evaluation
        Of the potential as it is, by FIRE.
    classes : tuple of str
        For each row of the evaluation, one of `ase_bptt.diagnosis.classes.CLASSES`.
    judgement : Judgement
    forces : ForceError or None
        None where no structure carries forces.
    sample : tuple of str
        Ids of the pairs that what follows was measured on.
    settling : tuple of Settling
        By the Trainer's gradient descent.
    minima : tuple of Minima
        From rattled starts.
    curvatures : tuple of float
        Largest eigenvalue of the Hessian at each reference, eV/Å^2.
    step_size, momentum : float
        Of the Trainer's gradient descent; the step in Å^2/eV.
    """

    evaluation: Evaluation
    classes: tuple[str, ...]
    judgement: Judgement
    forces: ForceError | None
    sample: tuple[str, ...]
    settling: tuple[Settling, ...]
    minima: tuple[Minima, ...]
    curvatures: tuple[float, ...]
    step_size: float
    momentum: float

    @property
    def verdict(self) -> str:
        """One of "yes", "no: already right", "no: retrain on forces first", "unlikely"."""
        return self.judgement.verdict

    @property
    def wrong_basins(self) -> float:
        """Share of structures that end in another basin than the relaxation from their reference, or fail."""
        return fmean(failed(row) or not row.right_basin for row in self.evaluation.rows)

    @property
    def frames(self) -> float | None:
        """Median number of frames until Delta-Q has settled; None where all diverged."""
        return _median([s.frames for s in self.settling if s.frames is not None])

    @property
    def fire_frames(self) -> float | None:
        """Median number of frames of FIRE to the evaluation's fmax; None where all failed."""
        return _median([row.nsteps for row in self.sound])

    @property
    def step_limit(self) -> float | None:
        """Å^2/eV: above it, gradient descent without momentum diverges in the stiffest of the sample.

        None where nothing is stiff.
        """
        limit = step_limit(max((c for c in self.curvatures if math.isfinite(c)), default=0.0))
        return limit if math.isfinite(limit) else None

    @property
    def sound(self) -> list[Row]:
        """The rows of those that did not fail, over which means and medians are."""
        return [row for row in self.evaluation.rows if not failed(row)]

    def todict(self) -> dict[str, Any]:
        """All of it, as JSON; None for what is missing or not finite."""
        delta_q, unrelaxed = [r.delta_q for r in self.sound], [r.unrelaxed for r in self.evaluation.rows]
        rows = zip(self.evaluation.todict()["rows"], self.classes, strict=True)
        found = {
            **asdict(self.judgement),
            "n": len(self.classes),
            "kinds": len(self.evaluation.by_group()),
            "classes": {name: self.classes.count(name) for name in CLASSES},
            "wrong_basins": self.wrong_basins,
            "mean": fmean(delta_q) if delta_q else None,
            "median": _median(delta_q),
            "mean_unrelaxed": fmean(unrelaxed),
            "median_unrelaxed": _median(unrelaxed),
            "forces": self.forces and asdict(self.forces),
            "frames": self.frames,
            "fire_frames": self.fire_frames,
            "minima_median": _median([m.ends for m in self.minima]),
            "minima_largest": max((m.ends for m in self.minima), default=None),
            "reference_met": sum(m.reference is True for m in self.minima),
            "step_limit": self.step_limit,
            "step_size": self.step_size,
            "momentum": self.momentum,
            "sample": self.sample,
            "settling": [asdict(s) for s in self.settling],
            "minima": [asdict(m) for m in self.minima],
            "curvatures": self.curvatures,
            "rows": [row | {"class": name} for row, name in rows],
        }
        return without_nan(found)


def _median(values: list[Any]) -> float | None:
    return median(values) if values else None
