"""Adsorption on many surfaces, kept in a database of ase.db.

    python tutorials/ase/adsorption_database.py

Lattice constants are computed, stored and read back to build the surfaces; adsorbed atoms are relaxed and
stored; energies are then put together by queries alone. A second pass finds all done and computes nothing.
"""

import twice
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111
from ase.constraints import FixAtoms
from ase.db import connect
from ase.eos import calculate_eos

METALS = ("Al", "Cu", "Pt", "Au")
ADSORBATES = ("N", "O")


def run(EMT, optimize):
    """Adsorption energies in eV, heights in Å, and how much the database holds."""
    found = {}
    database = connect("adsorption.db")
    steps = [fill(database, EMT, optimize) for _ in range(2)]
    found["first pass: steps"], found["second pass: steps"] = steps
    assert steps[0] > 0
    assert steps[1] == 0

    calculator = EMT()
    found["rows"] = database.count()
    found["rows of this calculator"] = database.count(calculator=calculator.name)
    assert found["rows"] == found["rows of this calculator"] > 0
    copy = connect("copy.json")
    for row in database.select():
        copy.write(row, **row.key_value_pairs)
    for row in [*database.select(), *copy.select()]:
        # What describes the calculator went through JSON, and comes back as it was.
        assert row.calculator_parameters == calculator.todict()
        assert row.toatoms().calc.name == calculator.name
    for row in database.select("kind=covered", sort="id"):
        clean = database.get(kind="clean", metal=row.metal).energy
        atom = database.get(kind="atom", adsorbate=row.adsorbate).energy
        found[f"{row.adsorbate} on {row.metal}: adsorption energy (eV)"] = clean + atom - row.energy
        atoms = row.toatoms()
        found[f"{row.adsorbate} on {row.metal}: height (Å)"] = atoms.positions[-1, 2] - atoms.positions[:-1, 2].max()
        found[f"{row.adsorbate} on {row.metal}: largest force (eV/Å)"] = row.fmax
    return found


def fill(database, EMT, optimize):
    """Compute what the database lacks; the steps that were taken."""
    steps = 0
    for metal in METALS:
        if (row := database.reserve(kind="bulk", metal=metal)) is not None:
            crystal = bulk(metal)
            crystal.calc = EMT()
            volume = calculate_eos(crystal, eps=0.02).fit()[0]
            crystal.set_cell(crystal.cell * (volume / crystal.get_volume()) ** (1 / 3), scale_atoms=True)
            crystal.get_potential_energy()
            database.write(crystal, id=row, kind="bulk", metal=metal)
        a = (4 * database.get(kind="bulk", metal=metal).volume) ** (1 / 3)
        steps += surface(database, EMT, optimize, {"kind": "clean", "metal": metal}, a)
        for adsorbate in ADSORBATES:
            steps += surface(database, EMT, optimize, {"kind": "covered", "metal": metal, "adsorbate": adsorbate}, a)
    for adsorbate in ADSORBATES:
        if (row := database.reserve(kind="atom", adsorbate=adsorbate)) is not None:
            atom = Atoms(adsorbate, calculator=EMT())
            atom.get_potential_energy()
            database.write(atom, id=row, kind="atom", adsorbate=adsorbate)
    return steps


def surface(database, EMT, optimize, keys, a):
    """Relax one surface, unless the database has it; the steps that were taken."""
    row = database.reserve(**keys)
    if row is None:
        return 0
    slab = fcc111(keys["metal"], (1, 1, 3), a=a, vacuum=6.0)
    if "adsorbate" in keys:
        add_adsorbate(slab, keys["adsorbate"], height=1.2, position="fcc")
    slab.set_constraint(FixAtoms(mask=slab.get_tags() > 1))
    slab.calc = EMT()
    optimizer = optimize.BFGS(slab, logfile=None)
    assert optimizer.run(fmax=0.02, steps=200)
    database.write(slab, id=row, **keys)
    return optimizer.nsteps


if __name__ == "__main__":
    twice.compare(run)
