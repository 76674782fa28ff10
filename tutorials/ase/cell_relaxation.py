"""Relaxation of a cell, by three filters and three algorithms, and under pressure.

    python tutorials/ase/cell_relaxation.py

A sheared, disordered crystal of copper and gold is relaxed with its cell.
"""

import numpy as np
import twice
from ase.build import bulk
from ase.filters import FrechetCellFilter, UnitCellFilter
from ase.units import GPa


def run(EMT, optimize):
    """Energies in eV, lengths in Å and angles in degrees of the cell, stresses in GPa, and the steps taken."""
    routes = {
        "FrechetCellFilter, BFGS": (FrechetCellFilter, {}, optimize.BFGS),
        "UnitCellFilter, FIRE": (UnitCellFilter, {}, optimize.FIRE),
        "10 GPa, LBFGS": (FrechetCellFilter, {"scalar_pressure": 10 * GPa}, optimize.LBFGS),
        "shape held, QuasiNewton": (UnitCellFilter, {"hydrostatic_strain": True}, optimize.QuasiNewton),
    }
    found = {}
    for name, (Filter, options, Optimizer) in routes.items():
        atoms = sheared_alloy()
        atoms.calc = EMT()
        optimizer = Optimizer(Filter(atoms, **options), logfile=None, trajectory="cell.traj")
        assert optimizer.run(fmax=0.001, steps=500)
        found[f"{name}: energy (eV)"] = atoms.get_potential_energy()
        for key, value in zip(("a (Å)", "b (Å)", "c (Å)", "alpha (°)", "beta (°)", "gamma (°)"), atoms.cell.cellpar()):
            found[f"{name}: {key}"] = value
        found[f"{name}: pressure (GPa)"] = -atoms.get_stress()[:3].mean() / GPa
        found[f"{name}: steps"] = optimizer.nsteps
    return found


def sheared_alloy():
    """Four atoms of Cu3Au, neither in their places nor in a cubic cell."""
    atoms = bulk("Cu", cubic=True, a=3.8)
    atoms.symbols[0] = "Au"
    shear = np.array([[1.0, 0.04, 0.0], [0.0, 0.97, 0.03], [0.0, 0.0, 1.02]])
    atoms.set_cell(atoms.cell @ shear, scale_atoms=True)
    atoms.rattle(0.05, seed=5)
    return atoms


if __name__ == "__main__":
    twice.compare(run)
