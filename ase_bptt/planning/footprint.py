"""What a batch takes of the memory, from its atoms and neighbour pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from ase import Atoms
from scipy.optimize import nnls

from ..potential import Potential
from ..search import search
from .halving import fits, tell
from .live import peak_bytes

Item = TypeVar("Item")
SHARE = 0.8
"""Of the memory that is free; the rest is for what allocators round up."""
COUNTED = 64
"""Structures whose pairs are held at once while they are counted."""


class Size(NamedTuple):
    """Atoms and neighbour pairs of a structure."""

    atoms: int
    pairs: int


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak: some for each batch, for each atom, for each neighbour pair.

    Attributes
    ----------
    fixed, per_atom, per_pair : float
        In bytes.
    """

    fixed: float
    per_atom: float
    per_pair: float

    def of(self, size: Size) -> float:
        """Bytes that a structure adds to a batch."""
        # Something at least, so that room is never endless.
        return max(1.0, self.per_atom * size.atoms + self.per_pair * size.pairs)


def sizes(potential: Potential, structures: Sequence[Atoms]) -> list[Size]:
    """Atoms and neighbour pairs of each structure."""
    counted: list[Size] = []
    for first in range(0, len(structures), COUNTED):
        some = structures[first : first + COUNTED]
        found = search(potential.batch(some), potential.cutoff)
        counted += [Size(len(atoms), len(pairs.i)) for atoms, pairs in zip(some, found, strict=True)]
    return counted


def measure(run: Callable[[list[Item]], Any], items: Sequence[Item], of: Sequence[Size]) -> Footprint:
    """The footprint of a computation, from its peaks on a few batches of the smallest and the largest items.

    Parameters
    ----------
    run : callable
        ``run(items)``, whose memory counts; it is called some times.
    items : sequence
    of : sequence of Size
        Their sizes.

    Raises
    ------
    MemoryError
        Where not even the smallest item fits, naming the mend.
    """
    order = sorted(range(len(items)), key=lambda k: of[k])
    small, large = order[0], order[-1]
    rows, peaks = [], []
    # The first makes what is made at first use, and is measured again.
    for batch in ([small], [small], [small, small], [large], [small, large]):
        found = fits(partial(peak_bytes, partial(run, [items[k] for k in batch])))
        if found is None:
            continue
        rows.append([1.0, sum(of[k].atoms for k in batch), sum(of[k].pairs for k in batch)])
        peaks.append(max(1, found[0]))
    if not peaks:
        tell(1)
    return _fitted(np.array(rows[1:] or rows), np.array(peaks[1:] or peaks, dtype=float))


def _fitted(rows: np.ndarray, peaks: np.ndarray) -> Footprint:
    """Bytes for each batch, atom and pair that give these peaks."""
    if len(rows) < rows.shape[1]:
        return Footprint(0.0, float((peaks / rows[:, 1]).max()), 0.0)
    # Each batch counts by its relative error; nothing can take less than no memory.
    (fixed, per_atom, per_pair), _ = nnls(rows / peaks[:, None], np.ones(len(peaks)))
    return Footprint(fixed, per_atom, per_pair)


def free_bytes(device: torch.device) -> float:
    """What may be taken of the memory of a GPU now; infinite elsewhere, where the system would swap, not say no."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return SHARE * (free + held_back)
