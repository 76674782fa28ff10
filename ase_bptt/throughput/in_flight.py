"""In-flight batching: structures that relax together, and a queue from which others replace those that have stopped."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from ase import Atoms

from ..batch import Batch
from ..cells import CellFreedom
from ..iterated_map import End, IteratedMap, Status
from ..relaxation import rows_of
from ..steppers import State
from ..structures import Structures
from .memory import fits, report_out_of_memory


class InFlight:
    """Structures that relax together, as many as there is room for, and a queue from which others take their places.

    The expensive ones come first, so that none is left to run alone at the end. Where memory runs out half of them
    are set aside as they are, and there is less room from then on.

    Parameters
    ----------
    iterated : IteratedMap
    structures : sequence of Atoms
    costs : sequence of float
        Of each structure, in the unit of `room`.
    room : float
        What structures that relax together may cost; a single one may cost more.
    fmax : float
        eV/Å below which a structure stops.
    steps : int
        Frames of each structure at most.
    cells : sequence of CellFreedom, optional
        Of each structure; None fixes all.
    """

    def __init__(
        self,
        iterated: IteratedMap,
        structures: Sequence[Atoms],
        *,
        costs: Sequence[float],
        room: float,
        fmax: float,
        steps: int,
        cells: Sequence[CellFreedom] | None = None,
    ):
        self.cells = cells if cells is not None and any(cell.moves for cell in cells) else None
        self.map, self.structures, self.costs, self.room = iterated, structures, costs, room
        self.fmax, self.steps = fmax, steps
        self._queue = deque(sorted(range(len(structures)), key=lambda k: -costs[k]))
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
            yield from batch.remove(stopped).items()
            if not len(batch):
                self._batch = None
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
        members: list[int] = []
        while not self._aside and self._queue and self._has_room([*members, self._queue[0]]):
            members.append(self._queue.popleft())
        if members:
            structures = self.map.potential.batch([self.structures[k] for k in members])
            self.map.potential.check(structures)
            if self.cells is not None:
                structures = rows_of(structures, [self.cells[k] for k in members], self.map)
            self._take_in(Batch(self.map, structures, self.fmax, self.steps, members))
        return self._batch

    def _has_room(self, new: Sequence[int]) -> bool:
        there = [] if self._batch is None else self._batch.members
        return (not there and len(new) == 1) or sum(self.costs[k] for k in (*there, *new)) <= self.room

    def _take_in(self, batch: Batch) -> None:
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.join(batch)

    def _halve(self, batch: Batch) -> None:
        """Set half of the batch aside."""
        report_out_of_memory(len(batch))
        self._aside.append(batch.split())
        self.room = sum(self.costs[k] for k in batch.members)
