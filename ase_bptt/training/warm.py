"""Relaxations that begin where those of the epoch before ended."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from ..losses import SAME_END, max_displacement
from ..pairs import RelaxationPair
from ..result import Relaxation, Status

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
