"""Molecular dynamics of copper: the total energy stays where the forces are the negative gradient of the energy.

    python tutorials/ase/molecular_dynamics.py

VelocityVerlet for 400 fs with two time steps: with half the step, the error of the total energy falls to a
quarter.
"""

import numpy as np
import twice
from ase.build import bulk
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.units import fs


def run(EMT, optimize):
    """Drift and largest error of the total energy in meV per atom, and where the run ended; nothing is optimized."""
    found = {}
    errors = []
    for step in (2, 1):
        atoms = bulk("Cu", cubic=True) * 2
        thermalize_momenta(atoms, temperature_K=600, rng=np.random.default_rng(2))
        Stationary(atoms)
        atoms.calc = EMT()
        dynamics = VelocityVerlet(atoms, timestep=step * fs)
        totals = [1000 * atoms.get_total_energy() / len(atoms) for _ in dynamics.irun(400 // step)]
        errors.append(np.abs(np.array(totals) - totals[0]).max())
        found[f"{step} fs: drift (meV per atom)"] = totals[-1] - totals[0]
        found[f"{step} fs: largest error (meV per atom)"] = errors[-1]
        found[f"{step} fs: last temperature (K)"] = atoms.get_temperature()
        found[f"{step} fs: last potential energy (eV)"] = atoms.get_potential_energy()
    assert errors[1] < 0.05
    assert 3.5 < errors[0] / errors[1] < 4.5
    return found


if __name__ == "__main__":
    twice.compare(run)
