"""Common crystals, and their lattice constants and bulk moduli by any potential."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, chemical_symbols, reference_states
from ase.units import GPa

from ..neighbors import find_pairs
from ..potential import Potential

COMPOUNDS: tuple[tuple[str, str, float], ...] = (
    ("MgO", "rocksalt", 4.21), ("NaCl", "rocksalt", 5.64), ("LiF", "rocksalt", 4.03), ("CaO", "rocksalt", 4.81),
    ("KBr", "rocksalt", 6.60), ("MgS", "rocksalt", 5.20), ("TiC", "rocksalt", 4.33), ("TiN", "rocksalt", 4.24),
    ("PbS", "rocksalt", 5.94), ("SnTe", "rocksalt", 6.33), ("GaAs", "zincblende", 5.65), ("SiC", "zincblende", 4.36),
    ("BN", "zincblende", 3.62), ("AlP", "zincblende", 5.46), ("AlAs", "zincblende", 5.66),
    ("AlSb", "zincblende", 6.14), ("GaP", "zincblende", 5.45), ("GaSb", "zincblende", 6.10),
    ("InP", "zincblende", 5.87), ("InAs", "zincblende", 6.06), ("InSb", "zincblende", 6.48),
    ("ZnS", "zincblende", 5.41), ("CdTe", "zincblende", 6.48), ("CuCl", "zincblende", 5.42),
    ("CsCl", "cesiumchloride", 4.12), ("NiAl", "cesiumchloride", 2.89),
    ("CaF2", "fluorite", 5.46), ("ZrO2", "fluorite", 5.09), ("CeO2", "fluorite", 5.41),
)  # fmt: skip
"""Formula, structure, and lattice constant in Å, near what is measured."""
CHOICE = ("Si", "Cu", "MgO", "Al", "NaCl", "GaAs", "W", "C", "CaF2", "TiN", "Ge", "AlP", "InSb", "Pt", "Au", "Ag", "Pd",
          "Ni", "SiC", "GaP", "AlSb", "InAs")  # fmt: skip
"""Of different bonding; the first ten that a potential knows stand on its card."""
CUBIC = ("fcc", "bcc", "diamond")
STEP, FINE, ROUNDS = 0.02, 0.008, 8
"""Spacing of the seven lattice constants in the search and in the fit, and how often the search moves on."""
POINTS = np.arange(-3, 4)


@dataclass(frozen=True)
class Crystal:
    """A crystal's name, ASE's name of its structure, and its lattice constant in Å to start from."""

    name: str
    structure: str
    a: float | None = None

    def atoms(self, cubic: bool = False) -> Atoms:
        """Its primitive cell, or the cubic one."""
        return bulk(self.name, self.structure, a=self.a, cubic=cubic)

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers."""
        return frozenset(int(z) for z in self.atoms().numbers)


def _elements() -> list[Crystal]:
    found = []
    for name, state in zip(chemical_symbols, reference_states):
        structure, a = (str((state or {}).get(key, "")) for key in ("symmetry", "a"))
        if structure in (*CUBIC, "hcp") and a:
            found.append(Crystal(name, structure, float(a) if structure in CUBIC else None))
    return found


CRYSTALS = {crystal.name: crystal for crystal in (*_elements(), *(Crystal(*row) for row in COMPOUNDS))}


def known_crystals(potential: Potential) -> list[Crystal]:
    """The crystals all of whose elements the potential knows."""
    known = potential.atomic_numbers or frozenset(atomic_numbers.values())
    return [crystal for crystal in CRYSTALS.values() if crystal.elements <= known]


def chosen_crystals(potential: Potential, most: int = 10) -> list[Crystal]:
    """So many that the potential knows, those of `CHOICE` first, and of the others only cubic ones."""
    known = {crystal.name: crystal for crystal in known_crystals(potential) if crystal.a is not None}
    names = [name for name in CHOICE if name in known]
    return [known[name] for name in [*names, *(name for name in known if name not in names)][:most]]


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
        scales = centre[searching, None] * (1 + STEP * POINTS)
        lowest = _energies(potential, [cells[k] for k in searching], scales).argmin(axis=1)
        centre[searching] = scales[np.arange(len(searching)), lowest]
        inside[searching] = (lowest > 0) & (lowest < len(POINTS) - 1)
    scales = centre[:, None] * (1 + FINE * POINTS)
    energies = _energies(potential, cells, scales) if len(cells) else np.zeros((0, len(POINTS)))
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
            energy = potential(batch, find_pairs(batch, potential.cutoff)).energy
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
