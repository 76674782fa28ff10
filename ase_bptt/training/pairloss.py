"""The loss of a batch of pairs: relax, and compare with the references."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from ase import Atoms
from torch import Tensor

from ..adjoints import Adjoint, Guided, Replay, SolveStatus
from ..pairs import RelaxationPair
from ..potential import Potential
from ..relaxation import relax
from ..result import Relaxation, Status
from ..steppers import Stepper
from ..structures import Structures
from .warm import WarmStarts

log = logging.getLogger(__name__)
Loss = Callable[[Relaxation, Structures], Tensor]


@dataclass
class PairLoss:
    """Relaxes a batch differentiably, and measures how far its ends are from the references.

    Attributes
    ----------
    potential, stepper, adjoint, loss, steps, fmax
        As for `Trainer`.
    warm : WarmStarts or None
        Where relaxations to a minimum begin; None begins from the initial structures.
    unsolved : int
        Structures whose gradient at the minimum was not solved for, since this was last set to zero.
    """

    potential: Potential
    stepper: Stepper
    adjoint: Adjoint
    loss: Loss
    steps: int
    fmax: float
    warm: WarmStarts | None = None
    unsolved: int = 0

    def backward(self, pairs: Sequence[RelaxationPair], epoch: int = 0) -> list[float]:
        """Add the gradient of the mean loss of a batch to ``.grad``; the losses of the pairs that counted.

        Pairs whose relaxation diverges are reported and left out.
        """
        relaxation = self.relaxation(pairs, epoch)
        reference = self.potential.batch([p.relaxed for p in pairs])
        losses = self.loss(relaxation, reference)
        ends = [relaxation]
        if isinstance(self.adjoint, Guided) and relaxation.early is not None:
            ends.append(relaxation.early)
            losses = losses + self.adjoint.weight * self.loss(relaxation.early, reference)
        diverged = [any(end.status[k] is Status.DIVERGED for end in ends) for k in range(len(pairs))]
        good = torch.isfinite(losses.detach()) & ~torch.tensor(diverged, device=losses.device)
        for pair, fine in zip(pairs, good.tolist(), strict=True):
            if not fine:
                log.warning("%s: left out of this step. %s", pair.id, Status.DIVERGED.sentence)
        if not good.any() or not losses.requires_grad:
            return []
        losses[good].mean().backward()
        self._count(pairs, relaxation)
        return losses[good].tolist()

    def counts(self) -> dict[str, float]:
        """Of the epoch that ends: what did not go as it should, where it can; begins to count anew."""
        found: dict[str, float] = {}
        if self.adjoint.to_the_end:
            found["unsolved"], self.unsolved = self.unsolved, 0
        if self.warm is not None:
            found["elsewhere"], self.warm.elsewhere = self.warm.elsewhere, 0
        return found

    def relaxation(self, pairs: Sequence[RelaxationPair], epoch: int = 0) -> Relaxation:
        """The differentiable relaxation of a batch."""
        initial = [p.initial for p in pairs]
        if self.warm is None:
            return self._relax(initial, self.stepper, self.adjoint, self.steps)
        guided = self.adjoint if isinstance(self.adjoint, Guided) else None
        stepper = self.stepper if guided is None or guided.tail is None else guided.tail
        adjoint = self.adjoint if guided is None else guided.solve
        end = self._relax(self.warm.starts(pairs, epoch), stepper, adjoint, self.steps)
        self.warm.note(pairs, end, epoch)
        if guided is None:
            return end
        # The first frames choose the basin, and so they begin at the beginning.
        return dataclasses.replace(end, early=self._relax(initial, self.stepper, Replay(), guided.first))

    def _relax(self, starts: Sequence[Atoms], stepper: Stepper | str, adjoint: Adjoint, steps: int) -> Relaxation:
        return relax(
            self.potential, self.potential.batch(starts), stepper=stepper, fmax=self.fmax, steps=steps, adjoint=adjoint
        )

    def _count(self, pairs: Sequence[RelaxationPair], relaxation: Relaxation) -> None:
        for pair, solve in zip(pairs, relaxation.solves, strict=False):
            if solve.status is not SolveStatus.SOLVED:
                self.unsolved += 1
                log.info("%s: %s", pair.id, solve.status.sentence)
