"""What a pair that is read when it is asked for takes in memory and time, in a database and in a folder of files.

python docs/measure/lazy.py 5000
"""

import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from ase.build import bulk
from ase.db import connect
from ase.io import write

from ase_bptt import read_pairs

N = int(sys.argv[1])
ATOMS = bulk("Si", cubic=True) * 2
READS = 500


def relaxation(k):
    """Both ends."""
    initial = ATOMS.copy()
    initial.rattle(0.1, seed=k)
    relaxed = ATOMS.copy()
    relaxed.info["kind"] = f"kind {k % 100}"
    return initial, relaxed


def database(folder):
    """All pairs in a database."""
    with connect(folder / "all.db") as rows:
        for k in range(N):
            for end, atoms in enumerate(relaxation(k)):
                rows.write(atoms, relaxed=bool(end), pair=f"pair {k}", kind=f"kind {k % 100}")
    return folder / "all.db"


def files(folder):
    """A file for each pair."""
    for k in range(N):
        write(folder / f"{k:06}.traj", relaxation(k))
    return folder


def started(path, index):
    """The pairs, and seconds until they are there."""
    clock = time.perf_counter()
    pairs = read_pairs(path, group="kind", lazy=True, index=index)
    return pairs, time.perf_counter() - clock


def measure(name, path, index):
    """One line of the table."""
    _, first = started(path, index)
    _, again = started(path, index)
    tracemalloc.start()
    pairs, _ = started(path, index)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    some = np.random.default_rng(0).permutation(N)[:READS]
    clock = time.perf_counter()
    for k in some:
        len(pairs[k].initial)
    read = (time.perf_counter() - clock) / len(some)
    print(f"{name:9}{first / N * 1e3:9.2f} ms{again / N * 1e3:13.3f} ms{read * 1e3:8.2f} ms{held / N:13.0f}")


print(f"{N} pairs of {len(ATOMS)} atoms; first and second start for each pair")
print("         first start    second start     a read   bytes a pair")
for make in (database, files):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        measure(make.__name__, make(Path(folder) / "data"), folder)
