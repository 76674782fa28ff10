"""The loss of a batch of pairs: relax, and compare with the references."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from ase import Atoms
from torch import Tensor, nn

from ..adjoints import Adjoint, Guided, Replay, SolveStatus
from ..gradients import Gradients
from ..pairs import RelaxationPair
from ..planning import Planner
from ..potential import Potential
from ..relaxation import relax
from ..result import Relaxation, Status
from ..steppers import Stepper
from ..structures import Structures
from .gradients import Total
from .ranks import Ranks
from .warm import WarmEnd, WarmStarts

log = logging.getLogger(__name__)
Loss = Callable[[Relaxation, Structures], Tensor]


class End(NamedTuple):
    """How one pair ended.

    Attributes
    ----------
    attached : bool
        Whether the losses that it was measured with have a gradient.
    loss : float or None
        None where it diverged.
    frames : int
    solve : SolveStatus or None
        Of the gradient at the minimum.
    warm : WarmEnd or None
        Where the next relaxation may begin.
    """

    attached: bool
    loss: float | None
    frames: int
    solve: SolveStatus | None
    warm: WarmEnd | None


@dataclass
class PairLoss:
    """Relaxes a batch differentiably, and measures how far its ends are from the references.

    Attributes
    ----------
    potential, stepper, adjoint, loss, steps, fmax
        As for `Trainer`.
    warm : WarmStarts or None
        Where relaxations to a minimum begin; None begins from the initial structures.
    ranks : Ranks
        Who share the work.
    memory : float or None
        GiB that a part of a batch may take, as for `Planner`.
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
    ranks: Ranks = field(default_factory=Ranks)
    memory: float | None = None
    unsolved: int = 0
    _frames: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._planner = Planner(self.potential, self.gradients, lambda pair: pair.initial, self.memory)

    def backward(self, pairs: Sequence[RelaxationPair], epoch: int = 0) -> list[float]:
        """Add the gradient of the mean loss of a batch to ``.grad``; the losses of the pairs that counted.

        Each rank does its share, in parts that fit into the memory. Pairs whose relaxation diverges are reported and
        left out.
        """
        total = Total(self.trained())

        def run(mine: list[RelaxationPair]) -> list[End]:
            ends: dict[int, End] = {}
            for part, (gradients, found) in self._planner.computed(partial(self.gradients, epoch=epoch), mine):
                total.add(gradients)
                ends |= zip(part, found, strict=True)
            return [ends[k] for k in range(len(mine))]

        ends = self.ranks.dealt(pairs, [self._cost(pair) for pair in pairs], run)
        losses = self._noted(pairs, ends)
        if losses:
            total.add_over(self.ranks)
            total.put(len(losses))
        return losses

    def gradients(self, pairs: Sequence[RelaxationPair], epoch: int = 0) -> tuple[Gradients, list[End]]:
        """The gradient of the sum of the losses, and how each pair ended; nothing else is changed by it."""
        relaxation = self.relaxation(pairs, epoch)
        reference = self.potential.batch([p.relaxed for p in pairs])
        losses = self.loss(relaxation, reference)
        runs = [relaxation]
        if isinstance(self.adjoint, Guided) and relaxation.early is not None:
            runs.append(relaxation.early)
            losses = losses + self.adjoint.weight * self.loss(relaxation.early, reference)
        diverged = [any(run.status[k] is Status.DIVERGED for run in runs) for k in range(len(pairs))]
        good = torch.isfinite(losses.detach()) & ~torch.tensor(diverged, device=losses.device)
        trained = self.trained()
        gradients: Gradients = [None] * len(trained)
        attached = bool(good.any()) and losses.requires_grad
        if attached:
            # Not backward(): where memory runs out, nothing may have been added to anything yet.
            gradients = torch.autograd.grad(losses[good].sum(), trained, allow_unused=True)
        solves = [solve.status for solve in relaxation.solves] if relaxation.solves else [None] * len(pairs)
        warm = self.warm.found(pairs, relaxation, epoch) if self.warm else [None] * len(pairs)
        counted = [loss if fine else None for loss, fine in zip(losses.tolist(), good.tolist(), strict=True)]
        frames = relaxation.nsteps.tolist()
        return gradients, [End(attached, *found) for found in zip(counted, frames, solves, warm, strict=True)]

    def trained(self) -> list[nn.Parameter]:
        """What requires gradients in the potential and its stepper."""
        return [p for m in (self.potential, self.stepper) for p in m.parameters() if p.requires_grad]

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
        if guided is None:
            return end
        # The first frames choose the basin, and so they begin at the beginning.
        return dataclasses.replace(end, early=self._relax(initial, self.stepper, Replay(), guided.first))

    def _relax(self, starts: Sequence[Atoms], stepper: Stepper | str, adjoint: Adjoint, steps: int) -> Relaxation:
        return relax(
            self.potential, self.potential.batch(starts), stepper=stepper, fmax=self.fmax, steps=steps, adjoint=adjoint
        )

    def _cost(self, pair: RelaxationPair) -> float:
        """Atoms times frames, as many as the last time where it is known."""
        return pair.n_atoms * (1 + self._frames.get(pair.id, self.steps))

    def _noted(self, pairs: Sequence[RelaxationPair], ends: Sequence[End]) -> list[float]:
        """Keep and tell how the pairs ended; the losses that count."""
        for pair, end in zip(pairs, ends, strict=True):
            self._frames[pair.id] = end.frames
            if end.loss is None:
                log.warning("%s: left out of this step. %s", pair.id, Status.DIVERGED.sentence)
            if end.solve and end.solve is not SolveStatus.SOLVED:
                self.unsolved += 1
                log.info("%s: %s", pair.id, end.solve.sentence)
            if self.warm and end.warm:
                self.warm.note(pair, end.warm)
        # Structures that rest where they begin have no gradient, which counts where others have one.
        attached = any(end.attached for end in ends)
        return [end.loss for end in ends if end.loss is not None] if attached else []
