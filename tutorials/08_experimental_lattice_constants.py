"""Training on experimental lattice constants: a table of elements, without energies, forces or positions.

ASE's table (`ase.data.reference_states`) has lattice constants at room temperature. A potential that is trained
on them takes up thermal expansion and zero-point motion, some tenths of a percent in length: fine for
simulations at room temperature that relax at 0 K, but not the potential of any functional. Correct the
constants to 0 K where that matters.

The potential is ASE's EMT, whose few parameters belong to one element each, so no held-out element could gain
from the others; this shows the steps. With CHGNet or MACE, hold elements out: `ase-bptt train elements.extxyz
--targets --folds 5`. Some 10 seconds.
"""

import tempfile
from pathlib import Path

import torch
from ase.build import bulk
from ase.data import atomic_numbers, reference_states
from ase.io import write

from ase_bptt import Trainer, evaluate, load_potential, read_targets

torch.set_num_threads(1)
ELEMENTS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")

# Of a cubic crystal the volume is all that there is to know of the cell. Only it counts.
crystals = []
for element in ELEMENTS:
    crystal = bulk(element, a=reference_states[atomic_numbers[element]]["a"])
    crystal.info |= {"id": element, "known": "volume"}
    crystals.append(crystal)

with tempfile.TemporaryDirectory() as folder:
    write(Path(folder) / "elements.extxyz", crystals)
    targets = read_targets(Path(folder) / "elements.extxyz")

potential = load_potential("emt")
before = evaluate(potential, targets)

# First no stress at the experimental volumes, then through the relaxation to the minimum.
trainer = Trainer(
    potential, adjoint="implicit", first="zero-force:4", lr=1e-3, batch_size=7, patience=None, progress=False
)
trainer.fit(targets, epochs=6)
after = evaluate(potential, targets)

print("volume error, %   before   after")
for old, new in zip(before.rows, after.rows, strict=True):
    print(f"{old.id:15} {100 * old.volume_error:8.2f} {100 * new.volume_error:7.2f}")
print(f"mean absolute   {100 * before.volume_error:8.2f} {100 * after.volume_error:7.2f}")
