"""What a tape costs: time and peak memory of FullTape and Replay, side by side.

    python benchmarks/tape.py [--frames 10 50 100] [--repeats 3]

MACE (the embedded mace-si) in float64 on a silicon cell of 64 sites with a vacancy: 63 atoms, gradient
descent, forward and backward together. Each case runs in a process of its own, so that its peak memory
is its own; the cases of one number of frames take turns, and the median over the repeats is printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from ase.build import bulk

from ase_bptt import Structures, adjoints, load_potential, relax, steppers


def measure(adjoint: str, frames: int) -> dict[str, float]:
    """Seconds, MiB above the loaded potential, and the gradient's norm, of one relaxation and its gradient."""
    torch.set_num_threads(1)
    potential = load_potential("mace-si", dtype="float64")
    atoms = bulk("Si", a=5.469, cubic=True) * (2, 2, 2)
    del atoms[0]
    atoms.rattle(0.05, seed=1)
    gradient(potential, atoms, "replay", 2)  # warm up what is compiled at first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    norm = gradient(potential, atoms, adjoint, frames)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "mib": (peak - before) / 1024, "norm": norm}


def gradient(potential, atoms, adjoint: str, frames: int) -> float:
    potential.zero_grad()
    start = Structures.from_atoms(atoms, dtype=potential.dtype)
    run = relax(
        potential,
        start,
        stepper=steppers.GradientDescent(step_size=0.02),
        fmax=0.0,
        steps=frames,
        adjoint=adjoints.make_adjoint(adjoint),
    )
    (run.positions - start.positions).square().sum().backward()
    squares = sum(p.grad.square().sum() for p in potential.parameters() if p.grad is not None)
    return float(squares) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("ADJOINT", "FRAMES"), help="measure one case and print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    print("frames   FullTape: s     MiB     Replay: s     MiB    time ratio   gradients differ by")
    for frames in arguments.frames:
        runs = {"full": [], "replay": []}
        for _ in range(arguments.repeats):
            for adjoint, found in runs.items():
                command = [sys.executable, __file__, "--one", adjoint, str(frames)]
                found.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
        (t_full, m_full, g_full), (t_replay, m_replay, g_replay) = (
            [statistics.median(run[key] for run in found) for key in ("seconds", "mib", "norm")]
            for found in runs.values()
        )
        ratio = statistics.median(
            r["seconds"] / f["seconds"] for f, r in zip(runs["full"], runs["replay"], strict=True)
        )
        difference = abs(g_replay - g_full) / g_full
        print(
            f"{frames:6}   {t_full:11.1f} {m_full:7.0f}   {t_replay:11.1f} {m_replay:7.0f}   {ratio:11.2f}   "
            f"{difference:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
