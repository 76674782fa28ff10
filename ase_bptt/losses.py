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

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from ase import Atoms
from torch import Tensor

from .cells import measures
from .displacements import Comparable, compared, displacements
from .geometry import angles, distances
from .structures import Structures
from .suggestions import named
from .utils import safe_sqrt

__all__ = [
    "LOSSES", "angles", "cell_strain", "delta_q", "displacements", "distances", "lattice_error", "log_delta_q",
    "max_displacement", "rmsd", "root_delta_q", "squared_delta_q", "volume_error",
]  # fmt: skip
SCALE = 0.1
"""amu^1/2 Å: below this, `log_delta_q` is nearly proportional to Delta-Q."""
TINY = 1e-3
"""amu^1/2 Å: below this, `root_delta_q` is nearly proportional to Delta-Q."""
SAME_END = 0.1
"""Å: ends of two relaxations that differ by less, at the farthest atom, are in one basin."""


def delta_q(a: Comparable, b: Comparable, *, align: bool = False, cell_weight: float = 0.0) -> Any:
    """Delta-Q = sqrt(sum_i m_i |dR_i|^2) in amu^1/2 Å (Alkauskas et al., Phys. Rev. B 90, 075202 (2014)).

    Where cells differ, dR is the difference of fractional coordinates in the cell of b.

    Parameters
    ----------
    a, b : Relaxation, Structures, Atoms or list of Atoms
        The same atoms in the same order.
    align : bool
        Also rotate isolated molecules onto each other (Kabsch).
    cell_weight : float
        w: where cells differ, w^2 n (V/n)^(2/3) m |E|^2 is added under the root, with the Green-Lagrange strain E of
        the cell and the atoms n, volume V and mean mass m of the reference. 0 leaves the displacements alone, and the
        losses, `root_delta_q` and the like, take 1.

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
    return _distance(a, b, align, _root_sum_square, by_mass=True, cell_weight=cell_weight)


def squared_delta_q(a: Comparable, b: Comparable, *, align: bool = False, cell_weight: float = 1.0) -> Any:
    """Delta-Q squared, in amu Å^2: a loss whose gradient fades near the match. Otherwise as `delta_q`."""
    return _distance(a, b, align, _sum_square, by_mass=True, cell_weight=cell_weight)


def log_delta_q(a: Comparable, b: Comparable, *, align: bool = False, cell_weight: float = 1.0) -> Any:
    """log(1 + Delta-Q / 0.1 amu^1/2 Å): a loss in which relative errors count.

    The weight of a structure in the gradient is 1/(Delta-Q + 0.1), so that one in another, distant basin, perhaps
    out of reach, does not dominate those that can be improved. Otherwise as `delta_q`.
    """

    def metric(d: Tensor, of: Structures, more: Tensor | float) -> Tensor:
        return torch.log1p(_root_sum_square(d, of, more) / SCALE)

    return _distance(a, b, align, metric, by_mass=True, cell_weight=cell_weight)


def root_delta_q(a: Comparable, b: Comparable, *, align: bool = False, cell_weight: float = 1.0) -> Any:
    """sqrt(Delta-Q), a loss between `delta_q` and `log_delta_q`. Otherwise as `delta_q`.

    The weight of a structure in the gradient is 1/(2 sqrt(Delta-Q)): distant ones count less than those that are
    nearly right, but enough to move some of them into the right basin. The Trainer's default.
    """

    def metric(d: Tensor, of: Structures, more: Tensor | float) -> Tensor:
        # The small constant keeps the gradient finite near the match.
        return (_root_sum_square(d, of, more) + TINY).sqrt() - TINY**0.5

    return _distance(a, b, align, metric, by_mass=True, cell_weight=cell_weight)


def rmsd(a: Comparable, b: Comparable, *, align: bool = False) -> Any:
    """Root of the mean squared displacement of the atoms, in Å. Otherwise as `delta_q`."""
    return _distance(a, b, align, _root_mean_square, by_mass=False)


def max_displacement(a: Comparable, b: Comparable, *, align: bool = False) -> Any:
    """Largest displacement of an atom, in Å. Otherwise as `delta_q`.

    With align its gradient takes the rotation as fixed.
    """
    return _distance(a, b, align, _largest, by_mass=False)


def cell_strain(a: Comparable, b: Comparable) -> Any:
    """Frobenius norm of the Green-Lagrange strain from the cell of b to that of a, shape (n,); a float for two Atoms.

    Does not change when a structure turns; differentiable, with a zero gradient at a match.

    >>> from ase.build import bulk
    >>> print(f"{cell_strain(bulk('Si', a=5.5), bulk('Si', a=5.4)):.4f}")
    0.0324
    """
    return _of_cells(a, b, measures.cell_strain)


def volume_error(a: Comparable, b: Comparable) -> Any:
    """V / V_ref - 1 with the volume V_ref of b, shape (n,); a float for two Atoms. NaN where b has no volume.

    >>> from ase.build import bulk
    >>> print(f"{volume_error(bulk('Si', a=5.5), bulk('Si', a=5.4)):.4f}")
    0.0566
    """
    return _of_cells(a, b, measures.volume_error)


def lattice_error(a: Comparable, b: Comparable) -> Any:
    """Differences of a, b, c (Å) and alpha, beta, gamma (degrees), shape (n, 6); an array for two Atoms.

    >>> from ase.build import bulk
    >>> lattice_error(bulk("Si", a=5.5, cubic=True), bulk("Si", a=5.4, cubic=True)).round(3).tolist()
    [0.1, 0.1, 0.1, 0.0, 0.0, 0.0]
    """
    return _of_cells(a, b, measures.lattice_error)


def _of_cells(a: Comparable, b: Comparable, measure: Callable[[Structures, Structures], Tensor]) -> Any:
    found = measure(*compared(a, b))
    if not (isinstance(a, Atoms) and isinstance(b, Atoms)):
        return found
    return found.item() if found.numel() == 1 else found[0].numpy()


Metric = Callable[[Tensor, Structures, "Tensor | float"], Tensor]
"""Of the displacements of a batch, and of what its cells add to the sum of their squares."""


def _distance(
    a: Comparable, b: Comparable, align: bool, metric: Metric, *, by_mass: bool, cell_weight: float = 0.0
) -> Any:
    d = displacements(a, b, align=align, by_mass=by_mass)
    now, then = compared(a, b)
    found = metric(d, then, cell_weight**2 * measures.cell_square(now, then) if cell_weight else 0.0)
    return found.item() if isinstance(a, Atoms) and isinstance(b, Atoms) else found


def _sum_square(d: Tensor, of: Structures, more: Tensor | float) -> Tensor:
    return of.sum(of.masses * d.square().sum(1)) + more


def _root_sum_square(d: Tensor, of: Structures, more: Tensor | float) -> Tensor:
    return safe_sqrt(_sum_square(d, of, more))


def _root_mean_square(d: Tensor, of: Structures, more: Tensor | float) -> Tensor:
    return safe_sqrt(of.sum(d.square().sum(1)) / of.sum(of.movable).clamp(min=1))


def _largest(d: Tensor, of: Structures, more: Tensor | float) -> Tensor:
    return safe_sqrt(of.max(d.square().sum(1)))


LOSSES: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (delta_q, root_delta_q, log_delta_q, squared_delta_q, rmsd, max_displacement)
}
"""By name; as losses of a training all but the last two count cells that moved, with weight 1."""


def named_loss(name: str) -> Callable[..., Any]:
    """The loss of this name, in any case, counting cells where it can; ValueError with the names there are."""
    found = named(LOSSES, name, "loss")
    return update_wrapper(partial(found, cell_weight=1.0), found) if found is delta_q else found
