"""Experimental lattice constants as targets: elements of ASE's table, five folds, no energy, force or position.

    python benchmarks/lattice_constants.py [--potential chgnet] [--folds 5] [--first 6] [--epochs 3]

The elements that are fcc, bcc, diamond or hcp at room temperature, but for noble gases, with the constants of
`ase.data.reference_states`: thermal expansion and zero-point motion are in them, some tenths of a percent in length. Of
cubic ones the volume is known, of hexagonal ones the cell. In each fold a fifth of the elements is measured that
neither trained nor chose the epoch: first no stress at the experimental cell (`--first` epochs), then through the
relaxation (`--epochs`; 0 leaves it out). Prints the elements and a line over all of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk
from ase.data import chemical_symbols, reference_states
from ase.io import write

from ase_bptt import RelaxationPair, Trainer, evaluate, load_potential, read_targets, split_into_folds
from ase_bptt.evaluation import Evaluation

KNOWN = {"fcc": "volume", "bcc": "volume", "diamond": "volume", "hcp": "cell"}
NOBLE = ("He", "Ne", "Ar", "Kr", "Xe", "Rn")


def elements(known: frozenset[int] | None) -> list[RelaxationPair]:
    """Targets of the elements that a potential knows."""
    crystals = []
    for number, (element, state) in enumerate(zip(chemical_symbols, reference_states)):
        kind = (state or {}).get("symmetry")
        if kind in KNOWN and "basis" not in state and element not in NOBLE and (known is None or number in known):
            crystals.append(bulk(element))
            crystals[-1].info |= {"id": element, "known": KNOWN[kind]}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "elements.extxyz", crystals)
        return read_targets(Path(folder) / "elements.extxyz")


def summary(name: str, found: Evaluation) -> str:
    """Volumes, and a and c of the hexagonal ones."""
    errors = np.abs([100 * row.volume_error for row in found.rows])
    return (
        f"{name:10} mean |dV/V| {errors.mean():.2f} %, median {np.median(errors):.2f} %, median strain "
        f"{found.cell_strain:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--potential", default="chgnet")
    parser.add_argument("--folds", type=int, default=5, help="how many of the five are run")
    parser.add_argument("--first", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    targets = elements(load_potential(arguments.potential).atomic_numbers)
    before, after, seconds = [], [], 0.0
    for splits in split_into_folds(targets, 5)[: arguments.folds]:
        potential = load_potential(arguments.potential, dtype="float32")
        before += evaluate(potential, splits["test"]).rows
        clock = time.process_time()
        trainer = Trainer(potential, first=f"zero-force:{arguments.first}", batch_size=8, terms=(), progress=False)
        trainer.fit(splits["train"], splits["valid"], epochs=arguments.first + arguments.epochs)
        seconds += time.process_time() - clock
        after += evaluate(potential, splits["test"]).rows
        for old, new in zip(before[-len(splits["test"]) :], after[-len(splits["test"]) :], strict=True):
            print(f"{old.id:3} {100 * old.volume_error:+7.2f} % {100 * new.volume_error:+7.2f} %", flush=True)
    print(f"{len(targets)} elements, {len(after)} of them held out; {seconds:.0f} s of one core")
    for name, rows in (("untuned", before), ("tuned", after)):
        print(summary(name, Evaluation(tuple(rows))))
    closer = np.mean([abs(b.volume_error) > abs(a.volume_error) for b, a in zip(before, after, strict=True)])
    print(f"closer     {closer:.0%}")


if __name__ == "__main__":
    main()
