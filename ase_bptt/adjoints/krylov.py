"""Conjugate gradients for many structures at once, each with its own numbers and its own end."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..structures import Structures


class SolveStatus(enum.Enum):
    """How the equation of one structure's gradient ended; `sentence` says what that means."""

    SOLVED = "solved"
    SADDLE = "saddle"
    CAPPED = "out of iterations"
    UNRELAXED = "not relaxed"

    @property
    def sentence(self) -> str:
        return {
            SolveStatus.SOLVED: "The equation of the gradient was solved to its tolerance.",
            SolveStatus.SADDLE: "The energy falls along some direction, so that this is a saddle and no minimum: the "
            "gradient holds what was found before that direction appeared.",
            SolveStatus.CAPPED: "The equation of the gradient was not solved to its tolerance: raise cap, or add "
            "damping.",
            SolveStatus.UNRELAXED: "Its relaxation did not converge, so that there is no minimum to take a gradient "
            "at, and it gives none: give it more steps.",
        }[self]


@dataclass(frozen=True)
class Solve:
    """How one structure's equation was solved: status, iterations, and the residual relative to the right side."""

    status: SolveStatus
    iterations: int
    residual: float


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, structures: Structures, *, tolerance: float, cap: int
) -> tuple[Tensor, list[Solve]]:
    """Solve H w = right for a symmetric H of independent structures (Hestenes and Stiefel, 1952).

    A structure whose residual falls below the tolerance stops there; one that meets a direction of no positive
    curvature stops before it, as in truncated Newton methods (Steihaug, 1983).

    Parameters
    ----------
    product : callable
        v -> H v, both of shape (n_atoms, 3).
    right : Tensor, shape (n_atoms, 3)
    structures : Structures
        Which atoms belong together.
    tolerance : float
        Of the residual's norm, relative to the right side's.
    cap : int
        Iterations at most.

    Returns
    -------
    w : Tensor, shape (n_atoms, 3)
    solves : list of Solve, length n
    """
    batch = structures.batch

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return structures.sum(a * b).sum(1)

    def ratio(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, a / torch.where(where, b, 1.0), 0.0)

    w, residual, direction = torch.zeros_like(right), right, right
    first = square = dot(right, right)
    live = square > 0
    saddle, counts = torch.zeros_like(live), torch.zeros_like(live, dtype=torch.int64)
    # One small transfer an iteration asks whether any structure goes on.
    for _ in range(cap):
        if not bool(live.any()):
            break
        image = product(torch.where(live[batch, None], direction, 0.0))
        curvature = dot(direction, image)
        # Written so that a NaN counts as a saddle, too.
        saddle = saddle | live & ~(curvature > 0)
        live = live & ~saddle
        counts = counts + live
        step = ratio(square, curvature, live)[batch, None]
        w = w + step * direction
        residual = torch.where(live[batch, None], residual - step * image, residual)
        new = dot(residual, residual)
        direction = residual + ratio(new, square, live)[batch, None] * direction
        square = new
        live = live & (square > tolerance**2 * first)
    rows = zip(saddle.tolist(), live.tolist(), counts.tolist(), ratio(square, first, first > 0).tolist(), strict=True)
    return w, [_solve(*row) for row in rows]


def _solve(saddle: bool, live: bool, iterations: int, square: float) -> Solve:
    status = SolveStatus.SADDLE if saddle else SolveStatus.CAPPED if live else SolveStatus.SOLVED
    return Solve(status, iterations, square**0.5)
