"""Batches that fit into the memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from ase import Atoms

from ..potential import Potential
from .footprint import Footprint, free_bytes, measure, sizes
from .packing import pack

log = logging.getLogger(__name__)
Item = TypeVar("Item")


class Planner(Generic[Item]):
    """Cuts a batch into parts that fit into the memory, by what it has measured.

    Measured is at the first batch, and not at all where the memory cannot run out of what is asked of it.

    Parameters
    ----------
    potential : Potential
    run : callable
        ``run(items)``, whose memory counts; it may leave nothing behind.
    atoms_of : callable
        ``atoms_of(item)``, the structure by whose size an item is judged.
    memory : float or None
        GiB that a part may take. None is 80 % of what is free on a GPU, and no limit elsewhere.

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

    @property
    def limit(self) -> float:
        """Bytes that a part may take."""
        if self.memory is not None:
            return self.memory * 2**30
        return free_bytes(self.potential.device)

    def parts(self, items: Sequence[Item]) -> list[list[int]]:
        """Indices of the items that are computed together; each part is in ascending order."""
        if self.limit == float("inf") or not items:
            return [list(range(len(items)))] if items else []
        return pack(*self.costs(items))

    def costs(self, items: Sequence[Item]) -> tuple[list[float], float]:
        """Bytes that each item adds to a batch, and what they may come to."""
        of = sizes(self.potential, [self._atoms_of(item) for item in items])
        if self.footprint is None:
            self.footprint = measure(self._run, items, of)
            log.info(
                "A batch takes %.1f MiB, %.3f MiB for each atom and %.2f KiB for each pair of neighbours.",
                self.footprint.fixed / 2**20, self.footprint.per_atom / 2**20, self.footprint.per_pair / 2**10,
            )  # fmt: skip
        return [self.footprint.of(size) for size in of], self.limit - self.footprint.fixed
