"""The gradient at a minimum, whatever path led there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..iterated_map import IteratedMap, Status, Trajectory
from ..structures import Structures
from ..utils import check_count, check_positive, outside_inference_mode
from .adjoint import Adjoint, Attached
from .hessian_solve import Solve, SolveStatus, ZeroModes, conjugate_gradients

if TYPE_CHECKING:
    from ..relaxation import Loop


class GradientWarning(UserWarning):
    """The backward pass could not solve for the gradient of a structure at its minimum: see `Solve`."""


SHOWN = 5
"""Structures that a warning names."""
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AtMinimum(Adjoint):
    """Base class: dL/dweights = w . dF/dweights at the relaxed structure, with a vector w that the subclass finds.

    No frame is stored, and any stepper may have led there. Nothing flows to the initial positions nor to the stepper:
    their gradients are exactly zero, since a minimum does not depend on where the path to it started. A structure
    that did not relax below fmax gives no gradient.

    Parameters
    ----------
    fmax : float
        eV/Å. Structures are relaxed to this at least, also where `relax` is given a larger one.

    Examples
    --------
    >>> from ase_bptt import adjoints
    >>> [name for name, adjoint in adjoints.ADJOINTS.items() if issubclass(adjoint, adjoints.AtMinimum)]
    ['implicit', 'one-step']
    """

    fmax: float = 0.01

    through_frames = False
    needs_minimum = True

    def __post_init__(self) -> None:
        check_positive(fmax=self.fmax)

    def check(self, iterated: IteratedMap, structures: Structures) -> None:
        """Refuse constraints by whose maps no minimum can be defined, and forces that are no energy's gradient."""
        super().check(iterated, structures)
        if not iterated.potential.conservative:
            raise NotImplementedError(
                f"The forces of this {iterated.potential.family} potential are not the negative gradient of an energy, "
                f"so that it has no Hessian for the adjoint {self.name!r}: take 'replay'."
            )
        _check_projectors(structures)

    def required_fmax(self, fmax: float) -> float:
        """The tighter of the two."""
        return min(fmax, self.fmax)

    def apply(self, loop: Loop, *, warm: Loop | None = None) -> Attached:
        """The path does not matter: from a start near the minimum, where there is one."""
        return super().apply(loop if warm is None else warm)

    def attach(self, trajectory: Trajectory) -> Tensor:
        """The positions as one node of the graph, whose backward pass warns of structures that it could not solve."""
        start, final = trajectory.start, trajectory.final.detach()
        inputs = (start.positions, *start.conditions(), *trajectory.map.parameters())
        return _AtMinimum.apply(self, trajectory, final, *inputs)

    def solve(self, product: Product, rhs: Tensor, structures: Structures) -> tuple[Tensor, list[Solve]]:
        """The vector w (n_atoms, 3) in Å^2/eV times the gradient's unit, and how it was found."""
        raise NotImplementedError


@dataclass(frozen=True)
class Implicit(AtMinimum):
    """The implicit-function theorem at the relaxed structure: w = H^-1 dL/dX with the Hessian H of the energy.

    F(X*, weights) = 0 gives dX*/dweights = H^-1 dF/dweights. H is never built: conjugate gradients ask for its products
    with vectors, each a second differentiation of the energy. Rigid motions are projected out, and so are the
    constrained degrees of freedom.

    Parameters
    ----------
    damping : float
        eV/Å^2, added to all of H: soft directions count less. 0 leaves the gradient exact.
    tolerance : float
        Of the residual, relative to the norm of dL/dX.
    max_iterations : int
        Conjugate gradient iterations at most.
    fmax : float
        eV/Å. Structures are relaxed to this at least, also where `relax` is given a larger one.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import adjoints, load_potential, relax
    >>> potential = load_potential("morse")
    >>> relaxation = relax(potential, molecule("N2"), stepper="bfgs", adjoint=adjoints.Implicit())
    >>> relaxation.positions.diff(dim=0).norm().backward()
    >>> print(f"dr/dr0 = {potential.r0.grad:.3f}, {relaxation.solves[0].status.value}")
    dr/dr0 = 1.000, solved
    """

    fmax: float = 0.01
    damping: float = 0.0
    tolerance: float = 1e-3
    max_iterations: int = 200

    name = "implicit"

    def __post_init__(self) -> None:
        check_positive(fmax=self.fmax, tolerance=self.tolerance)
        check_count(max_iterations=self.max_iterations)
        if not self.damping >= 0:
            raise ValueError(f"damping must not be negative, got {self.damping} eV/Å^2.")

    def solve(self, product: Product, rhs: Tensor, structures: Structures) -> tuple[Tensor, list[Solve]]:
        """By conjugate gradients."""
        return conjugate_gradients(
            lambda v: product(v) + self.damping * v,
            rhs,
            structures,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )


@dataclass(frozen=True)
class OneStep(AtMinimum):
    """One step of gradient descent at the relaxed structure, with all earlier ones taken as constant: w = eta dL/dX.

    The first term of the series whose sum is `Implicit` (Bolte, Pauwels and Vaiter, NeurIPS 2023, "One-step
    differentiation of iterative algorithms"). No Hessian is needed; right in sign along each of its eigenvectors,
    wrong in length.

    Parameters
    ----------
    step_size : float
        eta in Å^2/eV.
    fmax : float
        eV/Å. Structures are relaxed to this at least, also where `relax` is given a larger one.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import adjoints, load_potential, relax
    >>> potential = load_potential("morse")
    >>> relaxation = relax(potential, molecule("N2"), stepper="bfgs", adjoint=adjoints.OneStep())
    >>> relaxation.positions.diff(dim=0).norm().backward()
    >>> print(f"dr/dr0 = {potential.r0.grad:.3f}")
    dr/dr0 = 7.203
    """

    fmax: float = 0.01
    step_size: float = 0.05

    name = "one-step"

    def __post_init__(self) -> None:
        check_positive(fmax=self.fmax, step_size=self.step_size)

    def solve(self, product: Product, rhs: Tensor, structures: Structures) -> tuple[Tensor, list[Solve]]:
        """Without any product."""
        return self.step_size * rhs, [Solve(SolveStatus.SOLVED, 0, 0.0)] * len(structures)


class _AtMinimum(torch.autograd.Function):
    """The relaxed positions as a function of the weights and conditions alone."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        adjoint: AtMinimum,
        trajectory: Trajectory,
        final: Tensor,
        positions: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.adjoint, ctx.trajectory, ctx.final = adjoint, trajectory, final
        count = len(trajectory.start.conditions())
        ctx.weights = inputs[count:]
        ctx.save_for_backward(positions, *inputs[:count])
        return final.clone()

    @staticmethod
    @once_differentiable
    @outside_inference_mode
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        trajectory: Trajectory = ctx.trajectory
        trajectory.check_weights()
        positions, *conditions = ctx.saved_tensors
        relaxed = [k for k in range(len(trajectory.start)) if trajectory.ends[k].status is Status.CONVERGED]
        solves = dict.fromkeys(range(len(trajectory.start)), Solve(SolveStatus.UNRELAXED, 0, 1.0))
        to_conditions = [torch.zeros_like(value) for value in conditions]
        to_weights = [torch.zeros_like(p) if p.requires_grad else None for p in ctx.weights]
        if relaxed:
            atoms = trajectory.start.atoms_of(relaxed)
            structures = trajectory.start.select(relaxed).replace(positions=ctx.final[atoms])
            wanted = [p for p in ctx.weights if p.requires_grad]
            ends = (structures, gradient[atoms], [value[relaxed] for value in conditions])
            found, of_conditions, pulled = _vjp_at_minimum(ctx.adjoint, trajectory, *ends, wanted)
            solves |= dict(zip(relaxed, found, strict=True))
            for to, part in zip(to_conditions, of_conditions, strict=True):
                to[relaxed] = part
            queue = iter(pulled)
            to_weights = [None if zero is None else zero + next(queue) for zero in to_weights]
        trajectory.solves = tuple(solves.values())
        if trajectory.warns:
            _warn(trajectory)
        return None, None, None, torch.zeros_like(positions), *to_conditions, *to_weights


def _warn(trajectory: Trajectory) -> None:
    """Warn of the structures whose gradient is not that of a minimum, by their place in the batch and their formula."""
    formulas = trajectory.start.formulas()
    by_status: dict[SolveStatus, list[str]] = {}
    for k, solve in enumerate(trajectory.solves):
        if solve.status is not SolveStatus.SOLVED:
            by_status.setdefault(solve.status, []).append(f"{k} ({formulas[k]})")
    for status, places in by_status.items():
        some = ", ".join(places[:SHOWN]) + f" and {len(places) - SHOWN} more" * (len(places) > SHOWN)
        warnings.warn(
            f"Gradient of structure {some}: {status.sentence}",
            GradientWarning,
            stacklevel=2,
        )


def _vjp_at_minimum(
    adjoint: AtMinimum,
    trajectory: Trajectory,
    structures: Structures,
    gradient: Tensor,
    conditions: list[Tensor],
    weights: list[Tensor],
) -> tuple[list[Solve], list[Tensor], list[Tensor]]:
    """From dL/dX at the minima to dL/dconditions and dL/dweights; one graph serves all products."""
    x = structures.positions.detach().requires_grad_()
    conditions = [value.detach().requires_grad_() for value in conditions]
    with torch.enable_grad():
        live = structures.replace(positions=x).under(conditions)
        edges = trajectory.map.neighbor_list()(live)
        _, forces = trajectory.map.potential.energy_and_forces(live, edges, create_graph=True)
    motions = ZeroModes(structures, forces)

    def free(v: Tensor) -> Tensor:
        return motions.without(structures.project_forces(v))

    def product(v: Tensor) -> Tensor:
        (change,) = torch.autograd.grad(forces, x, free(v), retain_graph=True)
        return -free(change)

    w, solves = adjoint.solve(product, free(gradient), structures)
    inputs = [*conditions, *weights]
    found = torch.autograd.grad(forces, inputs, structures.project_forces(w), allow_unused=True)
    each = [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]
    return solves, each[: len(conditions)], each[len(conditions) :]


def _check_projectors(structures: Structures) -> None:
    """A minimum under constraints needs forces and steps that are constrained along the same directions."""
    if not structures.maps:
        return
    v = torch.randn(structures.positions.shape, generator=torch.Generator().manual_seed(0)).to(structures.positions)
    acting = structures.project_forces(v)
    lost = structures.max((structures.project_steps(acting) - acting).abs().amax(1))
    tolerance = 1e3 * torch.finfo(v.dtype).eps * max(structures.counts)
    apart = (
        k
        for k, (error, good) in enumerate(zip(lost.tolist(), structures.orthogonal, strict=True))
        if error > tolerance or not good
    )
    names = {name for k in apart for name in structures.constraints[k]}
    if names:
        raise NotImplementedError(
            f"The constraints {', '.join(sorted(names))} constrain forces and steps along different directions here, "
            "so that the implicit gradient does not exist: take the adjoint 'replay'."
        )
