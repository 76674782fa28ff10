"""The numbers by which the gradient of one relaxation is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..adjoints import Solve
from ..result import Relaxation, Status
from ..stability import largest_curvature, step_limit
from .spectrum import ITERATIONS, spectral_radius


@dataclass(frozen=True)
class Vitals:
    """Of the gradient of one structure.

    Attributes
    ----------
    frames : int
        That it took.
    status : Status
    step_size : float or None
        Å^2/eV, of its last frame; the longest of its elements. None where the stepper has none.
    step_limit : float
        2/lambda_max of the Hessian where it ended, in Å^2/eV: infinite where nothing is stiff, NaN where it is unknown.
    radius : float or None
        Spectral radius of its last frame's Jacobian; None for steppers that cannot be differentiated.
    back_to : int or None
        The frame before which the gradient's way back ended; None where it did not go through frames.
    growth : float or None
        |dL/dX| there over |dL/dX| at its end; NaN where that is zero.
    peak : float or None
        The largest |dL/dX| on the way over |dL/dX| at its end.
    peak_frame : int or None
        Before which frame it was that large.
    solve : Solve or None
        How the equation of an implicit gradient was solved.
    """

    frames: int
    status: Status
    step_size: float | None
    step_limit: float
    radius: float | None
    back_to: int | None
    growth: float | None
    peak: float | None
    peak_frame: int | None
    solve: Solve | None

    def todict(self) -> dict[str, Any]:
        """All of it, as JSON but for numbers that are not finite."""
        found = dict(vars(self)) | {"status": self.status.value}
        if self.solve is not None:
            found["solve"] = vars(self.solve) | {"status": self.solve.status.value}
        return found


def measure(relaxation: Relaxation, *, iterations: int = ITERATIONS, seed: int = 0) -> list[Vitals]:
    """The vitals of each structure; parameters and errors as for `ase_bptt.health.health`."""
    record = relaxation._record
    record.check_weights()
    stepper = record.map.stepper
    frames = relaxation.nsteps.tolist()
    radii: list[Any] = [None] * len(relaxation)
    if stepper.differentiable:
        radii = list(spectral_radius(relaxation, iterations=iterations, seed=seed))
    backs = _ways_back(relaxation)
    solves = relaxation.solves or (None,) * len(relaxation)
    return [
        Vitals(
            frames[k],
            relaxation.status[k],
            _step_size(stepper.todict(), frames[k]),
            _limit(relaxation, k, seed),
            radii[k],
            *backs[k],
            solves[k],
        )
        for k in range(len(relaxation))
    ]


def _limit(relaxation: Relaxation, k: int, seed: int) -> float:
    end = relaxation.structures.select([k])
    end = end.replace(positions=end.positions.detach(), cells=end.cells.detach())
    if not bool(end.positions.isfinite().all()):
        return math.nan
    return step_limit(largest_curvature(relaxation._record.map.potential, end, seed=seed))


def _step_size(numbers: dict[str, Any], frames: int) -> float | None:
    """Of the last of these frames, from what a stepper's `todict` gives: one, or one for each element or frame."""
    size, last = numbers.get("step_size"), max(frames - 1, 0)
    if isinstance(size, dict):
        size = max(size.values())
    elif isinstance(size, list):
        size = size[min(last, len(size) - 1)]
    return None if size is None else float(size * numbers.get("anneal", 1.0) ** last)


WayBack = tuple[int | None, float | None, float | None, int | None]


def _ways_back(relaxation: Relaxation) -> list[WayBack]:
    """For each structure: where its way back ended, its growth until there, its peak, and where that was."""
    # Of a guided gradient, the way back is that from the early positions.
    through = relaxation if relaxation.adjoint_norms is not None or relaxation.early is None else relaxation.early
    norms = through.adjoint_norms
    if norms is None:
        return [(None, None, None, None)] * len(relaxation)
    shares = torch.where(norms[-1] > 0, norms / norms[-1], torch.nan).double().cpu()
    peaks, rows = shares.max(0)
    # What lies before a window is zero.
    firsts = (shares != 0).to(torch.int64).argmax(0).tolist()
    growths = [column[first].item() for column, first in zip(shares.T, firsts, strict=True)]
    return list(zip(firsts, growths, peaks.tolist(), rows.tolist(), strict=True))
