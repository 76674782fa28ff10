"""How evenly a million relaxations are dealt out to many GPUs: a simulation, which needs no GPU.

    python benchmarks/packing.py [--pairs 1000000] [--ranks 512] [--seed 0] [--relax]

Pairs are drawn from the embedded silicon defects and scaled up: the atoms of one, in a supercell of 1 to 8 cells, and
the frames of one. What a pair costs is atoms times frames. An epoch goes through all pairs in random order, in global
batches; each batch is dealt out to the ranks, and a step of the optimizer takes as long as the rank that has most to
do. Efficiency is the mean load over the largest, added up over the steps: ideal time over real time.

share     `ase_bptt.throughput.packing.share`: dealt out by cost. Costs are known; or within so much: the frames
          that a pair takes differ from those that it took in the epoch before, by which it was dealt out, by a
          log-normal factor of this spread; or of the frames nothing is known, and the atoms alone count
naive     as many pairs to each rank, in the order in which they come
at best   no step is faster than its dearest pair

Below it, the batches that fit into memory (atoms at once on a rank) by `ase_bptt.throughput.packing.pack`, and where
each is filled in the order in which pairs come: the fewest that could hold all atoms over those that it takes.

--relax     structures that are relaxed (`ase-bptt relax`) instead: GPUs claim chunks by
            `ase_bptt.throughput.parts.divided` where there is room among the `--room` atoms that each relaxes at once.
            A frame of a GPU takes a time of its own (`--fixed`, in the unit of what an atom takes) and a time for each
            atom. Perfect is the time that all atoms' frames would take on full GPUs.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ase_bptt.datasets import si_defects
from ase_bptt.throughput.packing import pack, share
from ase_bptt.throughput.parts import divided

SUPERCELLS = (1, 2, 3, 4, 6, 8)
KNOWLEDGE = {"known": 0.0, "within 5 %": 0.05, "within 10 %": 0.1, "within 20 %": 0.2, "atoms only": None}
"""How costs are foreseen: spread of the log-normal error of the frames, None where nothing is known of them."""


@dataclass(frozen=True)
class Pairs:
    """Atoms and frames of each pair, as the epoch takes them."""

    atoms: np.ndarray
    frames: np.ndarray

    @property
    def costs(self) -> np.ndarray:
        return self.atoms * self.frames

    def foreseen(self, spread: float | None, generator: np.random.Generator) -> np.ndarray:
        """What the costs were thought to be."""
        if spread is None:
            return self.atoms.astype(float)
        return self.costs * generator.lognormal(sigma=spread, size=len(self.atoms))


def draw(n: int, generator: np.random.Generator) -> Pairs:
    """So many pairs with sizes and lengths as the embedded ones have, the sizes scaled up."""
    embedded = si_defects("all")
    sizes, frames = np.array([len(p.initial) for p in embedded]), np.array([len(p.frames) - 1 for p in embedded])
    one = generator.integers(len(embedded), size=n)
    other = generator.integers(len(embedded), size=n)
    return Pairs(sizes[one] * generator.choice(SUPERCELLS, size=n), np.maximum(frames[other], 1))


def efficiencies(pairs: Pairs, foreseen: Sequence[np.ndarray], ranks: int, batch: int) -> list[float]:
    """Ideal over real time of an epoch dealt out by each of these foreseen costs, then naively, and at best.

    No dealing out is faster than the dearest pair of a step.
    """
    costs = pairs.costs.astype(float)
    ideal, real = 0.0, np.zeros(len(foreseen) + 2)
    for first in range(0, len(costs) // batch * batch, batch):
        step = costs[first : first + batch]
        ideal += step.sum() / ranks
        dealt = [share(guess[first : first + batch].tolist(), ranks) for guess in foreseen]
        dealt.append([list(range(rank, batch, ranks)) for rank in range(ranks)])
        real += [max(step[part].sum() for part in parts) for parts in dealt] + [max(step.sum() / ranks, step.max())]
    return (ideal / real).tolist()


def fillings(pairs: Pairs, ranks: int, batch: int, capacity: int, steps: int) -> tuple[float, float]:
    """Fewest batches over batches, on all ranks: by `pack`, and closed as soon as the next pair does not fit."""
    costs, fewest, packed, plain = pairs.costs, 0, 0, 0
    for first in range(0, min(steps * batch, len(costs)), batch):
        for part in share(costs[first : first + batch].tolist(), ranks):
            atoms = pairs.atoms[first : first + batch][part]
            fewest += -(-atoms.sum() // capacity)
            packed += len(pack(atoms.tolist(), capacity))
            plain += in_order(atoms, capacity)
    return fewest / packed, fewest / plain


def relaxed(atoms: np.ndarray, frames: np.ndarray, ranks: int, room: int, fixed: float) -> tuple[float, float]:
    """Perfect over real time of relaxing all structures, and the same for as many structures to each GPU beforehand."""
    perfect = float((atoms * frames).sum()) / ranks * (1 + fixed / room)
    sizes = atoms.astype(float)
    chunks = deque(divided(sizes, ranks))
    naive = [deque([list(range(rank, len(atoms), ranks))]) for rank in range(ranks)]
    return perfect / _last(atoms, frames, [chunks] * ranks, room, fixed), perfect / _last(
        atoms, frames, naive, room, fixed
    )


def _last(atoms: np.ndarray, frames: np.ndarray, work: Sequence[deque[list[int]]], room: int, fixed: float) -> float:
    """When the last GPU ends. Each takes structures from its own queue, and chunks from where it gets them."""
    free = [(0.0, rank) for rank in range(len(work))]
    queues: list[deque[int]] = [deque() for _ in work]
    running: list[list[tuple[int, int]]] = [[] for _ in work]  # frame at which each ends, and its atoms
    frame, load, last = [0] * len(work), [0] * len(work), 0.0
    while free:
        now, rank = heapq.heappop(free)
        queue, batch = queues[rank], running[rank]
        while queue or work[rank]:
            if not queue:
                queue.extend(work[rank].popleft())
            if batch and load[rank] + atoms[queue[0]] > room:
                break
            k = queue.popleft()
            heapq.heappush(batch, (frame[rank] + int(frames[k]), int(atoms[k])))
            load[rank] += int(atoms[k])
        if not batch:
            last = max(last, now)
            continue
        until = batch[0][0]
        seconds = (until - frame[rank]) * (fixed + load[rank])
        frame[rank] = until
        while batch and batch[0][0] == until:
            load[rank] -= heapq.heappop(batch)[1]
        heapq.heappush(free, (now + seconds, rank))
    return last


def in_order(atoms: np.ndarray, capacity: int) -> int:
    """Batches that it takes where each is filled until the next pair does not fit."""
    batches, room = 0, 0
    for n in atoms:
        if n > room:
            batches, room = batches + 1, capacity
        room -= n
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--per-rank", type=int, nargs="+", default=[4, 8, 16, 64], help="pairs of a step per rank")
    parser.add_argument("--capacity", type=int, default=256, help="atoms at once on a rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--relax", action="store_true", help="relaxations instead of training")
    parser.add_argument("--room", type=int, nargs="+", default=[4096, 16384, 65536], help="atoms relaxed at once")
    parser.add_argument("--spread", type=float, default=0.0, help="log-normal, of frames about the embedded ones")
    parser.add_argument("--fixed", type=float, default=2000.0, help="of a frame, in the unit of what an atom takes")
    arguments = parser.parse_args()
    began = time.process_time()
    generator = np.random.default_rng(arguments.seed)
    if arguments.relax:
        embedded = np.array([len(p.frames) - 1 for p in si_defects("all")])
        atoms = generator.integers(8, 201, size=arguments.pairs)
        spread = generator.lognormal(0.0, arguments.spread, size=arguments.pairs)
        frames = np.maximum(1, generator.choice(embedded, size=arguments.pairs) * spread)
        print(
            f"{arguments.pairs} structures of 8 to 200 atoms and {frames.min():.0f} to {frames.max():.0f} frames, "
            f"{arguments.ranks} GPUs; perfect over real time (wanted: 0.97)\n"
            "atoms at once     chunks as GPUs ask     as many structures to each"
        )
        for room in arguments.room:
            found = relaxed(atoms, frames.astype(int), arguments.ranks, room, arguments.fixed)
            print(f"{room:13} {found[0]:22.3f} {found[1]:30.3f}", flush=True)
        print(f"{time.process_time() - began:.0f} s")
        return
    pairs = draw(arguments.pairs, generator)
    foreseen = [pairs.foreseen(spread, generator) for spread in KNOWLEDGE.values()]
    print(
        f"{arguments.pairs} pairs of {pairs.atoms.min()} to {pairs.atoms.max()} atoms and {pairs.frames.min()} to "
        f"{pairs.frames.max()} frames, {arguments.ranks} ranks; the dearest pair costs "
        f"{pairs.costs.max() / pairs.costs.mean():.1f} times the mean\n"
        f"efficiency               share:{''.join(f'{name:>13}' for name in KNOWLEDGE)}        naive      at best\n"
        f"pairs a rank   a step",
    )
    for per_rank in arguments.per_rank:
        found = efficiencies(pairs, foreseen, arguments.ranks, per_rank * arguments.ranks)
        columns = "".join(f"{value:13.3f}" for value in found)
        print(f"{per_rank:12}   {per_rank * arguments.ranks:6}          {columns}", flush=True)
    print(f"batches of at most {arguments.capacity} atoms, fewest over taken      pack     in order")
    for per_rank in arguments.per_rank:
        packed, plain = fillings(pairs, arguments.ranks, per_rank * arguments.ranks, arguments.capacity, steps=4)
        print(f"{per_rank:12} pairs a rank {packed:32.3f} {plain:12.3f}")
    print(f"{time.process_time() - began:.0f} s")


if __name__ == "__main__":
    main()
