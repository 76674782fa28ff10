"""Energies along a stretch: of known crystals (lattice constant, bulk modulus) and of dimers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.units import GPa

from ..neighbors import find_edges
from ..potential import Potential
from ..terms.probes import Crystal

STEP, FINE, ROUNDS = 0.02, 0.008, 8
"""Spacing of the seven lattice constants in the search and in the fit, and how often the search moves on."""
VOLUMES = np.arange(-3, 4)


@dataclass(frozen=True)
class Elastic:
    """A crystal's lattice constant in Å and bulk modulus in GPa; NaN where no minimum was found."""

    lattice_constant: float
    bulk_modulus: float


def elastic(potential: Potential, crystals: Sequence[Crystal]) -> dict[str, Elastic]:
    """Lattice constants and bulk moduli of cubic crystals, from energies at seven volumes each.

    The seven lattice constants move until the lowest energy is inside, then close in on it. The fit is
    Birch and Murnaghan's equation of state of third order (Phys. Rev. 71, 809 (1947)): the energy is a
    polynomial of third degree in V^(-2/3).
    """
    cells = [crystal.atoms() for crystal in crystals]
    centre = np.ones(len(cells))
    inside = np.zeros(len(cells), dtype=bool)
    for _ in range(ROUNDS):
        searching = np.flatnonzero(~inside)
        if not len(searching):
            break
        scales = centre[searching, None] * (1 + STEP * VOLUMES)
        lowest = _energies(potential, [cells[k] for k in searching], scales).argmin(axis=1)
        centre[searching] = scales[np.arange(len(searching)), lowest]
        inside[searching] = (lowest > 0) & (lowest < len(VOLUMES) - 1)
    scales = centre[:, None] * (1 + FINE * VOLUMES)
    energies = _energies(potential, cells, scales) if len(cells) else np.zeros((0, len(VOLUMES)))
    found = {}
    for crystal, cell, s, e, good in zip(crystals, cells, scales, energies, inside, strict=True):
        volume, modulus = birch_murnaghan(s**3 * cell.get_volume(), e) if good else (np.nan, np.nan)
        a = float(crystal.a or np.nan) * (volume / cell.get_volume()) ** (1 / 3)
        found[crystal.name] = Elastic(float(a), float(modulus / GPa))
    return found


def _energies(potential: Potential, cells: Sequence[Atoms], scales: np.ndarray) -> np.ndarray:
    """Energies in eV of each cell at each scale of its lattice constant, the shape of the scales."""
    atoms = []
    for cell, row in zip(cells, scales, strict=True):
        for scale in row:
            atoms.append(cell.copy())
            atoms[-1].set_cell(cell.cell.array * scale, scale_atoms=True)
    return energies_of(potential, atoms).reshape(scales.shape)


def energies_of(potential: Potential, atoms: Sequence[Atoms], together: int = 32) -> np.ndarray:
    """Energies in eV of structures, so many in one batch; infinite where they are not finite."""
    found = []
    for first in range(0, len(atoms), together):
        batch = potential.batch(atoms[first : first + together])
        with torch.no_grad():
            energy = potential(batch, find_edges(batch, potential.cutoff)).energy
        found.append(energy.double().cpu().numpy())
    energies = np.concatenate(found) if found else np.zeros(0)
    return np.where(np.isfinite(energies), energies, np.inf)


def birch_murnaghan(volumes: np.ndarray, energies: np.ndarray) -> tuple[float, float]:
    """Volume and bulk modulus (in energy per volume) at the minimum of a fit; NaN where it has none inside."""
    if not np.isfinite(energies).all():
        return np.nan, np.nan
    # Centred and scaled, or the fit would lose digits.
    scale = volumes.mean()
    x = (volumes / scale) ** (-2 / 3)
    fit = np.polynomial.Polynomial(np.linalg.lstsq(np.vander(x - 1, 4, increasing=True), energies, rcond=None)[0])
    slope, curvature = fit.deriv(), fit.deriv(2)
    roots = [root.real for root in slope.roots() if abs(root.imag) < 1e-9 and curvature(root.real) > 0]
    inside = [root for root in roots if x.min() <= 1 + root <= x.max()]
    if not inside:
        return np.nan, np.nan
    volume = (1 + inside[0]) ** (-1.5)
    return float(volume * scale), float(4 / 9 * curvature(inside[0]) * volume ** (-7 / 3) / scale)


NEAREST, FARTHEST, DISTANCES = 0.5, 1.6, 45
"""In sums of the covalent radii: where a curve begins and ends; and its distances."""
WELL = 0.7
"""In sums of the covalent radii: the well is sought from here on, and everything nearer must repel."""
LEAST = 0.1
"""eV: a smaller fall is none."""
MOST = 10


@dataclass(frozen=True)
class Curve:
    """Energies in eV of two atoms at distances in Å, rising; infinite where they are not finite."""

    distances: tuple[float, ...]
    energies: tuple[float, ...]


@dataclass(frozen=True)
class Hole:
    """From which distance on, in Å, the energy falls as two atoms come nearer, and by how much, in eV.

    `barrier` is the energy there above the well, in eV: the lower, the sooner two atoms fall in.
    """

    distance: float
    depth: float
    barrier: float


def dimer_curves(potential: Potential, elements: Sequence[tuple[int, int]]) -> dict[str, Curve]:
    """Curves of two isolated atoms of these elements, by name, as "Si-O"."""
    shares = np.linspace(NEAREST, FARTHEST, DISTANCES)
    grid = [shares * (covalent_radii[a] + covalent_radii[b]) for a, b in elements]
    atoms = [
        Atoms([a, b], positions=[[0, 0, 0], [0, 0, d]])
        for (a, b), distances in zip(elements, grid, strict=True)
        for d in distances
    ]
    energies = energies_of(potential, atoms).reshape(len(grid), DISTANCES)
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


def hole(curve: Curve, before: Curve | None = None) -> Hole | None:
    """The deepest fall on the way from the well inwards; None where the energy rises all the way.

    The well is the lowest point that is not too near; or, with the curve of another potential before, the
    minimum that leads down from where its well was: a hole may be deeper than the well.
    """
    distances, energies = np.array(curve.distances), np.array(curve.energies)
    if not np.isfinite(energies).any():
        return None
    well = _lowest(curve) if before is None else _downhill(energies, _lowest(before))
    inwards = energies[well::-1]
    # What is not finite breaks off the curve, and is no wall.
    inwards = inwards[: int(np.argmax(~np.isfinite(inwards)))] if not np.isfinite(inwards).all() else inwards
    if len(inwards) < 2:
        return None
    top = np.maximum.accumulate(inwards)
    fall = top - inwards
    lowest = int(fall.argmax())
    if fall[lowest] < LEAST:
        return None
    summit = int(inwards[: lowest + 1].argmax())
    return Hole(float(distances[well - summit]), float(fall[lowest]), float(inwards[summit] - inwards[0]))


def _lowest(curve: Curve) -> int:
    distances, energies = np.array(curve.distances), np.array(curve.energies)
    outer = distances >= WELL / FARTHEST * distances[-1]
    return int(np.flatnonzero(outer)[energies[outer].argmin()])


def _downhill(energies: np.ndarray, k: int) -> int:
    """The minimum that steps to the lower neighbour lead to."""
    while True:
        around = [j for j in (k - 1, k + 1) if 0 <= j < len(energies)]
        lower = min(around, key=lambda j: energies[j])
        if not energies[lower] < energies[k]:
            return k
        k = lower
