"""Two atoms pushed together: whether a potential repels them, or has a hole where it was never trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii

from ..potential import Potential
from .crystals import energies_of

NEAREST, FARTHEST, POINTS = 0.5, 1.6, 45
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
    shares = np.linspace(NEAREST, FARTHEST, POINTS)
    grid = [shares * (covalent_radii[a] + covalent_radii[b]) for a, b in elements]
    atoms = [
        Atoms([a, b], positions=[[0, 0, 0], [0, 0, d]])
        for (a, b), distances in zip(elements, grid, strict=True)
        for d in distances
    ]
    energies = energies_of(potential, atoms).reshape(len(grid), POINTS)
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
