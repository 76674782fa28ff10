"""Gradient diagnostics: spectral radius of a frame, stability limit, and growth of the adjoint along the path."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adjoints import Solve
from ..adjoints.backward_sweep import Frames
from ..adjoints.hessian_solve import ZeroModes
from ..iterated_map import Status, Trajectory
from ..result import Relaxation
from ..stability import largest_curvature, step_limit
from ..steppers import State
from ..structures import Structures

ITERATIONS = 100
"""Products with the Jacobian. The radius is then underestimated by about 0.1 % where one direction dominates, by 1 or
2 % where many are about as slow; three times as many iterations reduce the error to a tenth."""


def spectral_radius(relaxation: Relaxation, *, iterations: int = ITERATIONS, seed: int = 0) -> tuple[float, ...]:
    """The spectral radius of the last frame's Jacobian d(X', state')/d(X, state), for each structure.

    By power iteration: a vector is multiplied repeatedly by the transposed Jacobian, as a gradient is, and the mean
    rate at which its norm changes over the last half of the iterations is the radius, also where the largest
    eigenvalues are a complex pair, as with momentum. Below 1 gradients vanish along a long path, above 1 they grow.
    Rigid motions and constrained directions are left out: along those a frame is the identity. So are variables of
    the stepper that belong to whole structures, such as FIRE's time step.

    Where the state before the last frame was not stored, the frame is the first one of a relaxation that starts from
    the relaxed positions.

    Parameters
    ----------
    relaxation : Relaxation
    iterations : int
        Products with the Jacobian, each of about two force calls.
    seed : int
        Of the initial vector.

    Returns
    -------
    tuple of float, length n
        NaN where positions or forces are not finite.

    Raises
    ------
    TypeError
        For steppers that cannot be differentiated.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import relax
    >>> from ase_bptt.steppers import GradientDescent
    >>> relaxation = relax("emt", molecule("N2"), stepper=GradientDescent(step_size=0.005), steps=20)
    >>> 0 < spectral_radius(relaxation)[0] < 1  # stable: gradients shrink with each frame
    True
    """
    trajectory = relaxation.trajectory
    stepper = trajectory.map.stepper
    if not stepper.differentiable:
        raise TypeError(
            f"The stepper {stepper.name!r} cannot be differentiated, so that its frames have no spectral "
            "radius: use 'gd' or 'fire'."
        )
    generators = [np.random.default_rng([seed, k]) for k in relaxation.members]
    members = zip(relaxation.members, generators, strict=True)
    return tuple(_radius(trajectory, k, iterations, generator) for k, generator in members)


def _radius(trajectory: Trajectory, k: int, iterations: int, generator: np.random.Generator) -> float:
    structure, state = _last_frame(trajectory, k)
    if not bool(structure.positions.isfinite().all()):
        return math.nan
    vjp, sizes = _frame(trajectory, structure, state)
    _, forces = trajectory.map.potential.energy_and_forces(structure, trajectory.map.neighbor_list()(structure))
    if not bool(forces.isfinite().all()):
        return math.nan
    project = _projection(structure, forces)
    vectors = [torch.as_tensor(generator.normal(size=size)).to(structure.positions) for size in sizes]
    rates = []
    for _ in range(iterations):
        norm = math.sqrt(math.fsum(v.square().sum().item() for v in vectors))
        if not math.isfinite(norm) or norm == 0:
            return norm
        vectors = vjp([v / norm for v in vectors])
        vectors[0] = project(vectors[0])
        rates.append(norm)
    return _mean_rate(rates[1:])


def _mean_rate(rates: list[float]) -> float:
    """Geometric mean over the last half, weighted less at both ends: the beat of a complex pair then averages out."""
    late = np.log(rates[len(rates) // 2 :])
    weights = np.sin(np.pi * (np.arange(len(late)) + 0.5) / len(late)) ** 2
    return float(np.exp(np.average(late, weights=weights)))


def _last_frame(trajectory: Trajectory, k: int) -> tuple[Structures, State]:
    """Structure k and the stepper's state before its last frame, or at the start of a new relaxation."""
    alone = trajectory.start.select([k])
    t = trajectory.nsteps[k] - 1
    if not 0 <= t < len(trajectory.frames):
        there = alone.replace(positions=trajectory.final.detach()[trajectory.start.atoms_of([k])])
        return there, trajectory.map.start(there)
    positions, state = Frames(trajectory).before(t, [k])
    return alone.replace(positions=positions), state


VectorJacobianProduct = Callable[[list[Tensor]], list[Tensor]]


def _frame(
    trajectory: Trajectory, structure: Structures, state: State
) -> tuple[VectorJacobianProduct, list[torch.Size]]:
    """Vector-Jacobian products of the frame, all from one graph, and the shapes of the vectors."""
    carried = sum(t.is_floating_point() for t in state.atoms.values())
    floats = state.map(Tensor.detach).floats()
    x = structure.positions.detach().clone().requires_grad_()
    inputs = [x, *(s.clone().requires_grad_() for s in floats[:carried])]
    with torch.enable_grad():
        after, state = trajectory.map.frame(
            structure.replace(positions=x, cells=structure.cells.detach()),
            state.with_floats([*inputs[1:], *floats[carried:]]),
            trajectory.map.neighbor_list(),
        )
    outputs = [after, *state.floats()[:carried]]
    live = [k for k, output in enumerate(outputs) if output.requires_grad]

    def vjp(vectors: list[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(
            [outputs[k] for k in live], inputs, [vectors[k] for k in live], retain_graph=True, allow_unused=True
        )
        return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]

    return vjp, [i.shape for i in inputs]


def _projection(structure: Structures, forces: Tensor) -> Callable[[Tensor], Tensor]:
    """Removes rigid motions and components along constrained directions."""
    motions = ZeroModes(structure, forces)
    if not structure.maps:
        return motions.without

    def both(v: Tensor) -> Tensor:
        return structure.project_steps(structure.project_forces(v))

    v = torch.randn(structure.positions.shape, generator=torch.Generator().manual_seed(0)).to(structure.positions)
    # In a skewed cell the product of the two is no projection; that of the steps alone is.
    projection = both if torch.allclose(both(both(v)), both(v), atol=1e-5) else structure.project_steps
    x = torch.zeros_like(structure.positions).requires_grad_()
    with torch.enable_grad():
        projected = projection(x)

    def project(v: Tensor) -> Tensor:
        (transposed,) = torch.autograd.grad(projected, x, v, retain_graph=True)
        return motions.without(transposed)

    return project


@dataclass(frozen=True)
class GradientDiagnostics:
    """Diagnostics of the gradient of one structure.

    Attributes
    ----------
    frames : int
        Frames of its relaxation.
    status : Status
    step_size : float or None
        Å^2/eV, of its last frame; the longest of all elements. None where the stepper has none.
    step_limit : float
        2/lambda_max of the Hessian at its end, in Å^2/eV: infinite where no eigenvalue is positive, NaN where unknown.
    radius : float or None
        Spectral radius of its last frame's Jacobian; None for steppers that cannot be differentiated.
    back_to : int or None
        The earliest frame that the backward pass reached; None where it did not run through frames.
    growth : float or None
        |dL/dX| before that frame over |dL/dX| at the end; NaN where that is zero.
    peak : float or None
        The largest |dL/dX| of all frames over |dL/dX| at the end.
    peak_frame : int or None
        The frame before which it was largest.
    solve : Solve or None
        How the linear equation of an implicit gradient was solved.
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
        """As JSON, except for numbers that are not finite."""
        found = dict(vars(self)) | {"status": self.status.value}
        if self.solve is not None:
            found["solve"] = vars(self.solve) | {"status": self.solve.status.value}
        return found


def of_structures(relaxation: Relaxation, *, iterations: int = ITERATIONS, seed: int = 0) -> list[GradientDiagnostics]:
    """The diagnostics of each structure; parameters and errors as for `gradient_report.diagnose_gradients`."""
    trajectory = relaxation.trajectory
    trajectory.check_weights()
    stepper = trajectory.map.stepper
    frames = relaxation.nsteps.tolist()
    radii: list[Any] = [None] * len(relaxation)
    if stepper.differentiable:
        radii = list(spectral_radius(relaxation, iterations=iterations, seed=seed))
    growths = _growths(relaxation)
    solves = relaxation.solves or (None,) * len(relaxation)
    return [
        GradientDiagnostics(
            frames[k],
            relaxation.status[k],
            _step_size(stepper.todict(), frames[k]),
            _limit(relaxation, k, seed),
            radii[k],
            *growths[k],
            solves[k],
        )
        for k in range(len(relaxation))
    ]


def _limit(relaxation: Relaxation, k: int, seed: int) -> float:
    end = relaxation.structures.select([k])
    end = end.replace(positions=end.positions.detach(), cells=end.cells.detach())
    if not bool(end.positions.isfinite().all()):
        return math.nan
    return step_limit(largest_curvature(relaxation.trajectory.map.potential, end, seed=seed))


def _step_size(stepper: dict[str, Any], frames: int) -> float | None:
    """Of the last of these frames, from a stepper's `todict`: one, or the longest of all elements, or that frame's."""
    size, last = stepper.get("step_size"), max(frames - 1, 0)
    if isinstance(size, dict):
        size = max(size.values())
    elif isinstance(size, list):
        size = size[min(last, len(size) - 1)]
    return None if size is None else float(size * stepper.get("anneal", 1.0) ** last)


Growth = tuple[int | None, float | None, float | None, int | None]


def _growths(relaxation: Relaxation) -> list[Growth]:
    """For each structure the fields back_to, growth, peak and peak_frame of its diagnostics."""
    # The part of a guided gradient that runs through frames starts from the early positions.
    through = relaxation if relaxation.adjoint_norms is not None or relaxation.early is None else relaxation.early
    norms = through.adjoint_norms
    if norms is None:
        return [(None, None, None, None)] * len(relaxation)
    shares = torch.where(norms[-1] > 0, norms / norms[-1], torch.nan).double().cpu()
    peaks, rows = shares.max(0)
    # Norms before the window of a truncated gradient are zero.
    firsts = (shares != 0).to(torch.int64).argmax(0).tolist()
    growths = [column[first].item() for column, first in zip(shares.T, firsts, strict=True)]
    return list(zip(firsts, growths, peaks.tolist(), rows.tolist(), strict=True))
