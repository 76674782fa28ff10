"""Lattices: the reduced cell, the nearest lattice vector, and a structure as compact as a search for edges allows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from ase.geometry.cell import complete_cell
from ase.geometry.minkowski_reduction import minkowski_reduce
from ase.symbols import Symbols
from torch import Tensor

from ..structures import Structures

RESOLUTION = 1e-3
"""Å: positions that a dtype can tell apart no better are refused."""
IMAGES = 2**26
"""Periodic images of its atoms within the cutoff that a structure may have."""
SMALLEST = 0.01
"""Å^3 for each atom: a cell that is smaller has collapsed, or is in other units."""
FLAT = 0.25
"""Height of a cell along a vector, divided by that vector's length, below which it is reduced before a search."""
GAP = 1.1
"""Cutoffs to which a wider gap between atoms is shortened."""


def farthest(dtype: torch.dtype) -> float:
    """Distance from the origin in Å up to which positions are known to `RESOLUTION` in this precision."""
    return RESOLUTION / torch.finfo(dtype).eps


def check_lattices(structures: Structures) -> None:
    """Raise ValueError, naming the structure, where a cell or a position is not one that edges can be searched in.

    Positions that are not finite pass: they have no edges, and whoever asked for them finds out.
    """
    positions = structures.positions.detach()
    cells, pbc = structures.cells.detach().double().cpu().numpy(), structures.pbc.cpu().numpy()
    periodic = np.where(pbc[:, :, None], cells, 0.0)
    limit = farthest(positions.dtype)
    # NaN fails the comparison, too.
    finite: Any = (np.abs(periodic) <= farthest(torch.float64)).reshape(-1, 9).all(1)
    rank = np.linalg.matrix_rank(np.where(finite[:, None, None], periodic, 0.0))
    size = positions.abs().amax(1).nan_to_num(0.0, 0.0) if len(positions) else positions.new_zeros(0)
    far: Any = structures.max(size).double().cpu().numpy() > limit
    volumes = np.abs(np.linalg.det(np.where(finite[:, None, None], cells, 0.0)))
    collapsed = pbc.all(1) & (volumes < SMALLEST * np.array(structures.counts))
    for k in np.flatnonzero(~finite | (rank < pbc.sum(1)) | collapsed | far).tolist():
        name = named(structures, k)
        lengths = np.linalg.norm(periodic[k], axis=1)[pbc[k]]
        if not finite[k]:
            raise ValueError(f"{name} has a cell vector that is not finite, or too long to compute with: set its cell.")
        if (lengths == 0).any():
            raise ValueError(f"{name} is periodic along a cell vector of length zero: set its cell or its pbc.")
        if far[k]:
            precision = str(positions.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} has an atom more than {limit:,.0f} Å from the origin, where {precision} does not resolve "
                f"{RESOLUTION} Å: move the structure to the origin, or compute in float64."
            )
        if rank[k] < len(lengths):
            raise ValueError(
                f"{name} is periodic along cell vectors that are linearly dependent: set its cell or its pbc."
            )
        raise ValueError(
            f"{name} has a cell of {volumes[k]:.2g} Å^3, less than {SMALLEST:g} Å^3 for each of its atoms: check its "
            "cell and its units."
        )


def named(structures: Structures, k: int) -> str:
    """Structure k of a batch, for messages: what it is made of, with its place where there are others."""
    numbers = structures.numbers[structures.atoms_of([k])].cpu().numpy()
    formula: str = Symbols(numbers).get_chemical_formula()
    return formula if len(structures) == 1 else f"Structure {k} ({formula})"


def periodic_cell(cell: np.ndarray, periodic: np.ndarray) -> np.ndarray:
    """The cell (3, 3) with unit vectors at right angles to the others in place of those that are not periodic.

    Such a vector means nothing, and a tilted one would spoil the fractions along the others: ASE's `find_mic` misses
    the nearest image where it is given one.
    """
    periodic = np.asarray(periodic)
    return cell if periodic.all() else complete_cell(np.where(periodic[:, None], cell, 0.0))


@lru_cache(maxsize=4096)
def reduced(cell: bytes, pbc: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Minkowski-reduced cell, its inverse, which of its vectors are periodic (as 0 and 1), and their least length.

    Takes the bytes of a cell, float64 of shape (3, 3), in Å, and of its pbc, bool of shape (3,).
    """
    vectors, periodic = np.frombuffer(cell).reshape(3, 3), np.frombuffer(pbc, dtype=bool)
    reduced, _ = minkowski_reduce(periodic_cell(vectors, periodic), periodic)
    shortest = np.linalg.norm(reduced[periodic], axis=1).min(initial=np.inf)
    return reduced, np.linalg.inv(reduced), periodic.astype(float), np.asarray(shortest)


def reduced_cells(structures: Structures, like: Tensor) -> list[Tensor]:
    """What `reduced` gives, of each structure, as `like` in dtype and device: shapes (n, 3, 3) twice, (n, 3), (n,)."""
    cells, pbc = structures.cells.detach().double().cpu().numpy(), structures.pbc.cpu().numpy()
    columns = zip(*(reduced(c.tobytes(), p.tobytes()) for c, p in zip(cells, pbc, strict=True)), strict=True)
    return [torch.from_numpy(np.stack(column)).to(like) for column in columns]


def nearest_lattice_vectors(d: Tensor, cells: Tensor, inverses: Tensor, periodic: Tensor, owner: Tensor) -> Tensor:
    """The lattice vector nearest to each row of d, shape (n_rows, 3), in Å; skewed cells are treated exactly.

    Parameters
    ----------
    d : Tensor, shape (n_rows, 3)
        In Å.
    cells, inverses, periodic : Tensor
        From `reduced_cells`.
    owner : Tensor of int64, shape (n_rows,)
        The structure of each row.
    """
    # Rounding in a Minkowski-reduced cell misses by at most one cell in each direction.
    cell, mask = cells[owner], periodic[owner]
    whole = ((d.unsqueeze(1) @ inverses[owner]).squeeze(1)).round() * mask
    around = torch.tensor(list(product((0, -1, 1), repeat=3)), dtype=d.dtype, device=d.device)
    candidates = (whole.unsqueeze(1) + around * mask.unsqueeze(1)) @ cell
    nearest = (d.unsqueeze(1) - candidates).square().sum(2).argmin(1)
    return candidates[torch.arange(len(d), device=d.device), nearest]


def minimum_images(d: Tensor, structures: Structures, owner: Tensor) -> Tensor:
    """The shortest of the periodic images of each row of d, shape (n_rows, 3), in Å.

    Parameters
    ----------
    d : Tensor, shape (n_rows, 3)
        In Å. The result is differentiable in d and in the cells.
    structures : Structures
    owner : Tensor of int64, shape (n_rows,)
        The structure of each row.
    """
    exact = d.detach().double()
    cells, inverses, mask, _ = reduced_cells(structures, exact)
    nearest = nearest_lattice_vectors(exact, cells, inverses, mask, owner)
    # Whole numbers of cell vectors, so that the images move with the cells.
    periodic = structures.cells.detach().double() * structures.pbc[:, :, None]
    whole = (nearest.unsqueeze(1) @ torch.linalg.pinv(periodic)[owner]).round().to(d.dtype)
    return d - (whole @ structures.cells[owner]).squeeze(1)


@dataclass(frozen=True, eq=False)
class Compact:
    """A structure with the same edges, in a box that is no larger than its atoms need.

    The cell is reduced where it is very skewed, atoms are wrapped into it, and what is empty along a cell vector is
    shortened to little more than the cutoff: no edge crosses it, and all others keep their vectors to rounding.

    Attributes
    ----------
    positions : array, shape (n_atoms, 3)
        In Å.
    box : array, shape (3, 3)
        Vectors as rows, in Å; those that are not periodic span the atoms.
    heights : array, shape (3,)
        Distance between opposite faces of the box, in Å.
    """

    positions: np.ndarray
    box: np.ndarray
    heights: np.ndarray
    _away: np.ndarray
    _operation: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, cell: np.ndarray, periodic: np.ndarray, cutoff: float) -> Compact:
        """The compact form for a search within the cutoff (Å); x must be finite, and not empty."""
        box, operation = np.array(periodic_cell(cell, periodic)), np.eye(3, dtype=int)
        inverse = np.linalg.inv(box)
        if (heights(inverse) < FLAT * np.linalg.norm(box, axis=1))[periodic].any():
            box, operation = (np.array(found) for found in minkowski_reduce(box, periodic))
            inverse = np.linalg.inv(box)
        fractional, height = x @ inverse, heights(inverse)
        away = np.floor(fractional) * periodic
        inside = x - away @ box if away.any() else x
        for axis in range(3):
            # A cell that is no longer than that has no gap.
            if not periodic[axis] or height[axis] > GAP * cutoff:
                along = fractional[:, axis] - away[:, axis]
                gap = GAP * cutoff / height[axis]
                inside, length = _without_gaps(inside, along, box[axis], gap, bool(periodic[axis]))
                box[axis] *= length
                height[axis] *= length
        return cls(inside, box, height, away, operation)

    def shifts(self, found: np.ndarray) -> np.ndarray:
        """Shifts that were found in the compact box, as whole numbers of its vectors, in those of the given cell."""
        return found @ self._operation

    def wrapped(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """What is to be added to these shifts, since atoms i and j were wrapped."""
        return (self._away[i] - self._away[j]) @ self._operation if self._away.any() else np.zeros((len(i), 3))


def heights(inverse: np.ndarray) -> np.ndarray:
    """Distances between opposite faces of a box in Å, shape (3,), from its inverse."""
    return 1 / np.linalg.norm(inverse, axis=0)


def _without_gaps(
    x: np.ndarray, along: np.ndarray, vector: np.ndarray, gap: float, periodic: bool
) -> tuple[np.ndarray, float]:
    """Positions without what is empty along a vector of the box, and the part of it that then holds the atoms.

    Gaps are shortened to this one, a fraction of the vector, as `along` are the atoms' places.
    """
    order = np.argsort(along, kind="stable")
    steps = np.diff(along[order])
    last = 1 - (along[order[-1]] - along[order[0]]) if periodic else 0.0
    excess = np.maximum(np.append(steps, last) - gap, 0.0)
    if excess.any():
        x = x.copy()
        x[order[1:]] -= np.cumsum(excess[:-1])[:, None] * vector
    return x, float((1.0 if periodic else steps.sum() + gap) - excess.sum())
