"""Relaxing very many small structures: when the first result comes, and how much memory a run takes.

    python benchmarks/many_structures.py [--structures 100000] [--few 100] [--soak 20000] [--merge 100000]

`ase-bptt relax` with a Lennard-Jones potential on one extxyz of clusters of 2 to 4 atoms, as a process of its own: the
seconds from its start to the first structure in its journal, when it is ended by SIGTERM after `--seconds`; the largest
resident memory until then; the same for a file of few structures. With `--soak`, a run of so many to its end, and the
memory after a tenth of it and at its end. With `--merge`, nothing is relaxed: the ends of so many structures are put
into the journals of eight processes, and `ase-bptt merge` writes them into one file.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator

from ase_bptt import save_potential
from ase_bptt.iterated_map import Status
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.throughput import Relaxed
from ase_bptt.throughput.parts import Parts
from ase_bptt.throughput.structure_files import StructureFiles

PROCESSES = 8
SHAPE = np.array([[0.0, 0.0, 0.0], [3.8, 0.0, 0.0], [1.9, 3.3, 0.0], [1.9, 1.1, 3.1]])


def write_clusters(path: Path, n: int) -> None:
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for k in range(n):
            places = SHAPE[: 2 + k % 3] + generator.normal(scale=0.1, size=(2 + k % 3, 3))
            file.write(f'{len(places)}\nProperties=species:S:1:pos:R:3 name=cluster_{k} pbc="F F F"\n')
            file.writelines(f"Ar {x:.8f} {y:.8f} {z:.8f}\n" for x, y, z in places)


def memory(pid: int, key: str) -> float:
    """MiB, of the process's status: VmRSS now, VmHWM at most."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(key))


def write_ends(folder: Path, source: Path, out: Path) -> None:
    """Into journals, as processes do that share the run, each structure where it was."""
    files = StructureFiles([source], refused=lambda problem: None)
    facts = {"files": [str(source)], "out": str(out), "content": files.digest}
    for shard in range(PROCESSES):
        with Parts(folder, "a benchmark", files, files.sizes, shard=(shard, PROCESSES), facts=facts) as parts:
            for chunk in islice(parts.claims(), len(parts.chunks) // PROCESSES + 1):
                for k in chunk:
                    atoms = files[k]
                    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
                    parts.add(k, Relaxed(atoms, Status.CONVERGED, 1))


def watched(folder: Path, n: int, seconds: float | None) -> tuple[float, float, list[float], float]:
    """Seconds to the first result, MiB at most, MiB resident through the run, and seconds of all; until so many."""
    source, out = folder / f"{n}.extxyz", folder / f"relaxed_{n}.extxyz"
    write_clusters(source, n)
    command = ["relax", source, "--potential", folder / "lj", "--out", out]
    return run(command, folder / f"{out.name}.parts", seconds)


def merged(folder: Path, n: int) -> tuple[float, float]:
    """Seconds that a merge of so many ends takes, and MiB at most."""
    source, out, parts = folder / f"{n}.extxyz", folder / "merged.extxyz", folder / "merged.extxyz.parts"
    write_clusters(source, n)
    write_ends(parts, source, out)
    _, most, _, seconds = run(["merge", parts], parts, None)
    if not out.exists():
        raise RuntimeError("the merge has failed")
    return seconds, most


def run(command: list, parts: Path, seconds: float | None) -> tuple[float, float, list[float], float]:
    """A command of ase-bptt, watched."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "ase_bptt", *map(str, command)], stdout=subprocess.DEVNULL)
    first, most, resident = float("nan"), 0.0, []
    while process.poll() is None:
        time.sleep(0.05)
        try:
            most = max(most, memory(process.pid, "VmHWM"))
            resident.append(memory(process.pid, "VmRSS"))
        except (OSError, StopIteration):
            break
        if np.isnan(first) and any(p.stat().st_size for p in parts.glob("*.traj")):
            first = time.monotonic() - began
        if seconds is not None and time.monotonic() - began > seconds:
            process.send_signal(signal.SIGTERM)
            seconds = None
    process.wait()
    return first, most, resident, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--structures", type=int, default=100_000)
    parser.add_argument("--few", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0, help="after which the run of many is ended")
    parser.add_argument("--soak", type=int, help="structures of a run to its end")
    parser.add_argument("--merge", type=int, help="ends to write into one file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_potential(LennardJones(sigma=3.4, epsilon=0.0104, rc=9.0, smooth=True, ro=8.0), folder / "lj")
        if arguments.merge:
            seconds, most = merged(folder, arguments.merge)
            print(f"{arguments.merge} ends of {PROCESSES} processes merged in {seconds:.0f} s, {most:.0f} MiB at most")
            return
        if arguments.soak:
            _, most, resident, seconds = watched(folder, arguments.soak, None)
            early = max(resident[: max(1, len(resident) // 10)])
            print(
                f"{arguments.soak} structures in {seconds:.0f} s: {early:.0f} MiB in the first tenth of the time, "
                f"{resident[-1]:.0f} MiB at the end, {most:.0f} MiB at most"
            )
            return
        few = watched(folder, arguments.few, None)
        many = watched(folder, arguments.structures, arguments.seconds)
    for n, (first, most, *_) in ((arguments.few, few), (arguments.structures, many)):
        print(f"{n:8} structures: first result after {first:5.1f} s, {most:6.0f} MiB at most")
    print(f"more memory for many: {many[1] - few[1]:.0f} MiB (wanted: at most 300); first result wanted within 10 s")


if __name__ == "__main__":
    main()
