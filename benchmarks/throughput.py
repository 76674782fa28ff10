"""Many relaxations: structures per second, ours in batches, ASE's FIRE one after another, and torch-sim.

    python benchmarks/throughput.py [--torch-sim PYTHON] [--structures 64] [--batch 16] [--repeats 3] [--device cpu]

Rattled silicon cells of 8 to 64 atoms, FIRE by ASE's formulas to the same fmax, the same MACE file. All take turns in
each repeat, so that they see the same machine; ratios are of two that stand in one repeat, the medians are printed with
the smallest and the largest. PYTHON is that of an environment with torch-sim-atomistic 0.3.0 and mace-torch; without it
its rows stay empty. Its stop test comes every 5 frames, as is its default, and every frame. With --cells they are mixed
crystals of 1 to 16 atoms whose cells are free: ASE's FrechetCellFilter, and torch-sim's Frechet FIRE.

On a GPU, or with --training, `device_table.py` adds seconds per training step, peak memory, equality with the CPU, and
the share of time outside the model.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from device_table import print_device_table
from relaxers import Pass, Relaxer, TorchSim, ase, crystals, ours, rattled

from ase_bptt import Potential, load_potential
from ase_bptt.cells import CELLS
from ase_bptt.potentials import quiet

BATCHES, ALONE = "ase_bptt, in batches", "ase_bptt, one by one"
ASE = "ASE, one by one"
TORCH_SIM = {f"torch-sim, test every {every}": every for every in (5, 1)}
TOGETHER = 16
"""Structures at once for torch-sim, where --batch does not say."""


def processor() -> str:
    """The name of the CPU, or of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    names = [line for line in cpus.read_text().splitlines() if "model name" in line] if cpus.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def turns(relaxers: dict[str, Relaxer], repeats: int) -> dict[str, list[Pass]]:
    """All relaxers one after another, so many times."""
    found: dict[str, list[Pass]] = {name: [] for name in relaxers}
    for _ in range(repeats):
        for name, relaxer in relaxers.items():
            found[name].append(relaxer())
    return found


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):6.2f} [{min(values):.2f}, {max(values):.2f}]"


def rows(found: dict[str, list[Pass]], n: int) -> list[str]:
    """A row for each way: how fast, and how much it did."""
    reference = found[ASE][0]
    lines = [f"{'':28} structures a second     processor s   force calls   frames as ASE's   energies differ, eV"]
    for name in (BATCHES, ALONE, ASE, *TORCH_SIM):
        if name not in found:
            lines.append(name)
            continue
        passes = found[name]
        speed = spread([n / p.wall for p in passes])
        off = max(abs(a - b) for a, b in zip(passes[0].energies, reference.energies, strict=True))
        same = "" if passes[0].frames is None else f"{agreeing(passes[0].frames, reference.frames)} of {n}"
        lines.append(
            f"{name:28}{speed:>20} {statistics.median(p.processor for p in passes):14.1f} "
            f"{passes[0].force_calls:13} {same:>17} {off:21.0e}"
        )
    return lines


def agreeing(some: list[int], others: list[int]) -> int:
    return sum(a == b for a, b in zip(some, others, strict=True))


def ratios(found: dict[str, list[Pass]], arguments: argparse.Namespace) -> list[str]:
    """How many times as fast ours is, on the wall and by the processor, repeat by repeat."""
    to_ase, to_torch_sim = (1.8 if arguments.cells else 1.5, 1.0) if arguments.device == "cpu" else (20.0, 1.2)
    lines = [f"{BATCHES}, how many times as fast as           by the clock      by processor time"]
    for name, least in {ASE: to_ase, **dict.fromkeys(TORCH_SIM, to_torch_sim)}.items():
        if name not in found:
            continue
        pairs = list(zip(found[BATCHES], found[name], strict=True))
        wall, spent = (spread([getattr(b, by) / getattr(a, by) for a, b in pairs]) for by in ("wall", "processor"))
        lines.append(f"{name:46} {wall:>22} {spent:>22}   (wanted: at least {least})")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--potential", default="mace-si", help="a MACE")
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cells", action="store_true", help="crystals whose cells are relaxed, too")
    parser.add_argument("--structures", type=int, default=64)
    parser.add_argument("--batch", type=int, help="structures at once, of ours and of torch-sim's")
    parser.add_argument("--fmax", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch-sim", metavar="PYTHON")
    parser.add_argument("--training", action="store_true", help="the table of training steps on a CPU, too")
    return parser.parse_args()


def compare(potential: Potential, arguments: argparse.Namespace) -> None:
    structures = (crystals if arguments.cells else rattled)(arguments.structures)
    atoms = sum(map(len, structures))
    settings = {} if arguments.batch is None else {"batch_size": arguments.batch}
    free = [CELLS["full" if arguments.cells else "fixed"]] * len(structures)
    with tempfile.TemporaryDirectory() as folder:
        native = Path(folder) / "native.model"
        potential.save_native(native)
        relaxers = {
            BATCHES: ours(potential, structures, arguments.fmax, cells=free, **settings),
            ASE: ase(native, structures, arguments),
            ALONE: ours(potential, structures, arguments.fmax, cells=free, batch_size=1),
        }
        theirs = None
        if arguments.torch_sim:
            together = (arguments.batch or TOGETHER) * atoms / len(structures)
            theirs = TorchSim(native, structures, max(together, max(map(len, structures))), arguments)
            relaxers |= {name: theirs.relaxer(every) for name, every in TORCH_SIM.items()}
        ours(potential, structures[:2], arguments.fmax, cells=free[:2])()  # what is compiled or allocated at first use
        found = turns(relaxers, arguments.repeats)
        if theirs:
            theirs.close()
    print(
        f"{len(structures)} structures, {atoms} atoms; {arguments.potential}, {arguments.dtype}; {processor()}, "
        f"{torch.get_num_threads()} threads; FIRE to {arguments.fmax} eV/Å; medians of {arguments.repeats}"
    )
    print("\n".join(rows(found, len(structures)) + ratios(found, arguments)), flush=True)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    with quiet():
        potential = load_potential(arguments.potential, dtype=arguments.dtype, device=arguments.device)
    compare(potential, arguments)
    if arguments.device != "cpu" or arguments.training:
        print_device_table(potential, arguments.device)


if __name__ == "__main__":
    main()
