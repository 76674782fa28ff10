"""The gradient of the loss of a batch of pairs: relax each from its start, or a warm one, and compare the ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from ase import Atoms
from torch import Tensor, nn

from ..adjoints import Adjoint, SolveStatus
from ..displacements import as_far_as_known, known_of
from ..iterated_map import Status
from ..losses import SAME_END, max_displacement
from ..pairs import RelaxationPair
from ..potential import Potential
from ..relaxation import relax
from ..result import Relaxation
from ..stability import resolve_step_size, sample
from ..steppers import Stepper
from ..terms.zero_force import zero_force
from ..throughput.packing import Planner
from ..utils import Gradients
from .distributed import Ranks
from .settings import Loss, RelaxationSettings, first_stage
from .updates import Total, trained_parameters

log = logging.getLogger(__name__)


class PairEnd(NamedTuple):
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
        Where the next relaxation may start.
    """

    attached: bool
    loss: float | None
    frames: int
    solve: SolveStatus | None
    warm: WarmEnd | None


@dataclass
class PairLoss:
    """Relaxes a batch differentiably, and measures the distances of the ends from the references.

    Attributes
    ----------
    potential, stepper, adjoint, loss, steps, fmax
        As for `Trainer`.
    warm : WarmStarts or None
        Where relaxations to a minimum start; None starts from the initial structures.
    ranks : Ranks
        The processes that share the work.
    memory : float or None
        GiB that part of a batch may take, as for `Planner`.
    first : int
        Epochs of the first stage, in which the loss is `zero_force` at the references.
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
    first: int = 0
    unsolved: int = 0
    _frames: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_settings(cls, potential: Potential, settings: RelaxationSettings, ranks: Ranks) -> PairLoss:
        """The loss that the keywords of a Trainer describe."""
        return cls(
            potential, settings.stepper, settings.adjoint, settings.loss, settings.steps, settings.fmax,
            WarmStarts(settings.warm_start_every) if settings.warm_start_every else None, ranks, settings.memory,
            first_stage(settings.first),
        )  # fmt: skip

    def __post_init__(self) -> None:
        measured = partial(self.gradients, epoch=self.first)
        self._planner = Planner(self.potential, measured, lambda pair: pair.initial, self.memory)

    def backward(self, pairs: Sequence[RelaxationPair], epoch: int = 0) -> list[float]:
        """Add the gradient of the mean loss of a batch to ``.grad``; the losses of the pairs that counted.

        Each rank does its share, in parts that fit into the memory. Pairs whose relaxation diverges are reported and
        left out.
        """
        total = Total(self.trained())

        def run(mine: list[RelaxationPair]) -> list[PairEnd]:
            ends: dict[int, PairEnd] = {}
            for part, (gradients, found) in self._planner.computed(partial(self.gradients, epoch=epoch), mine):
                total.add(gradients)
                ends |= zip(part, found, strict=True)
            return [ends[k] for k in range(len(mine))]

        ends = self.ranks.dealt(pairs, [self._cost(pair) for pair in pairs], run)
        losses = self._recorded(pairs, ends)
        if losses:
            total.add_over(self.ranks)
            total.put(len(losses))
        return losses

    def gradients(self, pairs: Sequence[RelaxationPair], epoch: int = 0) -> tuple[Gradients, list[PairEnd]]:
        """The gradient of the sum of the losses, and how each pair ended; nothing else is changed by it."""
        if epoch < self.first:
            losses = zero_force(self.potential, pairs)
            good = torch.isfinite(losses.detach())
            gradients, counted = self._summed(losses, good)
            return gradients, [PairEnd(losses.requires_grad, loss, 0, None, None) for loss in counted]
        relaxation = self.relaxation(pairs, epoch)
        references = [p.relaxed for p in pairs]
        known = [known_of(atoms) for atoms in references]
        reference = as_far_as_known(relaxation, self.potential.batch(references), known)
        losses = self.adjoint.total_loss(self.loss, relaxation, reference)
        good = torch.isfinite(losses.detach()) & ~torch.tensor(relaxation.diverged, device=losses.device)
        gradients, counted = self._summed(losses, good)
        attached = bool(good.any()) and losses.requires_grad
        solves = [solve.status for solve in relaxation.solves] if relaxation.solves else [None] * len(pairs)
        warm = self.warm.found(pairs, relaxation, epoch) if self.warm else [None] * len(pairs)
        frames = relaxation.nsteps.tolist()
        return gradients, [PairEnd(attached, *found) for found in zip(counted, frames, solves, warm, strict=True)]

    def _summed(self, losses: Tensor, good: Tensor) -> tuple[Gradients, list[float | None]]:
        """The gradient of the sum of the losses that are good, and their values; None for the others."""
        trained = self.trained()
        gradients: Gradients = [None] * len(trained)
        if bool(good.any()) and losses.requires_grad:
            # Not backward(): where memory runs out, nothing may have been added to anything yet.
            gradients = torch.autograd.grad(losses[good].sum(), trained, allow_unused=True)
        return gradients, [loss if fine else None for loss, fine in zip(losses.tolist(), good.tolist(), strict=True)]

    def resolve_step_size(self, train: Sequence[RelaxationPair]) -> None:
        """Replace the step size "auto" of the stepper by half of what is stable, measured on some of the references."""
        some = sample(train)
        references, cells = [p.relaxed for p in some], [p.freedom for p in some]
        self.stepper = resolve_step_size(self.stepper, self.potential, references, cells)

    def trained(self) -> list[nn.Parameter]:
        """What requires gradients in the potential and its stepper."""
        return trained_parameters(self.potential, self.stepper)

    def counts(self) -> dict[str, float]:
        """What went wrong in the epoch that ends, as columns of its row; the counters are set to zero."""
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
        found = relax(
            self.potential, initial, stepper=self.stepper, fmax=self.fmax, steps=self.steps, adjoint=self.adjoint,
            cell=[p.freedom for p in pairs], warm_start=warm,
        )  # fmt: skip
        found.trajectory.warns = False  # they are counted, and logged by the pair's name
        return found

    def _cost(self, pair: RelaxationPair) -> float:
        """Atoms times frames, as many as the last time where it is known."""
        return pair.n_atoms * (1 + self._frames.get(pair.id, self.steps))

    def _recorded(self, pairs: Sequence[RelaxationPair], ends: Sequence[PairEnd]) -> list[float]:
        """Record and log how the pairs ended; the losses that count."""
        for pair, end in zip(pairs, ends, strict=True):
            if end.frames:
                self._frames[pair.id] = end.frames
            if end.loss is None:
                log.warning("%s: left out of this step. %s", pair.id, Status.DIVERGED.sentence)
            if end.solve and end.solve is not SolveStatus.SOLVED:
                self.unsolved += 1
                log.info("%s: %s", pair.id, end.solve.sentence)
            if self.warm and end.warm:
                self.warm.note(pair, end.warm)
        # A structure whose start is converged has no gradient; its loss counts where others have one.
        attached = any(end.attached for end in ends)
        return [end.loss for end in ends if end.loss is not None] if attached else []


class WarmEnd(NamedTuple):
    """Positions in Å, on the host, where a relaxation converged, else None; and their distance from the warm end."""

    positions: Tensor | None
    gap: float


class WarmStarts:
    """Where each pair's relaxation ended, from where the next one needs few frames.

    A minimum moves little while the weights change, but a path that starts in a basin stays in it, and the path from
    the initial structure may by then end in another. So all start from the initial structures again in every
    so-many-th epoch: where such a cold start ends in another basin than the warm one, that is logged, and the new end
    replaces the old one.

    Parameters
    ----------
    every : int
        Number of epochs from one cold start to the next.
    """

    def __init__(self, every: int):
        self.every = every
        self.ends: dict[str, Tensor] = {}
        """Relaxed positions in Å by the pair's id, and below them the cell where it moves, on the host; part of a
        checkpoint."""
        self.elsewhere = 0
        """Pairs whose cold start ended in another basin than the warm one, since this was last set to zero."""
        self._initial: dict[str, RelaxationPair] = {}

    def remember(self, pairs: Sequence[RelaxationPair]) -> None:
        """The pairs, whose initial structures are the cold starts; their ids must differ."""
        self._initial = {pair.id: pair for pair in pairs}

    def starts(self, pairs: Sequence[RelaxationPair], epoch: int) -> list[Atoms]:
        """Where each relaxation starts in this epoch."""
        return [self._start(pair, epoch) for pair in pairs]

    def _start(self, pair: RelaxationPair, epoch: int) -> Atoms:
        atoms = self._initial.get(pair.id, pair).initial
        if epoch % self.every and pair.id in self.ends:
            atoms, end = atoms.copy(), self.ends[pair.id].numpy()
            atoms.set_cell(end[len(atoms) :] if len(end) > len(atoms) else atoms.cell, apply_constraint=False)
            atoms.set_positions(end[: len(atoms)], apply_constraint=False)
        return atoms

    def found(self, pairs: Sequence[RelaxationPair], relaxation: Relaxation, epoch: int) -> list[WarmEnd]:
        """Where they ended, for `note`; after a cold start, compared with the ends of the warm ones."""
        final = _with_cells(relaxation)
        gaps = self._gaps(pairs, relaxation) if epoch % self.every == 0 else [0.0] * len(pairs)
        return [
            WarmEnd(positions if status is Status.CONVERGED else None, gap)
            for positions, status, gap in zip(final, relaxation.status, gaps, strict=True)
        ]

    def note(self, pair: RelaxationPair, end: WarmEnd) -> None:
        """Remember where a pair ended, and warn where that is another basin."""
        if end.positions is None:
            self.ends.pop(pair.id, None)
            return
        if end.gap > SAME_END:
            self.elsewhere += 1
            log.warning(
                "%s: from its initial structure it now relaxes to another basin than the one that the warm starts "
                "stayed in (%.2f Å apart at the farthest atom), and continues from there.",
                pair.id,
                end.gap,
            )
        self.ends[pair.id] = end.positions

    def _gaps(self, pairs: Sequence[RelaxationPair], relaxation: Relaxation) -> list[float]:
        """Largest displacement of an atom between each end and the warm end, in Å; 0 where there is none."""
        structures, now = relaxation.structures, _with_cells(relaxation)
        cells, parts = structures.cells.clone(), []
        for k, (pair, n) in enumerate(zip(pairs, structures.counts, strict=True)):
            warm = self.ends.get(pair.id, now[k]).to(cells)
            parts.append(warm[:n])
            if len(warm) > n:
                cells[k] = warm[n:]
        before = structures.replace(positions=torch.cat(parts), cells=cells)
        found: list[float] = max_displacement(structures, before).tolist()
        return found


def _with_cells(relaxation: Relaxation) -> list[Tensor]:
    """Positions where each structure ended, on the host, and below them its cell if that was free to move."""
    found = relaxation.positions.detach().cpu().double().split(relaxation.start.counts)
    cells = relaxation.cells.detach().cpu().double()
    return [
        torch.cat((x, cells[k])) if moved else x.clone()
        for k, (x, moved) in enumerate(zip(found, relaxation.moved_cells, strict=True))
    ]
