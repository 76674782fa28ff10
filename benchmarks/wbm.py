"""Crystals of the WBM set as targets: trained on some, measured on other chemical systems.

    python benchmarks/wbm.py WBM.extxyz [--potential chgnet] [--train 600] [--test 100] [--first 6] [--epochs 3]

The file holds relaxed structures alone (a random sample of WBM, relaxed with PBE within their space groups; public, not
part of the package). All are compared under FixSymmetry, from starts whose cells are strained and whose atoms are
rattled within the space group. Chemical systems are drawn by a fixed seed; no system is split. First no force
and no stress at the references (`--first` epochs of five passes), then through the relaxation (`--epochs`).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings

import numpy as np
import torch
from lattice_constants import summary

from ase_bptt import RelaxationPair, Trainer, evaluate, load_potential, read_targets
from ase_bptt.pairs.symmetry import with_symmetry
from ase_bptt.pairs.targets import Target

MOST = 10
"""Atoms of a crystal."""


def within_space_group(target: Target) -> RelaxationPair:
    """The target, with its space group kept from a new start on."""
    kept = with_symmetry(dataclasses.replace(target, initial=target.relaxed), "keep")
    kept = dataclasses.replace(kept, group="-".join(sorted({*target.relaxed.get_chemical_symbols()})))
    return dataclasses.replace(kept, initial=kept.start(np.random.default_rng(len(target.id))))


def split(targets: list[Target], sizes: tuple[int, ...]) -> list[list[RelaxationPair]]:
    """So many of each side, or a few more: whole chemical systems, in an order that a fixed seed draws."""
    systems: dict[str, list[Target]] = {}
    for target in targets:
        systems.setdefault("-".join(sorted({*target.relaxed.get_chemical_symbols()})), []).append(target)
    names, sides = iter(np.random.default_rng(0).permutation(list(systems))), [[] for _ in sizes]
    for side, size in zip(sides, sizes, strict=True):
        while len(side) < size and (name := next(names, None)) is not None:
            side += [within_space_group(target) for target in systems[name]]
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--potential", default="chgnet")
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--first", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    potential = load_potential(arguments.potential, dtype="float32")
    targets = [t for t in read_targets(arguments.file, skip_invalid=True) if t.n_atoms <= MOST]
    targets = [t for t in targets if {*t.relaxed.numbers.tolist()} <= (potential.atomic_numbers or {*range(120)})]
    test, valid, train = split(targets, (arguments.test, max(4, arguments.train // 10), arguments.train))
    before, clock = evaluate(potential, test), time.process_time()
    trainer = Trainer(potential, first=f"zero-force:{arguments.first}", batch_size=8, terms=(), progress=False)
    trainer.fit(train, valid, epochs=arguments.first + arguments.epochs)
    seconds, after = time.process_time() - clock, evaluate(potential, test)
    print(f"{len(train)} crystals to train on, {len(valid)} to choose the epoch by ({trainer.best_epoch} was kept), "
          f"{len(test)} of other chemical systems to measure; {seconds:.0f} s of training")  # fmt: skip
    for name, found in (("untuned", before), ("tuned", after)):
        print(summary(name, found))
    closer = np.mean([abs(b.volume_error) > abs(a.volume_error) for b, a in zip(before.rows, after.rows, strict=True)])
    print(f"closer     {closer:.0%}")


if __name__ == "__main__":
    main()
