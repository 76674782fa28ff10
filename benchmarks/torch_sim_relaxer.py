"""Relaxes structures with torch-sim, as often as it is asked to; `throughput.py` starts it in torch-sim's environment.

    PYTHON benchmarks/torch_sim_relaxer.py MODEL STRUCTURES [options]

Each line on standard input is one request, the frames between two of its stop tests; the answer is one line of JSON.
Where cells are fixed its MACE model is used without the stress, so that it does only what the others do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings

import torch
import torch_sim
from ase.io import read
from torch_sim.autobatching import InFlightAutoBatcher
from torch_sim.models.mace import MaceModel


class Counted(MaceModel):
    """Counts the structures whose forces were computed."""

    calls = 0

    def forward(self, state):
        self.calls += state.n_systems
        # It looks at the elements alone to see whether structures have been swapped, and many have the same.
        known = getattr(self, "system_idx", None)
        if known is not None and not torch.equal(known, state.system_idx):
            self.atomic_numbers = state.atomic_numbers[:0]
        return super().forward(state)


def relax(model: Counted, structures: list, every: int, arguments: argparse.Namespace) -> dict:
    model.calls, wall, processor = 0, time.perf_counter(), time.process_time()
    batcher = InFlightAutoBatcher(model, memory_scales_with="n_atoms", max_memory_scaler=arguments.atoms)
    state = torch_sim.optimize(
        structures,
        model,
        optimizer=torch_sim.optimizers.frechet_cell_fire if arguments.cells else torch_sim.optimizers.fire,
        md_flavor="ase_fire",
        convergence_fn=torch_sim.generate_force_convergence_fn(arguments.fmax, include_cell_forces=arguments.cells),
        max_steps=10**6,
        steps_between_swaps=every,
        autobatcher=batcher,
    )
    energies = state.energy.tolist()
    return {
        "wall": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "force_calls": model.calls,
        "energies": energies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("structures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fmax", type=float, default=0.05)
    parser.add_argument("--cells", action="store_true", help="relax the cells, too")
    parser.add_argument("--atoms", type=float, default=512, help="atoms at once")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    module = torch.load(arguments.model, map_location=device, weights_only=False)
    model = Counted(module, device=device, dtype=getattr(torch, arguments.dtype), compute_stress=arguments.cells)
    structures = read(arguments.structures, ":")
    relax(model, structures[:2], 5, arguments)  # what is compiled or allocated at first use
    for line in sys.stdin:
        print(json.dumps(relax(model, structures, int(line), arguments)), flush=True)


if __name__ == "__main__":
    main()
