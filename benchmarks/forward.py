"""What could make a frame faster: frozen weights, single precision, fewer gradients, torch.compile, side by side.

    python benchmarks/forward.py [--potentials mace-si chgnet] [--cells 2] [--repeats 7] [--compile]

A silicon cell with a vacancy (63 atoms), one thread, processor time; all cases take turns, medians are printed with the
smallest and the largest, and what each is of the force call with frozen weights.

frozen     energy and forces as `Potential.energy_and_forces` gives them without a graph
live       the same with weights that require gradients
float32    the same in single precision; errors of the forces against double precision, frames of FIRE to 0.05 eV/Å
exact      forces with a graph, and the product of a vector with their derivatives by positions, weights: a frame back
differences  the same product from two gradients of the energy, by positions and weights, at small displacements
           along the vector and against it (central differences), and by how much of its length it is off
compiled   frozen, through torch.compile (--compile: takes minutes; a MACE)

--batches: instead, what an atom costs in batches of more and more cells, in the program and in the system.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from ase.build import bulk
from torch import Tensor

from ase_bptt import Potential, load_potential, relax
from ase_bptt.neighbors import NeighborList
from ase_bptt.potentials import quiet
from ase_bptt.potentials.mace import MACE

AWAY = (1e-3, 1e-4, 1e-5)
"""Å that the farthest atom is moved for a difference."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Cells of 32 atoms in a batch."""


class Case:
    """A potential at one geometry, where nothing is to be found but energies and gradients."""

    def __init__(self, potential: Potential, cells: int):
        atoms = bulk("Si", a=5.469, cubic=True) * ((cells,) * 3)
        del atoms[0]
        atoms.rattle(0.05, seed=1)
        self.potential, self.atoms = potential, atoms
        self.structures = potential.batch(atoms)
        # The same where atoms are moved a little: near the cutoff a pair counts for nothing.
        self.pairs = NeighborList(potential.cutoff)(self.structures)
        self.weights = [p for p in potential.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        self.vector = torch.randn(len(atoms), 3, generator=generator).to(self.structures.positions)

    def frozen(self) -> Tensor:
        return self.potential.energy_and_forces(self.structures, self.pairs)[1]

    def live(self) -> Tensor:
        return -self.gradients(self.structures.positions, weights=False)[0]

    def gradients(self, positions: Tensor, weights: bool = True) -> Sequence[Tensor]:
        """dE/dX, and dE/dweights."""
        at = positions.detach().requires_grad_()
        energy = self.potential(self.structures.replace(positions=at), self.pairs).energy.sum()
        return torch.autograd.grad(energy, [at, *self.weights * weights], materialize_grads=True)

    def exact(self) -> Tensor:
        now = self.structures.replace(positions=self.structures.positions.detach().requires_grad_())
        _, forces = self.potential.energy_and_forces(now, self.pairs, create_graph=True)
        inputs = [now.positions, *self.weights]
        return flat(torch.autograd.grad(forces, inputs, self.vector, materialize_grads=True))

    def differences(self, away: float) -> Tensor:
        step = away / self.vector.norm(dim=1).max()
        ahead, behind = (flat(self.gradients(self.structures.positions + s * self.vector)) for s in (step, -step))
        return (behind - ahead) / (2 * step)

    def frames(self) -> int:
        with torch.no_grad():
            return int(relax(self.potential, self.atoms, fmax=0.05, steps=300).nsteps[0])


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def compiled(potential: Potential, cells: int) -> tuple[Case, float]:
    """A MACE in a form that torch can compile, and the processor's seconds until its second call is done."""
    from mace.tools.compile import prepare

    usual = torch.get_default_dtype()
    torch.set_default_dtype(potential.dtype)
    with quiet():
        module = prepare(lambda: MACE.from_config(potential.config()).model)()
    torch.set_default_dtype(usual)
    # Weights of zero that hold a place are not made in this form.
    module.load_state_dict(potential.model.state_dict(), strict=False)
    case = Case(MACE(module.requires_grad_(False)), cells)
    case.potential.model.forward = torch.compile(module.forward, dynamic=True)
    began = time.process_time()
    case.frozen(), case.frozen()
    return case, time.process_time() - began


def turns(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each, in turns."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(-1, repeats):
        for name, work in cases.items():
            began = time.process_time()
            work()
            if repeat >= 0:  # what is compiled or allocated at first use does not count
                found[name].append(time.process_time() - began)
    return found


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def table(name: str, arguments: argparse.Namespace) -> list[str]:
    double, single = (Case(load_potential(name, dtype=d), arguments.cells) for d in ("float64", "float32"))
    cases = {"frozen": double.frozen, "live": double.live, "float32": single.frozen, "exact": double.exact}
    cases |= {"exact, float32": single.exact, "differences": lambda: double.differences(AWAY[-1])}
    notes = {"float32": f"forces {(single.frozen().double() - double.frozen()).abs().max():.0e} eV/Å off"}
    notes["float32"] += f", {single.frames()} frames, in float64 {double.frames()}"
    exact = double.exact()
    notes["exact, float32"] = f"{off(single.exact(), exact):.0e} off"
    notes["differences"] = "; ".join(f"{off(double.differences(a), exact):.0e} off at {a:g} Å" for a in AWAY)
    if arguments.compile and isinstance(double.potential, MACE):
        case, seconds = compiled(double.potential, arguments.cells)
        cases["compiled"] = case.frozen
        apart = (case.frozen() - double.frozen()).abs().max()
        notes["compiled"] = f"forces {apart:.0e} eV/Å off, compiled in {seconds:.0f} s"
    found = turns(cases, arguments.repeats)
    lines = [f"{name}, {len(double.atoms)} atoms, {len(double.pairs.i)} pairs; medians of {arguments.repeats}"]
    for case, times in found.items():
        shares = sorted(t / f for t, f in zip(times, found["frozen"], strict=True))
        lines.append(
            f"  {case:16} {1e3 * statistics.median(times):8.1f} ms   {statistics.median(shares):5.2f} "
            f"[{shares[0]:.2f}, {shares[-1]:.2f}] of frozen   {notes.get(case, '')}"
        )
    return lines


def batches(name: str, arguments: argparse.Namespace) -> list[str]:
    """Milliseconds an atom, of the processor, medians; pages of memory that the system had to give, for each call."""
    potential = load_potential(name, dtype="float64")
    prepared = []
    for n in BATCHES:
        cells = [bulk("Si", a=5.469, cubic=True) * (2, 2, 1) for _ in range(n)]
        for k, atoms in enumerate(cells):
            atoms.rattle(0.1, seed=k)
        structures = potential.batch(cells)
        prepared.append((structures, NeighborList(potential.cutoff)(structures), []))
    for _ in range(arguments.repeats + 1):
        for structures, pairs, found in prepared:
            before = resource.getrusage(resource.RUSAGE_SELF)
            potential.energy_and_forces(structures, pairs)
            after = resource.getrusage(resource.RUSAGE_SELF)
            found.append(
                [getattr(after, what) - getattr(before, what) for what in ("ru_utime", "ru_stime", "ru_minflt")]
            )
    lines = [f"{name}, float64, cells of 32 atoms; a force call, medians of {arguments.repeats}"]
    lines.append("  atoms   pairs   ms an atom: program   system   both    fresh pages")
    for structures, pairs, found in prepared:
        program, system, pages = (statistics.median(column) for column in zip(*found[1:], strict=True))
        program, system = 1e3 * program / structures.n_atoms, 1e3 * system / structures.n_atoms
        lines.append(
            f"  {structures.n_atoms:5} {len(pairs.i):7} {program:21.3f} {system:8.3f} {program + system:6.3f} "
            f"{pages:14.0f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--potentials", nargs="+", default=["mace-si", "chgnet"])
    parser.add_argument("--cells", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batches", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in arguments.potentials:
        print("\n".join((batches if arguments.batches else table)(name, arguments)), flush=True)


if __name__ == "__main__":
    main()
