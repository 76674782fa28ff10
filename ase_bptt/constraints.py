"""ASE's constraints as linear maps on the device.

ASE adjusts forces and positions by two maps, which differ: FixCom, for example, projects forces with other weights than
steps. Both are linear here, X <- X + B (X' - X) and F <- A F, and act out of place, so that autograd finds their
transposes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from ase import Atoms, constraints
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """x_t <- sum of M_k x_s over all k with target t: shapes (K,), (K,), (K, 3, 3)."""

    target: np.ndarray
    source: np.ndarray
    matrices: np.ndarray


@dataclass(frozen=True, eq=False)
class Shift:
    """x <- x - u (v . x), for each Cartesian component: shapes (n,), (n,)."""

    u: np.ndarray
    v: np.ndarray


Map = Blocks | Shift


def maps_of(atoms: Atoms) -> tuple[tuple[Map, ...], tuple[Map, ...]]:
    """The maps of forces and of steps, one for each constraint among `KNOWN`, in order."""
    found = [KNOWN[type(c).__name__](c, atoms) for c in atoms.constraints if type(c).__name__ in KNOWN]
    return tuple(forces for forces, _ in found), tuple(steps for _, steps in found)


def unknown(names: Sequence[str]) -> list[str]:
    """Those of these constraints that only ASE's own optimizers can apply."""
    return [name for name in names if name not in KNOWN]


def unknown_of(atoms: Atoms) -> list[str]:
    """`unknown` of the constraints on these atoms."""
    return unknown([type(c).__name__ for c in atoms.constraints])


def _local(atoms: Atoms, index: Any, matrix: np.ndarray) -> Blocks:
    """One matrix on some atoms, the identity on the others."""
    matrices = np.tile(np.eye(3), (len(atoms), 1, 1))
    matrices[index] = matrix
    every = np.arange(len(atoms))
    return Blocks(every, every, matrices)


def _fix_atoms(constraint: Any, atoms: Atoms) -> tuple[Map, Map]:
    free = _local(atoms, constraint.index, np.zeros((3, 3)))
    return free, free


def _fix_cartesian(constraint: Any, atoms: Atoms) -> tuple[Map, Map]:
    free = _local(atoms, constraint.index, np.diag(~constraint.mask).astype(float))
    return free, free


def _fix_scaled(constraint: Any, atoms: Atoms) -> tuple[Map, Map]:
    # Rows of the cell: positions are scaled @ cell. Columns here, since a map acts from the left.
    cell = atoms.cell.complete().array.T
    free = np.diag(~constraint.mask).astype(float)
    steps = cell @ free @ np.linalg.inv(cell)
    forces = np.linalg.inv(cell) @ free @ cell
    return _local(atoms, constraint.index, forces), _local(atoms, constraint.index, steps)


def _fixed_line(constraint: Any, atoms: Atoms) -> tuple[Map, Map]:
    free = _local(atoms, constraint.index, np.outer(constraint.dir, constraint.dir))
    return free, free


def _fixed_plane(constraint: Any, atoms: Atoms) -> tuple[Map, Map]:
    free = _local(atoms, constraint.index, np.eye(3) - np.outer(constraint.dir, constraint.dir))
    return free, free


def _fix_com(constraint: Any, atoms: Atoms) -> tuple[Map, Map]:
    masses = np.zeros(len(atoms))
    masses[constraint.index] = atoms.get_masses()[constraint.index]
    # The centre of a subset is fixed by shifting all atoms, but by forces on the subset alone.
    steps = Shift(np.ones(len(atoms)), masses / masses.sum())
    return Shift(masses, masses / (masses**2).sum()), steps


def _fix_symmetry(constraint: Any, atoms: Atoms) -> tuple[Map, Map]:
    cell = atoms.cell.array.T
    n, rotations = len(atoms), np.asarray(constraint.rotations)
    cartesian = cell @ rotations @ np.linalg.inv(cell) / len(rotations)
    averaged = Blocks(
        target=np.concatenate([np.asarray(image) for image in constraint.symm_map]),
        source=np.tile(np.arange(n), len(rotations)),
        matrices=np.repeat(cartesian, n, axis=0),
    )
    free = _local(atoms, [], np.eye(3))
    return averaged, averaged if constraint.do_adjust_positions else free


KNOWN: dict[str, Callable[[Any, Atoms], tuple[Map, Map]]] = {
    constraints.FixAtoms.__name__: _fix_atoms,
    constraints.FixCartesian.__name__: _fix_cartesian,
    constraints.FixScaled.__name__: _fix_scaled,
    constraints.FixedLine.__name__: _fixed_line,
    constraints.FixedPlane.__name__: _fixed_plane,
    constraints.FixCom.__name__: _fix_com,
    constraints.FixSubsetCom.__name__: _fix_com,
    constraints.FixSymmetry.__name__: _fix_symmetry,
}
"""Constraints that can be differentiated through, by the name of their class."""


class Projection:
    """The product of the maps of a batch, one structure after another.

    Parameters
    ----------
    maps : sequence, length n
        The maps of each structure, the first one applied first.
    counts : sequence of int, length n
        Atoms of each structure.
    like : Tensor
        Whose device and dtype the maps take.
    """

    def __init__(self, maps: Sequence[tuple[Map, ...]], counts: Sequence[int], like: Tensor):
        self.layers = [
            _layer([m[depth] if depth < len(m) else None for m in maps], counts, like)
            for depth in range(max(map(len, maps), default=0))
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """Shape (n_atoms, 3) to (n_atoms, 3)."""
        return reduce(lambda value, layer: layer(value), self.layers, x)


def _layer(maps: Sequence[Map | None], counts: Sequence[int], like: Tensor) -> Callable[[Tensor], Tensor]:
    """One map of each structure (or none) as one map of the batch."""
    firsts = np.cumsum([0, *counts])
    blocks, shifts = [], []
    for map_, first, n in zip(maps, firsts, counts, strict=False):
        every = first + np.arange(n)
        if isinstance(map_, Blocks):
            blocks.append((first + map_.target, first + map_.source, map_.matrices))
        else:
            blocks.append((every, every, np.tile(np.eye(3), (n, 1, 1))))
        shifts.append((map_.u, map_.v) if isinstance(map_, Shift) else (np.zeros(n), np.zeros(n)))
    target, source, matrices = (np.concatenate(column) for column in zip(*blocks, strict=True))
    m = torch.as_tensor(matrices).to(like)
    to, of = (torch.as_tensor(index, device=like.device) for index in (target, source))
    simple = len(target) == firsts[-1] and (target == source).all() and (np.diff(target) == 1).all()
    u, v = (torch.as_tensor(np.concatenate(column)).to(like)[:, None] for column in zip(*shifts, strict=True))
    batch = torch.as_tensor(np.repeat(np.arange(len(counts)), counts), device=like.device)

    def apply(x: Tensor) -> Tensor:
        if simple:
            x = (m @ x[:, :, None]).squeeze(2)
        else:
            x = torch.zeros_like(x).index_add(0, to, (m @ x[of][:, :, None]).squeeze(2))
        sums = x.new_zeros(len(counts), 3).index_add(0, batch, v * x)
        return x - u * sums[batch]

    return apply


def fixed(maps: tuple[Map, ...], n: int) -> np.ndarray:
    """Which of n atoms cannot move at all, bool of shape (n,)."""
    stuck = np.zeros(n, dtype=bool)
    for map_ in maps:
        if isinstance(map_, Blocks) and len(map_.target) == n:
            stuck[map_.target] |= ~map_.matrices.any((1, 2))
        elif isinstance(map_, Shift):
            return np.zeros(n, dtype=bool)
    return stuck


def drift(maps: tuple[Map, ...], n: int) -> np.ndarray:
    """Projector onto the translations of the whole structure that its constraints allow, shape (3, 3)."""
    if not maps:
        return np.eye(3)
    like = torch.empty(0, dtype=torch.float64)
    project = Projection([maps], [n], like)
    units = torch.eye(3, dtype=torch.float64)
    lost = torch.stack([(project(e.expand(n, 3)) - e).reshape(-1) for e in units], dim=1).numpy()
    _, lengths, axes = np.linalg.svd(lost, full_matrices=False)
    free = axes[lengths < 1e-8 * n]
    return free.T @ free


def orthogonal(maps: tuple[Map, ...], n: int) -> bool:
    """Whether the maps of n atoms are an orthogonal projection, tested with two random vectors."""
    project = Projection([maps], [n], torch.empty(0, dtype=torch.float64))
    u, v = torch.from_numpy(np.random.default_rng(0).normal(size=(2, n, 3)))
    once = project(v)
    twisted, lost = (u * once - project(u) * v).sum().abs() / n, (project(once) - once).abs().max()
    return float(twisted + lost) < 1e-8
