"""Sums and lengths of each structure of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def dot(x: Tensor, y: Tensor, batch: Tensor, n: int) -> Tensor:
    """Scalar product of each structure, shape (n,)."""
    return x.new_zeros(n).index_add(0, batch, (x * y).sum(1))


def spread(values: Tensor, batch: Tensor) -> Tensor:
    """A number of each structure, (n,), beside its atoms' coordinates: (n_atoms, 1), or (1, 1) for one structure."""
    return values[:, None] if len(values) == 1 else values[batch, None]


def cap(square: Tensor, maxstep: float) -> Tensor:
    """Factor that brings a length down to maxstep, given its square; 1 where it is short enough."""
    too_long = square > maxstep**2
    return torch.where(too_long, maxstep / torch.where(too_long, square, 1.0).sqrt(), 1.0)


def shortened(moves: Tensor, batch: Tensor, n: int, maxstep: float) -> Tensor:
    """Moves with each structure's longest one at maxstep at most, and its others in proportion."""
    square = moves.square().sum(1)
    alone = n == 1 and len(square) > 0
    longest = square.amax(0, keepdim=True) if alone else moves.new_zeros(n).scatter_reduce(0, batch, square, "amax")
    return moves * spread(cap(longest, maxstep), batch)
