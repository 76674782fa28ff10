"""The health of a gradient: spectral radius of a frame, stability limit, and norms of the adjoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adjoints import Solve
from ..adjoints.hessian_solve import ZeroModes
from ..iterated_map import Status, Trajectory
from ..result import Relaxation
from ..stability import largest_curvature, step_limit
from ..steppers import State
from ..structures import Structures

ITERATIONS = 100
"""Products with the Jacobian. What is found then is rather too small than too large: by a thousandth where one
direction leads, by a hundredth or two where many are about as slow; three times as many make it a tenth of that."""


def spectral_radius(relaxation: Relaxation, *, iterations: int = ITERATIONS, seed: int = 0) -> tuple[float, ...]:
    """The spectral radius of the last frame's Jacobian d(X', state')/d(X, state), for each structure.

    By power iteration: a vector goes back through the same frame again and again, as a gradient does, and the mean
    rate at which its length changes over the last half of the iterations is the radius, also where the largest
    eigenvalues are a complex pair, as with momentum. Below 1 gradients fade along a long path, above 1 they grow.
    Rigid motions and directions that constraints hold do not count: along those a frame is the identity. Neither do
    numbers of the stepper that whole structures have, such as FIRE's time step.

    Where the state before the last frame was not stored, the frame is the first one of a relaxation that would begin
    at the relaxed positions.

    Parameters
    ----------
    relaxation : Relaxation
    iterations : int
        Products with the Jacobian, each of about two force calls.
    seed : int
        Of the vector to begin with.

    Returns
    -------
    tuple of float, length n
        NaN where positions or forces are not finite.

    Raises
    ------
    TypeError
        For steppers that cannot be differentiated.
    """
    trajectory = relaxation.trajectory
    stepper = trajectory.map.stepper
    if not stepper.differentiable:
        raise TypeError(
            f"The stepper {stepper.name!r} cannot be differentiated, so that its frames have no spectral "
            "radius: take 'gd' or 'fire'."
        )
    generators = [np.random.default_rng([seed, k]) for k in relaxation.members]
    members = zip(relaxation.members, generators, strict=True)
    return tuple(_radius(trajectory, k, iterations, generator) for k, generator in members)


def _radius(trajectory: Trajectory, k: int, iterations: int, generator: np.random.Generator) -> float:
    structure, state = _last_frame(trajectory, k)
    if not bool(structure.positions.isfinite().all()):
        return math.nan
    pull, sizes = _frame(trajectory, structure, state)
    _, forces = trajectory.map.potential.energy_and_forces(structure, trajectory.map.neighbor_list()(structure))
    if not bool(forces.isfinite().all()):
        return math.nan
    free = _free(structure, forces)
    vectors = [torch.as_tensor(generator.normal(size=size)).to(structure.positions) for size in sizes]
    rates = []
    for _ in range(iterations):
        length = math.sqrt(math.fsum(v.square().sum().item() for v in vectors))
        if not math.isfinite(length) or length == 0:
            return length
        vectors = pull([v / length for v in vectors])
        vectors[0] = free(vectors[0])
        rates.append(length)
    return _mean_rate(rates[1:])


def _mean_rate(rates: list[float]) -> float:
    """Geometric mean over the last half, with less weight at both ends: a pair's beat then averages out."""
    late = np.log(rates[len(rates) // 2 :])
    weights = np.sin(np.pi * (np.arange(len(late)) + 0.5) / len(late)) ** 2
    return float(np.exp(np.average(late, weights=weights)))


def _last_frame(trajectory: Trajectory, k: int) -> tuple[Structures, State]:
    """Structure k and the stepper's state before its last frame, or as a new relaxation would begin."""
    alone = trajectory.start.select([k])
    t = trajectory.nsteps[k] - 1
    if not 0 <= t < len(trajectory.frames):
        there = alone.replace(positions=trajectory.final.detach()[trajectory.start.atoms_of([k])])
        return there, trajectory.map.start(there)
    positions, state = trajectory.before(t, [k])
    return alone.replace(positions=positions), state


Pull = Callable[[list[Tensor]], list[Tensor]]


def _frame(trajectory: Trajectory, structure: Structures, state: State) -> tuple[Pull, list[torch.Size]]:
    """Products with the frame's Jacobian from the left, all of one graph, and the shapes of what it multiplies."""
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

    def pull(vectors: list[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(
            [outputs[k] for k in live], inputs, [vectors[k] for k in live], retain_graph=True, allow_unused=True
        )
        return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]

    return pull, [i.shape for i in inputs]


def _free(structure: Structures, forces: Tensor) -> Callable[[Tensor], Tensor]:
    """Without rigid motions, and without what acts along directions that constraints hold."""
    motions = ZeroModes(structure, forces)
    if not structure.maps:
        return motions.without

    def both(v: Tensor) -> Tensor:
        return structure.project_steps(structure.project_forces(v))

    v = torch.randn(structure.positions.shape, generator=torch.Generator().manual_seed(0)).to(structure.positions)
    # In a skewed cell the two together are no projection, but that of steps alone is.
    projection = both if torch.allclose(both(both(v)), both(v), atol=1e-5) else structure.project_steps
    x = torch.zeros_like(structure.positions).requires_grad_()
    with torch.enable_grad():
        projected = projection(x)

    def free(v: Tensor) -> Tensor:
        (transposed,) = torch.autograd.grad(projected, x, v, retain_graph=True)
        return motions.without(transposed)

    return free


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
    """The vitals of each structure; parameters and errors as for `ase_bptt.diagnostics.gradient_report.health`."""
    trajectory = relaxation.trajectory
    trajectory.check_weights()
    stepper = trajectory.map.stepper
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
    return step_limit(largest_curvature(relaxation.trajectory.map.potential, end, seed=seed))


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
