"""Lattice constants of nickel, fcc and hcp, on two routes: a fit to energies, and relaxation by the stress.

    python tutorials/ase/lattice_constants.py

Both routes must meet: a stress that is not the derivative of the energy would show here.
"""

from itertools import combinations_with_replacement, product

import numpy as np
import twice
from ase.build import bulk
from ase.filters import StrainFilter

STARTS = {"fcc": {"a": 3.6}, "hcp": {"a": 2.5, "c": 4.0}}


def run(EMT, optimize):
    """Lattice constants by both routes in Å, and the steps taken."""
    found = {}
    for lattice, start in STARTS.items():
        by_energy = fit(lattice, start, EMT)
        by_stress, found[f"{lattice}: steps"] = relax(lattice, start, EMT, optimize)
        for name, length in by_energy.items():
            assert abs(length - by_stress[name]) < 1e-6
            found[f"{lattice}: {name} by energy (Å)"] = length
            found[f"{lattice}: {name} by stress (Å)"] = by_stress[name]
    return found


def fit(lattice, start, EMT):
    """Lattice constants where a parabola through energies is lowest, drawn closer and closer to there."""
    calculator = EMT()
    names, lengths = list(start), np.array(list(start.values()))
    # 1, x, y, xx, xy, yy: a term is the product of the columns that it names, and column 0 is 1.
    terms = list(combinations_with_replacement(range(len(names) + 1), 2))
    for width in (0.02, 0.002, 0.0002):
        points = np.array(list(product((-1, 0, 1), repeat=len(names))))
        energies = []
        for point in points:
            atoms = bulk("Ni", lattice, **dict(zip(names, lengths * (1 + width * point))))
            atoms.calc = calculator
            energies.append(atoms.get_potential_energy())
        columns = np.column_stack([np.ones(len(points)), points])
        matrix = np.stack([columns[:, i] * columns[:, j] for i, j in terms], axis=1)
        weights = dict(zip(terms, np.linalg.lstsq(matrix, energies, rcond=None)[0]))
        gradient = np.array([weights[0, i + 1] for i in range(len(names))])
        curvature = np.zeros((len(names), len(names)))
        for (i, j), weight in weights.items():
            if i > 0:
                curvature[i - 1, j - 1] += weight
                curvature[j - 1, i - 1] += weight
        lengths = lengths * (1 - width * np.linalg.solve(curvature, gradient))
    return dict(zip(names, lengths))


def relax(lattice, start, EMT, optimize):
    """Lattice constants where the stress is zero, and the steps taken."""
    atoms = bulk("Ni", lattice, **start)
    atoms.calc = EMT()
    optimizer = optimize.BFGS(StrainFilter(atoms), logfile=None, trajectory=f"{lattice}.traj")
    assert optimizer.run(fmax=1e-7, steps=100)
    a, _, c = atoms.cell.lengths()
    return ({"a": a * np.sqrt(2)} if lattice == "fcc" else {"a": a, "c": c}), optimizer.nsteps


if __name__ == "__main__":
    twice.compare(run)
