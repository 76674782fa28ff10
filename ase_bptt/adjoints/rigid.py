"""Motions that cost no energy, under which a Hessian is singular."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..structures import Structures

TINY = 1e-6
"""Below this, relative to a unit vector, a motion does nothing, or is let pass whole."""


class RigidMotions:
    """Translations of each structure, and rotations where nothing periodic forbids them, as its constraints let pass.

    Parameters
    ----------
    structures : Structures
        The motions are those at its positions.
    """

    def __init__(self, structures: Structures):
        self.structures = structures
        members = [structures.select([k]) for k in range(len(structures))]
        bases = [_basis(member) for member in members]
        width = max((basis.shape[1] for basis in bases), default=0)
        padded = [np.pad(basis, ((0, 0), (0, width - basis.shape[1]))) for basis in bases]
        rows = np.concatenate([basis.reshape(-1, 3, width) for basis in padded])
        self._motions = torch.as_tensor(rows).to(structures.positions)

    def __len__(self) -> int:
        return self._motions.shape[2]

    def without(self, v: Tensor) -> Tensor:
        """v, shape (n_atoms, 3), with these motions of each structure taken out."""
        shares = self.structures.sum(torch.einsum("aim,ai->am", self._motions, v))
        return v - torch.einsum("aim,am->ai", self._motions, shares[self.structures.batch])


def _basis(structure: Structures) -> np.ndarray:
    """Orthonormal rigid motions of one structure, shape (3 n_atoms, m)."""
    x = structure.positions.detach().double().cpu().numpy()
    centred = x - x.mean(0)
    motions = [np.tile(axis, (len(x), 1)) for axis in np.eye(3)]
    motions += [np.cross(axis, centred) for axis in _rotation_axes(structure)]
    columns = np.stack([motion.ravel() for motion in motions], axis=1)
    left, lengths, _ = np.linalg.svd(columns, full_matrices=False)
    basis = left[:, lengths > TINY * max(1.0, lengths.max())]
    if not structure.maps:
        return basis
    # Those combinations that the constraints let pass unchanged.
    exact = structure.to(torch.device("cpu"), torch.float64)
    passed = [exact.project_forces(torch.from_numpy(c.reshape(-1, 3))).numpy().ravel() for c in basis.T]
    lost = np.stack(passed, axis=1) - basis
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
