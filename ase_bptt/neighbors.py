"""Neighbour pairs with integer shifts, from a list with a skin."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    i: Tensor
    j: Tensor
    shifts: Tensor

    def offsets(self, structures: Structures) -> Tensor:
        """Cartesian translation of each neighbour to its image, shape (n_pairs, 3), in Å."""
        cells = structures.cells[structures.batch[self.i]]
        return (self.shifts.unsqueeze(1) @ cells).squeeze(1)

    def vectors(self, structures: Structures) -> Tensor:
        """Vector from each atom to its neighbour's image, shape (n_pairs, 3), in Å."""
        x = structures.positions
        return x[self.j] - x[self.i] + self.offsets(structures)

    def within(self, cutoff: float, structures: Structures) -> Pairs:
        """The pairs that are closer than the cutoff (Å) now."""
        with torch.no_grad():
            near = self.vectors(structures).square().sum(1) < cutoff**2
        return Pairs(self.i[near], self.j[near], self.shifts[near])


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

    def __call__(self, structures: Structures) -> Pairs:
        """The pairs of this batch."""
        if self._stored is None or self._outdated(structures):
            self._stored = find_pairs(structures, self.cutoff + self.skin)
            self._built_for = structures.replace(positions=structures.positions.detach().clone())
            self.builds += 1
        return self._stored.within(self.cutoff, structures)

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
    found, first = [], 0
    for count, cell, periodic in zip(structures.counts, cells, pbc, strict=True):
        x = positions[first : first + count]
        if np.isfinite(x).all():
            # Where nothing repeats, no pair is longer than the span, and looking farther costs its third power.
            reach = cutoff if periodic.any() else min(cutoff, _span(x))
            find = VesinNeighborList(cutoff=reach, full_list=True, n_threads=1)
            i, j, shifts = find.compute(x, _filled(cell, periodic, x), periodic, "ijS")
            # One order for one geometry, whenever the list was built: sums repeat bit for bit.
            order = np.argsort(_code(i, j, shifts, count))
            i, j, shifts = i[order], j[order], shifts[order]
            found.append((i.astype(np.int64) + first, j.astype(np.int64) + first, shifts))
        first += count
    device = structures.positions.device
    columns = [np.concatenate(c) for c in zip(*found, strict=True)] or [
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        np.zeros((0, 3)),
    ]
    i, j, shifts = columns
    return Pairs(
        torch.from_numpy(i).to(device),
        torch.from_numpy(j).to(device),
        torch.from_numpy(shifts).to(device, structures.positions.dtype),
    )


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
