"""Which structures are computed together, and by which process, from the cost of each."""

from __future__ import annotations

import heapq
import logging
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from ase import Atoms

from ..potential import Potential
from .memory import Footprint, free_bytes, in_parts, measure, sizes

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Found = TypeVar("Found")


def share(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Items distributed over a number of parts of about equal cost.

    The most expensive first, each to the part that costs least so far (Graham, SIAM J. Appl. Math. 17, 416 (1969): at
    most 4/3 of the optimum, and close to it for many items). The result is the same on every machine.

    Parameters
    ----------
    costs : sequence of float
    parts : int

    Returns
    -------
    list of list of int
        Indices in ascending order, a list for each part; some are empty where there are fewer items than parts.
    """
    loads = [(0.0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for k in _expensive_first(costs):
        load, part = heapq.heappop(loads)
        dealt[part].append(k)
        heapq.heappush(loads, (load + costs[k], part))
    return [sorted(part) for part in dealt]


def pack(costs: Sequence[float], capacity: float, most: int | None = None) -> list[list[int]]:
    """Items in few batches, none of which costs more than the capacity (bin packing by best fit).

    The most expensive first, each into the fullest batch that has room for it.

    Parameters
    ----------
    costs : sequence of float
    capacity : float
        In the unit of the costs. An item that exceeds it alone is a batch of its own.
    most : int, optional
        Items in a batch at most.

    Returns
    -------
    list of list of int
        Indices in ascending order; batches in the order of their first items.
    """
    batches: list[list[int]] = []
    room: list[tuple[float, int]] = []  # sorted
    for k in _expensive_first(costs):
        place = bisect_left(room, (costs[k], -1))
        if place < len(room):
            left, batch = room.pop(place)
        else:
            left, batch = capacity, len(batches)
            batches.append([])
        batches[batch].append(k)
        if most is None or len(batches[batch]) < most:
            insort(room, (left - costs[k], batch))
    return sorted(map(sorted, batches))


def _expensive_first(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda k: (-costs[k], k))


class Planner(Generic[Item]):
    """Divides a batch into parts that fit into memory, by measured footprints and by where memory ran out.

    It measures at the first batch, and not at all where there is no limit.

    Parameters
    ----------
    potential : Potential
    run : callable
        ``run(items)``, whose memory is measured; it must have no effects.
    atoms_of : callable
        ``atoms_of(item)``, the structure whose size is that of the item.
    memory : float or None
        GiB that a part may take. None is 80 % of the free memory of a GPU, and no limit elsewhere.

    Attributes
    ----------
    footprint : Footprint or None
        What was measured.
    """

    def __init__(
        self,
        potential: Potential,
        run: Callable[[list[Item]], Any],
        atoms_of: Callable[[Item], Atoms],
        memory: float | None = None,
    ):
        self.potential, self.memory = potential, memory
        self.footprint: Footprint | None = None
        self._run, self._atoms_of = run, atoms_of
        self._most: int | None = None

    @property
    def limit(self) -> float:
        """Bytes that a part may take."""
        if self.memory is not None:
            return self.memory * 2**30
        return free_bytes(self.potential.device)

    def computed(self, run: Callable[[list[Item]], Found], items: Sequence[Item]) -> Iterator[tuple[list[int], Found]]:
        """The indices of each part of the items, and the result of `run` for it.

        Where memory runs out the part is halved, and later parts have no more items than fitted.
        """
        for part in self.parts(items):
            left = part
            for some, found in in_parts(run, [items[k] for k in part]):
                if len(some) < len(part):
                    self._most = len(some) if left is part else max(len(some), self._most or 0)
                yield left[: len(some)], found
                left = left[len(some) :]

    def parts(self, items: Sequence[Item]) -> list[list[int]]:
        """Indices of the items that are computed together; each part is in ascending order."""
        if self.limit < float("inf") and items:
            return pack(*self.costs(items), self._most)
        size = self._most or max(len(items), 1)
        return [list(range(first, min(first + size, len(items)))) for first in range(0, len(items), size)]

    def costs(self, items: Sequence[Item]) -> tuple[list[float], float]:
        """Bytes that each item adds to a batch, and the limit of their sum."""
        of = sizes(self.potential, [self._atoms_of(item) for item in items])
        if self.footprint is None:
            self.footprint = measure(self._run, items, of, self.potential.device)
            log.info(
                "A batch takes %.1f MiB, %.3f MiB for each atom and %.2f KiB for each edge.",
                self.footprint.fixed / 2**20, self.footprint.per_atom / 2**20, self.footprint.per_edge / 2**10,
            )  # fmt: skip
        return [self.footprint.of(size) for size in of], max(0.0, self.limit - self.footprint.fixed)
