"""Cells that move: cross-validation on crystals relaxed with PBEsol, by compound.

    python benchmarks/crystals.py [--potential chgnet] [--methods structures labels zero-force] [--epochs 9]

Trains on the compounds of three of five folds (`ase_bptt.datasets.pbesol_crystals`), keeps the epoch that is best on
the fourth, and measures the fifth, for each fold in turn. "structures" asks only where the relaxation ends (no energy,
force or stress of the reference); "labels" is the Trainer's default, with energies, forces and stresses of the frames
beside it; "zero-force" asks for no force and no stress at the references, without any relaxation; "stages" does that
first, and trains through the relaxation after it. Prints a line for each method over all held-out crystals: mean
absolute and median volume error, median strain, the share of crystals whose volume is better, the share that is worse
by more than half a percentage point, and the time of training.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ase_bptt import RelaxationPair, Trainer, evaluate, load_potential
from ase_bptt.cells import CELLS
from ase_bptt.cells.strained import Strained
from ase_bptt.datasets import FOLDS, pbesol_crystals
from ase_bptt.evaluation import Evaluation
from ase_bptt.potential import Potential
from ase_bptt.terms.probes import energies_and_forces

Pairs = Sequence[RelaxationPair]
BATCH, SQUARES_EPOCHS, STAGE = 4, 60, 12


def by_trainer(potential: Potential, train: Pairs, valid: Pairs, epochs: int, **settings) -> None:
    """Through the relaxation; the Trainer keeps the epoch that is best on the validation compounds."""
    Trainer(potential, progress=False, **settings).fit(train, valid, epochs=epochs)


def by_squares(potential: Potential, train: Pairs, valid: Pairs, epochs: int) -> None:
    """Squared forces and virials per atom at the references: zero force with another loss and a constant rate."""
    references = [p.relaxed for p in train]
    optimizer, rng = torch.optim.AdamW(potential.parameters(), lr=1e-3, weight_decay=0.0), np.random.default_rng(0)
    best, kept = evaluate(potential, valid).mean, copy.deepcopy(potential.state_dict())
    for epoch in range(1, SQUARES_EPOCHS + 1):
        order = rng.permutation(len(references))
        for first in range(0, len(order), BATCH):
            batch = potential.batch([references[k] for k in order[first : first + BATCH]])
            rows = Strained.of(batch, [CELLS["full"]] * len(batch), balanced=True)
            optimizer.zero_grad()
            _, forces = energies_and_forces(potential, rows)
            forces.square().sum(1).mean().backward()
            torch.nn.utils.clip_grad_norm_(potential.parameters(), 10.0)
            optimizer.step()
        if epoch % 10 == 0 and (found := evaluate(potential, valid).mean) < best:
            best, kept = found, copy.deepcopy(potential.state_dict())
    potential.load_state_dict(kept)


def by_zero_force(potential: Potential, train: Pairs, valid: Pairs, epochs: int) -> None:
    """No force and no stress at the references, without any relaxation, as the Trainer's first stage does it."""
    by_trainer(potential, train, valid, STAGE, first=f"zero-force:{STAGE}", terms=())


def by_stages(potential: Potential, train: Pairs, valid: Pairs, epochs: int) -> None:
    """First no force and no stress at the references, then through the relaxation."""
    by_trainer(potential, train, valid, STAGE + epochs, first=f"zero-force:{STAGE}", terms=())


METHODS: dict[str, Callable[[Potential, Pairs, Pairs, int], None]] = {
    "structures": lambda *given: by_trainer(*given, terms=()),
    "labels": by_trainer,
    "zero-force": by_zero_force,
    "stages": by_stages,
    "squares": by_squares,
}


def line(name: str, found: Sequence[Evaluation], before: Sequence[Evaluation], seconds: float) -> str:
    """Over all folds."""
    errors, old = (np.array([100 * row.volume_error for e in each for row in e.rows]) for each in (found, before))
    strain = np.median([row.cell_strain for e in found for row in e.rows])
    change = np.abs(errors) - np.abs(old)
    return (
        f"{name:12} {len(errors):3d} {np.abs(errors).mean():8.2f} % {np.median(np.abs(errors)):8.2f} % {strain:8.4f} "
        f"{np.mean(change < 0):7.0%} {np.mean(change > 0.5):7.0%} {seconds:7.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--potential", default="chgnet")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    splits = [[pbesol_crystals(side, fold=fold) for side in ("train", "valid", "test")] for fold in range(FOLDS)]
    print(f"{arguments.potential}, {arguments.epochs} epochs; held-out compounds of {FOLDS} folds")
    print("method         n  |dV/V| mean    median   strain  better   worse  training")
    before = [evaluate(load_potential(arguments.potential, dtype="float32"), test) for *_, test in splits]
    print(line("untuned", before, before, 0), flush=True)
    for name in arguments.methods:
        found, clock = [], time.monotonic()
        for train, valid, test in splits:
            potential = load_potential(arguments.potential, dtype="float32")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that few compounds tell little is known
                METHODS[name](potential, train, valid, arguments.epochs)
            found.append(evaluate(potential, test))
        print(line(name, found, before, time.monotonic() - clock), flush=True)


if __name__ == "__main__":
    main()
