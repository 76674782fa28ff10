"""Going back through the frames, each run again: exact, flat in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..iterated_map import Checkpointing, IteratedMap, Trajectory
from ..structures import Structures
from ..utils import check_count, check_positive, outside_inference_mode
from .adjoint import Adjoint
from .backward_sweep import BackwardSweep, check_smooth


@dataclass(frozen=True)
class Replay(Adjoint):
    """Keep the stepper's states only, and recompute each frame in the backward sweep: exact, flat in memory.

    The adjoint equations of the iterated map (arXiv 2512.01067): lambda(t) = (dX(t+1)/dX(t))^T lambda(t+1) with the
    stepper's state beside X, and dL/dweights the sum of (dX(t+1)/dweights)^T lambda(t+1).

    Parameters
    ----------
    every : int
        Store the state before each so many frames. 1 stores all, 48 bytes an atom and frame with FIRE; m stores
        1/m of that, and runs each frame once more.
    clip : float or None
        Largest norm of a structure's lambda(t), as a multiple of its norm at the relaxed positions; longer ones are
        shortened. None leaves the gradient exact.
    differences : bool
        Take derivatives of the forces by central differences of gradients of the energy, instead of from
        second derivatives: faster, and right to about 1e-6 of the gradient, in float64, which it needs.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import adjoints, load_potential, relax, steppers
    >>> potential, stepper = load_potential("morse"), steppers.GradientDescent(0.005)
    >>> relaxation = relax(potential, molecule("N2"), stepper=stepper, steps=4, adjoint=adjoints.Replay())
    >>> relaxation.positions.diff(dim=0).norm().backward()
    >>> print(f"dr/dr0 = {potential.r0.grad:.3f}")
    dr/dr0 = 0.506
    """

    every: int = 1
    clip: float | None = None
    differences: bool = False

    name = "replay"

    def __post_init__(self) -> None:
        check_count(every=self.every)
        check_positive(clip=self.clip)

    @property
    def checkpointing(self) -> Checkpointing:  # type: ignore[override]
        """Every so many frames."""
        return Checkpointing(every=self.every, forces=self.differences)

    def check(self, iterated: IteratedMap, structures: Structures) -> None:
        """Refuse differences of forces that are no energy's gradient, or too coarse for them."""
        super().check(iterated, structures)
        if self.differences:
            check_smooth(iterated.potential)

    def attach(self, trajectory: Trajectory) -> Tensor:
        """The positions as one node of the graph."""
        return _attach(trajectory, None, self.clip, self.differences)


@dataclass(frozen=True)
class Truncated(Adjoint):
    """Go back through the last frames only (truncated back-propagation through time).

    What lies before them is taken as given: the gradient of the initial positions of a structure with more frames is
    zero. Biased, and cheaper in proportion.

    Parameters
    ----------
    window : int
        Frames of each structure, counted from its own last one.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import adjoints, load_potential, relax, steppers
    >>> potential, stepper = load_potential("morse"), steppers.GradientDescent(0.005)
    >>> relaxation = relax(potential, molecule("N2"), stepper=stepper, steps=4, adjoint=adjoints.Truncated(2))
    >>> relaxation.positions.diff(dim=0).norm().backward()
    >>> print(f"dr/dr0 = {potential.r0.grad:.3f}")
    dr/dr0 = 0.464
    """

    window: int

    name = "truncated"

    def __post_init__(self) -> None:
        check_count(window=self.window)

    @property
    def checkpointing(self) -> Checkpointing:  # type: ignore[override]
        """The last ones of each structure."""
        return Checkpointing(last=self.window)

    def attach(self, trajectory: Trajectory) -> Tensor:
        """The positions as one node of the graph."""
        return _attach(trajectory, self.window, None, False)


def _attach(trajectory: Trajectory, window: int | None, clip: float | None, differences: bool) -> Tensor:
    start = trajectory.start
    final = trajectory.final.detach()
    back = partial(BackwardSweep, trajectory, clip=clip, differences=differences)
    inputs = (start.positions, *start.conditions(), *trajectory.map.parameters())
    return _Replayed.apply(back, window, trajectory, final, *inputs)


class _Replayed(torch.autograd.Function):
    """The whole relaxation as one node of the graph."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        back: Callable[..., BackwardSweep],
        window: int | None,
        trajectory: Trajectory,
        final: Tensor,
        positions: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.back, ctx.window, ctx.trajectory = back, window, trajectory
        count = len(trajectory.start.conditions())
        conditions, ctx.weights = inputs[:count], inputs[count:]
        ctx.conditions = [value.requires_grad for value in conditions]
        # The frames start from these very tensors: let torch notice when they change in place.
        ctx.save_for_backward(positions, *conditions)
        return final.clone()

    @staticmethod
    @once_differentiable
    @outside_inference_mode
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.trajectory.check_weights()
        _ = ctx.saved_tensors  # raises where they changed
        # Some may have been frozen since.
        weights = [p for p in ctx.weights if p.requires_grad]
        back = ctx.back(gradient=gradient, weights=weights, conditions=ctx.conditions)
        back.run(ctx.window)
        found = iter(back.to_weights)
        to_weights = [next(found) if p.requires_grad else None for p in ctx.weights]
        return None, None, None, None, back.adjoint, *back.to_conditions, *to_weights
