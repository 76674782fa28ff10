"""Recipes tried on the surrogate set, by which the Trainer's defaults were chosen.

    python benchmarks/recipes.py [--recipe "12 epochs, 4e-3" ...] >> docs/measured/recipes.txt

Each recipe trains mace-si (float32, seed 0 unless it says otherwise, no validation: the last epoch counts) on the
training kinds of the surrogate set and is measured on its validation kinds alone; the test kinds are left for the
tables of docs/evidence.rst. A line gives the Trainer's validation score (mean log(1 + Delta-Q / 0.1)), mean and median
of Delta-Q, the change of the geometric mean against the untuned potential, the share that is better, the median
improvement, the time of training and the mean absolute change of the elements' bulk moduli.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from study import Cell, splits_of
from torch import Tensor

from ase_bptt import RelaxationPair, Trainer, delta_q, load_potential
from ase_bptt.drift.changes import drift_report
from ase_bptt.evaluation import FLOOR
from ase_bptt.potential import Potential
from ase_bptt.throughput import relax_all

LABELS = {"name": "reference", "weight": 1.0}
TEACHER = {"name": "teacher", "weight": 1.0}
RECIPES: dict[str, dict[str, Any]] = {
    "6 epochs, 2e-3": {"epochs": 6, "lr": 2e-3},
    "6 epochs, 2e-3, seed 1": {"epochs": 6, "lr": 2e-3, "seed": 1},
    "6 epochs, 2e-3, structures alone": {"epochs": 6, "lr": 2e-3, "terms": ()},
    "6 epochs, 2e-3, labels: weight 3, 4 frames": {
        "epochs": 6, "lr": 2e-3, "terms": [LABELS | {"weight": 3.0, "per_pair": 4}],
    },
    "6 epochs, 4e-3": {"epochs": 6, "lr": 4e-3},
    "6 epochs, 4e-3, batches of 8": {"epochs": 6, "lr": 4e-3, "batch_size": 8},
    "12 epochs, 2e-3": {"epochs": 12, "lr": 2e-3},
    "12 epochs, 4e-3": {"epochs": 12, "lr": 4e-3},
    "12 epochs, 4e-3, structures alone": {"epochs": 12, "lr": 4e-3, "terms": ()},
    "12 epochs, 8e-3": {"epochs": 12, "lr": 8e-3},
    "12 epochs, 4e-3, batches of 2": {"epochs": 12, "lr": 4e-3, "batch_size": 2},
    "24 epochs, 4e-3": {"epochs": 24, "lr": 4e-3},
    "12 epochs, 4e-3, teacher 1": {"epochs": 12, "lr": 4e-3, "terms": [LABELS, "teacher"]},
    "12 epochs, 4e-3, teacher 0.1": {"epochs": 12, "lr": 4e-3, "terms": [LABELS, TEACHER | {"weight": 0.1}]},
    "12 epochs, 4e-3, teacher 1 on crystals": {
        "epochs": 12, "lr": 4e-3, "terms": [LABELS, TEACHER | {"kinds": "crystals"}],
    },
    "chgnet, 6 epochs, 1e-3": {"potential": "chgnet", "epochs": 6, "lr": 1e-3},
    "chgnet, 6 epochs, 2e-3": {"potential": "chgnet", "epochs": 6, "lr": 2e-3},
    "chgnet, 12 epochs, 1e-3": {"potential": "chgnet", "epochs": 12, "lr": 1e-3},
}  # fmt: skip


def distances(potential: Potential, pairs: Sequence[RelaxationPair]) -> np.ndarray:
    """Delta-Q of each end, amu^1/2 Å, shape (n,)."""
    ends = dict(relax_all(potential, [p.initial for p in pairs], stepper="fire", fmax=0.02, steps=200))
    found: Tensor = delta_q([ends[k].atoms for k in range(len(pairs))], [p.relaxed for p in pairs])
    return found.numpy()


def stiffness(before: Potential, after: Potential, pairs: Sequence[RelaxationPair]) -> float:
    """Mean absolute relative change of the bulk moduli of the elements."""
    crystals = drift_report(before, after, pairs, size=1).crystals.values()
    return float(np.nanmean([abs(a.bulk_modulus / b.bulk_modulus - 1) for b, a in crystals]))


def line(name: str, after: np.ndarray, before: np.ndarray, seconds: float, stiffer: float) -> str:
    """What was found, beside the untuned potential."""
    ratio = np.maximum(after, FLOOR) / np.maximum(before, FLOOR)
    better = (after < 0.99 * before) & (after < before - 0.005)
    return (
        f"{name:44} {np.log1p(after / 0.1).mean():.3f} {after.mean():6.2f} {np.median(after):6.2f} "
        f"{np.exp(np.log(ratio).mean()) - 1:+7.0%} {better.mean():5.0%} {np.median(1 - ratio):+5.0%} {seconds:6.0f} s "
        f"{stiffer:4.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    splits = splits_of(Cell("surrogate", "mace-si", "default", 0, 0))
    untuned: dict[str, tuple[Potential, np.ndarray]] = {}
    for name in arguments.recipe:
        settings = dict(RECIPES[name])
        which, epochs = settings.pop("potential", "mace-si"), settings.pop("epochs")
        if which not in untuned:
            potential = load_potential(which, dtype="float32")
            untuned[which] = potential, distances(potential, splits["valid"])
            print(line(f"{which}, untuned", untuned[which][1], untuned[which][1], 0, 0), flush=True)
        base, before = untuned[which]
        clock = time.monotonic()
        trainer = Trainer(load_potential(which, dtype="float32"), progress=False, **settings)
        trainer.fit(splits["train"], epochs=epochs)
        seconds, after = time.monotonic() - clock, distances(trainer.potential, splits["valid"])
        changed = stiffness(base, trainer.potential, splits["valid"])
        print(line(name, after, before, seconds, changed), flush=True)


if __name__ == "__main__":
    main()
