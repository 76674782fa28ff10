"""The ways to relax the structures that `throughput.py` sets side by side."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.io import write
from ase.optimize import FIRE

from ase_bptt import Potential
from ase_bptt.throughput import relax_all

REPEATS = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (2, 2, 1), (3, 2, 1), (2, 2, 2)]
RATTLE = 0.1
KINDS = [("Si", "fcc", 3.9), ("Si", "sc", 2.55), ("Si", "bcc", 3.1), ("Si", "diamond", 5.47), ("Ge", "diamond", 5.76),
         ("SiGe", "zincblende", 5.6), ("AlP", "zincblende", 5.5), ("SiGe", "rocksalt", 5.1), ("SiGe", "wurtzite", 3.96),
         ("AlP", "wurtzite", 3.89)]  # fmt: skip
SUPERCELLS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2)]
MOST, STRAIN = 16, 0.03
STEPS = 500
HELPER = Path(__file__).with_name("torch_sim_relaxer.py")


@dataclass
class Pass:
    """All structures relaxed once: seconds on the wall and of the processor, and where they ended.

    `frames` is of each structure, None where it is not reported.
    """

    wall: float
    processor: float
    force_calls: int
    energies: list[float]
    frames: list[int] | None = None


Relaxer = Callable[[], Pass]


def rattled(n: int) -> list[Atoms]:
    """Silicon cells of 8 to 64 atoms, each from its own seed."""
    cells = []
    for k in range(n):
        atoms = bulk("Si", a=5.469, cubic=True) * REPEATS[k % len(REPEATS)]
        atoms.rattle(RATTLE, seed=k)
        cells.append(atoms)
    return cells


def crystals(n: int) -> list[Atoms]:
    """Crystals of 1 to 16 atoms, strained by up to 3 % and rattled, each from its own seed."""
    found = []
    ideal = (bulk(name, kind, a=a) * repeats for repeats in SUPERCELLS for name, kind, a in KINDS)
    kinds = [atoms for atoms in ideal if len(atoms) <= MOST]
    for k in range(n):
        atoms, rng = kinds[k % len(kinds)].copy(), np.random.default_rng(k)
        strain = rng.uniform(-STRAIN, STRAIN, (3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        atoms.rattle(RATTLE / 2, seed=k)
        found.append(atoms)
    return found


def timed(work: Callable[[], list[tuple[int, float]]]) -> Pass:
    """Of work that gives frames and end energy of each structure."""
    wall, processor = time.perf_counter(), time.process_time()
    frames, energies = zip(*work(), strict=True)
    # Energies are on the host, so a device has nothing left to do.
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Pass(wall, processor, sum(frames) + len(frames), list(energies), list(frames))


def ours(potential: Potential, structures: Sequence[Atoms], fmax: float, **settings) -> Relaxer:
    def work() -> list[tuple[int, float]]:
        ends = dict(relax_all(potential, structures, stepper="fire", fmax=fmax, steps=STEPS, **settings))
        return [(ends[k].nsteps, ends[k].atoms.get_potential_energy()) for k in range(len(structures))]

    return lambda: timed(work)


def ase(native: Path, structures: Sequence[Atoms], arguments: argparse.Namespace) -> Relaxer:
    from mace.calculators import MACECalculator

    calculator = MACECalculator(str(native), device=arguments.device, default_dtype=arguments.dtype)

    def relaxed(atoms: Atoms) -> tuple[int, float]:
        atoms = atoms.copy()
        atoms.calc = calculator
        calculator.reset()
        with FIRE(FrechetCellFilter(atoms) if arguments.cells else atoms, logfile=None) as run:
            run.run(fmax=arguments.fmax, steps=STEPS)
        return run.nsteps, atoms.get_potential_energy()

    relaxed(structures[0])  # what is compiled or allocated at first use
    return lambda: timed(lambda: [relaxed(atoms) for atoms in structures])


class TorchSim:
    """torch-sim, in a process and an environment of its own."""

    def __init__(self, native: Path, structures: Sequence[Atoms], atoms: float, arguments: argparse.Namespace):
        file = native.with_name("structures.traj")
        write(file, list(structures))
        flags = {
            "device": arguments.device,
            "dtype": arguments.dtype,
            "threads": torch.get_num_threads(),
            "fmax": arguments.fmax,
            "atoms": atoms,
        }
        command = [arguments.torch_sim, HELPER, native, file]
        command += ["--cells"] if arguments.cells else []
        command += [word for name, value in flags.items() for word in (f"--{name}", value)]
        # Its environment is its own: nothing is imported from where ours is.
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(list(map(str, command)), env=own, text=True, **pipes)

    def relaxer(self, every: int) -> Relaxer:
        """With its stop test after so many frames."""

        def ask() -> Pass:
            print(every, file=self.process.stdin, flush=True)
            for line in self.process.stdout:
                if line.startswith("{"):  # libraries print, too
                    return Pass(**json.loads(line))
            raise SystemExit(f"torch-sim gave no answer: run {HELPER.name} by hand in its environment to see why.")

        return ask

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
