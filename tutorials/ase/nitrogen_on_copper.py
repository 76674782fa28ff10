"""N2 on Cu(111): a molecule that stands stays whole, one that lies falls apart.

    python tutorials/ase/nitrogen_on_copper.py

The molecule, the clean slab and the covered slabs are relaxed by QuasiNewton, the lower layer held. EMT's
nitrogen is good for trying things out only.
"""

import twice
from ase.build import add_adsorbate, fcc111, molecule
from ase.constraints import FixAtoms


def run(EMT, optimize):
    """Energies and distances, in eV and Å, and the steps taken."""
    found = {}

    def relax(atoms, name):
        atoms.calc = EMT()
        optimizer = optimize.QuasiNewton(atoms, logfile=None, trajectory=f"{name}.traj")
        assert optimizer.run(fmax=0.01, steps=200)
        found[f"{name}: energy (eV)"] = atoms.get_potential_energy()
        found[f"{name}: steps"] = optimizer.nsteps

    gas = molecule("N2")
    slab = fcc111("Cu", size=(3, 3, 2), vacuum=8.0)
    slab.set_constraint(FixAtoms(mask=slab.get_tags() == 2))
    relax(gas, "molecule")
    relax(slab, "slab")
    apart = gas.get_potential_energy() + slab.get_potential_energy()

    for name, angle in (("standing", 0), ("lying", 90)):
        turned = gas.copy()
        turned.rotate(angle, "x")
        covered = slab.copy()
        add_adsorbate(covered, turned, height=1.9, position="fcc", mol_index=turned.positions[:, 2].argmin())
        relax(covered, name)
        found[f"{name}: adsorption energy (eV)"] = apart - covered.get_potential_energy()
        found[f"{name}: distance of the nitrogen atoms (Å)"] = covered.get_distance(-1, -2)
        heights = covered.positions[:, 2]
        found[f"{name}: height above the copper (Å)"] = heights[-2:].min() - heights[:-2].max()
    return found


if __name__ == "__main__":
    twice.compare(run)
