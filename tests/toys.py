"""Potentials whose minima and Hessians are known, structures for the adjoints, and losses that know no rigid motion."""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from conftest import rattled
from torch import nn

from ase_bptt import Potential, Prediction


class Bowl(Potential):
    """u K u / 2 - load u with the displacements u from known places, centred: the minimum is u = K^+ load.

    Parameters
    ----------
    eigenvalues : sequence
        Of the Hessian, in eV/Å^2, without the three zeros of translations; three times (atoms - 1).
    """

    family = "bowl"

    def __init__(self, eigenvalues):
        super().__init__()
        rng = np.random.default_rng(5)
        n = len(eigenvalues) // 3 + 1
        translations = np.tile(np.eye(3), (n, 1))
        basis, _ = np.linalg.qr(np.hstack((translations, rng.normal(size=(3 * n, 3 * n - 3)))))
        self.modes = torch.from_numpy(basis[:, 3:].copy())
        self.places = torch.from_numpy(rng.uniform(0, 4, (n, 3)))
        diagonal = torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64))
        self.hessian = nn.Parameter(self.modes @ diagonal @ self.modes.T)
        self.load = nn.Parameter(self.modes @ torch.from_numpy(rng.normal(0, 0.1, 3 * n - 3)))
        self.cutoff = 0.5

    def forward(self, structures, edges):
        u = structures.positions.view(len(structures), -1, 3) - self.places
        u = (u - u.mean(1, keepdim=True)).flatten(1)
        return Prediction(((u @ self.hessian) * u).sum(1) / 2 - u @ self.load)

    def atoms(self, offset=0.0) -> Atoms:
        """A periodic cell, which cannot turn, displaced along all modes."""
        n = len(self.places)
        moved = (self.modes @ torch.full((3 * n - 3,), offset, dtype=torch.float64)).view(n, 3)
        return Atoms(f"Ar{n}", positions=(self.places + moved).numpy(), cell=[9, 9, 9], pbc=True)


class Narrow(Potential):
    """A potential that says that memory has run out where there are more atoms than fit."""

    family = "narrow"

    def __init__(self, inner, most):
        super().__init__()
        self.inner, self.most, self.cutoff, self.largest = inner, most, inner.cutoff, 0

    def forward(self, structures, edges):
        if structures.n_atoms > self.most:
            raise torch.OutOfMemoryError("out of memory")
        self.largest = max(self.largest, structures.n_atoms)
        return self.inner(structures, edges)


def vacancy(amplitude=0.03, seed=1, a=1.55) -> Atoms:
    """An orthorhombic Lennard-Jones crystal, an atom short: its neighbours' places depend on the weights."""
    atoms = bulk("Ar", "fcc", a=a, cubic=True).repeat((2, 1, 1))
    atoms.set_cell(atoms.cell.array * [1.0, 0.97, 1.02], scale_atoms=True)
    del atoms[0]
    return rattled(atoms, amplitude, seed)


def heap(stretch=1.1, seed=0) -> Atoms:
    """Five atoms, isolated; stretch sets the first two apart."""
    places = np.array([[0, 0, 0], [1.0, 0, 0.1], [0.5, 0.9, 0.1], [0.4, 0.3, 0.8], [0.5, 0.3, -0.8]])
    return rattled(Atoms("Ar5", positions=places * [stretch, 1.1, 1.1]), 0.03, seed)


def held(atoms, *constraints) -> Atoms:
    atoms.set_constraint([c(atoms) if callable(c) else c for c in constraints])
    return atoms


def shape(positions, structures) -> torch.Tensor:
    """A weighted sum of the distances between atoms, which no rigid motion changes, summed over the structures."""
    total = positions.new_zeros(())
    for x in positions.split(structures.counts):
        i, j = torch.triu_indices(len(x), len(x), 1)
        lengths = (x[i] - x[j]).norm(dim=1)
        total = total + (lengths * torch.linspace(-1, 1.5, len(lengths)).to(x)).sum()
    return total
