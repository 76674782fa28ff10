"""How fast an archive is read, compared with ASE's own parser of vasprun.xml, side by side in one run.

    python benchmarks/reading.py [--files 40] [--megabytes 5] [--processes N] [--repeats 3]

Relaxations of copper with a vacancy are written with the energies of all electronic steps and the eigenvalues of all
ionic steps, as real files have them, until each has its size. ASE's parser reads all files in one process, and in as
many as we use; then `read_archive` reads, checks and groups them. What is printed is files per second: ours must be 0.8
of what ASE does in one process times the processes. On a machine that does other work, too, compare it with what ASE
does in as many processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
from ase.build import bulk
from ase.io import read
from code_outputs import vasprun

from ase_bptt.pairs.loading import n_cores
from ase_bptt.pairs.reading import read_archive

STEPS = 20


def write_archive(folder: Path, n: int, megabytes: float) -> float:
    """Files of one relaxation each, and their size in MB."""
    rng = np.random.default_rng(5)
    total = 0
    for k in range(n):
        end = bulk("Cu", cubic=True) * (3, 3, 2)
        del end[k % len(end)]
        end.positions += 0.05 * rng.normal(size=end.positions.shape)
        noise = 0.1 * rng.normal(size=end.positions.shape)
        frames = [end.copy() for _ in range(STEPS)]
        for share, frame in zip(np.linspace(1, 0, STEPS), frames, strict=True):
            frame.positions += share * noise
        text = vasprun(frames)
        row = "       <r>   -12.3456    1.0000 </r>\n"
        levels = max(0, int((megabytes * 1e6 - len(text)) / STEPS / len(row)))
        points = f'<set comment="spin 1">\n<set comment="kpoint 1">\n{row * levels}</set>\n</set>\n'
        bands = f"<eigenvalues>\n<array>\n<set>\n{points}</set>\n</array>\n</eigenvalues>\n</calculation>"
        path = folder / f"{k:03d}" / "vasprun.xml"
        path.parent.mkdir()
        path.write_text(text.replace("</calculation>", bands))
        total += path.stat().st_size
    return total / 1e6


def parsed(path: Path) -> int:
    return len(read(path, index=":"))


def timed(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--megabytes", type=float, default=5.0)
    parser.add_argument("--processes", type=int, default=n_cores())
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    n = arguments.processes
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        size = write_archive(root, arguments.files, arguments.megabytes)
        files = sorted(root.rglob("vasprun.xml"))
        print(f"{len(files)} files of {size / len(files):.1f} MB, {n} processes\n\nASE in 1  ASE in {n}  ours  files/s")
        rates = []
        with ProcessPoolExecutor(n, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(parsed, files[:n]))
            for _ in range(arguments.repeats):
                times = (
                    timed(lambda: [parsed(file) for file in files]),
                    timed(lambda: list(pool.map(parsed, files))),
                    timed(lambda: read_archive(root, processes=n)),
                )
                rates.append([len(files) / t for t in times])
                print("  ".join(f"{rate:8.2f}" for rate in rates[-1]), flush=True)
        one, several, ours = (median(rate[k] for rate in rates) for k in range(3))
        print(
            f"\nours: {ours / one / n:.2f} of ASE in 1 process times {n}, {ours / several:.2f} of ASE in {n} processes"
        )


if __name__ == "__main__":
    main()
