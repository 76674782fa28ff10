"""The same relaxation with our classes and with the family's own calculator and ASE's optimizer, side by side.

    python benchmarks/vs_ase.py [--repeats 7] [--steps 20] [--device cpu] [--families sevennet nequip mattersim]

Rattled silicon of 8 and 64 atoms, FIRE, the same number of steps from the same start; TorchCalculator and
BPTTOptimizer against the calculator of the family with ASE's FIRE: mace-si in float64, and in float32 CHGNet 0.3.0,
SevenNet's 7net-0, and with random weights a MACE, a NequIP and a MatterSim of the sizes of published ones (medium of
MP-0; preset S; 1M), and of their default sizes matgl's TensorNet (matgl) and M3GNet (m3gnet) and metatrain's PET as
metatomic exports it (metatomic). Each needs its environment, and metatomic metatrain, too.
The two take turns in one process, so that both see the same machine; the median of the paired ratios is printed, with
the smallest and the largest. Below it, where our time goes. On a busy machine, --processor counts the time that this
process computes instead of the time on the wall.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.optimize import FIRE

from ase_bptt import BPTTOptimizer, TorchCalculator, load_potential, save_potential
from ase_bptt.potentials import quiet

SIZES = {8: (1, 1, 1), 64: (2, 2, 2)}
clock = time.perf_counter


def start(size: int) -> Atoms:
    atoms = bulk("Si", a=5.469, cubic=True) * SIZES[size]
    atoms.rattle(0.1, seed=1)
    return atoms


def mace(device: str) -> tuple[Callable, Callable]:
    from mace.calculators import MACECalculator

    potential = load_potential("mace-si", dtype="float64")
    with tempfile.TemporaryDirectory() as folder:
        save_potential(potential, folder)
        theirs = MACECalculator(str(Path(folder) / "mace.model"), device=device, default_dtype="float64")
    potential.to(device)
    return lambda: TorchCalculator(potential), lambda: theirs


def mace_medium(device: str) -> tuple[Callable, Callable]:
    from e3nn.o3 import Irreps
    from mace.calculators import MACECalculator
    from mace.modules import ScaleShiftMACE, interaction_classes

    torch.manual_seed(0)
    layer = interaction_classes["RealAgnosticResidualInteractionBlock"]
    model = ScaleShiftMACE(
        r_max=6.0,
        num_bessel=10,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=layer,
        interaction_cls_first=layer,
        num_interactions=2,
        num_elements=89,
        hidden_irreps=Irreps("128x0e + 128x1o"),
        MLP_irreps=Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.full(89, -5.0),
        avg_num_neighbors=61.0,
        atomic_numbers=list(range(1, 90)),
        correlation=3,
        radial_MLP=[64, 64, 64],
        atomic_inter_scale=0.1,
        atomic_inter_shift=0.0,
    ).to(device)
    theirs = MACECalculator(models=[model], device=device, default_dtype="float32")
    potential = load_potential(model, device=device)
    return lambda: TorchCalculator(potential), lambda: theirs


def chgnet(device: str) -> tuple[Callable, Callable]:
    from chgnet.model.dynamics import CHGNetCalculator

    potential = load_potential("chgnet", device=device)
    theirs = CHGNetCalculator(use_device=device)
    return lambda: TorchCalculator(potential), lambda: theirs


def sevennet(device: str) -> tuple[Callable, Callable]:
    from sevenn.calculator import SevenNetCalculator

    potential = load_potential("sevennet:7net-0", device=device)
    theirs = SevenNetCalculator("7net-0", device=device)
    return lambda: TorchCalculator(potential), lambda: theirs


def mattersim(device: str) -> tuple[Callable, Callable]:
    from mattersim.forcefield import MatterSimCalculator, Potential
    from mattersim.forcefield.m3gnet.m3gnet import M3Gnet

    torch.manual_seed(0)
    theirs = MatterSimCalculator(Potential(M3Gnet(num_blocks=3, device=device), device=device), device=device)
    potential = load_potential(theirs.potential.model, device=device)
    return lambda: TorchCalculator(potential), lambda: theirs


def nequip(device: str) -> tuple[Callable, Callable]:
    from nequip.integrations.ase import NequIPCalculator
    from nequip.integrations.utils import basic_transforms
    from nequip.model import ModelFromPackage

    from ase_bptt.potentials.nequip import NequIP

    settings = {
        "_target_": "nequip.model.PresetNequIPGNNModel",
        "preset": "S",
        "type_names": ["Si"],
        "r_max": 6.0,
        "avg_num_neighbors": 50.0,
    }
    potential = NequIP.from_config(settings).to(device)
    with tempfile.TemporaryDirectory() as folder:
        save_potential(potential, folder)
        model = ModelFromPackage(str(Path(folder) / potential.native_name))["sole_model"].eval()
    transforms = basic_transforms(model.metadata, float(model.metadata["r_max"]), ["Si"], {"Si": "Si"})
    theirs = NequIPCalculator(model, device=device, transforms=transforms)
    return lambda: TorchCalculator(potential), lambda: theirs


def matgl(device: str) -> tuple[Callable, Callable]:
    return of_matgl("TensorNet", device)


def m3gnet(device: str) -> tuple[Callable, Callable]:
    return of_matgl("M3GNet", device)


def of_matgl(network: str, device: str) -> tuple[Callable, Callable]:
    from matgl import models
    from matgl.apps.pes import Potential
    from matgl.ext.ase import PESCalculator

    torch.manual_seed(0)
    plain = {"use_warp": False} if network == "TensorNet" else {}
    model = getattr(models, network)(element_types=("Si",), is_intensive=False, **plain)
    potential = load_potential(Potential(model), device=device)
    theirs = PESCalculator(potential.model, stress_unit="eV/A3")
    return lambda: TorchCalculator(potential), lambda: theirs


def metatomic(device: str) -> tuple[Callable, Callable]:
    from metatomic_ase import MetatomicCalculator
    from metatrain.pet import PET
    from metatrain.utils.architectures import get_default_hypers
    from metatrain.utils.data import DatasetInfo
    from metatrain.utils.data.target_info import get_energy_target_info

    torch.manual_seed(0)
    target = get_energy_target_info("energy", {"quantity": "energy", "unit": "eV"}, add_position_gradients=True)
    info = DatasetInfo(length_unit="angstrom", atomic_types=[14], targets={"energy": target})
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "pet.pt")
        PET(get_default_hypers("pet")["model"], info).eval().export().save(file)
        theirs = MetatomicCalculator(file, device=device)
        potential = load_potential(file, trust=True, device=device)
    return lambda: TorchCalculator(potential), lambda: theirs


MADE = (mace, mace_medium, chgnet, sevennet, nequip, mattersim, matgl, m3gnet, metatomic)
FAMILIES = {made.__name__: made for made in MADE}


def seconds(atoms: Atoms, optimizer: type, steps: int) -> tuple[float, np.ndarray]:
    """Time of so many steps, and where they end."""
    with optimizer(atoms, logfile=None) as run:
        began = clock()
        run.run(fmax=0.0, steps=steps)
        return clock() - began, atoms.positions


def pair(make: tuple[Callable, Callable], size: int, steps: int) -> tuple[float, float, float]:
    """Our seconds, theirs, and by how far the two ends differ."""
    atoms = [start(size), start(size)]
    for a, calculator in zip(atoms, make, strict=True):
        a.calc = calculator()
        a.calc.reset()
    (ours, x), (theirs, y) = (
        seconds(a, optimizer, steps) for a, optimizer in zip(atoms, (BPTTOptimizer, FIRE), strict=True)
    )
    return ours, theirs, float(np.abs(x - y).max())


def profile(make: tuple[Callable, Callable], size: int, steps: int) -> str:
    """The share of our time inside the model's energy and gradient, in the neighbour list, and in the rest."""
    atoms = start(size)
    atoms.calc = make[0]()
    spent = {"model": 0.0, "neighbours": 0.0}
    calculator = atoms.calc
    results, neighbors = calculator.potential.results, calculator._neighbors

    def timed(name: str, function: Callable) -> Callable:
        def call(*arguments):
            began = clock()
            found = function(*arguments)
            spent[name] += clock() - began
            return found

        return call

    calculator.potential.results = timed("model", results)
    calculator._neighbors = timed("neighbours", neighbors)
    whole, _ = seconds(atoms, BPTTOptimizer, steps)
    del calculator.potential.results
    shares = ", ".join(f"{name} {100 * value / whole:.0f} %" for name, value in spent.items())
    return f"{shares}, all else {100 * (1 - sum(spent.values()) / whole):.0f} %"


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--families", nargs="+", default=["mace", "chgnet"], choices=FAMILIES)
    parser.add_argument("--processor", action="store_true", help="count the time of this process, not that on the wall")
    arguments = parser.parse_args()
    if arguments.processor:
        clock = time.process_time
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("family     atoms   ours: s   theirs: s   ratio [least, most]    ends differ by")
    for family in arguments.families:
        with quiet():
            make = FAMILIES[family](arguments.device)
        for size in SIZES:
            pair(make, size, 2)  # what is compiled or allocated at first use
            found = [pair(make, size, arguments.steps) for _ in range(arguments.repeats)]
            ours, theirs = (statistics.median(column) for column in list(zip(*found, strict=True))[:2])
            ratios = sorted(a / b for a, b, _ in found)
            print(
                f"{family:11} {size:4}   {ours:7.2f}   {theirs:9.2f}   {statistics.median(ratios):.2f} "
                f"[{ratios[0]:.2f}, {ratios[-1]:.2f}]      {max(d for *_, d in found):.0e} Å\n"
                f"           of ours: {profile(make, size, arguments.steps)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
