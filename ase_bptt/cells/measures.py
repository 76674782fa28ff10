"""How far a cell is from that of a reference: strain, volume and lattice parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..structures import Structures
from ..utils import safe_sqrt


def differ(now: Structures, then: Structures) -> Tensor:
    """Which structures stand in other cells than their references, bool of shape (n,)."""
    return (now.cells.detach() != then.cells).flatten(1).any(1)


def in_cells_of(now: Structures, then: Structures) -> Tensor:
    """Positions at the same fractional coordinates in the references' cells, in Å, shape (n_atoms, 3).

    Directions without a cell vector stay as they are, and so do structures in equal cells, to the last bit.
    """
    moved = differ(now, then)
    if not bool(moved.any()):
        return now.positions
    change = torch.linalg.pinv(now.cells) @ (then.cells - now.cells)
    there = now.positions + (now.positions.unsqueeze(1) @ change[now.batch]).squeeze(1)
    return torch.where(moved[now.batch, None], there, now.positions)


def green_lagrange(now: Structures, then: Structures) -> Tensor:
    """Green-Lagrange strain (G G^T - 1) / 2 of each cell, with C = C_ref G, shape (n, 3, 3).

    It does not change when the structure turns, and is a polynomial in the cell, so that it is smooth at a match,
    where it is exactly zero. In directions that the reference's cell does not span it is zero.
    """
    inverse = torch.linalg.pinv(then.cells)
    g, unit = inverse @ now.cells, inverse @ then.cells
    strain = (g @ g.mT - unit @ unit.mT) / 2
    return torch.where(differ(now, then)[:, None, None], strain, 0.0)


def cell_strain(now: Structures, then: Structures) -> Tensor:
    """Frobenius norm of `green_lagrange`, shape (n,)."""
    return safe_sqrt(green_lagrange(now, then).square().sum((1, 2)))


def cell_square(now: Structures, then: Structures) -> Tensor:
    """What a cell adds to Delta-Q squared, in amu Å^2, shape (n,): n (V/n)^(2/3) m |E|^2.

    With the atoms n, the volume V and the mean mass m of the reference: a strain counts as the displacement of atoms
    that are (V/n)^(1/3) apart.
    """
    n = torch.tensor(then.counts).to(then.cells)
    length = torch.where(then.volumes > 0, then.volumes / n, 1.0) ** (1 / 3)
    mass = then.sum(then.masses) / n
    return n * length.square() * mass * green_lagrange(now, then).square().sum((1, 2))


def volume_error(now: Structures, then: Structures) -> Tensor:
    """V / V_ref - 1, shape (n,); NaN where a reference has no volume."""
    volumes = torch.linalg.det(now.cells).abs()
    known = then.volumes > 0
    return torch.where(known, volumes / torch.where(known, then.volumes, 1.0) - 1, torch.nan)


def lattice_error(now: Structures, then: Structures) -> Tensor:
    """Differences of a, b, c in Å and alpha, beta, gamma in degrees, shape (n, 6)."""
    return torch.cat([a - b for a, b in zip(_parameters(now), _parameters(then), strict=True)], dim=1)


def _parameters(of: Structures) -> tuple[Tensor, Tensor]:
    lengths = safe_sqrt(of.cells.square().sum(2))
    pairs = of.cells[:, [1, 0, 0]], of.cells[:, [2, 2, 1]]
    across = safe_sqrt(torch.linalg.cross(*pairs).square().sum(2))
    return lengths, torch.atan2(across, (pairs[0] * pairs[1]).sum(2)) * (180 / math.pi)
