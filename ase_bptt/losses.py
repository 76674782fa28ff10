"""Distances between relaxed structures and their references.

All of them use true minimum images, leave out the drift of the whole structure, and have a zero
gradient where the match is exact.

>>> from ase import Atoms
>>> a, b = Atoms("H2", [(0, 0, 0), (0, 0, 1)]), Atoms("H2", [(0, 0, 0), (0, 0, 2)])
>>> list(LOSSES)
['delta_q', 'root_delta_q', 'log_delta_q', 'squared_delta_q', 'rmsd', 'max_displacement']
>>> [round(loss(a, b), 3) for loss in LOSSES.values()]
[0.71, 0.812, 2.092, 0.504, 0.5, 0.5]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from .geometry import angles, distances
from .neighbors.lattice import nearest_lattice_vectors, reduced, reduced_cells
from .result import Relaxation
from .structures import Structures, as_structures
from .suggestions import named
from .utils import safe_sqrt

__all__ = [
    "LOSSES", "angles", "delta_q", "displacements", "distances", "log_delta_q", "max_displacement",
    "rmsd", "root_delta_q", "squared_delta_q",
]  # fmt: skip
Comparable = Relaxation | Structures | Atoms | Sequence[Atoms]
SCALE = 0.1
"""amu^1/2 Å: below this, `log_delta_q` is nearly proportional to Delta-Q."""
TINY = 1e-3
"""amu^1/2 Å: below this, `root_delta_q` is nearly proportional to Delta-Q."""
SAME_END = 0.1
"""Å: ends of two relaxations that differ by less, at the farthest atom, are in one basin."""
ANCHORS = 8
"""Atoms whose displacement is tried as the drift."""


def delta_q(a: Comparable, b: Comparable, *, align: bool = False) -> Any:
    """Delta-Q = sqrt(sum_i m_i |dR_i|^2) in amu^1/2 Å (Alkauskas et al., Phys. Rev. B 90, 075202 (2014)).

    Parameters
    ----------
    a, b : Relaxation, Structures, Atoms or list of Atoms
        The same atoms in the same order.
    align : bool
        Also rotate isolated molecules onto each other (Kabsch).

    Returns
    -------
    Tensor, shape (n,), differentiable in the positions; a float for two Atoms.

    Raises
    ------
    ValueError
        Where the two do not hold the same atoms.

    Examples
    --------
    >>> from ase.build import molecule
    >>> a, b = molecule("N2"), molecule("N2")
    >>> b.set_distance(0, 1, a.get_distance(0, 1) + 0.1)
    >>> print(f"{delta_q(a, b):.4f} amu^1/2 Å")
    0.2646 amu^1/2 Å
    """
    return _distance(a, b, align, _root_sum_square, by_mass=True)


def squared_delta_q(a: Comparable, b: Comparable, *, align: bool = False) -> Any:
    """Delta-Q squared, in amu Å^2: a loss whose gradient fades near the match. Otherwise as `delta_q`."""
    return _distance(a, b, align, _sum_square, by_mass=True)


def log_delta_q(a: Comparable, b: Comparable, *, align: bool = False) -> Any:
    """log(1 + Delta-Q / 0.1 amu^1/2 Å): a loss in which relative errors count.

    The weight of a structure in the gradient is 1/(Delta-Q + 0.1), so that one in another, distant basin, perhaps
    out of reach, does not dominate those that can be improved. Otherwise as `delta_q`.
    """
    return _distance(a, b, align, lambda d, of: torch.log1p(_root_sum_square(d, of) / SCALE), by_mass=True)


def root_delta_q(a: Comparable, b: Comparable, *, align: bool = False) -> Any:
    """sqrt(Delta-Q), a loss between `delta_q` and `log_delta_q`. Otherwise as `delta_q`.

    The weight of a structure in the gradient is 1/(2 sqrt(Delta-Q)): distant ones count less than those that are
    nearly right, but enough to move some of them into the right basin. The Trainer's default.
    """
    # The small constant keeps the gradient finite near the match.
    return _distance(a, b, align, lambda d, of: (_root_sum_square(d, of) + TINY).sqrt() - TINY**0.5, by_mass=True)


def rmsd(a: Comparable, b: Comparable, *, align: bool = False) -> Any:
    """Root of the mean squared displacement of the atoms, in Å. Otherwise as `delta_q`."""
    return _distance(a, b, align, _root_mean_square, by_mass=False)


def max_displacement(a: Comparable, b: Comparable, *, align: bool = False) -> Any:
    """Largest displacement of an atom, in Å. Otherwise as `delta_q`.

    With align its gradient takes the rotation as fixed.
    """
    return _distance(a, b, align, _largest, by_mass=False)


def displacements(a: Comparable, b: Comparable, *, align: bool = False, by_mass: bool = True) -> Tensor:
    """Displacement of each atom from b to a in Å, shape (n_atoms, 3).

    Minimal over lattice translations of each atom and over rigid translations of each structure,
    in the sum of squares, weighted by mass or not.

    >>> displacements(Atoms('H2', [(0, 0, 0), (0, 0, 2)]), Atoms('H2', [(0, 0, 0), (0, 0, 1)]))[:, 2].tolist()
    [-0.5, 0.5]
    """
    now, then = _pair(a, b)
    weights = then.movable * then.masses if by_mass else then.movable
    d = now.positions - then.positions
    d = d - lattice_translations(d.detach(), then, weights)
    d = (d - _mean(d, then, weights)[then.batch]) * then.movable[:, None]
    return _aligned(now, then, d, weights) if align and not then.maps else d


Metric = Callable[[Tensor, Structures], Tensor]


def _distance(a: Comparable, b: Comparable, align: bool, metric: Metric, *, by_mass: bool) -> Any:
    d = displacements(a, b, align=align, by_mass=by_mass)
    found = metric(d, _pair(a, b)[1])
    return found.item() if isinstance(a, Atoms) and isinstance(b, Atoms) else found


def _sum_square(d: Tensor, of: Structures) -> Tensor:
    return of.sum(of.masses * d.square().sum(1))


def _root_sum_square(d: Tensor, of: Structures) -> Tensor:
    return safe_sqrt(_sum_square(d, of))


def _root_mean_square(d: Tensor, of: Structures) -> Tensor:
    return safe_sqrt(of.sum(d.square().sum(1)) / of.sum(of.movable).clamp(min=1))


def _largest(d: Tensor, of: Structures) -> Tensor:
    return safe_sqrt(of.max(d.square().sum(1)))


def _pair(a: Comparable, b: Comparable) -> tuple[Structures, Structures]:
    """Both as batches, the reference detached and in the dtype and on the device of the other."""
    now = a.structures if isinstance(a, Relaxation) else as_structures(a)
    x = now.positions
    then = b.structures if isinstance(b, Relaxation) else as_structures(b)
    names = ("positions", "cells", "pbc", "numbers", "masses")
    then = then.replace(**{k: _like(getattr(then, k).detach(), x) for k in names})
    # The constraints of the run decide which atoms and which drift count; else those of the reference.
    if now.maps:
        then = then.replace(maps=now.maps)
    if now.counts != then.counts or not torch.equal(now.numbers, then.numbers):
        raise ValueError(
            "Only structures of the same atoms in the same order can be compared: "
            f"{', '.join(now.formulas(3))} is not {', '.join(then.formulas(3))}."
        )
    return now, then


def _like(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x) if value.is_floating_point() else value.to(x.device)


def _mean(d: Tensor, of: Structures, weights: Tensor) -> Tensor:
    """The drift of each structure, as far as its constraints let it drift, shape (n, 3)."""
    # Where all atoms are fixed there is no weight, and no drift.
    return _passing(of.sum(weights[:, None] * d) / of.sum(weights).clamp(min=1e-30)[:, None], of)


def _passing(drift: Tensor, of: Structures) -> Tensor:
    return drift if of.drift is None else (of.drift @ drift[:, :, None]).squeeze(2)


def lattice_translations(d: Tensor, of: Structures, weights: Tensor) -> Tensor:
    """The lattice vector to subtract from each displacement, so that their sum of squares about the drift is least.

    Which image is nearest depends on the drift, and the drift on the images. Starting from no drift and from the
    displacements of a few atoms, images and drift are improved in turn, and the best result counts. It is the least
    sum where all displacements about the drift are shorter than a quarter of the shortest lattice vector, for then no
    two of them differ by more than half of it. For displacements near half a lattice vector, in cells of two or three
    atoms, the sum was up to 7 % above the least in 3 of 720 random cases.

    Parameters
    ----------
    d : Tensor, shape (n_atoms, 3)
        Displacements in Å.
    of : Structures
        The batch that they belong to; its constraints decide how it can drift.
    weights : Tensor, shape (n_atoms,)
        Of the atoms, in the sum of squares.

    Returns
    -------
    Tensor, shape (n_atoms, 3)
        In Å.
    """
    if not bool(of.pbc.any()):
        return torch.zeros_like(d)
    cells, inverses, periodic, shortest = reduced_cells(of, d)
    ends, certain = np.cumsum(of.counts), torch.zeros_like(shortest, dtype=torch.bool)
    best, best_score = torch.zeros_like(d), torch.full_like(of.volumes.detach(), torch.inf)
    for anchor in range(-1, min(ANCHORS, max(of.counts))):
        rows = [
            end - n + anchor * n // ANCHORS if n > ANCHORS else end - n + anchor % n
            for end, n in zip(ends, of.counts, strict=True)
        ]
        drift = torch.zeros_like(of.cells[:, 0]) if anchor < 0 else _passing(d[rows], of)
        for _ in range(3):
            translation = nearest_lattice_vectors(d - drift[of.batch], cells, inverses, periodic, of.batch)
            drift = _mean(d - translation, of, weights)
        rest = d - translation - drift[of.batch]
        squares = rest.square().sum(1)
        score = of.sum(weights * squares)
        better = score < best_score * (1 - 1e-9)
        best = torch.where(better[of.batch, None], translation, best)
        best_score = torch.where(better, score, best_score)
        certain = certain | (of.max(squares) < (shortest / 4).square())
        if of.drift is None and bool(certain.all()):
            break
    return best


def shortest_lattice_vector(atoms: Atoms) -> float:
    """Length in Å of the shortest translation that the periodic directions have; infinite where there are none."""
    return float(reduced(atoms.cell.array.tobytes(), atoms.pbc.tobytes())[3])


def _aligned(now: Structures, then: Structures, d: Tensor, weights: Tensor) -> Tensor:
    """Displacements after the best rotation of each isolated molecule (Kabsch, Acta Cryst. A32, 922 (1976)).

    The rotation is a minimum, so it can stand still while the positions are differentiated.
    """
    reference = then.positions - _mean(then.positions, then, weights)[then.batch]
    pieces = []
    columns = (x.split(then.counts) for x in (reference, d, weights))
    for r, shift, w, periodic in zip(*columns, then.pbc.any(1).tolist(), strict=True):
        if periodic:
            pieces.append(shift)
            continue
        x = r + shift
        u, _, vt = torch.linalg.svd((x.detach() * w[:, None]).mT @ r)
        flip = torch.diag(torch.stack((w.new_ones(()), w.new_ones(()), torch.linalg.det(u @ vt).sign())))
        pieces.append(x @ (u @ flip @ vt) - r)
    return torch.cat(pieces)


LOSSES: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (delta_q, root_delta_q, log_delta_q, squared_delta_q, rmsd, max_displacement)
}


def named_loss(name: str) -> Callable[..., Any]:
    """The loss of this name, in any case; ValueError with the names there are."""
    return named(LOSSES, name, "loss")
