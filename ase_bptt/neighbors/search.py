"""The search for edges: by vesin on the host, by periodic images on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase.geometry.cell import complete_cell
from torch import Tensor
from vesin import NeighborList as VesinNeighborList

from ..structures import Structures
from .edges import Edges, joined_up


def search_each(structures: Structures, cutoff: float, members: Sequence[int] | None = None) -> list[Edges]:
    """The edges closer than the cutoff (Å) of each structure, or of these members, as indices into that structure.

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
    if positions.device.type != "cpu" and feasible(structures.counts, cells, pbc, cutoff):
        _check_cells(cells, pbc)
        found = search_on_device(positions, structures.counts, cells, pbc, cutoff)
        return [Edges(i, j, shifts.to(structures.positions.dtype), mirror) for i, j, shifts, mirror in found]
    rows = positions.cpu().split(structures.counts)
    every = [_of_one(x.numpy(), cell, p, cutoff) for x, cell, p in zip(rows, cells, pbc, strict=True)]
    like = structures.positions
    return [
        Edges(
            torch.from_numpy(i).to(like.device),
            torch.from_numpy(j).to(like.device),
            torch.from_numpy(shifts).to(like.device, like.dtype),
            None if mirror is None else torch.from_numpy(mirror).to(like.device),
        )
        for i, j, shifts, mirror in every
    ]


def find_edges(structures: Structures, cutoff: float) -> Edges:
    """The edges of a batch, as indices into it; otherwise as `search`."""
    return joined_up(search_each(structures, cutoff), structures)


def _of_one(
    x: np.ndarray, cell: np.ndarray, periodic: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """The edges of one structure, by vesin; none where a position is not finite."""
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


CANDIDATES = 2**27
"""Distances of one structure at most."""
BLOCK = 2**20
"""Distances that are computed at once; each takes about 300 bytes."""


def feasible(counts: Sequence[int], cells: np.ndarray, pbc: np.ndarray, cutoff: float) -> bool:
    """Whether none of the structures is too large for it."""
    return bool(_candidates(counts, _reach(cells, pbc, cutoff)).max(initial=0) <= CANDIDATES)


def search_on_device(
    positions: Tensor, counts: Sequence[int], cells: np.ndarray, pbc: np.ndarray, cutoff: float
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """i, j, shifts and mirror of each structure, as `ase_bptt.neighbors.edges.Edges` has them.

    Parameters
    ----------
    positions : Tensor of float64, shape (n_atoms, 3)
        In Å.
    counts : sequence of int, length n
    cells : array, shape (n, 3, 3)
        In Å.
    pbc : array of bool, shape (n, 3)
    cutoff : float
        In Å.
    """
    device = positions.device
    full = np.stack([complete_cell(np.where(p[:, None], c, 0.0)) for c, p in zip(cells, pbc, strict=True)])
    vectors, inverses = (torch.from_numpy(x).to(device) for x in (full, np.linalg.inv(full)))
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
    # Atoms may be anywhere: each is brought into its cell, and the way is remembered.
    away = (positions.unsqueeze(1) @ inverses[owner]).squeeze(1).floor() * torch.from_numpy(pbc).to(device)[owner]
    inside = positions - (away.unsqueeze(1) @ vectors[owner]).squeeze(1)
    reach = _reach(cells, pbc, cutoff)
    blocks = [
        _near(inside, away, vectors, block, cutoff) for block in _blocks(counts, reach, _candidates(counts, reach))
    ]
    of, i, j, shifts = (torch.cat(column) for column in zip(*blocks, strict=True))
    # Right at the cutoff rounding may have found one direction only: a pair without its mirror image is none.
    mirror, has_mirror = _mirrors(i, j, shifts)
    kept = has_mirror.nonzero().squeeze(1)
    mirror = (has_mirror.cumsum(0) - 1)[mirror[kept]]
    of, i, j, shifts = of[kept], i[kept], j[kept], shifts[kept]
    sizes = torch.bincount(of, minlength=len(counts)).tolist()
    first_atoms, first_pairs = np.cumsum([0, *counts]), np.cumsum([0, *sizes])
    columns = (x.split(sizes) for x in (i, j, shifts, mirror))
    return [
        (i - int(atom), j - int(atom), shifts, mirror - int(pair))
        for i, j, shifts, mirror, atom, pair in zip(*columns, first_atoms, first_pairs, strict=False)
    ]


def _reach(cells: np.ndarray, pbc: np.ndarray, cutoff: float) -> np.ndarray:
    """How many images to look at on each side of each direction, shape (n, 3)."""
    reach = np.zeros(pbc.shape, np.int64)
    for k, (cell, periodic) in enumerate(zip(cells, pbc, strict=True)):
        heights = 1 / np.linalg.norm(np.linalg.inv(complete_cell(np.where(periodic[:, None], cell, 0.0))), axis=0)
        # Two atoms of one cell may be nearly a whole cell apart already.
        reach[k] = np.where(periodic, np.floor(cutoff / heights) + 1, 0)
    return reach


def _candidates(counts: Sequence[int], reach: np.ndarray) -> np.ndarray:
    return np.square(np.asarray(counts, np.int64)) * (2 * reach + 1).prod(1)


def _blocks(counts: Sequence[int], reach: np.ndarray, candidates: np.ndarray) -> list[list[tuple[int, ...]]]:
    """Which candidates are computed at once: (structure, its first atom, its atoms, reach, first, last candidate)."""
    blocks: list[list[tuple[int, ...]]] = [[]]
    room = BLOCK
    for k, (first, n) in enumerate(zip(np.cumsum([0, *counts]), counts, strict=False)):
        begin = 0
        while begin < candidates[k]:
            end = min(int(candidates[k]), begin + room)
            blocks[-1].append((k, int(first), n, *map(int, reach[k]), begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                blocks.append([])
                room = BLOCK
    return [block for block in blocks if block] or [[]]


def _near(
    inside: Tensor, away: Tensor, vectors: Tensor, block: list[tuple[int, ...]], cutoff: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Structure, atom, neighbour and shift of the candidates that are closer than the cutoff."""
    device = inside.device
    table = torch.tensor(block, dtype=torch.int64).reshape(-1, 8)
    sizes = table[:, 7] - table[:, 6]
    row = torch.repeat_interleave(torch.arange(len(table)), sizes).to(device)
    begins = (sizes.cumsum(0) - sizes).to(device)
    k, first, n, *reach, begin, _ = table.to(device)[row].unbind(1)
    left = torch.arange(len(row), device=device) - begins[row] + begin
    digits = []
    for axis in (2, 1, 0):
        width = 2 * reach[axis] + 1
        digits.append(left % width - reach[axis])
        left = left // width
    image = torch.stack(digits[::-1], dim=1)
    i, j = first + left // n, first + left % n
    d = inside[j] - inside[i] + (image.to(inside).unsqueeze(1) @ vectors[k]).squeeze(1)
    itself = (i == j) & (image == 0).all(1)
    near = ((d.square().sum(1) < cutoff**2) & ~itself).nonzero().squeeze(1)
    k, i, j = k[near], i[near], j[near]
    return k, i, j, image[near] + away[i] - away[j]


def _mirrors(i: Tensor, j: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pair's other direction is, if it is there; edges are sorted by i, j and shifts."""
    whole = shifts.to(torch.int64)
    reach = whole.abs().max() if len(whole) else 0
    width, n = 2 * reach + 1, (i.max() + 1 if len(i) else 1)
    code, back = i * n + j, j * n + i
    for axis in range(3):
        code, back = code * width + whole[:, axis] + reach, back * width - whole[:, axis] + reach
    mirror = torch.searchsorted(code, back).clamp(max=max(len(code) - 1, 0))
    return mirror, code[mirror] == back
