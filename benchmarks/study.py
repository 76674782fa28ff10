"""The evidence: sets x potentials x methods x seeds x folds, measured cell by cell on held-out kinds.

    python benchmarks/study.py run                      # every cell of the plan that has no file yet
    python benchmarks/study.py run --potential chgnet --fold 0 1
    python benchmarks/study.py list                     # the cells that were not run
    python benchmarks/evidence.py                       # tables and figures of docs/evidence.rst
    python benchmarks/crystals.py                       # its table of crystals whose cells move

A cell fine-tunes one potential by one method (`benchmarks/methods.py`) on the training kinds of one fold, keeps the
epoch that is best on the validation kinds, and measures the test kinds: Delta-Q by FIRE and BFGS to 0.02 eV/Å, the
force error on all reference frames, and what else has changed in the potential. On the surrogate set, the validation
kinds are measured, too: recipes are chosen on them, and on nothing else. The embedded sets are called by how many
relaxations they hold, for their folds change with them; of crystals only FIRE relaxes the test compounds. Each cell is
one JSON file in docs/measured/study, so a stopped run continues, and cells can be run on several machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import platform
import time
import warnings
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase.io import read
from methods import CURVE, METHODS, ON_CRYSTALS, ON_DEFECTS, VARIANTS, Method, force_error

from ase_bptt import RelaxationPair, load_potential, read_pairs
from ase_bptt.datasets import FOLDER, FOLDS, folds, grouped_by_kind, of_split, pbesol_crystals, si_defects
from ase_bptt.drift import take_snapshot
from ase_bptt.drift.changes import DriftReport
from ase_bptt.evaluation import evaluate
from ase_bptt.utils import write_json

HERE = Path(__file__).parent
CELLS = HERE.parent / "docs" / "measured" / "study"
DEFECTS, WITH_FAR, CRYSTALS = "si_defects", "si_defects_with_far", "pbesol_crystals"
EMBEDDED = f"{DEFECTS}_{len(si_defects())}"
"""The set of the embedded relaxations of defects."""
Splits = dict[str, list[RelaxationPair]]


class Cell(NamedTuple):
    """What is measured: a set, a potential, a method, a seed and a fold."""

    set: str
    potential: str
    method: str
    seed: int
    fold: int

    @property
    def compute(self) -> Method:
        """What tunes the potential."""
        return (ON_CRYSTALS if self.set.startswith(CRYSTALS) else METHODS | VARIANTS | ON_DEFECTS)[self.method]

    @property
    def file(self) -> Path:
        folder = CELLS / self.set / self.potential.replace(":", "-") / self.method
        return folder / f"seed{self.seed}_fold{self.fold}.json"


COMPARED = ("default", "structures", "forces")
FEWER = "default at 70%"
"""What the kinds that `train` keeps for itself are worth to the potential: it is trained on them, too, in the end."""
BESIDE = {  # further methods of a potential, and their seeds
    "mace-si": {"refit": (0, 1, 2), FEWER: (0, 1), "guided": (0, 1, 2)},
    "chgnet": {"refit": (0,), "rate 0.001": (0,)},
}
ON_DFT = {  # potential: seeds, folds
    "mace-si": ((0, 1, 2), range(FOLDS)),
    "chgnet": ((0,), range(FOLDS)),
    "sevennet": ((0,), range(FOLDS)),
    "chgnet:0.2.0": ((0,), (0,)),
    "chgnet:r2scan": ((0,), (0,)),
}


def plan() -> list[Cell]:
    """All cells, the most important first."""
    chosen = [Cell("surrogate", "mace-si", method, seed, 0) for seed in (0, 1) for method in METHODS
              if method != "untuned" or seed == 0]  # fmt: skip
    robust = [Cell("surrogate", "mace-si", method, 0, 0) for method in VARIANTS]
    return defects(EMBEDDED) + chosen + robust + crystals() + defects(WITH_FAR)


def defects(name: str) -> list[Cell]:
    """On DFT relaxations of defects: the embedded set, or that with benchmarks/far_defects."""
    far = name == WITH_FAR
    found = [
        Cell(name, potential, method, seed, fold)
        for potential, (seeds, folds) in ON_DFT.items()
        for seed in seeds
        for fold in folds
        for method in ("untuned", *(COMPARED[:1] if far else COMPARED))
        if method != "untuned" or seed == seeds[0]
    ]
    return found + [
        Cell(name, potential, method, seed, fold)
        for potential, methods in BESIDE.items()
        for method, seeds in methods.items()
        for seed in seeds
        for fold in range(FOLDS)
        if not far or method == "rate 0.001"
    ]


def crystals() -> list[Cell]:
    """Where the cell moves: the potentials, one method after another, then what was trained on fewer compounds."""
    pairs = pbesol_crystals()
    fewest = min(len({p.group for p in pbesol_crystals("train", fold=fold)}) for fold in range(FOLDS))
    methods = [name for name in ON_CRYSTALS if " at " not in name]
    curve = [f"{name} at {n}" for n in CURVE if n < fewest for name in ("stages", "structures")]
    order = [("chgnet", methods), ("sevennet", methods[:6]), ("chgnet", curve)]
    return [Cell(f"{CRYSTALS}_{len(pairs)}", potential, method, 0, fold)
            for potential, names in order for method in names for fold in range(FOLDS)]  # fmt: skip


def with_far(fold: int) -> Splits:
    """The embedded defects and those whose references few potentials have a minimum at, in folds of their own."""
    pairs = grouped_by_kind(sorted(read_pairs(FOLDER) + read_pairs(HERE / "far_defects"), key=lambda pair: pair.id))
    return {side: of_split(pairs, folds(pairs), side, fold) for side in ("train", "valid", "test")}


def surrogate_pairs() -> list[RelaxationPair]:
    """Relaxations of defects in silicon and germanium, by 7net-mf-0."""
    runs: dict[str, list] = {}
    for atoms in read(HERE / "surrogate" / "surrogate.extxyz.gz", index=":"):
        runs.setdefault(atoms.info["id"], []).append(atoms)
    return [RelaxationPair(f[0], f[-1], name, f[0].info["kind"], frames=f) for name, f in runs.items()]


def splits_of(cell: Cell) -> Splits:
    """Training, validation and test kinds, of the surrogate in four, three and three tenths by the kind's hash."""
    if cell.set == WITH_FAR:
        return with_far(cell.fold)
    if cell.set.startswith(DEFECTS):
        return {name: si_defects(name, fold=cell.fold) for name in ("train", "valid", "test")}
    if cell.set.startswith(CRYSTALS):
        return {name: pbesol_crystals(name, fold=cell.fold) for name in ("train", "valid", "test")}
    found: Splits = {"train": [], "valid": [], "test": []}
    for pair in surrogate_pairs():
        tenth = int(hashlib.sha256(pair.group.encode()).hexdigest(), 16) % 10
        found["train" if tenth < 4 else "valid" if tenth < 7 else "test"].append(pair)
    return found


def run(cell: Cell) -> dict:
    """Train and measure."""
    splits = splits_of(cell)
    potential = load_potential(cell.potential, dtype="float32")
    before = take_snapshot(potential, splits["test"]) if cell.set.startswith(DEFECTS) else None
    clock, cpu = time.monotonic(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nothing was gained is one of the results
        said = cell.compute(potential, splits, cell.seed)
    found = {"cell": cell._asdict(), "settings": said, "seconds": time.monotonic() - clock,
             "processor_seconds": time.process_time() - cpu}  # fmt: skip
    sides = ("valid", "test") if cell.set == "surrogate" else ("test",)
    found["sizes"] = {name: [len(pairs), len({p.group for p in pairs})] for name, pairs in splits.items()}
    found |= {side: measured(potential, splits[side]) for side in sides}
    if before is not None:
        found["drift"] = vars(DriftReport(before, take_snapshot(potential, splits["test"])).drift())
    return found | {"date": date.today().isoformat(), "torch": torch.__version__, "machine": platform.machine()}


def measured(potential, pairs: list[RelaxationPair]) -> dict:
    """Rows by FIRE, with the displacement that the field's match rate is made of; Delta-Q by BFGS; the force error.

    Where the cell moves, by FIRE alone.
    """
    rows = []
    for row, pair in zip(evaluate(potential, pairs).rows, pairs, strict=True):
        found = dataclasses.asdict(row)
        del found["displacements"], found["space_group"], found["reference_space_group"]
        scale = (pair.relaxed.get_volume() / len(pair.relaxed)) ** (1 / 3)
        rows.append(found | {"scaled_displacement": row.max_displacement / scale, "scaled_rmsd": row.rmsd / scale})
    fixed = [pair for pair in pairs if not pair.freedom.moves]
    bfgs = {row.id: row.delta_q for row in evaluate(potential, fixed, stepper="bfgs").rows}
    frames = [atoms for pair in pairs for atoms in pair.frames]
    return {"fire": rows, "bfgs": bfgs, "force_error": force_error(potential, frames)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("run", "list"))
    for name in Cell._fields:
        kind = int if name in ("seed", "fold") else str
        parser.add_argument(f"--{name}", nargs="+", type=kind, help="only these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--until", type=float, default=np.inf, metavar="MINUTES", help="start no cell after this time")
    arguments = parser.parse_args()
    chosen = [cell for cell in plan() if all(
        getattr(arguments, name) is None or getattr(cell, name) in getattr(arguments, name) for name in Cell._fields
    )]  # fmt: skip
    missing = [cell for cell in chosen if not cell.file.exists()]
    if arguments.action == "list":
        print("\n".join(" ".join(map(str, cell)) for cell in missing) or "all cells were run")
        return
    torch.set_num_threads(arguments.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.monotonic()
    for cell in missing:
        if cell.file.exists() or time.monotonic() - began > 60 * arguments.until:
            continue  # another process has run it
        cell.file.parent.mkdir(parents=True, exist_ok=True)
        found = run(cell)
        write_json(cell.file, found)
        mean = np.mean([row["delta_q"] for row in found["test"]["fire"]])
        logging.info("%s: mean %.3f, %.0f s", " ".join(map(str, cell)), mean, found["seconds"])


if __name__ == "__main__":
    main()
