"""Finding pairs where the structures are: every atom against every image of every other, for all structures at once.

Quadratic in the atoms of a structure, so for cells of some hundred atoms: there it saves the way to the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase.geometry.cell import complete_cell
from torch import Tensor

CANDIDATES = 2**27
"""Distances of one structure at most."""
BLOCK = 2**20
"""Distances that are computed at once; each takes about 300 bytes."""


def feasible(counts: Sequence[int], cells: np.ndarray, pbc: np.ndarray, cutoff: float) -> bool:
    """Whether none of the structures is too large for it."""
    return bool(_candidates(counts, _reach(cells, pbc, cutoff)).max(initial=0) <= CANDIDATES)


def search(
    positions: Tensor, counts: Sequence[int], cells: np.ndarray, pbc: np.ndarray, cutoff: float
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """i, j, shifts and mirror of each structure, as `ase_bptt.pairlists.Pairs` has them.

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
    """Where each pair's other direction is, if it is there; pairs are sorted by i, j and shifts."""
    whole = shifts.to(torch.int64)
    reach = whole.abs().max() if len(whole) else 0
    width, n = 2 * reach + 1, (i.max() + 1 if len(i) else 1)
    code, back = i * n + j, j * n + i
    for axis in range(3):
        code, back = code * width + whole[:, axis] + reach, back * width - whole[:, axis] + reach
    mirror = torch.searchsorted(code, back).clamp(max=max(len(code) - 1, 0))
    return mirror, code[mirror] == back
