"""An ASE script, unchanged but for two imports; then the gradient of where it ended.

    python tutorials/01_drop_in.py

A silicon cell with a vacancy is relaxed. Prints the log that ASE's optimizers print, the relaxed energy,
the difference to ASE's own FIRE, and on which weights of the potential the end depends most.
"""

import numpy as np
from ase.build import bulk
from ase.optimize import FIRE

from ase_bptt import BPTTOptimizer, TorchCalculator  # instead of a calculator and an optimizer of ASE's

vacancy = bulk("Si", a=5.469, cubic=True)
del vacancy[0]
vacancy.rattle(0.1, seed=1)
start = vacancy.copy()

# 1. The script as before. "mace-si" is the embedded potential; "chgnet", a folder that ase_bptt saved, or a
#    torch module of a supported family can be given as well.
vacancy.calc = TorchCalculator("mace-si")
optimizer = BPTTOptimizer(vacancy, trajectory="vacancy.traj")
optimizer.run(fmax=0.02)
print(f"relaxed energy: {vacancy.get_potential_energy():.4f} eV after {optimizer.nsteps} steps")

# 2. The update rule is ASE's FIRE by default, so ASE's own optimizer takes the same path.
twin = start.copy()
twin.calc = TorchCalculator("mace-si")
FIRE(twin, logfile=None).run(fmax=0.02)
difference = np.abs(twin.positions - vacancy.positions).max()
print(f"largest difference to ASE's FIRE: {difference:.1e} Å")
assert difference < 1e-9

# 3. What is new: the run that has just ended can be differentiated. Here, the squared distance that the
#    atoms moved, with respect to every weight of the potential and through every frame of the relaxation.
relaxation = optimizer.relaxation
moved = (relaxation.positions - relaxation.start.positions).square().sum()
vacancy.calc.potential.zero_grad()
moved.backward()
norms = {name: p.grad.norm().item() for name, p in vacancy.calc.potential.named_parameters() if p.grad is not None}
strongest = max(norms, key=norms.get)
print(f"squared distance {moved.item():.3f} Å^2 depends on {len(norms)} weight tensors, most on {strongest}")
assert norms[strongest] > 0
