"""Finding all pairs of atoms within a radius, structure by structure.

On the host the search is vesin's, one structure after the other; elsewhere `images` searches all structures at once
where they are. Both give the same pairs in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase.geometry.cell import complete_cell
from vesin import NeighborList as VesinNeighborList

from . import images
from .pairlists import Pairs, joined_up
from .structures import Structures


def search(structures: Structures, cutoff: float, members: Sequence[int] | None = None) -> list[Pairs]:
    """The pairs closer than the cutoff (Å) of each structure, or of these members, as indices into that structure.

    All in both directions, sorted by i, j and shifts. Any mix of boundary conditions, skewed cells, cells smaller than
    the cutoff and atoms outside of their cell.

    Raises
    ------
    ValueError
        For a structure that is periodic along a cell vector of length zero.
    """
    if members is not None:
        structures = structures.select(members)
    positions = structures.positions.detach().double()
    cells = structures.cells.detach().double().cpu().numpy()
    pbc = structures.pbc.cpu().numpy()
    if positions.device.type != "cpu" and images.feasible(structures.counts, cells, pbc, cutoff):
        _check_cells(cells, pbc)
        found = images.search(positions, structures.counts, cells, pbc, cutoff)
        return [Pairs(i, j, shifts.to(structures.positions.dtype), mirror) for i, j, shifts, mirror in found]
    rows = positions.cpu().split(structures.counts)
    every = [_of_one(x.numpy(), cell, p, cutoff) for x, cell, p in zip(rows, cells, pbc, strict=True)]
    like = structures.positions
    return [
        Pairs(
            torch.from_numpy(i).to(like.device),
            torch.from_numpy(j).to(like.device),
            torch.from_numpy(shifts).to(like.device, like.dtype),
            None if mirror is None else torch.from_numpy(mirror).to(like.device),
        )
        for i, j, shifts, mirror in every
    ]


def find_pairs(structures: Structures, cutoff: float) -> Pairs:
    """The pairs of a batch, as indices into it; otherwise as `search`."""
    return joined_up(search(structures, cutoff), structures)


def _of_one(
    x: np.ndarray, cell: np.ndarray, periodic: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """The pairs of one structure, by vesin; none where a position is not finite."""
    if not np.isfinite(x).all():
        none = np.zeros(0, np.int64)
        return none, none, np.zeros((0, 3)), none
    # Where nothing repeats, no pair is longer than the span, and looking farther costs its third power.
    reach = cutoff if periodic.any() else min(cutoff, _span(x))
    find = VesinNeighborList(cutoff=reach, full_list=True, n_threads=1)
    i, j, shifts = find.compute(x, _filled(cell, periodic, x), periodic, "ijS")
    # One order for one geometry, whenever the list was built: sums repeat bit for bit.
    code = _code(i, j, shifts, len(x))
    order = np.argsort(code)
    i, j, shifts = i[order].astype(np.int64), j[order].astype(np.int64), shifts[order]
    mirror = np.searchsorted(code[order], _code(j, i, -shifts, len(x)))
    return i, j, shifts, mirror if _is_mirror(i, j, shifts, mirror) else None


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
    _check_cells(cell[None], periodic[None])
    filled = complete_cell(np.where(periodic[:, None], cell, 0.0))
    filled[~periodic] *= _span(positions)
    return filled


def _check_cells(cells: np.ndarray, pbc: np.ndarray) -> None:
    if (np.linalg.norm(cells, axis=2)[pbc] == 0).any():
        raise ValueError("A structure is periodic along a cell vector of length zero: set its cell or its pbc.")


def _span(positions: np.ndarray) -> float:
    """A length in Å that is more than the distance between any two of the atoms."""
    return 1.0 + float(np.linalg.norm(np.ptp(positions, axis=0))) if len(positions) else 1.0
