"""What every adjoint is, and the plainest of them: the whole relaxation on the tape of autograd."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..iterated_map import IteratedMap, Keep, Record
from ..steppers import Stepper, make_stepper
from ..structures import Structures


@dataclass(frozen=True)
class Adjoint:
    """The way from the gradient at the relaxed positions to the weights and the initial positions."""

    name: ClassVar[str]
    on_tape: ClassVar[bool] = False
    """Whether the frames must run on autograd's tape."""
    through_frames: ClassVar[bool] = True
    """Whether it goes back through the frames, so that the stepper must be differentiable."""
    to_the_end: ClassVar[bool] = False
    """Whether the relaxation must end at a minimum, rather than after a few frames."""
    keep: ClassVar[Keep | None] = None
    """Which frames' states must be stored."""

    def attach(self, record: Record) -> Tensor:
        """The relaxed positions, with their gradient attached."""
        raise NotImplementedError

    def check(self, iterated: IteratedMap, structures: Structures) -> None:
        """Raise what `attach` could not treat, before any work is lost."""
        self.check_stepper(iterated.stepper)

    def check_stepper(self, stepper: Stepper) -> None:
        """Raise TypeError for a stepper that this adjoint cannot go through."""
        if self.through_frames and not stepper.differentiable:
            raise TypeError(
                f"The stepper {stepper.name!r} cannot be differentiated, and the adjoint {self.name!r} goes through "
                "its frames: take 'gd' or 'fire', the adjoint 'implicit', or torch.no_grad()."
            )

    def tolerance_of_forces(self, fmax: float) -> float:
        """The fmax (eV/Å) to relax to where the user asks for this one."""
        return fmax

    def todict(self) -> dict[str, Any]:
        """Name and settings, as JSON."""
        return {"name": self.name} | asdict(self, dict_factory=_plain)


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value.todict() if isinstance(value, Stepper) else value for name, value in items}


def stepper_of(value: Any) -> Stepper | None:
    """A stepper from an object, a name, or what `todict` made of one; None as it is."""
    if isinstance(value, dict):
        return make_stepper(value["name"], **{k: v for k, v in value.items() if k != "name"})
    return value if value is None else make_stepper(value)


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
