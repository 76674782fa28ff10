"""Held-out Delta-Q and basins before and after fine-tuning, for every family of potentials, on the embedded pairs.

    python benchmarks/families.py --out families [--potentials mace-si chgnet:0.2.0 chgnet chgnet:r2scan sevennet]

One command, the Trainer's default settings but for the learning rate of pretrained models (`--lr`), and five folds of
the kinds of defect, each held out once. A cell of the table is a potential on a fold and is kept in a file of its own
when it is done, so that a second call, also from the environment of another family, goes on with the missing ones;
cells that nobody has run stay empty. Changes are those of the mean and of the median over the folds that are there.
Drift is the root mean square change of the forces on the probe set (`ase_bptt.guard.probes`); `--terms teacher:1`
trains with the guard against forgetting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from ase_bptt import Trainer, load_potential
from ase_bptt.datasets import FOLDS, si_defects
from ase_bptt.evaluation import evaluate
from ase_bptt.files import write_json
from ase_bptt.guard.changes import Changes
from ase_bptt.guard.portrait import portrait

POTENTIALS = ["mace-si", "chgnet:0.2.0", "chgnet:0.3.0", "chgnet:r2scan", "sevennet"]


def cell(name: str, fold: int, arguments: argparse.Namespace) -> dict:
    """One fine-tuning run: each held-out structure before and after."""
    began = time.monotonic()
    splits = {split: si_defects(split, fold=fold) for split in ("train", "valid", "test")}
    potential = load_potential(name, dtype="float32")
    before, known = evaluate(potential, splits["test"]), portrait(potential, splits["test"])
    own = {} if name == "mace-si" else {"lr": arguments.lr}
    epochs = arguments.epochs if own else 16
    trainer = Trainer(potential, **own, terms=[term(text) for text in arguments.terms])
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
    drifts = Changes(known, portrait(trainer.potential, splits["test"])).drifts
    settings = {"lr": trainer.lr, "epochs": epochs, "steps": trainer.steps, "best_epoch": trainer.best_epoch}
    forces = {kind: found.force for kind, found in drifts.items()}
    return {"rows": rows, "drift": forces, "seconds": time.monotonic() - began, **settings}


def term(text: str) -> dict:
    """A further term of the loss, from its name and weight."""
    name, _, weight = text.partition(":")
    return {"name": name, "weight": float(weight)}


def place(name: str, fold: int, arguments: argparse.Namespace) -> Path:
    """The file of a cell."""
    parts = [name, str(fold), *arguments.terms]
    return arguments.out / ("_".join(parts).replace(":", "_") + ".json")


def line(name: str, cells: dict[int, dict]) -> str:
    """A row of the table."""
    rows = [row for found in cells.values() for row in found["rows"].values()]
    if not rows:
        return f"{name:16}"
    figures = {}
    for when in ("before", "after"):
        values = [row[when] for row in rows]
        figures[when] = (statistics.fmean(values), statistics.median(values))
        figures[f"basins {when}"] = sum(row[f"basin_{when}"] for row in rows)

    def change(k: int) -> str:
        was, now = figures["before"][k], figures["after"][k]
        return f"{was:5.2f} -> {now:5.2f} {100 * (now / was - 1):+5.0f} %   "

    folds = ",".join(str(fold) for fold in sorted(cells))
    longest = max(found["seconds"] for found in cells.values()) / 60
    basins = f"{figures['basins before']:3} -> {figures['basins after']:3}"
    drift = statistics.fmean(found["drift"]["all"] for found in cells.values())
    return f"{name:16} {folds:10} {len(rows):3}   {change(0)}{change(1)}{basins}   {drift:7.3f}   {longest:5.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--potentials", nargs="+", default=POTENTIALS)
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    parser.add_argument("--lr", type=float, default=1e-3, help="of the pretrained models")
    parser.add_argument("--epochs", type=int, default=6, help="of the pretrained models")
    parser.add_argument("--terms", nargs="+", default=[], metavar="NAME:WEIGHT", help="such as teacher:1")
    parser.add_argument("--out", type=Path, default=Path("families"))
    parser.add_argument("--table", action="store_true", help="print what is there, and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for fold in arguments.folds:
        for name in [] if arguments.table else arguments.potentials:
            path = place(name, fold, arguments)
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, cell(name, fold, arguments))
                print(f"{name}, fold {fold}: done", flush=True)
    print("drift in eV/Å, the longest run in minutes")
    print(
        f"{'':16} {'folds':10}   n   mean Delta-Q, amu^1/2 Å    median                   basins      drift     longest"
    )
    for name in POTENTIALS:
        paths = {fold: place(name, fold, arguments) for fold in range(FOLDS)}
        print(line(name, {fold: json.loads(path.read_text()) for fold, path in paths.items() if path.is_file()}))


if __name__ == "__main__":
    main()
