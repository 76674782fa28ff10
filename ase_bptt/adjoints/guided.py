"""The first frames by back-propagation, the end by the implicit-function theorem."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..iterated_map import Checkpointing, IteratedMap, Trajectory
from ..steppers import Stepper
from ..structures import Structures
from ..utils import check_count, check_positive
from .adjoint import Adjoint, Attached, Loss, stepper_of
from .implicit import Implicit
from .replay import Replay

if TYPE_CHECKING:
    from ..relaxation import Loop
    from ..result import Relaxation


@dataclass(frozen=True)
class Guided(Adjoint):
    """Two gradients of one relaxation: of where it ends, and of where it is after its first frames.

    The end X* is attached by `Implicit`, the positions X_K after `first` frames by `Replay` as ``relaxation.early``,
    and the Trainer lowers loss(X*) + weight loss(X_K). This is our reading of the guided gradient of G-DEQ (the
    follow-up to arXiv 2512.01067), which differentiates the first K steps and then takes the implicit gradient: to
    compose the two by the chain rule would give zero, since dX*/dX_K = 0 at a minimum, so the first frames need a
    loss of their own. In these frames the basin is selected.

    Parameters
    ----------
    first : int
        K, the frames to go back through; a structure that has relaxed before has fewer.
    weight : float
        Of loss(X_K) beside loss(X*).
    tail : Stepper, str or None
        What relaxes from X_K to X*; None continues with the stepper of the first frames.
    solve : Implicit
        How the gradient at the end is found.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import adjoints, load_potential, relax
    >>> potential = load_potential("morse")
    >>> relaxation = relax(potential, molecule("N2"), adjoint=adjoints.Guided(3))
    >>> relaxation.early
    Relaxation: N2, out of steps after 3 frames, energy -0.9833 eV, fmax 1.7497 eV/Å
    >>> (relaxation.positions.square().sum() + relaxation.early.positions.square().sum()).backward()
    """

    first: int
    weight: float = 1.0
    tail: Stepper | str | None = "bfgs"
    solve: Implicit = field(default_factory=Implicit)

    name = "guided"
    needs_minimum = True

    def __post_init__(self) -> None:
        check_count(first=self.first)
        check_positive(weight=self.weight)
        tail: Any = stepper_of(self.tail)
        solve = {k: v for k, v in self.solve.items() if k != "name"} if isinstance(self.solve, dict) else None
        # As JSON brings them back.
        object.__setattr__(self, "tail", tail)
        object.__setattr__(self, "solve", self.solve if solve is None else Implicit(**solve))

    @torch.no_grad()
    def run(self, loop: Loop) -> Trajectory:
        loop.run(frames=self.first)
        loop.switch(self.tail)
        return loop.run()

    def apply(self, loop: Loop, *, warm: Loop | None = None) -> Attached:
        """The first frames choose the basin, and so they start where the structures do, whatever start is warm."""
        with torch.no_grad():
            first = loop.run(frames=self.first, checkpointing=Checkpointing())
        to_minimum = loop if warm is None else warm
        to_minimum.switch(self.tail)
        end = self.solve.apply(to_minimum)
        return end._replace(early=Attached(first, Replay().attach(first)))

    def check(self, iterated: IteratedMap, structures: Structures) -> None:
        """What either of the two refuses."""
        super().check(iterated, structures)
        self.solve.check(iterated, structures)

    def check_recorded(self) -> None:
        raise TypeError(
            "An ASE run cannot change its stepper after the first frames, as 'guided' does: use ase_bptt.relax."
        )

    def required_fmax(self, fmax: float) -> float:
        """That of the implicit gradient."""
        return self.solve.required_fmax(fmax)

    def total_loss(self, loss: Loss, relaxation: Relaxation, reference: Structures) -> Tensor:
        """The sum of both losses."""
        found = loss(relaxation, reference)
        return found if relaxation.early is None else found + self.weight * loss(relaxation.early, reference)
