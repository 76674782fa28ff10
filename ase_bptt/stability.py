"""The stiffest direction of a structure, which bounds the step size of gradient descent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from ase import Atoms
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from ..neighbors import NeighborList, Pairs
from ..potential import Potential
from ..structures import Structures

TOLERANCE = 1e-3
"""Relative residual of the eigenvector; the error of the eigenvalue is of second order in it."""
RESTARTS = 30
"""Of Lanczos' method at most; a few are enough."""
Product = Callable[[np.ndarray], np.ndarray]


def largest_curvature(potential: Potential, atoms: Atoms, *, seed: int = 0) -> float:
    """Largest eigenvalue of the Hessian of the energy in eV/Å^2, by Lanczos' method.

    Gradient descent is stable below a step of 2 divided by it. With momentum m (heavy ball) the
    bound is 1 + m times as far.

    Parameters
    ----------
    atoms : Atoms
        The structure, in whose positions the Hessian is taken; not changed.
    seed : int
        Of the vector to begin with.

    Returns
    -------
    float
        Zero where no force changes with the positions; NaN where forces are not finite, or it does not converge.
    """
    product = hessian_product(potential, atoms)
    first = np.random.default_rng(seed).normal(size=3 * len(atoms))
    change = product(first / np.linalg.norm(first))
    if not np.isfinite(change).all():
        return float("nan")
    # Lanczos cannot begin from nothing.
    if not change.any():
        return 0.0
    operator = LinearOperator((len(first), len(first)), matvec=product, dtype=np.float64)
    try:
        (found,) = eigsh(
            operator, k=1, which="LA", v0=first, tol=TOLERANCE, maxiter=RESTARTS, return_eigenvectors=False
        )
    except ArpackNoConvergence:
        return float("nan")
    return float(found)


def hessian_product(potential: Potential, atoms: Atoms) -> Product:
    """The function v -> H v, for vectors of shape (3 n_atoms,), H in eV/Å^2.

    By a second differentiation of the energy where the potential has one, else by central
    differences of its forces.
    """
    structures = Structures.from_atoms(atoms, device=potential.device, dtype=potential.dtype)
    pairs = NeighborList(potential.cutoff, skin=0.0)(structures)
    try:
        by_gradient = _by_gradient(potential, structures, pairs)
        by_gradient(np.ones(3 * len(atoms)))
        return by_gradient
    # So autograd says that there is no second derivative; a GPU says so that there is no room for it.
    except RuntimeError:
        return _by_differences(potential, structures)


def _by_gradient(potential: Potential, structures: Structures, pairs: Pairs) -> Product:
    positions = structures.positions.detach().requires_grad_()
    with torch.enable_grad():
        _, forces = potential.energy_and_forces(structures.replace(positions=positions), pairs, create_graph=True)

    def product(v: np.ndarray) -> np.ndarray:
        along = torch.from_numpy(np.ascontiguousarray(v)).to(positions).view_as(positions)
        (change,) = torch.autograd.grad(forces, positions, along, retain_graph=True)
        return -change.double().cpu().numpy().ravel()

    return product


def _by_differences(potential: Potential, structures: Structures) -> Product:
    positions = structures.positions.detach()
    # Where rounding of the forces and curvature of the difference are about equal.
    length = torch.finfo(positions.dtype).eps ** (1 / 3)

    def forces(moved: torch.Tensor) -> torch.Tensor:
        there = structures.replace(positions=moved)
        return potential.energy_and_forces(there, NeighborList(potential.cutoff, skin=0.0)(there))[1]

    def product(v: np.ndarray) -> np.ndarray:
        norm = float(np.linalg.norm(v))
        if norm == 0:
            return np.zeros_like(v)
        step = torch.from_numpy(np.ascontiguousarray(v) * length / norm).to(positions).view_as(positions)
        change = (forces(positions - step) - forces(positions + step)) * (norm / (2 * length))
        return change.double().cpu().numpy().ravel()

    return product
