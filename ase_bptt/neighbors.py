"""Neighbour pairs with integer shifts, from a list with a skin."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from ase.geometry.cell import complete_cell
from torch import Tensor
from vesin import NeighborList as VesinNeighborList

from .structures import Structures


@dataclass(eq=False)
class Pairs:
    """Every pair of atoms closer than a cutoff, each in both directions.

    Attributes
    ----------
    i, j : Tensor of int64, shape (n_pairs,)
        Atom and neighbour, as indices into the batch.
    shifts : Tensor, shape (n_pairs, 3)
        Whole numbers of cell vectors that lead to the neighbour's image, in the positions' dtype.
    mirror : Tensor of int64 or None, shape (n_pairs,)
        Index of each pair's other direction; None where it was not looked for.
    """

    i: Tensor
    j: Tensor
    shifts: Tensor
    mirror: Tensor | None = None
    _offsets: Tensor | None = None

    def offsets(self, structures: Structures) -> Tensor:
        """Cartesian translation of each neighbour to its image, shape (n_pairs, 3), in Å."""
        if self._offsets is not None:
            return self._offsets
        cells = structures.cells[structures.batch[self.i]]
        return (self.shifts.unsqueeze(1) @ cells).squeeze(1)

    def vectors(self, structures: Structures) -> Tensor:
        """Vector from each atom to its neighbour's image, shape (n_pairs, 3), in Å."""
        x = structures.positions
        return x[self.j] - x[self.i] + self.offsets(structures)

    def within(self, cutoff: float, structures: Structures) -> Pairs:
        """The pairs that are closer than the cutoff (Å) now."""
        return self.select(self.near(cutoff, structures))

    def near(self, cutoff: float, structures: Structures) -> Tensor:
        """Whether each pair is closer than the cutoff (Å) now, shape (n_pairs,)."""
        with torch.no_grad():
            near = self.vectors(structures).square().sum(1) < cutoff**2
        # A length may differ from that of the other direction in the last bit.
        return near if self.mirror is None else near & near[self.mirror]

    def select(self, keep: Tensor) -> Pairs:
        """The pairs where keep, bool of shape (n_pairs,), is true: both directions or none."""
        mirror = None if self.mirror is None else (keep.cumsum(0) - 1)[self.mirror[keep]]
        return Pairs(self.i[keep], self.j[keep], self.shifts[keep], mirror)

    def with_offsets(self, offsets: Tensor) -> Pairs:
        """The same pairs, whose offsets are these instead of what follows from the cells."""
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
        first = (self.mirror > torch.arange(len(self.i), device=self.i.device)).nonzero().squeeze(1)
        return torch.cat((first, self.mirror[first]))


class NeighborList:
    """Pairs within a cutoff, found anew only after an atom moved more than half the skin.

    Parameters
    ----------
    cutoff : float
        In Å. The pairs it returns are closer than this, whatever the skin.
    skin : float
        In Å: how much farther the stored list looks.

    The list is exact for every geometry: any change of the cells, the boundary conditions or
    the atoms builds it again, too.
    """

    def __init__(self, cutoff: float, skin: float = 0.5):
        if skin < 0:
            raise ValueError(f"The skin must not be negative, got {skin} Å.")
        self.cutoff = cutoff
        self.skin = skin
        self.builds = 0
        self._built_for: Structures | None = None
        self._stored: Pairs | None = None
        self._near: Tensor | None = None
        self._found: Pairs | None = None

    def __call__(self, structures: Structures) -> Pairs:
        """The pairs of this batch."""
        if self._stored is None or self._outdated(structures):
            found = find_pairs(structures, self.cutoff + self.skin)
            self._stored = found.with_offsets(found.offsets(structures).detach())
            self._found = None
            self._built_for = structures.replace(positions=structures.positions.detach().clone())
            self.builds += 1
        near = self._stored.near(self.cutoff, structures)
        if self._found is None or self._near is None or not torch.equal(near, self._near):
            self._near, self._found = near, self._stored.select(near)
        return self._found

    def _outdated(self, now: Structures) -> bool:
        then = self._built_for
        assert then is not None
        if then.counts != now.counts or then.positions.dtype != now.positions.dtype:
            return True
        if then.cells is not now.cells and not torch.equal(then.cells, now.cells):
            return True
        if then.pbc is not now.pbc and not torch.equal(then.pbc, now.pbc):
            return True
        with torch.no_grad():
            moved = (now.positions - then.positions).square().sum(1)
            # Written so that a NaN position counts as outdated.
            return not bool((moved <= (self.skin / 2) ** 2).all())


def find_pairs(structures: Structures, cutoff: float) -> Pairs:
    """All pairs of each structure closer than the cutoff (Å), in both directions.

    Any mix of boundary conditions, skewed cells, cells smaller than the cutoff and atoms outside
    of their cell. The search itself is vesin's.
    """
    positions = structures.positions.detach().double().cpu().numpy()
    cells = structures.cells.detach().double().cpu().numpy()
    pbc = structures.pbc.cpu().numpy()
    found, first, n_found = [], 0, 0
    for count, cell, periodic in zip(structures.counts, cells, pbc, strict=True):
        x = positions[first : first + count]
        if np.isfinite(x).all():
            # Where nothing repeats, no pair is longer than the span, and looking farther costs its third power.
            reach = cutoff if periodic.any() else min(cutoff, _span(x))
            find = VesinNeighborList(cutoff=reach, full_list=True, n_threads=1)
            i, j, shifts = find.compute(x, _filled(cell, periodic, x), periodic, "ijS")
            # One order for one geometry, whenever the list was built: sums repeat bit for bit.
            code = _code(i, j, shifts, count)
            order = np.argsort(code)
            i, j, shifts = i[order], j[order], shifts[order]
            mirror = np.searchsorted(code[order], _code(j, i, -shifts, count))
            found.append((i.astype(np.int64) + first, j.astype(np.int64) + first, shifts, mirror + n_found))
            n_found += len(i)
        first += count
    device = structures.positions.device
    columns = [np.concatenate(c) for c in zip(*found, strict=True)] or [
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        np.zeros((0, 3)),
        np.zeros(0, np.int64),
    ]
    i, j, shifts, mirror = columns
    return Pairs(
        torch.from_numpy(i).to(device),
        torch.from_numpy(j).to(device),
        torch.from_numpy(shifts).to(device, structures.positions.dtype),
        torch.from_numpy(mirror).to(device) if _is_mirror(i, j, shifts, mirror) else None,
    )


def _is_mirror(i: np.ndarray, j: np.ndarray, shifts: np.ndarray, mirror: np.ndarray) -> bool:
    """Whether every pair has its other direction there; right at the cutoff the search may have found only one."""
    if mirror.max(initial=-1) >= len(i):
        return False
    return np.array_equal(i[mirror], j) and np.array_equal(j[mirror], i) and np.array_equal(shifts[mirror], -shifts)


def _code(i: np.ndarray, j: np.ndarray, shifts: np.ndarray, n_atoms: int) -> np.ndarray:
    """A whole number for each pair of a structure, which sorts by i, j and shifts."""
    shifts = shifts.astype(np.int64)
    reach = np.abs(shifts).max(initial=0)
    code = i.astype(np.int64) * n_atoms + j.astype(np.int64)
    for column in shifts.T:
        code = code * (2 * reach + 1) + column + reach
    return code


def _filled(cell: np.ndarray, periodic: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The cell with every non-periodic or missing vector replaced by one that spans the atoms.

    A search grid needs a volume. Where a direction is not periodic the given vector says nothing
    about the atoms (it may be zero, or far too short), so a perpendicular one takes its place.
    """
    if periodic.all():
        return cell
    kept = np.where(periodic[:, None], cell, 0.0)
    if (np.linalg.norm(kept, axis=1)[periodic] == 0).any():
        raise ValueError("A structure is periodic along a cell vector of length zero: set its cell or its pbc.")
    filled = complete_cell(kept)
    filled[~periodic] *= _span(positions)
    return filled


def _span(positions: np.ndarray) -> float:
    """A length in Å that is more than the distance between any two of the atoms."""
    return 1.0 + float(np.linalg.norm(np.ptp(positions, axis=0))) if len(positions) else 1.0
