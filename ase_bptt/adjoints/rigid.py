"""Motions that cost no energy, under which a Hessian is singular."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..structures import Structures

TINY = 1e-6
"""Below this, relative to a unit vector, a motion does nothing, or is let pass whole."""
NOISE = 4.0
"""A turn of the constraints' forces counts above this, relative to the forces that are left at the minimum."""


class RigidMotions:
    """Translations of each structure, and rotations where nothing periodic forbids them, as its constraints let pass.

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
    """Orthonormal rigid motions of one structure, shape (3 n_atoms, m)."""
    x = structure.positions.detach().double().cpu().numpy()
    centred, axes = x - x.mean(0), _rotation_axes(structure)
    motions = [np.tile(axis, (len(x), 1)) for axis in np.eye(3)] + [np.cross(axis, centred) for axis in axes]
    columns = np.stack([motion.ravel() for motion in motions], axis=1)
    left, lengths, right = np.linalg.svd(columns, full_matrices=False)
    sound = lengths > TINY * max(1.0, lengths.max())
    basis = left[:, sound]
    if not structure.maps:
        return basis
    exact = structure.to(torch.device("cpu"), torch.float64)
    turns = (right[sound, 3:] / lengths[sound, None]) @ axes
    # Those combinations that the constraints let pass unchanged, and that turn no force into a free direction:
    # where constraints hold a structure under strain, a turn that they allow at first costs energy all the same.
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
