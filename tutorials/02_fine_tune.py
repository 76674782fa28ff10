"""Fine-tune a potential on relaxations of your own, and use the result in an ASE script.

    python tutorials/02_fine_tune.py

Writes a small folder of relaxations, as yours might be (here DFT relaxations of defects in silicon, out of
the package), reads it back as pairs of initial and relaxed structures, splits it so that no structure is
in both the training and the test set, trains for three epochs, and relaxes a held-out defect with the tuned potential
in ASE. Prints the splits, the distance to the DFT structure (Delta-Q) before and after for every held-out
structure, and that distance after an ordinary ASE relaxation with the tuned potential.

Three epochs of eight frames keep this within a minute; the Trainer's defaults, 6 epochs of ten frames, go
farther.
"""

from pathlib import Path

import torch
from ase.io import write
from ase.optimize import BFGS

from ase_bptt import TorchCalculator, Trainer, datasets, delta_q, load_potential, read_pairs, split_by_group

# 1. Relaxations of your own. One file each, first frame the start, last frame the relaxed structure. Energies and
#    forces of the frames are trained on, too, where the file has any (terms=() leaves them out), as it does for
#    these two. A vasprun.xml or an OUTCAR can be used as it is.
folder = Path("my_relaxations")
folder.mkdir()
for pair in datasets.si_defects()[::3]:
    if len(pair.initial) == 8:  # dopants and pairs of dopants, not vacancies and interstitials
        write(folder / f"{pair.id}.extxyz", [pair.initial, pair.relaxed])

# 2. Pairs. Those of one composition that end in the same structure form a group, and groups are never
#    split: a structure in both the training and the test set would make the test worthless.
pairs = read_pairs(folder)
splits = split_by_group(pairs, seed=0)
for name, members in splits.items():
    print(f"{name}: {len(members)} relaxations in {len({p.group for p in members})} groups")

# 3. Train through the first eight frames of the relaxation, with the square root of Delta-Q of their ends as
#    the loss. The weights with the best score on "valid" are kept.
trainer = Trainer(load_potential("mace-si"), steps=8, out="my_run", seed=0)
before = trainer.evaluate(splits["test"])
trainer.fit(splits["train"], splits["valid"], epochs=3)
after = trainer.evaluate(splits["test"])

print("\nheld out           Delta-Q (amu^1/2 Å): start   before   after")
for b, a in zip(before.rows, after.rows, strict=True):
    print(f"{a.id:38} {b.unrelaxed:6.2f}   {b.delta_q:6.2f}  {a.delta_q:6.2f}")
print(f"{'mean':38} {before.mean_unrelaxed:6.2f}   {before.mean:6.2f}  {after.mean:6.2f}")

# 4. Save, and use it as any ASE calculator: here with ASE's own BFGS, not the update rule it was trained
#    with.
trainer.save("tuned")
print("\nin the folder tuned:", ", ".join(sorted(path.name for path in Path("tuned").iterdir())))
pair = splits["test"][0]
atoms = pair.initial.copy()
atoms.calc = TorchCalculator("tuned")
BFGS(atoms, logfile=None).run(fmax=0.02)
print(f"{pair.id} by BFGS ends {delta_q(atoms, pair.relaxed):.2f} amu^1/2 Å from DFT")

# The same weights, wherever they are read from.
with torch.no_grad():
    for saved, kept in zip(atoms.calc.potential.parameters(), trainer.potential.parameters(), strict=True):
        assert torch.equal(saved, kept)
assert after.mean < before.mean
