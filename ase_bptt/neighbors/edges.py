"""Edges of neighbouring atoms with integer shifts."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..structures import Structures


@dataclass(eq=False)
class Edges:
    """Every pair of atoms closer than a cutoff, each in both directions.

    Attributes
    ----------
    i, j : Tensor of int64, shape (n_edges,)
        Atom and neighbour, as indices into the batch.
    shifts : Tensor, shape (n_edges, 3)
        Whole numbers of cell vectors that lead to the neighbour's image, in the positions' dtype.
    mirror : Tensor of int64 or None, shape (n_edges,)
        Index of each pair's other direction; None where it was not looked for.
    """

    i: Tensor
    j: Tensor
    shifts: Tensor
    mirror: Tensor | None = None
    _offsets: Tensor | None = None

    def offsets(self, structures: Structures) -> Tensor:
        """Cartesian translation of each neighbour to its image, shape (n_edges, 3), in Å."""
        if self._offsets is not None:
            return self._offsets
        cells = structures.cells[structures.batch[self.i]]
        return (self.shifts.unsqueeze(1) @ cells).squeeze(1)

    def vectors(self, structures: Structures) -> Tensor:
        """Vector from each atom to its neighbour's image, shape (n_edges, 3), in Å."""
        x = structures.positions
        return x[self.j] - x[self.i] + self.offsets(structures)

    def near(self, cutoff: float, structures: Structures) -> Tensor:
        """Whether each pair is closer than the cutoff (Å) now, shape (n_edges,)."""
        with torch.no_grad():
            near = self.vectors(structures).square().sum(1) < cutoff**2
        # A length may differ from that of the other direction in the last bit.
        return near if self.mirror is None else near & near[self.mirror]

    def select(self, keep: Tensor, count: int | None = None) -> Edges:
        """The edges where keep, bool of shape (n_edges,), is true: both directions or none.

        Who knows how many these are spares the device the question.
        """
        place = keep.cumsum(0) - 1
        rows = keep.nonzero().squeeze(1) if count is None else _rows(keep, place, count)
        mirror = None if self.mirror is None else place[self.mirror[rows]]
        return Edges(self.i[rows], self.j[rows], self.shifts[rows], mirror)

    def with_offsets(self, offsets: Tensor) -> Edges:
        """The same edges, whose offsets are these instead of what follows from the cells."""
        new = copy(self)
        new._offsets = offsets
        return new

    @cached_property
    def one_way_first(self) -> Tensor | None:
        """Order in which one direction of every pair comes first, then the other in the same order.

        None where there is no `mirror`.
        """
        if self.mirror is None:
            return None
        first = self.mirror > torch.arange(len(self.i), device=self.i.device)
        # No pair is its own other direction.
        first = _rows(first, first.cumsum(0) - 1, len(self.i) // 2)
        return torch.cat((first, self.mirror[first]))


def joined_up(found: Sequence[Edges], structures: Structures) -> Edges:
    """The edges of each structure, as those of the batch."""
    sizes = torch.tensor([len(edges.i) for edges in found])
    firsts = torch.from_numpy(np.cumsum([0, *structures.counts])[:-1])
    device = structures.positions.device
    atoms = torch.repeat_interleave(firsts, sizes).to(device)
    i, j, shifts = (torch.cat([getattr(edges, name) for edges in found]) for name in ("i", "j", "shifts"))
    mirrors = [edges.mirror for edges in found if edges.mirror is not None]
    mirror = None
    if len(mirrors) == len(found):
        mirror = torch.cat(mirrors) + torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes).to(device)
    return Edges(i + atoms, j + atoms, shifts, mirror)


def _rows(keep: Tensor, place: Tensor, count: int) -> Tensor:
    """Indices of the true ones, without asking the device how many they are."""
    rows = torch.zeros(count + 1, dtype=torch.int64, device=keep.device)
    rows.scatter_(0, torch.where(keep, place, count), torch.arange(len(keep), device=keep.device))
    return rows[:count]
