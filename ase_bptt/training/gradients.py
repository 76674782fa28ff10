"""Gradients that add up: over the parts of a batch, and over the ranks of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..gradients import Gradients, added
from .ranks import Ranks


class Total:
    """The sum of gradients with respect to some parameters; None for those on which nothing depends.

    Parameters
    ----------
    parameters : sequence of Parameter
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        self.gradients: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: Gradients) -> None:
        """Add gradients, one for each parameter."""
        self.gradients = added(self.gradients, gradients)

    def add_over(self, ranks: Ranks) -> None:
        """Make it the sum over all ranks, on all of them."""
        if ranks.size == 1 or not self.parameters:
            return
        used = self.parameters[0].new_tensor([g is not None for g in self.gradients])
        filled = [torch.zeros_like(p) if g is None else g.clone()
                  for p, g in zip(self.parameters, self.gradients, strict=True)]  # fmt: skip
        ranks.sum_([*filled, used])
        # Optimizers move a parameter whose gradient is zero, but not one that has none.
        self.gradients = [g if times else None for g, times in zip(filled, used.tolist(), strict=True)]

    def put(self, divisor: float = 1.0) -> None:
        """Add it, divided, to ``.grad``."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if gradient is not None:
                share = gradient / divisor
                parameter.grad = share if parameter.grad is None else parameter.grad + share
