"""Energy curves of a potential: of crystals against volume (lattice constant, bulk modulus), and of dimers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.eos import EquationOfState
from ase.units import GPa

from ..potential import Potential
from ..terms.probes import Crystal
from ..threads import quiet
from ..throughput import single_points

STEP, FINE, ROUNDS = 0.02, 0.008, 8
"""Spacing of the seven lattice constants in the search and in the fit, and the most rounds of the search."""
VOLUMES = np.arange(-3, 4)
TOGETHER = 32
"""Structures evaluated in one batch: these are small."""


@dataclass(frozen=True)
class Elastic:
    """A crystal's lattice constant in Å and bulk modulus in GPa; NaN where no minimum was found."""

    lattice_constant: float
    bulk_modulus: float


def elastic(potential: Potential, crystals: Sequence[Crystal]) -> dict[str, Elastic]:
    """Lattice constants and bulk moduli of cubic crystals, from energies at seven volumes each.

    The seven lattice constants move until the lowest energy is inside, then close in on it, and the equation of
    state is fitted to their energies (`birch_murnaghan`).

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.terms.probes import known_crystals
    >>> potential = load_potential("emt")
    >>> copper = [crystal for crystal in known_crystals(potential) if crystal.name == "Cu"]
    >>> print(f"{elastic(potential, copper)['Cu'].lattice_constant:.2f} Å")
    3.59 Å
    """
    cells = [crystal.atoms() for crystal in crystals]
    centre = np.ones(len(cells))
    inside = np.zeros(len(cells), dtype=bool)
    for _ in range(ROUNDS):
        searching = np.flatnonzero(~inside)
        if not len(searching):
            break
        scales = centre[searching, None] * (1 + STEP * VOLUMES)
        lowest = _energies_at(potential, [cells[k] for k in searching], scales).argmin(axis=1)
        centre[searching] = scales[np.arange(len(searching)), lowest]
        inside[searching] = (lowest > 0) & (lowest < len(VOLUMES) - 1)
    scales = centre[:, None] * (1 + FINE * VOLUMES)
    energies = _energies_at(potential, cells, scales)
    found = {}
    for crystal, cell, s, e, good in zip(crystals, cells, scales, energies, inside, strict=True):
        volume, modulus = birch_murnaghan(s**3 * cell.get_volume(), e) if good else (np.nan, np.nan)
        a = float(crystal.a or np.nan) * (volume / cell.get_volume()) ** (1 / 3)
        found[crystal.name] = Elastic(float(a), float(modulus / GPa))
    return found


def _energies_at(potential: Potential, cells: Sequence[Atoms], scales: np.ndarray) -> np.ndarray:
    """Energies in eV of each cell at each scale of its lattice constant, the shape of the scales."""
    atoms = []
    for cell, row in zip(cells, scales, strict=True):
        for scale in row:
            atoms.append(cell.copy())
            atoms[-1].set_cell(cell.cell.array * scale, scale_atoms=True)
    return _energies(potential, atoms).reshape(scales.shape)


def _energies(potential: Potential, atoms: Sequence[Atoms]) -> np.ndarray:
    """Energies in eV of structures, shape (n,); infinite where they are not finite."""
    batches = single_points(potential, atoms, TOGETHER, forces=False)
    energies = np.concatenate([np.zeros(0), *(energy.double().cpu().numpy() for _, energy, _ in batches)])
    return np.where(np.isfinite(energies), energies, np.inf)


def birch_murnaghan(volumes: np.ndarray, energies: np.ndarray) -> tuple[float, float]:
    """Volume and bulk modulus (in energy per volume) at the minimum of a fit; NaN where it has none inside.

    The third-order equation of state of Birch and Murnaghan (Phys. Rev. 71, 809 (1947)), fitted by `ase.eos`.

    Examples
    --------
    >>> import numpy as np
    >>> volumes = np.linspace(9, 11, 7)
    >>> volume, modulus = birch_murnaghan(volumes, 0.5 * (volumes - 10) ** 2)
    >>> print(f"{volume:.1f} {modulus:.0f}")  # V d2E/dV2 at the minimum
    10.0 10
    """
    if not np.isfinite(energies).all():
        return np.nan, np.nan
    # Energies from the lowest one, or a large total energy would cost the fit digits.
    equation = EquationOfState(volumes, energies - energies.min(), eos="birchmurnaghan")
    # Where there is no minimum the fit runs into negative volumes, and says so.
    with quiet():
        try:
            volume, _, modulus = equation.fit(warn=False)
        except RuntimeError:
            return np.nan, np.nan
    if not (volumes.min() <= volume <= volumes.max() and modulus > 0):
        return np.nan, np.nan
    return float(volume), float(modulus)


NEAREST, FARTHEST, DISTANCES = 0.5, 1.6, 45
"""In sums of the covalent radii: the shortest and the longest distance of a curve; and the number of distances."""
BONDED = 0.7
"""In sums of the covalent radii: the minimum is sought from here outwards, and everything nearer must repel."""
LEAST = 0.1
"""eV: a smaller fall of the energy does not count."""
MOST = 10


@dataclass(frozen=True)
class Curve:
    """Energies in eV of two atoms at distances in Å, in rising order; infinite where they are not finite."""

    distances: tuple[float, ...]
    energies: tuple[float, ...]


@dataclass(frozen=True)
class ShortRangeInstability:
    """Where the energy falls although two atoms come nearer to each other.

    Attributes
    ----------
    distance : float
        Å, below which the energy falls.
    depth : float
        eV, by how much it falls.
    barrier : float
        eV, the energy at that distance above the minimum of the curve: the lower, the sooner two atoms collapse.
    """

    distance: float
    depth: float
    barrier: float


def dimer_curves(potential: Potential, elements: Sequence[tuple[int, int]]) -> dict[str, Curve]:
    """Curves of two isolated atoms of these elements (atomic numbers), by name, as "Si-O".

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> list(dimer_curves(load_potential("emt"), [(29, 29), (29, 79)]))
    ['Cu-Cu', 'Cu-Au']
    """
    shares = np.linspace(NEAREST, FARTHEST, DISTANCES)
    grid = [shares * (covalent_radii[a] + covalent_radii[b]) for a, b in elements]
    atoms = [
        Atoms([a, b], positions=[[0, 0, 0], [0, 0, d]])
        for (a, b), distances in zip(elements, grid, strict=True)
        for d in distances
    ]
    energies = _energies(potential, atoms).reshape(len(grid), DISTANCES)
    return {
        f"{chemical_symbols[a]}-{chemical_symbols[b]}": Curve(tuple(d.tolist()), tuple(e.tolist()))
        for (a, b), d, e in zip(elements, grid, energies, strict=True)
    }


def chosen_dimers(structures: Sequence[Atoms], most: int = MOST) -> list[tuple[int, int]]:
    """Pairs of elements: each with itself, then different ones, those first that are in most of the structures."""
    count = Counter(int(z) for atoms in structures for z in set(atoms.numbers.tolist()))
    elements = [z for z, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))]
    found = [(z, z) for z in elements]
    together = {tuple(sorted(pair)) for a in structures for pair in combinations(set(a.numbers.tolist()), 2)}
    # Half of the places at least are for those of different elements, if there are so many.
    mixed = [(a, b) for a, b in combinations(elements, 2) if tuple(sorted((a, b))) in together]
    alike = found[: max(most - len(mixed), -(-most // 2))]
    return [*alike, *mixed[: most - len(alike)]]


def short_range_instability(curve: Curve, before: Curve | None = None) -> ShortRangeInstability | None:
    """The deepest fall of the energy from the minimum inwards; None where it rises all the way.

    The minimum is the lowest point from `BONDED` outwards. With the curve of another potential before, it is the
    minimum that is reached downhill from where that curve has its own: an instability may be deeper than the minimum.

    Examples
    --------
    >>> from ase_bptt.drift.curves import Curve, short_range_instability
    >>> short_range_instability(Curve((0.8, 1.2, 1.6, 2.0), (-3.0, 2.0, 0.0, 1.0)))
    ShortRangeInstability(distance=1.2, depth=5.0, barrier=2.0)
    """
    distances, energies = np.array(curve.distances), np.array(curve.energies)
    if not np.isfinite(energies).any():
        return None
    minimum = _lowest(curve) if before is None else _downhill(energies, _lowest(before))
    inwards = energies[minimum::-1]
    # An energy that is not finite ends the curve; it is no repulsion.
    inwards = inwards[: int(np.argmax(~np.isfinite(inwards)))] if not np.isfinite(inwards).all() else inwards
    if len(inwards) < 2:
        return None
    fall = np.maximum.accumulate(inwards) - inwards
    lowest = int(fall.argmax())
    if fall[lowest] < LEAST:
        return None
    top = int(inwards[: lowest + 1].argmax())
    barrier = float(inwards[top] - inwards[0])
    return ShortRangeInstability(float(distances[minimum - top]), float(fall[lowest]), barrier)


def _lowest(curve: Curve) -> int:
    distances, energies = np.array(curve.distances), np.array(curve.energies)
    outer = distances >= BONDED / FARTHEST * distances[-1]
    return int(np.flatnonzero(outer)[energies[outer].argmin()])


def _downhill(energies: np.ndarray, k: int) -> int:
    """The minimum that steps to the lower neighbour lead to."""
    while True:
        around = [j for j in (k - 1, k + 1) if 0 <= j < len(energies)]
        lower = min(around, key=lambda j: energies[j])
        if not energies[lower] < energies[k]:
            return k
        k = lower
