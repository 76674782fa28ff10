"""The loss of a batch of pairs: relax from where each begins, and compare with the references."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from ase import Atoms
from torch import Tensor, nn

from ..adjoints import Adjoint, SolveStatus
from ..iterated_map import Status
from ..losses import SAME_END, max_displacement
from ..pairs import RelaxationPair
from ..potential import Potential
from ..relaxation import relax
from ..result import Relaxation
from ..steppers import Stepper
from ..structures import Structures
from ..throughput.packing import Planner
from ..utils import Gradients
from .distributed import Ranks
from .updates import Total

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
        losses = self.adjoint.total_loss(self.loss, relaxation, reference)
        good = torch.isfinite(losses.detach()) & ~torch.tensor(relaxation.diverged, device=losses.device)
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
        if self.adjoint.needs_minimum:
            found["unsolved"], self.unsolved = self.unsolved, 0
        if self.warm is not None:
            found["elsewhere"], self.warm.elsewhere = self.warm.elsewhere, 0
        return found

    def relaxation(self, pairs: Sequence[RelaxationPair], epoch: int = 0) -> Relaxation:
        """The differentiable relaxation of a batch."""
        initial = self.potential.batch([p.initial for p in pairs])
        warm = None if self.warm is None else self.potential.batch(self.warm.starts(pairs, epoch))
        return relax(
            self.potential, initial, stepper=self.stepper, fmax=self.fmax, steps=self.steps, adjoint=self.adjoint,
            warm_start=warm,
        )  # fmt: skip

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


log = logging.getLogger(__name__)


class WarmEnd(NamedTuple):
    """Positions in Å, on the host, where a relaxation converged, else None; and how far that is from the warm end."""

    positions: Tensor | None
    gap: float


class WarmStarts:
    """Where each pair's relaxation ended, so that the next one has a short way.

    A minimum moves little while the weights do, but a warm path cannot leave its basin, and the path from the initial
    structure may by then lead elsewhere. So all begin from there again in every so-many-th epoch: where that path ends
    in another basin than the warm one, it is told, and the new end goes on.

    Parameters
    ----------
    every : int
        Epochs from one cold start to the next.
    """

    def __init__(self, every: int):
        self.every = every
        self.ends: dict[str, Tensor] = {}
        """Relaxed positions by the pair's id, on the host; they belong into a checkpoint."""
        self.elsewhere = 0
        """Pairs that ended elsewhere from the cold start than from the warm one, since this was last set to zero."""
        self._initial: dict[str, RelaxationPair] = {}

    def begin(self, pairs: Sequence[RelaxationPair]) -> None:
        """Remember the initial structures, to begin from in a cold epoch."""
        self._initial = {pair.id: pair for pair in pairs}

    def check(self, pairs: Sequence[RelaxationPair]) -> None:
        """Raise ValueError for two pairs of one name, whose ends could not be told apart."""
        [(name, times)] = Counter(pair.id for pair in pairs).most_common(1)
        if times > 1:
            raise ValueError(f"Two training pairs are called {name!r}: give each a name of its own for warm starts.")

    def starts(self, pairs: Sequence[RelaxationPair], epoch: int) -> list[Atoms]:
        """Where each relaxation shall begin."""
        return [self._start(pair, epoch) for pair in pairs]

    def _start(self, pair: RelaxationPair, epoch: int) -> Atoms:
        atoms = self._initial.get(pair.id, pair).initial
        if epoch % self.every and pair.id in self.ends:
            atoms = atoms.copy()
            atoms.set_positions(self.ends[pair.id].numpy(), apply_constraint=False)
        return atoms

    def found(self, pairs: Sequence[RelaxationPair], relaxation: Relaxation, epoch: int) -> list[WarmEnd]:
        """Where they ended, for `note`; after a cold start, compared with the ends that are kept."""
        final = relaxation.positions.detach().cpu().double().split(relaxation.start.counts)
        gaps = self._gaps(pairs, relaxation) if epoch % self.every == 0 else [0.0] * len(pairs)
        return [
            WarmEnd(positions.clone() if status is Status.CONVERGED else None, gap)
            for positions, status, gap in zip(final, relaxation.status, gaps, strict=True)
        ]

    def note(self, pair: RelaxationPair, end: WarmEnd) -> None:
        """Keep where a pair ended, and tell where that is another basin."""
        if end.positions is None:
            self.ends.pop(pair.id, None)
            return
        if end.gap > SAME_END:
            self.elsewhere += 1
            log.warning(
                "%s: from its initial structure it now relaxes to another basin than the one that the warm starts "
                "stayed in (%.2f Å apart at the farthest atom), and goes on from there.",
                pair.id,
                end.gap,
            )
        self.ends[pair.id] = end.positions

    def _gaps(self, pairs: Sequence[RelaxationPair], relaxation: Relaxation) -> list[float]:
        """How far the farthest atom of each end is from the warm end, in Å; 0 where there is none."""
        now = relaxation.positions.detach().split(relaxation.start.counts)
        kept = [self.ends.get(pair.id, x) for pair, x in zip(pairs, now, strict=True)]
        before = relaxation.start.replace(positions=torch.cat([x.to(relaxation.positions) for x in kept]))
        found: list[float] = max_displacement(relaxation.start.replace(positions=torch.cat(now)), before).tolist()
        return found
