"""The search for the edges of each structure: by vesin on the host, by periodic images on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vesin import NeighborList as VesinNeighborList

from ..structures import Structures
from .lattice import IMAGES, Compact, check_lattices, heights, named, periodic_cell

Found = tuple[Tensor, Tensor, Tensor, "Tensor | None"]
"""i, j, shifts and mirror of one structure, as `ase_bptt.neighbors.Edges` has them."""
CANDIDATES = 2**27
"""Distances of one structure that are computed on a device at most."""
BINS = 1e5
"""Into which vesin sorts atoms, at most."""
BLOCK = 2**20
"""Distances that are computed at once; each takes about 300 bytes."""


def search_structures(structures: Structures, cutoff: float) -> list[Found]:
    """The edges closer than the cutoff (Å) of each structure; `ase_bptt.neighbors.search_each` says more."""
    check_lattices(structures)
    positions = structures.positions.detach().double()
    cells = structures.cells.detach().double().cpu().numpy()
    pbc = structures.pbc.cpu().numpy()
    like = structures.positions
    if like.device.type != "cpu" and feasible(structures.counts, cells, pbc, cutoff):
        found = search_on_device(positions, structures.counts, cells, pbc, cutoff)
        return [(i, j, shifts.to(like.dtype), mirror) for i, j, shifts, mirror in found]
    rows = positions.cpu().split(structures.counts)
    every = []
    for k, (x, cell, periodic) in enumerate(zip(rows, cells, pbc, strict=True)):
        try:
            every.append(_of_one(x.numpy(), cell, periodic, cutoff))
        except _TooManyImages as error:
            raise ValueError(
                f"{named(structures, k)} has a cell so small that more than {IMAGES} images of its atoms lie within "
                f"{cutoff:g} Å: check its cell and its units."
            ) from error
    return [
        (
            torch.from_numpy(i).to(like.device),
            torch.from_numpy(j).to(like.device),
            torch.from_numpy(shifts).to(like.device, like.dtype),
            None if mirror is None else torch.from_numpy(mirror).to(like.device),
        )
        for i, j, shifts, mirror in every
    ]


def _of_one(x: np.ndarray, cell: np.ndarray, periodic: np.ndarray, cutoff: float) -> tuple[Any, Any, Any, Any]:
    """The edges of one structure, by vesin; none where a position is not finite."""
    if not np.isfinite(x).all() or not len(x):
        none = np.zeros(0, np.int64)
        return none, none, np.zeros((0, 3)), none
    compact = Compact.of(x, cell, periodic, cutoff)
    if len(x) * (2 * cutoff / compact.heights + 1)[periodic].prod() > IMAGES:
        raise _TooManyImages
    # Without periodicity no distance exceeds the span, and the cost of a search grows with the cube of its radius.
    least = cutoff if periodic.any() else min(cutoff, _span(x))
    reach = _reach_of_bins(compact.heights, least)
    find = VesinNeighborList(cutoff=reach, full_list=True, n_threads=1)
    i, j, shifts, *lengths = find.compute(compact.positions, compact.box, periodic, "ijS" if reach == least else "ijSd")
    for length in lengths:
        i, j, shifts = (column[length < least] for column in (i, j, shifts))
    i, j, whole = (column.astype(np.int64) for column in (i, j, compact.shifts(shifts)))
    # One order for one geometry, whenever the list was built: sums repeat bit for bit.
    code = edge_codes(i, j, whole, len(x))
    order = np.argsort(code)
    i, j, whole = i[order], j[order], whole[order]
    mirror = np.searchsorted(code[order], edge_codes(j, i, -whole, len(x)))
    shifts = whole + compact.wrapped(i, j)
    return i, j, shifts, mirror if _is_mirror(i, j, shifts, mirror) else None


class _TooManyImages(ValueError):
    """A cell far smaller than the cutoff."""


def _reach_of_bins(heights: np.ndarray, cutoff: float) -> float:
    """The cutoff, or a longer one for boxes of heights that vesin would sort into so many bins that it divides by zero.

    It has `BINS` at most, shared out in proportion to the heights of the box, and rounds down to none of them where
    one direction is much shorter than another.
    """
    while True:
        bins = np.maximum(np.trunc(heights / cutoff), 1)
        if bins.prod() <= BINS or (bins * np.cbrt(BINS / bins.prod())).min() >= 2:
            return cutoff
        cutoff *= 1.25


def _is_mirror(i: np.ndarray, j: np.ndarray, shifts: np.ndarray, mirror: np.ndarray) -> bool:
    """Whether every edge has its reverse; right at the cutoff the search may have found one of the two only."""
    if mirror.max(initial=-1) >= len(i):
        return False
    return np.array_equal(i[mirror], j) and np.array_equal(j[mirror], i) and np.array_equal(shifts[mirror], -shifts)


def edge_codes(i: Any, j: Any, shifts: Any, n_atoms: Any) -> Any:
    """A whole number for each edge, which sorts as i, j and shifts do.

    Arrays or tensors of int64: shapes (n_edges,), (n_edges,) and (n_edges, 3) to (n_edges,). All codes that are
    compared must come from the same edges, in either direction.
    """
    # A tensor stays on its device.
    reach = abs(shifts).max() if len(shifts) else 0
    code = i * n_atoms + j
    for axis in range(3):
        code = code * (2 * reach + 1) + shifts[:, axis] + reach
    return code


def two_at_each_atom(i: Tensor, short: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Every ordered two of the short edges that share their atom i, as indices of edges: the legs of the angles.

    i, of shape (n_edges,), must be sorted, as the edges of `ase_bptt.neighbors` are; short is bool of the same shape.
    """
    edge = short.nonzero().squeeze(1)
    centre = i[edge]
    coordination = torch.bincount(centre, minlength=n_atoms)
    start = coordination.cumsum(0) - coordination
    partners = coordination[centre]
    first = torch.repeat_interleave(torch.arange(len(edge), device=i.device), partners)
    block = torch.arange(len(first), device=i.device) - torch.repeat_interleave(partners.cumsum(0) - partners, partners)
    second = start[centre[first]] + block
    different = first != second
    return edge[first[different]], edge[second[different]]


def _span(positions: np.ndarray) -> float:
    """A length in Å that is more than the distance between any two of the atoms."""
    return 1.0 + float(np.linalg.norm(np.ptp(positions, axis=0))) if len(positions) else 1.0


def feasible(counts: Sequence[int], cells: np.ndarray, pbc: np.ndarray, cutoff: float) -> bool:
    """Whether every structure is small enough for `search_on_device`."""
    return bool(_candidates(counts, _reach(cells, pbc, cutoff)).max(initial=0) <= CANDIDATES)


def search_on_device(
    positions: Tensor, counts: Sequence[int], cells: np.ndarray, pbc: np.ndarray, cutoff: float
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """i, j, shifts and mirror of each structure, as `ase_bptt.neighbors.Edges` has them.

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
    full = np.stack([periodic_cell(c, p) for c, p in zip(cells, pbc, strict=True)])
    vectors, inverses = (torch.from_numpy(x).to(device) for x in (full, np.linalg.inv(full)))
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
    # Atoms may be anywhere: each is wrapped into its cell, and the lattice vector is kept.
    away = (positions.unsqueeze(1) @ inverses[owner]).squeeze(1).floor() * torch.from_numpy(pbc).to(device)[owner]
    inside = positions - (away.unsqueeze(1) @ vectors[owner]).squeeze(1)
    reach = _reach(cells, pbc, cutoff)
    blocks = [
        _near(inside, away, vectors, block, cutoff) for block in _blocks(counts, reach, _candidates(counts, reach))
    ]
    of, i, j, shifts = (torch.cat(column) for column in zip(*blocks, strict=True))
    # Right at the cutoff rounding may have found one direction only: an edge without its reverse is left out.
    mirror, has_mirror = _mirrors(i, j, shifts)
    kept = has_mirror.nonzero().squeeze(1)
    mirror = (has_mirror.cumsum(0) - 1)[mirror[kept]]
    of, i, j, shifts = of[kept], i[kept], j[kept], shifts[kept]
    sizes = torch.bincount(of, minlength=len(counts)).tolist()
    first_atoms, first_edges = np.cumsum([0, *counts]), np.cumsum([0, *sizes])
    columns = (x.split(sizes) for x in (i, j, shifts, mirror))
    return [
        (i - int(atom), j - int(atom), shifts, mirror - int(edge))
        for i, j, shifts, mirror, atom, edge in zip(*columns, first_atoms, first_edges, strict=False)
    ]


def _reach(cells: np.ndarray, pbc: np.ndarray, cutoff: float) -> np.ndarray:
    """How many periodic images to search on each side of each direction, shape (n, 3)."""
    reach = np.zeros(pbc.shape, np.int64)
    for k, (cell, periodic) in enumerate(zip(cells, pbc, strict=True)):
        # Two atoms of one cell may be nearly a whole cell apart already.
        reach[k] = np.where(periodic, np.floor(cutoff / heights(np.linalg.inv(periodic_cell(cell, periodic)))) + 1, 0)
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
    """Index of each edge's reverse, and whether there is one; edges are sorted by i, j and shifts."""
    n, whole = i.max() + 1 if len(i) else 1, shifts.to(torch.int64)
    code, back = edge_codes(i, j, whole, n), edge_codes(j, i, -whole, n)
    mirror = torch.searchsorted(code, back).clamp(max=max(len(code) - 1, 0))
    return mirror, code[mirror] == back
