"""How long a training step takes with each further term of the loss: the embedded potential and data, in turns.

python docs/measure/terms.py
"""

from __future__ import annotations

import statistics
import time

import torch

from ase_bptt import Trainer
from ase_bptt.datasets import si_defects
from ase_bptt.terms.labels import Labels
from ase_bptt.terms.regularizers import Distillation, WeightAnchor

REPEATS = 7
TERMS = {
    "none": (),
    "WeightAnchor()": (WeightAnchor(),),
    "Distillation()": (Distillation(),),
    "Labels()": (Labels(),),
    "Labels(path=1.0)": (Labels(path=1.0),),
}


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    train = si_defects("train")
    trainers, before = {}, {}
    for name, terms in TERMS.items():
        trainer = Trainer("mace-si", terms=terms)
        trainer.potential.float().requires_grad_()
        began = time.perf_counter()
        trainer.start(trainer.check(train), epochs=1)
        trainers[name], before[name] = trainer, time.perf_counter() - began
    seconds: dict[str, list[float]] = {name: [] for name in TERMS}
    for k in range(REPEATS):
        batch = [train[(4 * k + j) % len(train)] for j in range(4)]
        for name, trainer in trainers.items():
            began = time.perf_counter()
            trainer.train_step(batch)
            seconds[name].append(time.perf_counter() - began)
    bare = statistics.median(seconds["none"])
    print(f"{'terms':22}{'a step':>8}{'of that without':>18}{'before the first':>19}")
    for name, found in seconds.items():
        step = statistics.median(found)
        print(f"{name:22}{step:6.2f} s{step / bare:18.2f}{before[name]:17.1f} s")


if __name__ == "__main__":
    main()
