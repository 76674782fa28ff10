"""Fine-tune a potential on pairs of initial and DFT-relaxed structures, in Python.

    python tutorials/02_fine_tune.py

A small run (two epochs of eight frames, a minute) on the embedded silicon defects. For your own
relaxations replace the three splits by ``split_by_group(read_pairs("my_folder"))``.
"""

import torch

from ase_bptt import TorchCalculator, Trainer, datasets, load_potential
from ase_bptt.steppers import GradientDescent

torch.manual_seed(0)
potential = load_potential("mace-si", dtype="float32")
train, valid, test = (datasets.si_defects(split) for split in ("train", "valid", "test"))

trainer = Trainer(
    potential,
    stepper=GradientDescent(step_size=0.05),
    loss="delta_q",
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
    steps=8,
    batch_size=8,
    out="tuned",
)
before = trainer.evaluate(test)
trainer.fit(train, valid, epochs=2)
after = trainer.evaluate(test)
print(f"held-out mean Delta-Q: {before.mean:.3f} before, {after.mean:.3f} amu^1/2 Å after")

# The run folder loads like any potential, in any ASE script.
atoms = test[0].initial.copy()
atoms.calc = TorchCalculator("tuned")
print(f"energy of {test[0].id} with the tuned potential: {atoms.get_potential_energy():.3f} eV")
