"""Starts from which one structure may relax to other minima: rattled, bonds distorted, symmetry broken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.data import covalent_radii

WAYS = ("rattle", "distort", "break-symmetry")
RATTLES = (0.1, 0.2, 0.3, 0.45)
"""Å, standard deviations of the rattled starts in turn."""
FACTORS = (0.6, 1.3, 0.7, 1.4, 0.5, 1.5, 0.8, 1.2, 0.4, 1.6)
"""By which bonds are scaled in turn, up to 60 % either way (Mosquera-Lois et al., npj Comput. Mater. 9, 25 (2023))."""
DISTORTED = (2, 1, 3, 4)
"""Bonds of the site that are distorted in turn."""
SHIFTS = (0.3, 0.6, 0.9)
"""Å, by which the site, or its neighbours against each other, are pushed off their symmetric places."""
NOISE = 0.03
"""Å, standard deviation of what is added to all atoms of a distorted start, so that no symmetry is left."""
CLOSEST = 0.6
"""Of the sum of two covalent radii: what is closer is no start and no minimum."""


class Start(NamedTuple):
    """A structure to relax, and how it was made."""

    atoms: Atoms
    way: str


def make_start(atoms: Atoms, k: int, ways: Sequence[str], site: int | Sequence[float] | None, seed: int) -> Start:
    """The k-th start from a structure, always the same; the first is the structure itself.

    Parameters
    ----------
    atoms : Atoms
        Its constraints are obeyed.
    k : int
    ways : sequence of str
        Of `WAYS`, taken in turn.
    site : int, (float, float, float) or None
        Atom or place (Å) around which bonds are distorted; None takes `odd_sites` in turn.
    seed : int
    """
    if k == 0:
        return Start(atoms.copy(), "as given")
    round_, which = divmod(k - 1, len(ways))
    generator = np.random.default_rng([seed, k])
    centers = [place_of(atoms, site)] if site is not None else odd_sites(atoms)
    center = centers[round_ % len(centers)]
    if ways[which] == "rattle":
        size = RATTLES[round_ % len(RATTLES)]
        moves, said = generator.normal(scale=size, size=(len(atoms), 3)), f"rattled {size} Å"
    elif ways[which] == "distort":
        factor = FACTORS[round_ % len(FACTORS)]
        n = min(DISTORTED[(round_ // len(FACTORS) + round_) % len(DISTORTED)], len(atoms) - 1)
        moves = _distortion(atoms, center, factor, n, generator)
        said = f"{n} bond{'s' * (n > 1)} times {factor}"
    else:
        size = SHIFTS[round_ % len(SHIFTS)]
        moves, said = _pushed(atoms, center, size, generator), f"pushed {size} Å"
    return Start(_moved(atoms, moves), said)


def place_of(atoms: Atoms, site: int | Sequence[float]) -> np.ndarray:
    """A place in Å, from the index of an atom or from itself.

    Raises
    ------
    ValueError
        For an atom that there is not.
    """
    if np.ndim(site):
        return np.asarray(site, dtype=float)
    if not 0 <= int(site) < len(atoms):  # type: ignore[arg-type]
        raise ValueError(f"There is no atom {site}: the structure has {len(atoms)}, counted from 0.")
    return atoms.positions[int(site)]  # type: ignore[arg-type]


def odd_sites(atoms: Atoms) -> list[np.ndarray]:
    """Places in Å of what is unlike the rest: atoms of rare elements, else of odd surroundings, else all atoms."""
    elements, counts = np.unique(atoms.numbers, return_counts=True)
    rare = elements[(counts <= max(1, len(atoms) // 4)) & (len(elements) > 1)]
    if len(rare):
        return list(atoms.positions[np.isin(atoms.numbers, rare)])
    if len(atoms) > 2:
        distances = np.sort(atoms.get_all_distances(mic=bool(atoms.pbc.any())), axis=1)[:, 1:5]
        strain = np.abs(distances.mean(1) - np.median(distances.mean(1)))
        if strain.max() > 0.1:
            return list(atoms.positions[strain > 0.5 * strain.max()])
    return list(atoms.positions)


def too_close(atoms: Atoms) -> bool:
    """Whether two atoms are closer than any chemistry puts them."""
    if len(atoms) < 2:
        return False
    radii = covalent_radii[atoms.numbers]
    distances = atoms.get_all_distances(mic=bool(atoms.pbc.any()))
    np.fill_diagonal(distances, np.inf)
    return bool((distances < CLOSEST * (radii[:, None] + radii)).any())


def _around(atoms: Atoms, center: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n atoms nearest to a place, and their vectors from it."""
    probe = Atoms("X", positions=[center], cell=atoms.cell, pbc=atoms.pbc)
    both = atoms.copy()
    both.set_constraint()
    both += probe
    vectors = both.get_distances(len(atoms), range(len(atoms)), mic=bool(atoms.pbc.any()), vector=True)
    lengths = np.linalg.norm(vectors, axis=1)
    nearest = np.argsort(np.where(lengths < 1e-3, np.inf, lengths), kind="stable")[:n]
    return nearest, vectors[nearest]


def _distortion(atoms: Atoms, center: np.ndarray, factor: float, n: int, generator: np.random.Generator) -> np.ndarray:
    nearest, vectors = _around(atoms, center, n)
    moves = generator.normal(scale=NOISE, size=(len(atoms), 3))
    moves[nearest] += (factor - 1) * vectors
    return moves


def _pushed(atoms: Atoms, center: np.ndarray, size: float, generator: np.random.Generator) -> np.ndarray:
    """The atom at the place in any direction, or, where there is none, its two neighbours together or apart."""
    moves = generator.normal(scale=NOISE, size=(len(atoms), 3))
    at_it = np.flatnonzero(np.linalg.norm(atoms.positions - center, axis=1) < 1e-3)
    direction = generator.normal(size=3)
    if len(at_it):
        moves[at_it[0]] += size * direction / np.linalg.norm(direction)
    nearest, vectors = _around(atoms, center, min(2, len(atoms) - 1))
    for k, vector in zip(nearest, vectors, strict=True):
        moves[k] += generator.choice([-1.0, 1.0]) * size / 2 * vector / np.linalg.norm(vector)
    return moves


def _moved(atoms: Atoms, moves: np.ndarray) -> Atoms:
    """A copy with these displacements, which are halved until no two atoms are too close."""
    for _ in range(6):
        moved = atoms.copy()
        moved.set_positions(atoms.positions + moves, apply_constraint=True)
        if not too_close(moved):
            break
        moves = moves / 2
    return moved
