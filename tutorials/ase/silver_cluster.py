"""Clusters of silver: which shape holds 13 and 55 atoms best.

    python tutorials/ase/silver_cluster.py

Icosahedra and cuboctahedra without a cell are relaxed by BFGS from slightly disordered positions.
"""

import numpy as np
import twice
from ase import Atoms
from ase.cluster import Icosahedron, Octahedron


def run(EMT, optimize):
    """Cohesive energies in eV per atom, radii in Å, and the steps taken."""
    found = {}
    alone = Atoms("Ag", calculator=EMT()).get_potential_energy()
    found["atom alone: energy (eV)"] = alone
    shapes = {
        "icosahedron of 13": Icosahedron("Ag", 2),
        "cuboctahedron of 13": Octahedron("Ag", 3, cutoff=1),
        "icosahedron of 55": Icosahedron("Ag", 3),
        "cuboctahedron of 55": Octahedron("Ag", 5, cutoff=2),
    }
    for name, shape in shapes.items():
        cluster = Atoms(shape.symbols, shape.positions)
        cluster.rattle(0.02, seed=3)
        cluster.calc = EMT()
        optimizer = optimize.BFGS(cluster, logfile=None, trajectory="cluster.traj")
        assert optimizer.run(fmax=0.01, steps=200)
        found[f"{name}: cohesive energy (eV per atom)"] = alone - cluster.get_potential_energy() / len(cluster)
        radii = np.linalg.norm(cluster.positions - cluster.get_center_of_mass(), axis=1)
        found[f"{name}: radius (Å)"] = radii.max()
        found[f"{name}: steps"] = optimizer.nsteps
    return found


if __name__ == "__main__":
    twice.compare(run)
