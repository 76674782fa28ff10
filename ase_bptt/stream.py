"""Relaxing a long queue of structures without a gradient: whoever stops makes room for the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from ase import Atoms

from .frames import IteratedMap
from .moving import Moving, Stopped
from .planning import fits, tell


class Stream:
    """Structures that relax together, as many as there is room for, and a queue of those that wait.

    The expensive ones come first, so that none is left to run alone at the end. Where memory runs out half of them
    are set aside as they stand, and there is less room from then on.

    Parameters
    ----------
    iterated : IteratedMap
    structures : sequence of Atoms
    costs : sequence of float
        Of each structure, in the unit of `room`.
    room : float
        What structures that relax together may cost; a single one may cost more.
    fmax : float
        eV/Å at which a structure stops.
    steps : int
        Frames of each structure at most.
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
    ):
        self.map, self.structures, self.costs, self.room = iterated, structures, costs, room
        self.fmax, self.steps = fmax, steps
        self._queue = deque(sorted(range(len(structures)), key=lambda k: -costs[k]))
        self._moving: Moving | None = None
        self._members: list[int] = []
        self._aside: list[tuple[Moving, list[int]]] = []

    @torch.no_grad()
    def run(self) -> Iterator[tuple[int, Stopped, int]]:
        """Each structure's index, where it stopped, and after how many frames, as soon as it has.

        Raises
        ------
        MemoryError
            Where a single structure does not fit, naming the mend.
        """
        while (moving := self._filled()) is not None:
            looked = fits(moving.look)
            if looked is None:
                self._halve(moving)
                continue
            (stopping,) = looked
            for k, status in stopping.items():
                yield self._members[k], Stopped.of(moving, k, status), moving.frames[k]
            self._members = [whole for k, whole in enumerate(self._members) if k not in stopping]
            if not self._members:
                self._moving = None
                continue
            if stopping:
                moving.leave(stopping)
            if fits(moving.advance) is None:
                self._halve(moving)

    def _filled(self) -> Moving | None:
        """Those that move, joined by as many of those that wait as there is room for; None where none is left."""
        while self._aside and (not self._members or self._has_room(self._aside[-1][1])):
            self._take_in(*self._aside.pop())
        members: list[int] = []
        while not self._aside and self._queue and self._has_room([*members, self._queue[0]]):
            members.append(self._queue.popleft())
        if members:
            batch = self.map.potential.batch([self.structures[k] for k in members])
            self.map.potential.check(batch)
            self._take_in(Moving(self.map, batch, self.fmax, self.steps), members)
        return self._moving

    def _has_room(self, new: Sequence[int]) -> bool:
        alone = not self._members and len(new) == 1
        return alone or sum(self.costs[k] for k in (*self._members, *new)) <= self.room

    def _take_in(self, moving: Moving, members: list[int]) -> None:
        if self._moving is None:
            self._moving, self._members = moving, members
        else:
            self._moving.join(moving)
            self._members = self._members + members

    def _halve(self, moving: Moving) -> None:
        """Set half of those that move aside."""
        tell(len(moving))
        other = moving.split()
        self._aside.append((other, self._members[len(moving) :]))
        self._members = self._members[: len(moving)]
        self.room = sum(self.costs[k] for k in self._members)
