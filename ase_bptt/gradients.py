"""Gradients by many inputs at once, some of which nothing depends on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]


def pull_back(outputs: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients by the inputs; None for those that no output depends on."""
    live = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
    if not live:
        return [None] * len(inputs)
    outs, grads = zip(*live, strict=True)
    return list(torch.autograd.grad(outs, list(inputs), grads, allow_unused=True))


def added(some: Gradients, others: Gradients) -> list[Tensor | None]:
    """The sum of two gradients, either of which may lack parts."""
    return [a if b is None else b if a is None else a + b for a, b in zip(some, others, strict=True)]
