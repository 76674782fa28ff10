"""The whole relaxation on autograd's tape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..frames import Record
from .base import Adjoint


@dataclass(frozen=True)
class FullTape(Adjoint):
    """Keep the graph of every frame: exact, memory grows with every frame. For tests and small cases."""

    name = "full"
    on_tape = True

    def attach(self, record: Record) -> Tensor:
        """The positions, guarded against weights that change before the backward pass."""
        start = record.start
        return _Guarded.apply(record.final, record, start.positions, start.cells, *record.map.parameters())


class _Guarded(torch.autograd.Function):
    """The identity, refusing to go backward with other weights than forward.

    What the relaxation depends on is handed in beside it, so that there is a graph without any frame, too, as with
    `Replay`. Gradients flow there through the frames only.
    """

    @staticmethod
    def forward(ctx: Any, final: Tensor, record: Record, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.record = record
        return final.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.record.check_weights()
        return gradient, *(None for _ in ctx.needs_input_grad[1:])
