"""Small structures."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule


def rattled(atoms: Atoms, amplitude: float = 0.1, seed: int = 1) -> Atoms:
    atoms = atoms.copy()
    atoms.rattle(amplitude, seed=seed)
    return atoms


def constrained(atoms: Atoms, *constraints) -> Atoms:
    """With these constraints, or what these functions make of the atoms."""
    atoms.set_constraint([c(atoms) if callable(c) else c for c in constraints])
    return atoms


def moved_about(atoms: Atoms, seed: int) -> Atoms:
    """The same structure after a drift, in other cells and with its atoms of one element in another order."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(np.flatnonzero(atoms.numbers == z)) for z in np.unique(atoms.numbers)])
    atoms = atoms[order]
    atoms.positions += rng.normal(size=3)
    atoms.wrap(pbc=atoms.pbc)
    return atoms


# For Lennard-Jones with sigma 1.


def argon(seed: int = 1) -> Atoms:
    """A cubic cell of an fcc crystal."""
    return rattled(bulk("Ar", "fcc", a=1.6, cubic=True), 0.05, seed)


def vacancy(amplitude=0.03, seed=1, a=1.55) -> Atoms:
    """An orthorhombic crystal without one of its atoms: its neighbours' places depend on the weights."""
    atoms = bulk("Ar", "fcc", a=a, cubic=True).repeat((2, 1, 1))
    atoms.set_cell(atoms.cell.array * [1.0, 0.97, 1.02], scale_atoms=True)
    del atoms[0]
    return rattled(atoms, amplitude, seed)


def cluster(n: int = 6, seed: int = 1) -> Atoms:
    """An isolated octahedron, or its first n atoms, not far from a minimum."""
    corners = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]) * 0.79
    return rattled(Atoms("Ar" * n, positions=corners[:n]), 0.05, seed)


def pentamer(stretch=1.1, seed=0) -> Atoms:
    """Five atoms, isolated; stretch sets the first two apart."""
    places = np.array([[0, 0, 0], [1.0, 0, 0.1], [0.5, 0.9, 0.1], [0.4, 0.3, 0.8], [0.5, 0.3, -0.8]])
    return rattled(Atoms("Ar5", positions=places * [stretch, 1.1, 1.1]), 0.03, seed)


# For Lennard-Jones with sigma 2.5.


def wide_cluster(seed: int) -> Atoms:
    """The octahedron with bonds as long as those of silicon."""
    atoms = cluster(seed=seed)
    atoms.positions *= 2.5
    return rattled(atoms, 0.1, seed)


# For the potentials of the families.


def silicon(seed: int = 1, amplitude: float = 0.1) -> Atoms:
    """The cubic cell."""
    return rattled(bulk("Si", a=5.43, cubic=True), amplitude, seed)


def skewed(seed: int = 1) -> Atoms:
    """The primitive cell of silicon, two atoms, strained."""
    atoms = bulk("Si", a=5.43)
    atoms.set_cell(
        atoms.cell.array @ (np.eye(3) + np.array([[0.02, 0.03, 0], [0, -0.02, 0.05], [0, 0, 0.01]])), scale_atoms=True
    )
    return rattled(atoms, 0.1, seed)


def trimer() -> Atoms:
    return Atoms("Si3", positions=[[0, 0, 0], [2.3, 0.1, 0], [0.9, 2.0, 0.3]])


def methanol() -> Atoms:
    return rattled(molecule("CH3OH"), 0.02)


def copper() -> Atoms:
    """A crystal with a vacancy and an atom of silver."""
    atoms = bulk("Cu", cubic=True).repeat((2, 1, 1))
    del atoms[0]
    atoms.symbols[3] = "Ag"
    return rattled(atoms, 0.05)


def alloy() -> Atoms:
    """An isolated tetrahedron of two metals."""
    return rattled(Atoms("Cu3Pt", positions=np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 0.9), 0.05)
