"""Solving H w = rhs at a minimum: conjugate gradients for many structures, and the zero modes of H."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..structures import Structures


class SolveStatus(enum.Enum):
    """How the equation of one structure's gradient ended; `sentence` says what that means.

    >>> from ase_bptt.adjoints import SolveStatus
    >>> [status.value for status in SolveStatus]
    ['solved', 'saddle', 'out of iterations', 'not relaxed']
    """

    SOLVED = "solved"
    SADDLE = "saddle"
    OUT_OF_ITERATIONS = "out of iterations"
    UNRELAXED = "not relaxed"

    @property
    def sentence(self) -> str:
        return {
            SolveStatus.SOLVED: "The equation of the gradient was solved to its tolerance.",
            SolveStatus.SADDLE: "The energy falls along some direction, so that this is a saddle and no minimum: the "
            "gradient holds what was found before that direction appeared.",
            SolveStatus.OUT_OF_ITERATIONS: "The equation of the gradient was not solved to its tolerance: raise "
            "max_iterations, or add damping.",
            SolveStatus.UNRELAXED: "Its relaxation did not converge, so that there is no minimum to take a gradient "
            "at, and it gives none: give it more steps.",
        }[self]


@dataclass(frozen=True)
class Solve:
    """How one structure's equation was solved: status, iterations, and the residual relative to rhs.

    >>> from ase.build import molecule
    >>> from ase_bptt import load_potential, relax
    >>> relaxation = relax(load_potential("morse"), molecule("N2"), stepper="bfgs", adjoint="implicit")
    >>> relaxation.positions.square().sum().backward()
    >>> relaxation.solves[0].status
    <SolveStatus.SOLVED: 'solved'>
    """

    status: SolveStatus
    iterations: int
    residual: float


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], rhs: Tensor, structures: Structures, *, tolerance: float, max_iterations: int
) -> tuple[Tensor, list[Solve]]:
    """Solve H w = rhs for a symmetric H of independent structures (Hestenes and Stiefel, 1952).

    A structure whose residual falls below the tolerance stops there; one that meets a direction of no positive
    curvature stops before it, as in truncated Newton methods (Steihaug, 1983).

    Parameters
    ----------
    product : callable
        v -> H v, both of shape (n_rows, 3).
    rhs : Tensor, shape (n_rows, 3)
    structures : Structures
        Which rows belong together.
    tolerance : float
        Of the residual's norm, relative to rhs's.
    max_iterations : int
        Iterations at most.

    Returns
    -------
    w : Tensor, shape (n_rows, 3)
    solves : list of Solve, length n
    """
    batch = structures.batch

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return structures.sum(a * b).sum(1)

    def ratio(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, a / torch.where(where, b, 1.0), 0.0)

    w, residual, direction = torch.zeros_like(rhs), rhs, rhs
    first = square = dot(rhs, rhs)
    live = square > 0
    saddle, counts = torch.zeros_like(live), torch.zeros_like(live, dtype=torch.int64)
    # One small transfer an iteration asks whether any structure continues.
    for _ in range(max_iterations):
        if not bool(live.any()):
            break
        image = product(torch.where(live[batch, None], direction, 0.0))
        curvature = dot(direction, image)
        # Written so that a NaN counts as a saddle, too.
        saddle = saddle | live & ~(curvature > 0)
        live = live & ~saddle
        counts = counts + live
        step = ratio(square, curvature, live)[batch, None]
        w = w + step * direction
        residual = torch.where(live[batch, None], residual - step * image, residual)
        new = dot(residual, residual)
        direction = residual + ratio(new, square, live)[batch, None] * direction
        square = new
        live = live & (square > tolerance**2 * first)
    rows = zip(saddle.tolist(), live.tolist(), counts.tolist(), ratio(square, first, first > 0).tolist(), strict=True)
    return w, [_solve(*row) for row in rows]


def _solve(saddle: bool, live: bool, iterations: int, square: float) -> Solve:
    status = SolveStatus.SADDLE if saddle else SolveStatus.OUT_OF_ITERATIONS if live else SolveStatus.SOLVED
    return Solve(status, iterations, square**0.5)


TINY = 1e-6
"""Below this, relative to a unit vector, a motion does nothing, or is let pass whole."""
NOISE = 4.0
"""A turn of the constraints' forces counts above this, relative to the forces that are left at the minimum."""


class ZeroModes:
    """Translations of each structure, and rotations where nothing periodic forbids them or the cell turns along, as its
    constraints let pass.

    Parameters
    ----------
    structures : Structures
        The motions are those at its positions.
    forces : Tensor, shape (n_atoms, 3)
        There, in eV/Å, constraints not applied.
    """

    def __init__(self, structures: Structures, forces: Tensor):
        self.structures = structures
        parts = forces.detach().cpu().double().split(structures.counts)
        bases = [_basis(structures.select([k]), part) for k, part in enumerate(parts)]
        width = max((basis.shape[1] for basis in bases), default=0)
        padded = [np.pad(basis, ((0, 0), (0, width - basis.shape[1]))) for basis in bases]
        rows = np.concatenate([basis.reshape(len(basis) // 3, 3, width) for basis in padded])
        self._motions = torch.as_tensor(rows).to(structures.positions)

    def __len__(self) -> int:
        return self._motions.shape[2]

    def without(self, v: Tensor) -> Tensor:
        """v, shape (n_atoms, 3), with these motions of each structure taken out."""
        shares = self.structures.sum(torch.einsum("aim,ai->am", self._motions, v))
        return v - torch.einsum("aim,am->ai", self._motions, shares[self.structures.batch])


def _basis(structure: Structures, forces: Tensor) -> np.ndarray:
    """Orthonormal rigid motions of one structure, shape (3 n_rows, m)."""
    x = structure.positions.detach().double().cpu().numpy()
    atoms = structure.numbers.cpu().numpy()[:, None] > 0  # the rows of a cell are none
    centred, axes = np.where(atoms, x - x[atoms[:, 0]].mean(0), 0.0), _rotation_axes(structure)
    motions = [np.where(atoms, axis, 0.0) for axis in np.eye(3)] + [np.cross(axis, centred) for axis in axes]
    motions += [*structure.cell_rotations()]
    columns = np.stack([motion.ravel() for motion in motions], axis=1)
    left, lengths, right = np.linalg.svd(columns, full_matrices=False)
    sound = lengths > TINY * max(1.0, lengths.max())
    basis = left[:, sound]
    if not structure.maps:
        return basis
    exact = structure.to(torch.device("cpu"), torch.float64)
    turns = (right[sound, 3 : 3 + len(axes)] / lengths[sound, None]) @ axes
    # Those combinations that the constraints let pass unchanged, and that turn no force into a free direction:
    # where constraints keep a structure under strain, a turn that they allow at first costs energy all the same.
    passed = [exact.project_forces(torch.from_numpy(column.reshape(-1, 3))).numpy().ravel() for column in basis.T]
    acting = exact.project_forces(forces)
    turned = [np.cross(turn, (forces - acting).numpy()) for turn in turns]
    freed = [exact.project_forces(torch.from_numpy(force)).numpy().ravel() for force in turned]
    noise = NOISE * acting.norm().item() + TINY
    lost = np.concatenate((np.stack(passed, axis=1) - basis, np.stack(freed, axis=1) * (TINY / noise)))
    _, lengths, combinations = np.linalg.svd(lost, full_matrices=False)
    return basis @ combinations[lengths < TINY].T


def _rotation_axes(structure: Structures) -> np.ndarray:
    """Axes about which the structure can turn without a change: all of a molecule's, a wire's own."""
    periodic = structure.pbc[0].cpu().numpy()
    if not periodic.any():
        return np.eye(3)
    if periodic.sum() > 1:
        return np.zeros((0, 3))
    vector = structure.cells[0].detach().double().cpu().numpy()[periodic][0]
    return (vector / np.linalg.norm(vector))[None]
