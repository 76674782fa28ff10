"""Gradient descent with momentum and an annealed step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..positive import check_positive
from . import arithmetic
from .base import State, Stepper


class GradientDescent(Stepper):
    """v <- momentum v + F;  X <- X + eta anneal^t v  (arXiv 2512.01067, with its annealed step).

    Parameters
    ----------
    step_size : float or Parameter
        eta in Å^2/eV. Stable below 2/lambda_max of the Hessian.
    anneal : float or Parameter
        Factor by which the step size falls with each frame.
    momentum : float or Parameter
    maxstep : float
        Å. The longest atom step of a structure is capped by this, the others in proportion.
    """

    name = "gd"
    fields = ("step_size", "anneal", "momentum", "maxstep")

    def __init__(
        self,
        step_size: float | nn.Parameter = 0.05,
        anneal: float | nn.Parameter = 1.0,
        momentum: float | nn.Parameter = 0.0,
        maxstep: float = 0.2,
    ):
        super().__init__()
        check_positive(step_size=step_size, anneal=anneal, maxstep=maxstep)
        self.step_size = step_size
        self.anneal = anneal
        self.momentum = momentum
        self.maxstep = maxstep

    def init(self, positions: Tensor, n: int) -> State:
        state = State(structures={"frame": positions.new_zeros(n, dtype=torch.int64)})
        if self._has_momentum():
            state.atoms["velocities"] = torch.zeros_like(positions)
        return state

    def step(self, positions: Tensor, forces: Tensor, state: State, batch: Tensor) -> tuple[Tensor, State]:
        frame = state.structures["frame"]
        velocities = forces
        atoms = {}
        if self._has_momentum():
            velocities = self.momentum * state.atoms["velocities"] + forces
            atoms = {"velocities": velocities}
        anneal = torch.as_tensor(self.anneal, dtype=positions.dtype, device=positions.device)
        eta = self.step_size * anneal ** frame.to(positions.dtype)
        moves = eta[batch, None] * velocities
        moves = arithmetic.shortened(moves, batch, len(frame), self.maxstep)
        return positions + moves, State(atoms, {"frame": frame + 1})

    def _has_momentum(self) -> bool:
        return isinstance(self.momentum, nn.Parameter) or self.momentum != 0
