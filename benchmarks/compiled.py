"""Relaxing many structures with compiled forces and without: processor time, compilation included and left out.

    TORCHINDUCTOR_COMPILE_THREADS=1 python benchmarks/compiled.py [--potential mace-si] [--structures 100] [--steps 40]

Rattled silicon crystals of 8 to 64 atoms are relaxed by FIRE through `relax_all`, first without and then with compiled
forces, on one thread. Time of g++ is counted; that of further processes, in which torch compiles where the
environment variable does not forbid it, is not. The break-even is the number of force calls after which what each saves
has paid for the compilation.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk

from ase_bptt import load_potential
from ase_bptt.throughput import relax_all
from ase_bptt.throughput.compilation import compiled

SHAPES = ((1, 1, 1), (2, 1, 1), (2, 2, 1), (3, 1, 1), (3, 2, 1), (2, 2, 2))


def crystals(n: int) -> list[Atoms]:
    """Of 8 to 64 atoms."""
    generator, found = np.random.default_rng(0), []
    for k in range(n):
        atoms = bulk("Si", a=5.469 * generator.uniform(0.98, 1.02), cubic=True) * SHAPES[generator.integers(6)]
        atoms.rattle(0.15, seed=k)
        found.append(atoms)
    return found


def of_children() -> float:
    """Processor time of processes that have ended, in s."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--potential", default="mace-si")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--structures", type=int, default=100)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--backend", default="inductor")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    potential = load_potential(arguments.potential, dtype=arguments.dtype, device="cpu")
    structures = crystals(arguments.structures)
    made = compiled(potential, arguments.backend)
    forces = vars(made)["energy_and_forces"]
    found, seconds = [], []
    for each in (potential, made):
        began, children = time.process_time(), of_children()
        ends = dict(relax_all(each, structures, steps=arguments.steps))
        children = of_children() - children
        seconds.append(time.process_time() - began + children)
        found.append(np.array([ends[k].atoms.calc.results["energy"] for k in range(len(ends))]))
    plain, with_it = seconds
    compiling = forces.seconds + children
    calls, rest = forces.n_calls, with_it - compiling
    print(
        f"{arguments.potential}, {len(structures)} structures, {sum(map(len, structures))} atoms, {calls} force calls, "
        f"{forces.n_compiled} by compiled code\n"
        f"processor time: without {plain:.1f} s, with {with_it:.1f} s, of which compiling {compiling:.1f} s "
        f"({forces.compilations} times, sizes {[size for size, _ in forces._graphs]})\n"
        f"{plain / with_it:.2f} times faster with the compilation, {plain / rest:.2f} without it; energies differ by "
        f"{np.abs(found[1] - found[0]).max():.1e} eV"
    )
    if rest < plain:
        print(f"break-even: {compiling * calls / (plain - rest):.0f} force calls of up to 256 atoms")


if __name__ == "__main__":
    main()
