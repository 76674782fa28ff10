"""A gold atom pushed over Al(100): the barrier along a path drawn by constraints.

    python tutorials/ase/gold_pushed.py

The gold stays in planes across its way, one after the other, and all else but the lower layers is relaxed
by BFGS, LBFGS and FIRE. The highest energy is the barrier that gold_diffusion.py finds.
"""

import numpy as np
import twice
from ase.build import add_adsorbate, fcc100
from ase.constraints import FixAtoms, FixedPlane


def run(EMT, optimize):
    """Energies above the first in eV, heights of the gold in Å, and the steps taken."""
    found = {}
    profiles = []
    for Optimizer in (optimize.BFGS, optimize.LBFGS, optimize.FIRE):
        slab = fcc100("Al", size=(2, 2, 3))
        add_adsorbate(slab, "Au", height=1.7, position="hollow")
        slab.center(axis=2, vacuum=4.0)
        gold = len(slab) - 1
        slab.set_constraint([FixAtoms(mask=slab.get_tags() > 1), FixedPlane(gold, (1, 0, 0))])
        slab.calc = EMT()
        energies = []
        for number in range(5):
            optimizer = Optimizer(slab, logfile=None, trajectory="pushed.traj")
            assert optimizer.run(fmax=0.005, steps=200)
            energies.append(slab.get_potential_energy())
            name = f"{Optimizer.__name__}, plane {number}"
            found[f"{name}: energy (eV)"] = energies[-1] - energies[0]
            found[f"{name}: height (Å)"] = slab.positions[gold, 2] - slab.positions[:gold, 2].max()
            found[f"{name}: steps"] = optimizer.nsteps
            positions = slab.positions
            positions[gold, 0] += slab.cell[0, 0] / 8
            slab.set_positions(positions, apply_constraint=False)
        profiles.append(np.array(energies))
    assert np.ptp(profiles, axis=0).max() < 1e-3
    return found


if __name__ == "__main__":
    twice.compare(run)
