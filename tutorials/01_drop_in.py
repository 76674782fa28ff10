"""An ASE script, unchanged but for two imports; then the gradient of where it ended.

    python tutorials/01_drop_in.py

Prints the log of ASE, the relaxed energy, that ASE's own FIRE ends in the same place, and how far the
relaxed positions would move if the weights did.
"""

import numpy as np
from ase.build import bulk
from ase.optimize import FIRE

from ase_bptt import BPTTOptimizer, TorchCalculator  # instead of a calculator and an optimizer of ASE's

vacancy = bulk("Si", a=5.469, cubic=True)
del vacancy[0]
vacancy.rattle(0.1, seed=1)
start = vacancy.copy()

vacancy.calc = TorchCalculator("mace-si")
optimizer = BPTTOptimizer(vacancy, trajectory="vacancy.traj")
optimizer.run(fmax=0.02)
print(f"relaxed energy: {vacancy.get_potential_energy():.4f} eV after {optimizer.nsteps} steps")

# The update rule is ASE's FIRE, so ASE's own optimizer takes the same path.
twin = start.copy()
twin.calc = TorchCalculator("mace-si")
FIRE(twin, logfile=None).run(fmax=0.02)
difference = np.abs(twin.positions - vacancy.positions).max()
print(f"largest difference to ASE's FIRE: {difference:.1e} Å")
assert difference < 1e-9

# Any run can be differentiated afterwards: here, the distance that the atoms moved, by the weights.
relaxation = optimizer.relaxation
moved = (relaxation.positions - relaxation.start.positions).square().sum()
vacancy.calc.potential.zero_grad()
moved.backward()
norms = {name: p.grad.norm().item() for name, p in vacancy.calc.potential.named_parameters() if p.grad is not None}
strongest = max(norms, key=norms.get)
print(f"squared distance {moved.item():.3f} Å^2 depends on {len(norms)} weight tensors, most on {strongest}")
assert norms[strongest] > 0
