"""The longest step of gradient descent that is stable, 2/lambda_max of the Hessian, for some materials by CHGNet.

python docs/measure/stiffness.py
"""

from ase.build import bulk, molecule

from ase_bptt import load_potential
from ase_bptt.stability import largest_curvature

structures = {
    "Cu": bulk("Cu", cubic=True),
    "MgO": bulk("MgO", "rocksalt", a=4.21, cubic=True),
    "Si": bulk("Si", a=5.469, cubic=True),
    "CH4": molecule("CH4", vacuum=5, pbc=True),
    "H2O": molecule("H2O", vacuum=5, pbc=True),
    "CO2": molecule("CO2", vacuum=5, pbc=True),
}
potential = load_potential("chgnet", dtype="float64")
for name, atoms in structures.items():
    stiffest = largest_curvature(potential, atoms)
    print(f"{name:4} lambda_max {stiffest:6.1f} eV/Å^2   2/lambda_max {2 / stiffest:.3f} Å^2/eV")
