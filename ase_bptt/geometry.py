"""Distances and angles between atoms, by nearest periodic images, differentiable in positions and cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from .neighbors.lattice import minimum_images, named
from .result import Relaxation
from .structures import Structures, as_structures
from .utils import safe_sqrt

Index = int | Sequence[int] | np.ndarray
Measurable = Relaxation | Structures | Atoms | Sequence[Atoms]


def distances(relaxation: Measurable, i: Index, j: Index) -> Tensor:
    """Distances in Å from atoms i to the nearest periodic images of atoms j.

    True minimum images, in skewed cells, too. After ``backward`` the gradient is in the weights of the potential
    (``potential.parameters()``) and at the start (``relaxation.start.positions.grad``). It is zero where two atoms are
    in one place, and jumps where two images are equally near.

    Parameters
    ----------
    relaxation : Relaxation, Structures, Atoms or list of Atoms
        n structures.
    i, j : int or sequence of m int
        Atoms of each structure, counted as in Atoms: from 0, or from the end where negative.

    Returns
    -------
    Tensor, shape (n,) for two numbers, (n, m) for sequences
        Differentiable in the positions and cells of the structures.

    Raises
    ------
    IndexError
        For an atom that a structure does not have.

    Examples
    --------
    >>> from ase.build import molecule
    >>> print(f"O-H: {distances(molecule('H2O'), 0, 1).item():.3f} Å")
    O-H: 0.969 Å
    """
    structures = _structures(relaxation)
    return _shaped(_lengths(_vectors(structures, i, j)), i, j)


def angles(relaxation: Measurable, i: Index, j: Index, k: Index) -> Tensor:
    """Angles in degrees at atoms j, between the nearest periodic images of atoms i and k, from 0 to 180.

    As ``Atoms.get_angle(i, j, k, mic=True)``. The gradient is in degrees/Å, and zero where the three atoms are in line:
    the angle has a kink there. Otherwise as `distances`.

    Raises
    ------
    IndexError
        For an atom that a structure does not have.
    ValueError
        Where an end is the atom in the middle.

    Examples
    --------
    >>> from ase.build import molecule
    >>> print(f"H-O-H: {angles(molecule('H2O'), 1, 0, 2).item():.1f} degrees")
    H-O-H: 104.0 degrees
    """
    if np.any(np.equal(i, j)) or np.any(np.equal(k, j)):
        raise ValueError("An angle needs another atom on each side: atom j is in the middle, i and k are the ends.")
    structures = _structures(relaxation)
    a, b = _vectors(structures, j, i), _vectors(structures, j, k)
    # Of a cosine alone the gradient would be infinite where the atoms are in line.
    angle = torch.atan2(_lengths(torch.linalg.cross(a, b)), (a * b).sum(2))
    return _shaped(angle * (180 / math.pi), i, j, k)


def _structures(relaxation: Measurable) -> Structures:
    return relaxation.structures if isinstance(relaxation, Relaxation) else as_structures(relaxation)


def _vectors(structures: Structures, i: Index, j: Index) -> Tensor:
    """From atoms i to the nearest images of atoms j, shape (n, m, 3)."""
    n = len(structures)
    from_, to = np.broadcast_arrays(_rows(structures, i), _rows(structures, j))
    rows, ends = (torch.from_numpy(np.array(x)).to(structures.numbers.device).reshape(-1) for x in (from_, to))
    d = structures.positions[ends] - structures.positions[rows]
    return minimum_images(d, structures, structures.batch[rows]).reshape(n, -1, 3)


def _rows(structures: Structures, index: Index) -> np.ndarray:
    """Rows of the batch, shape (n, m)."""
    counts, wanted = np.array(structures.counts)[:, None], np.atleast_1d(np.asarray(index, dtype=np.int64))[None]
    for k, atom in np.argwhere((wanted < -counts) | (wanted >= counts)):
        raise IndexError(f"{named(structures, int(k))} has no atom {wanted[0, atom]}: it has {counts[k, 0]} atoms.")
    return np.cumsum([0, *structures.counts])[:-1, None] + wanted % counts


def _lengths(vectors: Tensor) -> Tensor:
    return safe_sqrt(vectors.square().sum(-1))


def _shaped(found: Tensor, *indices: Index) -> Tensor:
    return found.squeeze(1) if all(np.ndim(index) == 0 for index in indices) else found
