"""Whether the search finds the references of the embedded defects from perfect sites, and with how many starts.

    python benchmarks/search.py [--potential mace-si] [-n 20] [--kinds N]

For each kind, the reference is relaxed with the potential; where it ends in the same structure, the reference is a
minimum of the potential, and the kind counts. Then `search_minima` starts from the defect on perfect sites: the
kind's initial structure that is nearest to the crystal. The reference is found where one of the minima is the same
structure. The first start that ended there is how many starts were needed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from ase import Atoms

from ase_bptt import load_potential, search_minima
from ase_bptt.datasets import si_defects
from ase_bptt.iterated_map import Status
from ase_bptt.pairs import RelaxationPair
from ase_bptt.pairs.structure_matching import same_structure
from ase_bptt.throughput import relax_all


def perfect(pairs: list[RelaxationPair]) -> Atoms:
    """The initial structure whose atoms are nearest to multiples of an eighth of the cell, which all sites are."""

    def off(atoms: Atoms) -> float:
        eighths = 8 * atoms.get_scaled_positions()
        return float(np.abs(eighths - eighths.round()).max())

    return min((pair.initial for pair in pairs), key=off)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--potential", default="mace-si")
    parser.add_argument("-n", type=int, default=20)
    parser.add_argument("--kinds", type=int, help="the first so many only")
    arguments = parser.parse_args()
    potential = load_potential(arguments.potential, device="cpu")
    kinds: dict[str, list[RelaxationPair]] = {}
    for pair in si_defects("all"):
        kinds.setdefault(pair.group, []).append(pair)
    settings = {"fmax": 0.02, "steps": 500}
    needed: list[int | None] = []
    lower, began, all_kinds = 0, time.monotonic(), list(kinds)[: arguments.kinds]
    for kind in all_kinds:
        reference = kinds[kind][0].relaxed
        ((_, end),) = relax_all(potential, [reference], **settings)
        if end.status is not Status.CONVERGED or not same_structure(reference, end.atoms):
            continue
        found = search_minima(potential, perfect(kinds[kind]), n=arguments.n, **settings)
        first = [min(m.starts) + 1 for m in found.minima if same_structure(m.atoms, end.atoms)]
        needed.append(min(first) if first else None)
        below = bool(found.minima) and found.minima[0].energy < end.atoms.get_potential_energy() - 0.01
        lower += below
        print(f"{kind:14} {found}: reference {f'from start {needed[-1]}' if first else 'not found'}"
              f"{', and a lower minimum' if below else ''}", flush=True)  # fmt: skip
    hits = [n for n in needed if n is not None]
    share = len(hits) / len(needed)
    print(
        f"{len(needed)} of {len(all_kinds)} kinds have a reference that is a minimum of {arguments.potential}\n"
        f"found with {arguments.n} starts each: {len(hits)}, {share:.0%} (wanted: 90 %)\n"
        f"found from the structure as given: {sum(n == 1 for n in hits)}; starts needed: median "
        f"{statistics.median(hits):.0f}, at most {max(hits)}\n"
        f"a minimum more than 0.01 eV lower: {lower}\n{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
