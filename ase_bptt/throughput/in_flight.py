"""In-flight batching: structures that relax together, and a queue from which others replace those that have stopped."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from ase import Atoms

from ..batch import Batch
from ..cells import CellFreedom
from ..iterated_map import End, IteratedMap, Status
from ..relaxation import rows_of
from ..steppers import State
from ..structures import Structures
from .memory import fits, report_out_of_memory


class Waiting(NamedTuple):
    """A structure that is to be relaxed: its number, its atoms, what it costs, and what of its cell is relaxed."""

    member: int
    atoms: Atoms
    cost: float
    cell: CellFreedom


class InFlight:
    """Structures that relax together, as many as there is room for, and a queue from which others take their places.

    The next portion of the work is asked for when the queue is empty and there is room, so that only a few structures
    are in memory however many there are. Where memory runs out half of those that relax are set aside as they are, and
    there is less room from then on.

    Parameters
    ----------
    iterated : IteratedMap
    work : iterator of lists of Waiting
        Portions of the work. The expensive ones of each come first, so that none is left to run alone at the end.
    room : float
        What structures that relax together may cost; a single one may cost more.
    fmax : float
        eV/Å below which a structure stops.
    steps : int
        Frames of each structure at most.
    cells_move : bool
        Whether the cell of any structure is relaxed.
    explosion : float
        As of `Batch`.
    """

    def __init__(
        self,
        iterated: IteratedMap,
        work: Iterator[list[Waiting]],
        *,
        room: float,
        fmax: float,
        steps: int,
        cells_move: bool = False,
        explosion: float = math.inf,
    ):
        self.map, self.room, self.cells_move = iterated, room, cells_move
        self.fmax, self.steps, self.explosion = fmax, steps, explosion
        self._work = work
        self._queue: deque[Waiting] = deque()
        self._costs: dict[int, float] = {}
        self._batch: Batch | None = None
        self._aside: list[Batch] = []

    @torch.no_grad()
    def run(self) -> Iterator[tuple[int, End]]:
        """Each structure's index and where it ended, as soon as it has stopped.

        Raises
        ------
        MemoryError
            Where a single structure does not fit, naming the mend.
        """
        while (batch := self._filled()) is not None:
            found = fits(partial(self._evaluate, batch))
            if found is None:
                self._halve(batch)
                continue
            following: tuple[Structures, State] | None
            ((following, stopped),) = found
            # The step of a batch that has changed must not fill the memory beside the next one.
            del found
            if stopped:
                following = None
            ends = batch.remove(stopped)
            if not len(batch):
                self._batch = None
            for member in ends:
                del self._costs[member]
            yield from ends.items()
            if self._batch is None:
                continue
            moved = fits(partial(self._move, batch, following))
            following = None
            if moved is None:
                self._halve(batch)

    def _evaluate(self, batch: Batch) -> tuple[tuple[Structures, State], dict[int, Status]]:
        forces = batch.evaluate()
        following = self.map.advance(batch.structures, batch.state, forces)
        return following, batch.stopped(following)

    def _move(self, batch: Batch, following: tuple[Structures, State] | None) -> None:
        batch.move(following or self.map.advance(batch.structures, batch.state, batch.forces))

    def _filled(self) -> Batch | None:
        """The batch, joined by as many of the queue as there is room for; None where none is left."""
        while self._aside and (self._batch is None or self._has_room(self._aside[-1].members)):
            self._take_in(self._aside.pop())
        new: list[Waiting] = []
        while not self._aside and self._next() and self._has_room([w.member for w in (*new, self._queue[0])]):
            new.append(self._queue.popleft())
        if new:
            structures = self.map.potential.batch([w.atoms for w in new])
            self.map.potential.check(structures)
            if self.cells_move:
                structures = rows_of(structures, [w.cell for w in new], self.map)
            members = [w.member for w in new]
            self._take_in(Batch(self.map, structures, self.fmax, self.steps, members, explosion=self.explosion))
        return self._batch

    def _next(self) -> bool:
        """Whether a structure waits, after the next portion of the work was asked for where none did."""
        while not self._queue:
            portion = next(self._work, None)
            if portion is None:
                return False
            self._queue.extend(sorted(portion, key=lambda w: -w.cost))
            self._costs |= {w.member: w.cost for w in portion}
        return True

    def _has_room(self, new: Sequence[int]) -> bool:
        there = [] if self._batch is None else self._batch.members
        return (not there and len(new) == 1) or sum(self._costs[k] for k in (*there, *new)) <= self.room

    def _take_in(self, batch: Batch) -> None:
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.join(batch)

    def _halve(self, batch: Batch) -> None:
        """Set half of the batch aside."""
        report_out_of_memory(len(batch))
        self._aside.append(batch.split())
        self.room = sum(self._costs[k] for k in batch.members)
