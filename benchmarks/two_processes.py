"""One process against two: seconds of an epoch of training, and whether the weights after it are the same.

    python benchmarks/two_processes.py [--processes 2] [--batch-size 8] [--epochs 1] [--repeats 3] [-- OPTIONS]

`ase-bptt train` on the embedded pairs with mace-si in float64, one thread in each process, alone and under torch's own
launcher, in turns, with the same batches of the whole run. Seconds are those that metrics.csv tells, validation
included; so that they mean something there must be as many free cores as processes. OPTIONS go to `ase-bptt train`.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ase_bptt.datasets import FOLDER


def train(processes: int, out: Path, arguments: argparse.Namespace) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds of its epochs, and its last weights."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    settings = {"potential": "mace-si", "dtype": "float64", "device": "cpu", "out": out}
    settings |= {"batch-size": arguments.batch_size, "epochs": arguments.epochs}
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "ase_bptt", "train", FOLDER]
    command += [word for name, value in settings.items() for word in (f"--{name}", value)] + arguments.options
    ran = subprocess.run(
        list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if ran.returncode:
        raise SystemExit(ran.stdout + ran.stderr)
    with (out / "metrics.csv").open() as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    return seconds, torch.load(out / "checkpoint.pt", weights_only=True)["potential"]


def apart(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    return max(float((w - others[name]).abs().max()) for name, w in some.items() if w.is_floating_point() and w.numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("options", nargs="*", help="of ase-bptt train, after --")
    arguments = parser.parse_args()
    ones, several, ratios = [], [], []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            one, alone = train(1, Path(folder) / "one", arguments)
            many, together = train(arguments.processes, Path(folder) / "several", arguments)
        ones.append(one)
        several.append(many)
        ratios.append(one / many)
    print(
        f"mace-si, float64, {arguments.batch_size} pairs a batch, epochs: {arguments.epochs}; medians of "
        f"{arguments.repeats}\n"
        f"one process     {statistics.median(ones):7.1f} s\n"
        f"{arguments.processes} processes     {statistics.median(several):7.1f} s\n"
        f"times as fast   {statistics.median(ratios):7.2f} [{min(ratios):.2f}, {max(ratios):.2f}]   "
        f"(wanted of two: at least 1.7)\n"
        f"weights after the last epoch differ by {apart(alone, together):.0e} at most (wanted: at most 1e-8)"
    )


if __name__ == "__main__":
    main()
