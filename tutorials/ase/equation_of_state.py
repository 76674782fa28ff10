"""Equations of state of seven metals: energies of strained crystals, and what a curve through them says.

    python tutorials/ase/equation_of_state.py

One calculator computes all crystals, so nothing may stay behind in it from one to the next. The energies
go through a trajectory, from which the curves are fitted.
"""

import numpy as np
import twice
from ase.build import bulk
from ase.eos import EquationOfState
from ase.io import Trajectory, read
from ase.units import GPa

METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")


def run(EMT, optimize):
    """Volumes in Å^3, energies in eV and bulk moduli in GPa; nothing is optimized."""
    calculator = EMT()
    with Trajectory("strained.traj", "w") as strained:
        for metal in METALS:
            crystal = bulk(metal)
            for scale in np.linspace(0.97, 1.03, 7):
                atoms = crystal.copy()
                atoms.set_cell(crystal.cell * scale, scale_atoms=True)
                atoms.calc = calculator
                atoms.get_potential_energy()
                strained.write(atoms)
    found = {}
    frames = read("strained.traj", ":")
    for metal in METALS:
        points = [atoms for atoms in frames if atoms.symbols[0] == metal]
        volumes = [atoms.get_volume() for atoms in points]
        energies = [atoms.get_potential_energy() for atoms in points]
        volume, energy, modulus = EquationOfState(volumes, energies).fit()
        found[f"{metal}: volume (Å^3)"] = volume
        found[f"{metal}: energy (eV)"] = energy
        found[f"{metal}: bulk modulus (GPa)"] = modulus / GPa
    return found


if __name__ == "__main__":
    twice.compare(run)
