"""Relaxations shared by processes: seconds of one against several, and whether the ends are the same.

    python benchmarks/shared_relaxations.py [--processes 2] [--structures 200] [--repeats 3]

Rattled silicon cells of 8 to 64 atoms are relaxed with mace-si in float64, at most `--steps` frames, by what
`ase-bptt relax` uses, under torch's own launcher with one thread in each process. One process and several take turns.
Seconds are those from when all have loaded the potential to the last end; so that they mean something there must be as
many free cores as processes. Processor time is that of the busiest process, beside that of one: the ratio that cores of
their own would give.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.io import read, write

from ase_bptt import load_potential
from ase_bptt.cells import CELLS
from ase_bptt.throughput import relax_all
from ase_bptt.throughput.journal import relax_shared, run_key
from ase_bptt.throughput.parts import Parts
from ase_bptt.training.distributed import leave, together

SHAPES = ((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2))


def mixed(n: int) -> list[Atoms]:
    structures = []
    for k in range(n):
        structures.append(bulk("Si", cubic=True).repeat(SHAPES[k % len(SHAPES)]))
        structures[-1].rattle(0.05 + 0.1 * (k % 7) / 7, seed=k)
    return structures


def work(folder: Path, steps: int) -> None:
    """One process's part."""
    ranks, structures = together(), read(folder / "starts.traj", ":")
    potential = load_potential("mace-si", device="cpu", dtype="float64")
    list(relax_all(potential, structures[:4], steps=2))
    ranks.once(lambda: None)
    began, busy = time.monotonic(), time.process_time()
    parts = Parts(
        folder / "parts", run_key(potential, structures, {}), structures, [len(a) for a in structures],
        ranks=(ranks.rank, ranks.size), store=ranks.store,
    )  # fmt: skip
    with parts:
        cells = [CELLS["fixed"]] * len(structures)
        relax_shared(potential, structures, parts, cells=cells, fmax=0.02, steps=steps)
        seconds, busy = time.monotonic() - began, time.process_time() - busy
        (folder / f"{ranks.rank}.json").write_text(json.dumps([seconds, busy, parts.n_mine]))
        if ranks.writes:
            write(folder / "ends.traj", [end.atoms for end in parts.ends])
    leave()


def measured(folder: Path, processes: int, steps: int) -> tuple[float, float, list[Atoms]]:
    """Seconds, processor time of the busiest process, and ends."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] * (processes > 1)
    command += [__file__, "--work", str(folder), "--steps", str(steps)]
    ran = subprocess.run([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    if ran.returncode:
        raise SystemExit(ran.stderr.decode())
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return found[0][0], max(busy for _, busy, _ in found), read(folder / "ends.traj", ":")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--structures", type=int, default=200)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.steps)
        return
    rows, apart = [], 0.0
    for _ in range(arguments.repeats):
        ends = []
        for processes in (1, arguments.processes):
            with tempfile.TemporaryDirectory() as name:
                write(Path(name) / "starts.traj", mixed(arguments.structures))
                *row, some = measured(Path(name), processes, arguments.steps)
            rows.append((processes, *row))
            ends.append(some)
        apart = max(apart, *(np.abs(a.positions - b.positions).max() for a, b in zip(*ends, strict=True)))
    one, several = ([row[1:] for row in rows if (row[0] == 1) == alone] for alone in (True, False))
    print(f"{arguments.structures} cells of 8 to 64 Si atoms, mace-si, float64; medians of {arguments.repeats}")
    for k, what in enumerate(("seconds", "processor time of the busiest")):
        ratios = [a[k] / b[k] for a, b in zip(one, several, strict=True)]
        print(
            f"{what:30} one {statistics.median(r[k] for r in one):7.1f} s, {arguments.processes} processes "
            f"{statistics.median(r[k] for r in several):7.1f} s: {statistics.median(ratios):.2f} times as fast "
            f"[{min(ratios):.2f}, {max(ratios):.2f}] (wanted of two: at least 1.85)"
        )
    print(f"positions differ by {apart:.0e} Å at most (wanted: at most 1e-10)")


if __name__ == "__main__":
    main()
