"""What each adjoint gains: fine-tuning on the embedded pairs, three seeds each.

    python benchmarks/adjoint_training.py [--potential mace-si] [--epochs 8] [--seeds 0 1 2] --out adjoint_training

Each case trains on the demo's split with the Trainer's other defaults, and is measured on the held-out kinds: Delta-Q
by FIRE and the structures in the right basin. Time per epoch is processor time of training alone, validation left out.
A run that is done is read from its file; a second call continues with the missing ones and prints the table, whose
missing cells stay empty.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from ase_bptt import Trainer, load_potential
from ase_bptt.datasets import si_defects
from ase_bptt.evaluation import evaluate
from ase_bptt.steppers import GradientDescent
from ase_bptt.utils import write_json

CASES = {
    "replay, 10 frames": {},
    "replay, 75 frames": {"steps": 75, "stepper": {"step_size": 0.05}},
    "truncated:10 of 75": {"adjoint": "truncated:10", "steps": 75, "stepper": {"step_size": 0.05}},
    "implicit": {"adjoint": "implicit"},
    "implicit, warm": {"adjoint": "implicit", "warm_start_every": 4},
    "one-step, warm": {"adjoint": "one-step", "warm_start_every": 4},
    "guided:10": {"adjoint": "guided:10"},
    "guided:10, warm": {"adjoint": "guided:10", "warm_start_every": 4},
}


def train(name: str, seed: int, arguments: argparse.Namespace) -> dict:
    """One run: what it took, and where the held-out structures end."""
    splits = {split: si_defects(split) for split in ("train", "valid", "test")}
    settings = dict(CASES[name])
    if "stepper" in settings:
        settings["stepper"] = GradientDescent(**settings["stepper"])
    potential = load_potential(arguments.potential, dtype="float32")
    before = evaluate(potential, splits["test"])
    trainer = Trainer(potential, seed=seed, lr=arguments.lr, **settings)
    spent, backward = [], trainer.backward

    def timed(pairs):
        began = time.process_time()
        losses = backward(pairs)
        spent.append(time.process_time() - began)
        return losses

    trainer.backward = timed
    trainer.fit(splits["train"], splits["valid"], epochs=arguments.epochs)
    after = evaluate(potential, splits["test"])
    return {
        "seconds_per_epoch": sum(spent) / arguments.epochs,
        "unsolved": sum(row.get("unsolved", 0) for row in trainer.history),
        "elsewhere": sum(row.get("elsewhere", 0) for row in trainer.history),
        "best_epoch": trainer.best_epoch,
        **{f"{what}_before": getattr(before, what) for what in ("mean", "median", "basins")},
        **{f"{what}_after": getattr(after, what) for what in ("mean", "median", "basins")},
    }


def table(found: dict[tuple[str, int], dict], arguments: argparse.Namespace) -> str:
    """Medians over the seeds, and the range of the held-out mean."""
    lines = [
        f"{arguments.potential}, {arguments.epochs} epochs; medians over the seeds {arguments.seeds}",
        f"{'':20} s an epoch   Delta-Q mean [lowest, highest]   median   right basins   unsolved   elsewhere",
    ]
    for name in ("untuned", *CASES):
        runs = [run for (case, _), run in found.items() if case == name or name == "untuned"]
        if not runs:
            lines.append(name)
            continue
        at = "before" if name == "untuned" else "after"
        means = [run[f"mean_{at}"] for run in runs]
        middle = {k: statistics.median(run[k] for run in runs) for k in runs[0]}
        took = "" if name == "untuned" else f"{middle['seconds_per_epoch']:.1f}"
        rest = "" if name == "untuned" else f"{middle['unsolved']:9.0f}   {middle['elsewhere']:9.0f}"
        lines.append(
            f"{name:20} {took:>10}   {statistics.median(means):12.2f} [{min(means):.2f}, {max(means):.2f}]"
            f"{middle[f'median_{at}']:17.2f}   {100 * middle[f'basins_{at}']:10.0f} %   {rest}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--potential", default="mace-si")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="CASE")
    parser.add_argument("--out", type=Path, default=Path("adjoint_training"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for seed in arguments.seeds:
        for name in CASES:
            path = arguments.out / f"{name.replace(' ', '_').replace(':', '_')}_{seed}.json"
            if not path.is_file() and name in arguments.cases:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, train(name, seed, arguments))
                print(f"{name}, seed {seed}: done", flush=True)
            if path.is_file():
                found[name, seed] = json.loads(path.read_text())
    print(table(found, arguments))


if __name__ == "__main__":
    main()
