"""Which epoch to keep where few kinds validate: three rules, on the surrogate set.

    python benchmarks/kept_epoch.py [--draws 2] > docs/measured/kept_epoch.txt

mace-si (float32) is trained on six tenths of the surrogate's training kinds, as many as an archive of some fifty pairs
has, and all validation kinds are measured after each epoch. Then a few of these kinds are drawn, a thousand times, to
choose an epoch by, and the change of the geometric mean of Delta-Q is that of the kinds that were not drawn: by the
lowest score, by the last epoch that is as good (`ase_bptt.training.validation`), and by the last epoch of all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
from methods import drawn
from study import Cell, splits_of

from ase_bptt import Trainer, load_potential
from ase_bptt.evaluation import FLOOR
from ase_bptt.losses import SCALE
from ase_bptt.training.state import RunRecord
from ase_bptt.training.validation import Validation

REPEATS = 1000
Rule = Callable[[list[Validation]], int]


class Recorded(Trainer):
    """Remembers the validation of each epoch, that of the untuned potential first."""

    def validate(self, pairs):
        found = super().validate(pairs)
        self.found = [*getattr(self, "found", []), found]
        return found


def lowest(epochs: list[Validation]) -> int:
    """The epoch with the lowest score."""
    return int(np.argmin([found.score for found in epochs]))


def as_good(epochs: list[Validation]) -> int:
    """The last that is as good as the best, as the Trainer keeps it."""
    record = RunRecord(untuned=epochs[0].row)
    for record.epoch, found in enumerate(epochs):
        if record.keeps(found):
            record.keep()
    return record.best_epoch


def last(epochs: list[Validation]) -> int:
    """The last epoch, or the untuned potential where that is better."""
    return len(epochs) - 1 if epochs[-1].score < epochs[0].score else 0


def of_kinds(found: Validation, inside: np.ndarray) -> Validation:
    """The validation of some of the pairs."""
    return Validation(np.array(found.scores)[inside].tolist(), np.array(found.kinds)[inside].tolist(), found.delta_q)


def change(rule: Rule, epochs: Sequence[Validation], n: int, rng: np.random.Generator) -> str:
    """Change of the geometric mean on the kinds that did not choose, and which epochs were kept."""
    kinds, scores = np.array(epochs[0].kinds), np.array([found.scores for found in epochs])
    logs = np.log(np.maximum(SCALE * np.expm1(scores), FLOOR))
    changes, kept = [], []
    for _ in range(REPEATS):
        chosen = np.isin(kinds, rng.choice(np.unique(kinds), n, replace=False))
        kept.append(rule([of_kinds(found, chosen) for found in epochs]))
        changes.append((logs[kept[-1]] - logs[0])[~chosen].mean())
    quartiles = np.percentile(kept, [10, 50, 90])
    return f"{np.exp(np.mean(changes)) - 1:+.1%}, epochs {'/'.join(f'{q:.0f}' for q in quartiles)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--draws", type=int, default=2, help="of the training kinds, each with its seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    splits = splits_of(Cell("surrogate", "mace-si", "default", 0, 0))
    for seed in range(arguments.draws):
        potential = load_potential("mace-si", dtype="float32")
        trainer = Recorded(potential, lr=arguments.lr, seed=seed, progress=False)
        train = drawn(splits["train"], 0.6, seed)
        trainer.fit(train, splits["valid"], epochs=arguments.epochs)
        print(f"{len(train)} training pairs, {arguments.epochs} epochs at {arguments.lr:g}, seed {seed}")
        for n in (8, 16, 32):
            for rule in (lowest, as_good, last):
                found = change(rule, trainer.found, n, np.random.default_rng(0))
                print(f"  {n:>2} kinds choose, {rule.__name__:8} {found}", flush=True)


if __name__ == "__main__":
    main()
