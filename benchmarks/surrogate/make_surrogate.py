"""Make the surrogate set: silicon and germanium point defects relaxed by a pretrained potential, not by DFT.

    python make_surrogate.py OUT [--potential sevennet:7net-mf-0] [--worker W --workers N]
    python make_surrogate.py OUT --pack surrogate.extxyz.gz

Point defects, dopants and dopant pairs in 8-site cubic and 16-site primitive cells of silicon and germanium, rattled,
relaxed by BFGS to 0.03 eV/Å at fixed cell. Needs `ase_bptt[sevennet]`. A relaxation is skipped if its file exists, so
several workers can share OUT and a stopped run can continue. The kinds that are kept for judging (`HELD_OUT` of
make_si_defects.py) are not made here either. `--pack` writes the converged relaxations into one file, each by eight
frames, evenly spaced, with the energies and forces of the surrogate.
"""

from __future__ import annotations

import argparse
import itertools
import random
import runpy
import time
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

import ase_bptt
from ase_bptt import TorchCalculator, load_potential
from ase_bptt.optimize import BFGS

DFT = runpy.run_path(str(Path(ase_bptt.__file__).parent / "data" / "si_defects" / "make_si_defects.py"))
LATTICE_CONSTANTS = {"Si": 5.469, "Ge": 5.763}
"""Å, by PBE."""
DOPANTS = DFT["DOPANTS"]
NATIVE = ("V", "V2", "I_T", "I_X", "crystal")
FMAX, STEPS, FRAMES = 0.03, 120, 8


def kinds(host: str) -> list[str]:
    """All kinds in a host, in one order: native defects, dopants alone and beside a vacancy, pairs of dopants."""
    dopants = [x for x in [*DOPANTS, "Si"] if x != host]
    single = [f"{x}{suffix}" for x in dopants for suffix in ("_s", "_i", "V")]
    pairs = [f"{x}-{y}_nn{shell}" for x, y in itertools.combinations(dopants, 2) for shell in (1, 2)]
    random.Random(11).shuffle(pairs)
    # In germanium, too: a kind that is kept for judging teaches the same chemistry there.
    return [k for k in (*NATIVE, *single, *pairs) if not DFT["held_out"](k)]


def jobs() -> list[tuple[str, str, int, int]]:
    """(host, kind, sites, seed): two starts of a native kind in each host and cell, one of each other kind."""
    found = []
    for host in LATTICE_CONSTANTS:
        for k, kind in enumerate(kinds(host)[:110]):
            cells = [(sites, seed) for sites in (8, 16) for seed in (0, 1)] if kind in NATIVE else [((8, 16)[k % 2], k)]
            found += [(host, kind, *cell) for cell in cells]
    random.Random(3).shuffle(found)
    return found


def start(host: str, kind: str, sites: int, seed: int) -> Atoms | None:
    """The rattled structure, or None where no rattle keeps all atoms 1.6 Å apart."""
    rng = np.random.default_rng([seed, sites, *map(ord, host + kind)])
    a = LATTICE_CONSTANTS[host]
    atoms = bulk(host, a=a, cubic=True) if sites == 8 else bulk(host, a=a).repeat(2)
    d = atoms.get_distances(0, range(len(atoms)), mic=True)
    neighbors = [int(np.flatnonzero(np.isclose(d, r, atol=0.05))[0]) for r in np.sqrt([3 / 16, 1 / 2]) * a]
    tetrahedral = atoms.positions[0] + 0.5 * a
    if "-" in kind:
        x, y = kind.split("_")[0].split("-")
        atoms.symbols[0], atoms.symbols[neighbors[int(kind[-1]) - 1]] = x, y
    elif kind.endswith("_s"):
        atoms.symbols[0] = kind[:-2]
    elif kind.endswith("_i"):
        atoms += Atoms(kind[:-2], positions=[tetrahedral + rng.normal(0, 0.15, 3)])
    elif kind == "I_T":
        atoms += Atoms(host, positions=[tetrahedral])
    elif kind == "I_X":
        split = np.array([1, 1, 0]) / np.sqrt(2) * 1.2
        atoms += Atoms(host, positions=[atoms.positions[0] - split])
        atoms.positions[0] += split
    elif kind == "V2":
        del atoms[[0, neighbors[0]]]
    elif kind == "V":
        del atoms[0]
    elif kind.endswith("V"):
        atoms.symbols[neighbors[0]] = kind[:-1]
        del atoms[0]
    amplitude = rng.uniform(0.15, 0.35) if kind == "crystal" else rng.uniform(0.04, 0.2)
    for _ in range(50):
        rattled = atoms.copy()
        rattled.positions += rng.normal(0, amplitude / np.sqrt(3), rattled.positions.shape)
        if (rattled.get_all_distances(mic=True) + 9 * np.eye(len(rattled))).min() > 1.6:
            return rattled
    return None


def relax(atoms: Atoms, calculator: TorchCalculator, file: Path) -> bool:
    """Write all frames, where it converges."""
    atoms.calc, frames = calculator, []
    optimizer = BFGS(atoms, logfile=None, maxstep=0.15)
    for converged in optimizer.irun(fmax=FMAX, steps=STEPS):  # noqa: B007  (the last one counts)
        frame = atoms.copy()
        frame.calc = SinglePointCalculator(frame, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
        frames.append(frame)
    if converged:
        write(file, frames)
    return bool(converged)


def pack(folder: Path, file: Path) -> None:
    """One file of all relaxations; each frame says whose it is."""
    packed = []
    for path in sorted(folder.glob("*.extxyz")):
        host, sites, kind, _ = path.stem.split("=")
        frames = read(path, index=":")
        chosen = np.unique(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int))
        for k in chosen:
            frames[k].info.update(
                id=f"{host}{sites}_{kind}_{path.stem.split('=')[3]}", kind=f"{host}:{kind}", frame=int(k)
            )
            packed.append(frames[k])
    write(file, packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--potential", default="sevennet:7net-mf-0")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--pack", type=Path)
    arguments = parser.parse_args()
    if arguments.pack:
        return pack(arguments.out, arguments.pack)
    arguments.out.mkdir(parents=True, exist_ok=True)
    calculator = TorchCalculator(load_potential(arguments.potential, dtype="float32"))
    for host, kind, sites, seed in jobs()[arguments.worker :: arguments.workers]:
        name = f"{host}={sites}={kind}={seed:02d}"
        atoms = start(host, kind, sites, seed)
        if atoms is None or (arguments.out / f"{name}.extxyz").exists():
            continue
        began = time.monotonic()
        converged = relax(atoms, calculator, arguments.out / f"{name}.extxyz")
        how = "" if converged else "not converged"
        print(name, len(atoms), "atoms", how, f"{time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
