"""What every adjoint is, and the plainest of them: the whole relaxation on the tape of autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..iterated_map import Checkpointing, IteratedMap, Trajectory
from ..steppers import Stepper, make_stepper
from ..structures import Structures

if TYPE_CHECKING:
    from ..relaxation import Loop
    from ..result import Relaxation

Loss = Callable[["Relaxation", Structures], Tensor]


class Attached(NamedTuple):
    """A trajectory, and where its structures ended, with the gradient attached.

    Attributes
    ----------
    trajectory : Trajectory
        It has no reference to these positions, since their graph refers to it.
    positions : Tensor, shape (n_atoms, 3)
        In Å.
    early : Attached or None
        The same after the first frames, for adjoints that attach a gradient there, too.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import adjoints, load_potential
    >>> from ase_bptt.relaxation import Loop
    >>> potential = load_potential("lj")
    >>> loop = Loop(potential, "fire", potential.batch(molecule("N2")), fmax=0.05, steps=5)
    >>> attached = adjoints.Replay().apply(loop)
    >>> attached.trajectory, attached.positions.requires_grad
    (Trajectory(1 in all, 1 frames at most, kept), True)
    """

    trajectory: Trajectory
    positions: Tensor
    early: Attached | None = None


@dataclass(frozen=True)
class Adjoint:
    """How a relaxation is differentiated: by `apply`, which is given the loop, runs it, and attaches a gradient.

    A subclass says what it needs of the loop and how the gradient at the relaxed positions reaches the weights and the
    initial positions: most need `attach` alone, and `checkpointing` where frames are needed. It may run the loop, in
    parts (`Loop.run` with frames) and with another stepper (`Loop.switch`). It reads the trajectory and writes only
    what it reports there, `adjoint_norms` or `solves`. It calls the step, and knows none of its formulas.

    >>> from ase_bptt import adjoints
    >>> adjoints.Implicit().through_frames, adjoints.Replay().through_frames
    (False, True)
    """

    name: ClassVar[str]
    through_frames: ClassVar[bool] = True
    """Whether it goes back through the frames, so that the stepper must be differentiable."""
    needs_minimum: ClassVar[bool] = False
    """Whether the relaxation must end at a minimum, rather than after a few frames."""
    checkpointing: ClassVar[Checkpointing | None] = None
    """Which frames' states must be kept."""

    def run(self, loop: Loop) -> Trajectory:
        """Run the loop where nothing requires gradients."""
        with torch.no_grad():
            return loop.run()

    def apply(self, loop: Loop, *, warm: Loop | None = None) -> Attached:
        """Run the loop, and attach the gradient to where it ends.

        Parameters
        ----------
        loop : Loop
            Of the structures that the gradient belongs to.
        warm : Loop or None
            The same structures from a start near their minima, for those that need the minimum.
        """
        with torch.no_grad():
            trajectory = loop.run(checkpointing=self.checkpointing)
        return Attached(trajectory, self.attach(trajectory))

    def attach(self, trajectory: Trajectory) -> Tensor:
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

    def check_recorded(self) -> None:
        """Raise TypeError if a run that an ASE optimizer has recorded is not enough for this adjoint."""

    def required_fmax(self, fmax: float) -> float:
        """The fmax (eV/Å) to relax to where the user asks for this one."""
        return fmax

    def total_loss(self, loss: Loss, relaxation: Relaxation, reference: Structures) -> Tensor:
        """What is lowered in training, shape (n,): the loss where the relaxation ended."""
        return loss(relaxation, reference)

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
    """Keep the graph of every frame: exact, memory grows with every frame. For tests and small cases.

    >>> from ase.build import molecule
    >>> from ase_bptt import adjoints, load_potential, relax, steppers
    >>> potential, stepper = load_potential("morse"), steppers.GradientDescent(0.005)
    >>> relaxation = relax(potential, molecule("N2"), stepper=stepper, steps=4, adjoint=adjoints.FullTape())
    >>> relaxation.positions.diff(dim=0).norm().backward()
    >>> print(f"dr/dr0 = {potential.r0.grad:.3f}")
    dr/dr0 = 0.506
    """

    name = "full"

    def apply(self, loop: Loop, *, warm: Loop | None = None) -> Attached:
        trajectory = loop.run()
        return Attached(trajectory, self.attach(trajectory))

    def attach(self, trajectory: Trajectory) -> Tensor:
        """The positions, guarded against weights that change before the backward pass."""
        start = trajectory.start
        return _WeightsChecked.apply(
            trajectory.final, trajectory, start.positions, *start.conditions(), *trajectory.map.parameters()
        )

    def check_recorded(self) -> None:
        raise TypeError("An ASE run keeps no tape: take adjoint='replay', or ase_bptt.relax.")


class _WeightsChecked(torch.autograd.Function):
    """The identity, refusing to go backward with other weights than forward.

    What the relaxation depends on is handed in beside it, so that there is a graph without any frame, too, as with
    `Replay`. Gradients flow there through the frames only.
    """

    @staticmethod
    def forward(ctx: Any, final: Tensor, trajectory: Trajectory, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.trajectory = trajectory
        return final.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.trajectory.check_weights()
        return gradient, *(None for _ in ctx.needs_input_grad[1:])
