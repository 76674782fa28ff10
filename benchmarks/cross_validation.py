"""Five-fold cross-validation over kinds of defect: is the tuned potential better on kinds never seen?

    python benchmarks/cross_validation.py --potential mace-si --dtype float32 --out cv/mace-si
    python benchmarks/cross_validation.py --potential chgnet --epochs 6 --lr 1e-3 --out cv/chgnet

For each fold of the embedded silicon defects: fine-tuning through the relaxation with the Trainer's
defaults, and, as a rival that uses more data, force matching on every DFT frame of the same training
relaxations (validated every second of its eight epochs by the same score, the best kept). Both start
from the same potential. Measured on the held-out kinds: Delta-Q by FIRE and by BFGS to fmax 0.02 eV/Å,
and the force error on the DFT frames. Every fold is written when it is done; a second call goes on with
the missing ones and prints the table. Intervals are 95 %, by bootstrap over kinds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from ase.io import read

from ase_bptt import Structures, Trainer, load_potential, relax
from ase_bptt.datasets import FOLDER, FOLDS, si_defects
from ase_bptt.evaluation import evaluate
from ase_bptt.losses import delta_q, log_delta_q
from ase_bptt.neighbors import NeighborList
from ase_bptt.utils import replacing

FORCE_EPOCHS, FORCE_BATCH = 8, 16


def run_fold(fold: int, arguments: argparse.Namespace) -> dict:
    splits = {name: si_defects(name, fold=fold) for name in ("train", "valid", "test")}
    test, began = splits["test"], time.monotonic()
    base = load_potential(arguments.potential, dtype=arguments.dtype)
    found = {"unrelaxed": {p.id: delta_q(p.initial, p.relaxed) for p in test}}
    found["groups"] = {p.id: p.group for p in test}
    found["untuned"] = measure(base, test)

    clock = time.monotonic()
    trainer = Trainer(load_potential(arguments.potential, dtype=arguments.dtype), lr=arguments.lr, seed=arguments.seed)
    trainer.fit(splits["train"], splits["valid"], epochs=arguments.epochs)
    found["bptt_seconds"] = time.monotonic() - clock
    found["bptt"] = measure(trainer.potential, test)

    found["seconds"] = time.monotonic() - began
    return found | {"settings": trainer.settings(), "fold": fold, "arguments": described(arguments)}


def run_rival(fold: int, arguments: argparse.Namespace) -> dict:
    splits = {name: si_defects(name, fold=fold) for name in ("train", "valid", "test")}
    clock = time.monotonic()
    rival = load_potential(arguments.potential, dtype=arguments.dtype)
    match_forces(rival, splits, arguments)
    return {"forces_seconds": time.monotonic() - clock, "forces": measure(rival, splits["test"])}


def described(arguments: argparse.Namespace) -> dict:
    """What the figures depend on."""
    return {k: v for k, v in vars(arguments).items() if k not in ("out", "folds", "threads", "without_forces")}


def measure(potential, test) -> dict:
    """Rows by FIRE, Delta-Q by BFGS, force error on the DFT frames (mean absolute, eV/Å)."""
    fire, bfgs = evaluate(potential, test), evaluate(potential, test, stepper="bfgs")
    return {
        "fire": [dataclasses.asdict(row) for row in fire.rows],
        "bfgs": {row.id: row.delta_q for row in bfgs.rows},
        "force_error": force_error(potential, frames_of(test)),
    }


def frames_of(pairs) -> list:
    return [atoms for pair in pairs for atoms in read(FOLDER / f"{pair.id}.extxyz", index=":")]


def force_loss(potential, frames, create_graph=False):
    """Mean absolute error of the force components, eV/Å."""
    batch = Structures.from_atoms(frames, dtype=potential.dtype)
    reference = torch.as_tensor(np.concatenate([a.get_forces() for a in frames])).to(batch.positions)
    pairs = NeighborList(potential.cutoff, skin=0.0)(batch)
    batch.positions.requires_grad_(create_graph)
    _, forces = potential.energy_and_forces(batch, pairs, create_graph=create_graph)
    return (forces - reference).abs().mean()


def force_error(potential, frames) -> float:
    chunks = [frames[k : k + FORCE_BATCH] for k in range(0, len(frames), FORCE_BATCH)]
    weights = [sum(len(a) for a in chunk) for chunk in chunks]
    return float(np.average([force_loss(potential, chunk).item() for chunk in chunks], weights=weights))


def match_forces(potential, splits, arguments) -> None:
    """Train on the forces of all training frames; keep the epoch with the best validation Delta-Q."""
    frames, rng = frames_of(splits["train"]), np.random.default_rng(arguments.seed)
    optimizer = torch.optim.AdamW(potential.parameters(), lr=arguments.force_lr, weight_decay=0.0)
    count = -(-len(frames) // FORCE_BATCH) * FORCE_EPOCHS
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    best, best_state = score(potential, splits["valid"]), None
    for epoch in range(FORCE_EPOCHS):
        order = rng.permutation(len(frames))
        for k in range(0, len(order), FORCE_BATCH):
            optimizer.zero_grad()
            force_loss(potential, [frames[m] for m in order[k : k + FORCE_BATCH]], create_graph=True).backward()
            torch.nn.utils.clip_grad_norm_(potential.parameters(), 10.0)
            optimizer.step()
            schedule.step()
        if epoch % 2 == 1:
            found = score(potential, splits["valid"])
            logging.info("forces, epoch %d: validation %.3f", epoch + 1, found)
            if found < best:
                best, best_state = found, {k: v.clone() for k, v in potential.state_dict().items()}
    if best_state is not None:
        potential.load_state_dict(best_state)


def score(potential, valid) -> float:
    """The Trainer's validation score."""
    with torch.no_grad():
        run = relax(potential, [p.initial for p in valid], stepper="fire", fmax=0.02, steps=200)
    return log_delta_q(run, [p.relaxed for p in valid]).mean().item()


def table(folds: list[dict]) -> str:
    kinds = {id_: kind for fold in folds for id_, kind in fold["groups"].items()}
    columns = {"unrelaxed": merge(fold["unrelaxed"] for fold in folds)}
    lines = []
    methods = [name for name in ("untuned", "forces", "bptt") if all(name in fold for fold in folds)]
    for name in methods:
        columns[name] = {row["id"]: row["delta_q"] for fold in folds for row in fold[name]["fire"]}
        columns[f"{name}, BFGS"] = merge(fold[name]["bfgs"] for fold in folds)
    lines.append(f"{len(kinds)} held-out structures of {len(set(kinds.values()))} kinds, {len(folds)} folds")
    lines.append(
        f"{'':18} mean   median   change of the mean [95 %]   of the geometric mean   right basins   force error"
    )
    for name, column in columns.items():
        values = np.array([column[k] for k in kinds])
        text = f"{name:16} {values.mean():6.3f}   {np.median(values):6.3f}"
        if name.startswith(("bptt", "forces")):
            reference = columns["untuned, BFGS" if "BFGS" in name else "untuned"]
            for geometric in (False, True):
                ratio, low, high = bootstrap(column, reference, kinds, geometric)
                text += f"   {100 * (ratio - 1):+5.1f} % [{100 * (low - 1):+.0f}, {100 * (high - 1):+.0f}]"
        if name in methods:
            basins = [row["right_basin"] for fold in folds for row in fold[name]["fire"]]
            error = np.mean([fold[name]["force_error"] for fold in folds])
            text = f"{text:76} {sum(basins)} of {len(basins)}   {1000 * error:5.0f} meV/Å"
        lines.append(text)
    for name in methods[1:]:
        lines.append(f"{name}: {np.mean([fold[f'{name}_seconds'] for fold in folds]):.0f} s of training a fold")
    changes = by_kind(columns["bptt"], columns["untuned"], kinds)
    lines.append("bptt, change of the summed Delta-Q by kind: " + ", ".join(f"{k} {v:+.1f}" for k, v in changes))
    return "\n".join(lines)


def by_kind(after: dict, before: dict, kinds: dict, most: int = 5) -> list[tuple[str, float]]:
    """The kinds that add most to the change of the mean, up and down."""
    sums: dict[str, float] = {}
    for name, kind in kinds.items():
        sums[kind] = sums.get(kind, 0.0) + after[name] - before[name]
    ordered = sorted(sums.items(), key=lambda item: item[1])
    return ordered[:most] + ordered[-most:]


def merge(dictionaries) -> dict:
    return {k: v for d in dictionaries for k, v in d.items()}


def bootstrap(after: dict, before: dict, kinds: dict, geometric: bool) -> tuple[float, float, float]:
    """Ratio of the (geometric) means, and its 95 % interval when kinds are drawn with replacement."""
    names = sorted(set(kinds.values()))
    members = [[k for k in kinds if kinds[k] == n] for n in names]
    counts = np.array([len(m) for m in members])
    draws = np.random.default_rng(0).integers(0, len(names), (10_000, len(names)))
    shape = np.log if geometric else np.asarray
    sums = np.array([[sum(shape(c[k]) for k in m) for m in members] for c in (after, before)])

    def ratio(rows: np.ndarray) -> np.ndarray:
        means = sums[:, rows].sum(-1) / counts[rows].sum(-1)
        return np.exp(means[0] - means[1]) if geometric else means[0] / means[1]

    whole = np.arange(len(names))[None]
    return float(ratio(whole)[0]), *map(float, np.percentile(ratio(draws), [2.5, 97.5]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--potential", default="mace-si")
    add("--dtype", choices=("float32", "float64"))
    add("--epochs", type=int, default=16)
    add("--lr", type=float, default=2e-3, help="learning rate of the fine-tuning")
    add("--force-lr", type=float, default=1e-3, help="learning rate of force matching")
    add("--without-forces", action="store_true", help="leave the rival out")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    add("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    add("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for fold in arguments.folds:
        file = arguments.out / f"fold_{fold}.json"
        found = json.loads(file.read_text()) if file.exists() else run_fold(fold, arguments)
        if not arguments.without_forces and "forces" not in found:
            found |= run_rival(fold, arguments)
        with replacing(file) as path:
            path.write_text(json.dumps(found, indent=1))
    done = [json.loads(file.read_text()) for file in sorted(arguments.out.glob("fold_*.json"))]
    for fold in done:
        if fold["arguments"] != described(arguments):
            raise SystemExit(
                f"fold {fold['fold']} in {arguments.out} was made with {fold['arguments']}: take another --out."
            )
    print(table(done))


if __name__ == "__main__":
    main()
