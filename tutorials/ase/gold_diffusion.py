"""A gold atom hops on Al(100): the barrier along a nudged elastic band.

    python tutorials/ase/gold_diffusion.py

Both ends are relaxed by QuasiNewton with the lower layers fixed, the band between them by BFGS and, once more,
by FIRE. Energies are those of the band that the optimizer has written to its trajectory.
"""

import twice
from ase.build import add_adsorbate, fcc100
from ase.constraints import FixAtoms
from ase.io import read
from ase.mep import NEB, NEBTools

IMAGES = 5


def run(EMT, optimize):
    """Energies of all images and the barrier in eV, the way of the gold in Å, and the steps taken."""
    found = {}
    slab = fcc100("Al", size=(2, 2, 3))
    add_adsorbate(slab, "Au", height=1.7, position="hollow")
    slab.center(axis=2, vacuum=4.0)
    slab.set_constraint(FixAtoms(mask=slab.get_tags() > 1))
    ends = [slab, slab.copy()]
    ends[1][-1].x += slab.cell[0, 0] / 2
    for name, atoms in zip(("start", "goal"), ends):
        atoms.calc = EMT()
        optimizer = optimize.QuasiNewton(atoms, logfile=None, trajectory=f"{name}.traj")
        assert optimizer.run(fmax=0.02, steps=100)
        found[f"{name}: steps"] = optimizer.nsteps

    for name in ("BFGS", "FIRE"):
        images = [read("start.traj"), *(ends[0].copy() for _ in range(IMAGES - 2)), read("goal.traj")]
        for image in images[1:-1]:
            image.calc = EMT()
        band = NEB(images, method="improvedtangent")
        band.interpolate(mic=True)
        optimizer = getattr(optimize, name)(band, logfile=None, trajectory="band.traj")
        assert optimizer.run(fmax=0.01, steps=300)
        found[f"band by {name}: steps"] = optimizer.nsteps
        last = read("band.traj", f"-{IMAGES}:")
        for number, image in enumerate(last):
            found[f"band by {name}: energy of image {number} (eV)"] = image.get_potential_energy()
        found[f"band by {name}: barrier (eV)"] = NEBTools(last).get_barrier(fit=True)[0]
        found[f"band by {name}: way of the gold (Å)"] = last[-1][-1].x - last[0][-1].x
    return found


if __name__ == "__main__":
    twice.compare(run)
