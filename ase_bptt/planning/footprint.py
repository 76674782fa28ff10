"""What a batch takes of the memory, from its atoms and neighbour pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from ase import Atoms
from scipy.optimize import nnls

from ..potential import Potential
from ..search import search
from .live import peak_bytes

Item = TypeVar("Item")
SHARE = 0.8
"""Of the memory that is free; the rest is for what allocators round up."""
PROBES = 4
"""Batches that are measured."""


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
        return self.per_atom * size.atoms + self.per_pair * size.pairs


def sizes(potential: Potential, structures: Sequence[Atoms]) -> list[Size]:
    """Atoms and neighbour pairs of each structure."""
    found = search(potential.batch(structures), potential.cutoff)
    return [Size(len(atoms), len(pairs.i)) for atoms, pairs in zip(structures, found, strict=True)]


def measure(run: Callable[[list[Item]], Any], items: Sequence[Item], of: Sequence[Size]) -> Footprint:
    """The footprint of a computation, from its peaks on a few batches of the smallest and the largest items.

    Parameters
    ----------
    run : callable
        ``run(items)``, whose memory counts; it is called some times.
    items : sequence
    of : sequence of Size
        Their sizes.
    """
    order = sorted(range(len(items)), key=lambda k: of[k])
    small, large = order[0], order[-1]
    batches = [[small], [small, small], [large], [small, large]][:PROBES]
    run([items[small]])  # what is made at first use
    peaks = [peak_bytes(lambda batch=batch: run([items[k] for k in batch])) for batch in batches]  # type: ignore[misc]
    rows = [[1.0, sum(of[k].atoms for k in batch), sum(of[k].pairs for k in batch)] for batch in batches]
    # Each batch counts by its relative error; nothing can take less than no memory.
    scale = 1 / np.array(peaks, dtype=float)
    (fixed, per_atom, per_pair), _ = nnls(np.array(rows) * scale[:, None], np.ones(len(peaks)))
    return Footprint(fixed, per_atom, per_pair)


def free_bytes(device: torch.device) -> float:
    """What may be taken of the memory of a GPU now; infinite elsewhere, where the system would swap, not say no."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return SHARE * (free + held_back)
