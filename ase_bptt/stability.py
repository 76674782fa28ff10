"""The stiffest direction of a structure, which bounds the step size of gradient descent."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from ase import Atoms
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from .cells import CellFreedom
from .cells.strained import Strained
from .neighbors import Edges, NeighborList
from .potential import Potential
from .steppers import Stepper
from .structures import Structures, as_structures

LOG = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Relative residual of the eigenvector; the error of the eigenvalue is of second order in it."""
RESTARTS = 30
"""Of Lanczos' method at most; a few are enough."""
FLAT = 1e-3
"""eV/Å^2: curvatures below this are rounding."""
LOOSE = 0.1
"""Å^2/eV. Taken for the limit where nothing is stiff; half of it is the default step of gradient descent."""
SAMPLED = 8
"""Structures at least, where there are so many, on which a step size that is "auto" is resolved."""
Product = Callable[[np.ndarray], np.ndarray]
Item = TypeVar("Item")


def resolve_step_size(
    stepper: Stepper,
    potential: Potential,
    structures: Structures | Sequence[Atoms],
    cells: Sequence[CellFreedom] = (),
) -> Stepper:
    """A stepper whose step size is a number: where it is "auto", resolved by the `stability_limit` of the structures.

    Parameters
    ----------
    stepper : Stepper
        One whose step size is a number already is given back as it is, and nothing is computed.
    potential : Potential
    structures : Structures or sequence of Atoms
        Those that it will move, or a sample of them: each costs some tens of Hessian-vector products.
    cells : sequence of CellFreedom, one for each structure, optional
        What of their cells moves: its rows count as the stepper moves them. None by default.

    Raises
    ------
    ValueError
        Where the forces of none of them are finite.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import load_potential, steppers
    >>> from ase_bptt.stability import resolve_step_size
    >>> stepper = resolve_step_size(steppers.GradientDescent("auto"), load_potential("emt"), [molecule("N2")])
    >>> print(f"{stepper.step_size:.3f} Å^2/eV")
    0.023 Å^2/eV
    """
    if stepper.todict().get("step_size") != "auto":
        return stepper
    batch = as_structures(structures, device=potential.device, dtype=potential.dtype)
    if any(cell.moves for cell in cells):
        batch = Strained.of(batch, cells, balanced=stepper.scale_sensitive)
    limit = stability_limit(potential, batch)
    if math.isnan(limit):
        raise ValueError(
            "step_size='auto' found no finite forces on any structure to take a step size from: mend the structures, "
            "or give step_size a number in Å^2/eV."
        )
    resolved = stepper.resolve_step_size(limit if math.isfinite(limit) else LOOSE)
    LOG.info("step_size='auto' is %s Å^2/eV (limit %.3g)", resolved.todict()["step_size"], limit)
    return resolved


def sample(items: Sequence[Item]) -> Sequence[Item]:
    """A few of many, evenly spaced: enough to resolve a step size on."""
    return items[:: max(1, len(items) // SAMPLED)]


def stability_limit(potential: Potential, structures: Structures | Sequence[Atoms], *, seed: int = 0) -> float:
    """The longest step of gradient descent, in Å^2/eV, that is stable at all of these structures.

    The smallest 2/lambda_max, with the largest eigenvalue of each one's Hessian, in which rows of cells count where
    there are some. Those whose forces are not finite do not count.

    Parameters
    ----------
    potential : Potential
    structures : Structures or sequence of Atoms
        Not changed.
    seed : int
        Of the vectors to start with.

    Returns
    -------
    float
        Infinite where nothing is stiff; NaN where no structure counts.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.stability import stability_limit
    >>> print(f"{stability_limit(load_potential('emt'), [molecule('N2')]):.3f} Å^2/eV")
    0.045 Å^2/eV
    """
    batch = as_structures(structures, device=potential.device, dtype=potential.dtype)
    curvatures = [largest_curvature(potential, batch.select([k]), seed=seed) for k in range(len(batch))]
    known = [curvature for curvature in curvatures if math.isfinite(curvature)]
    return step_limit(max(known, default=math.nan))


def step_limit(curvature: float) -> float:
    """2/lambda_max in Å^2/eV from lambda_max in eV/Å^2; infinite where it is no more than rounding, NaN for NaN."""
    return math.inf if curvature <= FLAT else 2 / curvature


def largest_curvature(potential: Potential, atoms: Atoms | Structures, *, seed: int = 0) -> float:
    """Largest eigenvalue of the Hessian of the energy in eV/Å^2, by Lanczos' method.

    Gradient descent is stable below a step of 2 divided by it. With momentum m (heavy ball) the
    bound is 1 + m times as far. Constrained degrees of freedom do not count.

    Parameters
    ----------
    atoms : Atoms or Structures
        The one structure, in whose positions the Hessian is taken; not changed.
    seed : int
        Of the vector to start with.

    Returns
    -------
    float
        Zero where no force changes with the positions; NaN where forces are not finite, or it does not converge.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.stability import largest_curvature
    >>> print(f"{largest_curvature(load_potential('emt'), molecule('N2')):.0f} eV/Å^2")
    44 eV/Å^2
    """
    structures = as_structures(atoms).to(potential.device, potential.dtype)
    product = _free(hessian_product(potential, structures), structures)
    first = np.random.default_rng(seed).normal(size=3 * structures.n_atoms)
    change = product(first / np.linalg.norm(first))
    if not np.isfinite(change).all():
        return float("nan")
    # Lanczos' method cannot start from zero.
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


def hessian_product(potential: Potential, atoms: Atoms | Structures) -> Product:
    """The function v -> H v, for vectors of shape (3 n_atoms,), H in eV/Å^2.

    By a second differentiation of the energy where the potential has one, else by central
    differences of its forces. Constraints are not applied.
    """
    structures = as_structures(atoms).to(potential.device, potential.dtype)
    edges = NeighborList(potential.cutoff, skin=0.0)(structures)
    try:
        by_gradient = _by_gradient(potential, structures, edges)
        by_gradient(np.ones(3 * structures.n_atoms))
        return by_gradient
    # So autograd says that there is no second derivative; a GPU says so that there is no room for it.
    except RuntimeError:
        return _by_differences(potential, structures)


def _free(product: Product, structures: Structures) -> Product:
    """The product among the directions that the constraints leave free.

    Where their map of forces is no orthogonal projection, Lanczos' method would fail: the whole Hessian stands for it.
    """
    if not structures.maps or not structures.orthogonal[0]:
        return product
    exact = structures.to(torch.device("cpu"), torch.float64)

    def constrained(v: np.ndarray) -> np.ndarray:
        return exact.project_forces(torch.from_numpy(v.reshape(-1, 3))).numpy().ravel()

    return lambda vector: constrained(product(constrained(np.ravel(vector))))


def _by_gradient(potential: Potential, structures: Structures, edges: Edges) -> Product:
    positions = structures.positions.detach().requires_grad_()
    with torch.enable_grad():
        _, forces = potential.energy_and_forces(structures.replace(positions=positions), edges, create_graph=True)

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
