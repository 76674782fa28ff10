"""Held-out Delta-Q and basins before and after fine-tuning, for every family of potentials, on the embedded pairs.

    python benchmarks/families.py --out families [--potentials mace-si chgnet:0.2.0 chgnet:0.3.0 ...]

One command, and the Trainer's default settings but for the learning rate and the epochs of pretrained models (`--lr`,
`--epochs`): three seeds on the demo's fold of the kinds of defect, or other folds and seeds. A cell of the table is a
potential on a fold with a seed and is kept in a file of its own when it is done, so that a second call, also from the
environment of another family, continues with the missing ones; cells that nobody has run stay empty, as do those of
families that are not installed. DriftReport are those
of the mean and of the median over all cells that are there; in brackets, those of each cell alone.
Drift is the root mean square change of the forces on the probe set (`ase_bptt.terms.probes`); `--terms teacher:1`
trains with the guard against forgetting.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ase_bptt import Trainer, load_potential
from ase_bptt.datasets import DEMO_FOLD, si_defects
from ase_bptt.drift import take_snapshot
from ase_bptt.drift.changes import DriftReport
from ase_bptt.evaluation import evaluate
from ase_bptt.utils import write_json

LR, EPOCHS = 1e-3, 6
"""Of the pretrained models: a run shall take minutes."""
POTENTIALS = ["mace-si", "chgnet:0.2.0", "chgnet:0.3.0", "chgnet:r2scan", "sevennet"]


def cell(name: str, fold: int, seed: int, arguments: argparse.Namespace) -> dict:
    """One fine-tuning run: each held-out structure before and after."""
    began = time.monotonic()
    splits = {split: si_defects(split, fold=fold) for split in ("train", "valid", "test")}
    potential = load_potential(name, dtype="float32")
    before, known = evaluate(potential, splits["test"]), take_snapshot(potential, splits["test"])
    own = {} if name == "mace-si" else {"lr": arguments.lr}
    epochs = arguments.epochs if own else 16
    trainer = Trainer(potential, **own, seed=seed, terms=[term(text) for text in arguments.terms])
    trainer.fit(splits["train"], splits["valid"], epochs=epochs)
    after = evaluate(trainer.potential, splits["test"])
    rows = {
        row.id: {
            "before": row.delta_q,
            "after": now.delta_q,
            "basin_before": row.right_basin,
            "basin_after": now.right_basin,
        }
        for row, now in zip(before.rows, after.rows, strict=True)
    }
    drifts = DriftReport(known, take_snapshot(trainer.potential, splits["test"])).drifts
    settings = {
        "lr": trainer.optimization.lr,
        "epochs": epochs,
        "steps": trainer.relaxation.steps,
        "best_epoch": trainer.best_epoch,
    }
    forces = {kind: found.force for kind, found in drifts.items()}
    return {"rows": rows, "drift": forces, "seconds": time.monotonic() - began, **settings}


def term(text: str) -> dict:
    """A further term of the loss, from its name and weight."""
    name, _, weight = text.partition(":")
    return {"name": name, "weight": float(weight)}


def place(name: str, fold: int, seed: int, arguments: argparse.Namespace) -> Path:
    """The file of a cell, which tells all that it depends on."""
    parts = [name, f"fold {fold}", f"seed {seed}", *arguments.terms]
    parts += [] if arguments.lr == LR else [f"lr {arguments.lr:g}"]
    parts += [] if arguments.epochs == EPOCHS else [f"epochs {arguments.epochs}"]
    return arguments.out / ("_".join(parts).replace(":", "_").replace(" ", "") + ".json")


def line(name: str, cells: dict[tuple[int, int], dict]) -> str:
    """A row of the table."""
    found = list(cells.values())
    rows = [row for one in found for row in one["rows"].values()]
    if not rows:
        return f"{name:14}"

    def change(of: Callable[[Iterable[float]], float]) -> str:
        was, now = (of([row[when] for row in rows]) for when in ("before", "after"))
        each = [relative(of, one["rows"].values()) for one in found]
        return f"{was:5.2f} -> {now:5.2f} {100 * (now / was - 1):+5.0f} % {each!s:26}"

    which = ",".join(f"{fold}.{seed}" for fold, seed in sorted(cells))
    basins = [sum(row[f"basin_{when}"] for row in rows) for when in ("before", "after")]
    drift = statistics.fmean(one["drift"]["all"] for one in found)
    longest = max(one["seconds"] for one in found) / 60
    return (
        f"{name:14} {which:20} {len(rows):3}   {change(statistics.fmean)} {change(statistics.median)} "
        f"{basins[0]:3} -> {basins[1]:3}   {drift:6.3f}   {longest:5.1f}"
    )


def relative(of: Callable[[Iterable[float]], float], rows: Iterable[dict]) -> int:
    """The change of a mean or median, in percent."""
    rows = list(rows)
    return round(100 * (of([row["after"] for row in rows]) / of([row["before"] for row in rows]) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--potentials", nargs="+", default=POTENTIALS)
    parser.add_argument("--folds", type=int, nargs="+", default=[DEMO_FOLD])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=LR, help="of the pretrained models")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the pretrained models")
    parser.add_argument("--terms", nargs="+", default=[], metavar="NAME:WEIGHT", help="such as teacher:1")
    parser.add_argument("--out", type=Path, default=Path("families"))
    parser.add_argument("--table", action="store_true", help="print what is there, and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = list(itertools.product(arguments.folds, arguments.seeds))
    for (fold, seed), name in [] if arguments.table else itertools.product(cells, arguments.potentials):
        path = place(name, fold, seed, arguments)
        if path.is_file():
            continue
        try:
            found = cell(name, fold, seed, arguments)
        except ImportError as error:
            print(f"{name}, fold {fold}, seed {seed}: left out. {error}", flush=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        print(f"{name}, fold {fold}, seed {seed}: done", flush=True)
    print("cells are fold.seed, drift is in eV/Å, longest in minutes")
    print(
        f"{'':14} {'cells':20}   n   mean Delta-Q, amu^1/2 Å  {'each cell, %':24} median                 "
        f"{'each cell, %':24} basins      drift   longest"
    )
    for name in dict.fromkeys([*POTENTIALS, *arguments.potentials]):
        paths = {which: place(name, *which, arguments) for which in cells}
        print(line(name, {which: json.loads(path.read_text()) for which, path in paths.items() if path.is_file()}))


if __name__ == "__main__":
    main()
