"""The validation score after each epoch, on the DFT folds: whether a training overfits, seen without any test kind.

    python benchmarks/validation_curves.py [--lr 0.002 --epochs 6] [--labels 3 4] >> docs/measured/validation_curves.txt
    python benchmarks/validation_curves.py --forces-first 4
    python benchmarks/validation_curves.py --forces --epochs 8 --lr 0.001
    python benchmarks/validation_curves.py --adjoint guided:10

A line for each fold: the epoch that is kept, and after each epoch the validation score (mean of log(1 + Delta-Q / 0.1
amu^1/2 Å) of the fold's validation pairs) less that of the untuned potential. Float32, seed 0. With --forces-first the
potential first matches the forces of all frames in so many epochs, and what is kept is from then on. With --forces it
matches forces alone, as the method "forces" of benchmarks/study.py does, without any relaxation.
"""

from __future__ import annotations

import argparse
import time

import torch
from methods import fit_frames, force_loss, keep

from ase_bptt import Trainer, load_potential
from ase_bptt.datasets import FOLDS, si_defects
from ase_bptt.training.distributed import together
from ase_bptt.training.state import RunRecord
from ase_bptt.training.validation import validate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--potential", default="mace-si")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--labels", type=float, nargs=2, metavar=("WEIGHT", "FRAMES"), help="of each pair in a step")
    parser.add_argument("--adjoint", help="as in the shell")
    parser.add_argument("--forces-first", type=int, default=0, metavar="EPOCHS")
    parser.add_argument("--forces", action="store_true", help="alone: the method that study.py compares with")
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weight, frames = arguments.labels or (1.0, 1)
    terms = [{"name": "reference", "weight": weight, "per_pair": int(frames)}]
    name = f"{arguments.potential}, {arguments.epochs} epochs at {arguments.lr:g}"
    if arguments.labels:
        name += f", labels {weight:g} x {frames:g}"
    if arguments.forces_first:
        name += f", {arguments.forces_first} of forces first"
    if arguments.adjoint:
        name += f", {arguments.adjoint}"
    if arguments.forces:
        name += ", forces alone"
    for fold in arguments.folds:
        clock = time.monotonic()
        potential = load_potential(arguments.potential, dtype="float32")
        train, valid = (si_defects(side, fold=fold) for side in ("train", "valid"))
        run = forces_alone if arguments.forces else through_the_relaxation
        kept, scores = run(potential, train, valid, arguments, terms)
        curve = " ".join(f"{score:+.2f}" for score in scores)
        print(f"{name}, fold {fold}: kept {kept}; {curve}  ({time.monotonic() - clock:.0f} s)", flush=True)


def through_the_relaxation(potential, train, valid, arguments, terms) -> tuple[int, list[float]]:
    """By the Trainer; the epoch that it keeps, and the scores."""
    trainer = Trainer(potential, lr=arguments.lr, terms=terms, adjoint=arguments.adjoint, progress=False)
    untuned = validate(potential, valid, together()).score
    frames = [atoms for pair in train for atoms in pair.frames]
    list(fit_frames(potential, frames, 0, loss=force_loss, epochs=arguments.forces_first))
    trainer.fit(train, valid, epochs=arguments.epochs)
    first, *others = [row["valid_score"] - untuned for row in trainer.record.rows]
    return trainer.best_epoch, [first, *others] if arguments.forces_first else others


def forces_alone(potential, train, valid, arguments, _) -> tuple[int, list[float]]:
    """By the frames; the epoch that a Trainer would keep, and the scores."""
    record, scores = RunRecord(), []
    untuned = keep(record, potential, valid).score
    frames = [atoms for pair in train for atoms in pair.frames]
    for record.epoch in fit_frames(potential, frames, 0, loss=force_loss, epochs=arguments.epochs, lr=arguments.lr):
        scores.append(keep(record, potential, valid).score - untuned)
    return record.best_epoch, scores


if __name__ == "__main__":
    main()
