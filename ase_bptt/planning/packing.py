"""Dealing items of unlike costs out to processes and to batches."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


def share(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Items dealt out to so many parts, so that none has much more to do than the others.

    The most expensive first, each to the part that has least so far (Graham, SIAM J. Appl. Math. 17, 416 (1969): at
    most 4/3 of the best there is, and close to it where items are many). The same on every machine.

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
    """Items in as few batches as will do, none of which costs more than the capacity.

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
