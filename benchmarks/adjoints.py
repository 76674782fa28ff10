"""What each adjoint costs, side by side in one run: time, peak memory, and how far it is from exact.

    python benchmarks/adjoints.py [--potential mace-si] [--device cpu] [--parts replay cell memory implicit guided ways]

A silicon cell of 64 sites with a vacancy (63 atoms), in float64, one thread. `--cells 1` takes 8 sites, for slow
potentials. The parts:

replay     time of a frame, forward and backward, in units of one force call of the same model with frozen weights, and
           beside a bare loop written by hand over the same module; cases take turns, medians are printed
cell       time of a frame of Replay in which the cell moves, too, in units of one call for forces and stress
memory     peak memory above that of the loaded potential, each case in a process of its own
implicit   relaxed by BFGS, with the implicit gradient, beside gradient descent to the same fmax with Replay
guided     Guided beside FullTape over the same relaxation of 75 frames
ways       every adjoint on one relaxation: time, memory, and its gradient's angle to the exact one
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ase.build import bulk

from ase_bptt import Relaxation, Structures, adjoints, load_potential, relax, steppers
from ase_bptt.neighbors import NeighborList

STEP = 0.03
"""Å^2/eV, below the stability limit of silicon."""
LOOSE = 0.01
"""eV/Å at which relaxations that need a minimum stop, where nothing else is said."""
WAYS = ["full", "replay", "replay:differences", "replay:10", "truncated:10", "one-step", "implicit", "guided:10"]


class Case:
    """A potential and a structure."""

    def __init__(self, arguments: argparse.Namespace):
        torch.set_num_threads(1)
        self.potential = load_potential(arguments.potential, dtype="float64", device=arguments.device)
        atoms = bulk("Si", a=5.469, cubic=True) * ((arguments.cells,) * 3)
        del atoms[0]
        atoms.rattle(0.05, seed=1)
        self.start = Structures.from_atoms(atoms, dtype=self.potential.dtype, device=self.potential.device)
        self.loaded = self.resident()
        self.gradient("replay", 2)  # what is compiled or allocated at first use

    def relax(self, adjoint, frames: int, *, fmax: float = 0.0, stepper=None) -> Relaxation:
        stepper = stepper or steppers.GradientDescent(step_size=STEP)
        return relax(self.potential, self.start, stepper=stepper, fmax=fmax, steps=frames, adjoint=adjoint)

    def loss(self, run: Relaxation) -> torch.Tensor:
        """Changes when atoms move against each other, not when all move together."""
        moved = run.positions - self.start.positions
        loss = (moved - moved.mean(0)).square().sum()
        return loss if run.early is None else loss + (run.early.positions - self.start.positions).square().sum()

    def gradient(self, adjoint, frames: int, **how) -> tuple[torch.Tensor, Relaxation, dict[str, float]]:
        """dL/dweights in one vector, the relaxation, and the seconds forward and backward."""
        self.potential.zero_grad()
        began = clock()
        run = self.relax(adjoint, frames, **how)
        between = clock()
        self.loss(run).backward()
        self.finish()
        seconds = {"forward": between - began, "backward": clock() - between}
        weights = [p for p in self.potential.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in weights]
        return torch.cat(grads).cpu(), run, seconds

    def peak(self) -> float:
        """Most memory used so far, MiB."""
        if self.potential.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        # Not getrusage: a child process begins with its parent's peak.
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    def resident(self) -> float:
        """Memory in use now, MiB, from which the peak is counted."""
        if self.potential.device.type == "cuda":
            return torch.cuda.memory_allocated() / 2**20
        Path("/proc/self/clear_refs").write_text("5")  # what loading took for a while is no peak of ours
        return self.peak()

    def finish(self) -> None:
        if self.potential.device.type == "cuda":
            torch.cuda.synchronize()

    def force_calls(self, n: int) -> None:
        """Force calls with frozen weights, neighbour list included."""
        neighbors = NeighborList(self.potential.cutoff)
        for _ in range(n):
            self.potential.energy_and_forces(self.start, neighbors(self.start))
        self.finish()

    def stress_calls(self, n: int) -> None:
        """Calls for forces and stress with frozen weights, neighbour list included."""
        neighbors = NeighborList(self.potential.cutoff)
        for _ in range(n):
            self.potential.results(self.start, neighbors(self.start))
        self.finish()

    def with_cell(self, frames: int) -> None:
        """Replay through positions and cell, forward and backward."""
        self.potential.zero_grad()
        stepper = steppers.GradientDescent(step_size=STEP)
        run = relax(self.potential, self.start, stepper=stepper, fmax=0.0, steps=frames, adjoint="replay", cell="full")
        (self.loss(run) + run.cells.square().sum()).backward()
        self.finish()

    def by_hand(self, frames: int) -> torch.Tensor:
        """The bare loop: gradient descent, positions stored, each frame recomputed in the backward pass."""
        potential, start, neighbors = self.potential, self.start, NeighborList(self.potential.cutoff)
        weights = [p for p in potential.parameters() if p.requires_grad]

        def forces(x: torch.Tensor, graph: bool) -> torch.Tensor:
            now = start.replace(positions=x.detach().requires_grad_())
            for p in weights:
                p.requires_grad_(graph)
            energy = potential(now, neighbors(now)).energy.sum()
            (gradient,) = torch.autograd.grad(energy, now.positions, create_graph=graph)
            return now.positions, -gradient

        x, stored = start.positions, []
        for _ in range(frames):
            stored.append(x)
            x = x + STEP * forces(x, False)[1]
        moved = x - start.positions
        adjoint, total = 2 * (moved - moved.mean(0)), None
        for x in reversed(stored):
            at, force = forces(x, True)
            to_x, *to_weights = torch.autograd.grad(at + STEP * force, [at, *weights], adjoint, allow_unused=True)
            adjoint = to_x
            found = [torch.zeros_like(w) if g is None else g for g, w in zip(to_weights, weights, strict=True)]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        self.finish()
        return torch.cat([g.flatten() for g in total]).cpu()


def clock() -> float:
    """Seconds: of the processor, which other work does not disturb, or on the wall beside a GPU."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def seconds(work: Callable[[], object]) -> float:
    began = clock()
    work()
    return clock() - began


def replay(case: Case, arguments: argparse.Namespace) -> None:
    frames, found = arguments.frames, {"call": [], "hand": [], "replay": [], "differences": [], "full": []}
    for _ in range(arguments.repeats):
        found["call"].append(seconds(lambda: case.force_calls(frames)))
        found["hand"].append(seconds(lambda: case.by_hand(frames)))
        found["replay"].append(seconds(lambda: case.gradient("replay", frames)))
        found["differences"].append(seconds(lambda: case.gradient("replay:differences", frames)))
        found["full"].append(seconds(lambda: case.gradient("full", frames)))
    call, by_hand, ours, quick, full = (statistics.median(v) for v in found.values())
    exact = case.by_hand(frames)
    error, near = (
        float((case.gradient(way, frames)[0] - exact).norm() / exact.norm()) for way in ("replay", "replay:differences")
    )
    print(f"replay: {frames} frames, {case.start.n_atoms} atoms, medians of {arguments.repeats}")
    print(f"  one force call, weights frozen   {call / frames * 1e3:8.1f} ms")
    print(f"  Replay, a frame both ways        {ours / call:8.2f} force calls  (wanted: at most 4.3)")
    print(f"  bare loop by hand                {by_hand / call:8.2f} force calls")
    ratio = statistics.median(a / b for a, b in zip(found["replay"], found["hand"], strict=True))
    print(f"  Replay / bare loop               {ratio:8.3f}              (wanted: at most 1.05)")
    print(f"  Replay by differences            {quick / call:8.2f} force calls")
    print(f"  FullTape                         {full / call:8.2f} force calls")
    print(f"  gradients of Replay and of the bare loop differ by {error:.1e}, by differences by {near:.1e}")


def cell(case: Case, arguments: argparse.Namespace) -> None:
    frames, calls, found = arguments.frames, [], []
    case.with_cell(2)  # what is compiled or allocated at first use
    for _ in range(arguments.repeats):
        calls.append(seconds(lambda: case.stress_calls(frames)))
        found.append(seconds(lambda: case.with_cell(frames)))
    ratios = [a / b for a, b in zip(found, calls, strict=True)]
    print(f"cell: {frames} frames, {case.start.n_atoms} atoms, median of {arguments.repeats}")
    print(f"  one call for forces and stress   {statistics.median(calls) / frames * 1e3:8.1f} ms")
    print(
        f"  Replay, a frame both ways        {statistics.median(ratios):8.2f} such calls "
        f"[{min(ratios):.2f}, {max(ratios):.2f}]  (wanted: at most 4.6)"
    )


def memory(arguments: argparse.Namespace, adjoint: str, frames: int) -> dict[str, float]:
    """The figures of one case, in a process of its own."""
    command = [sys.executable, __file__, "--potential", arguments.potential, "--cells", str(arguments.cells)]
    command += ["--device", arguments.device, "--one", adjoint, str(frames)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def one(case: Case, adjoint: str, frames: int) -> dict[str, float]:
    made = adjoints.Guided(20, tail=None) if adjoint == "guided:20" else adjoint
    fmax = LOOSE if adjoint == "full:75" else 0.0
    made = "full" if adjoint == "full:75" else made
    if adjoints.make_adjoint(made).needs_minimum:
        fmax = LOOSE
    _, run, spent = case.gradient(made, frames, fmax=fmax)
    return spent | {"mib": case.peak() - case.loaded, "frames": int(run.nsteps[0])}


def memories(arguments: argparse.Namespace) -> None:
    print("memory: MiB above the loaded potential, each in a process of its own")
    cases = [("full", 10), ("full", 50), ("replay", 10), ("replay", 1000), ("replay:20", 1000)]
    found = {}
    for adjoint, frames in cases:
        found[adjoint, frames] = memory(arguments, adjoint, frames)["mib"]
        print(f"  {adjoint:12} {frames:5} frames   {found[adjoint, frames]:8.0f}", flush=True)
    more = found["replay", 1000] - found["replay", 10]
    print(f"  Replay, 1000 frames against 10: {more:.0f} MiB more (wanted: at most 57, which are 60 MB)")


def implicit(case: Case, arguments: argparse.Namespace) -> None:
    fmax, found = 1e-4, {}
    for name, adjoint, how in (
        ("Implicit, by BFGS", "implicit", {"stepper": steppers.BFGS()}),
        ("Replay, by gradient descent", "replay", {}),
    ):
        gradient, run, spent = case.gradient(adjoint, 5000, fmax=fmax, **how)
        found[name] = (gradient, run.positions.detach(), sum(spent.values()))
        solves = "".join(f", {s.status.value} in {s.iterations} iterations" for s in run.solves)
        print(
            f"  {name:28} {spent['forward']:7.1f} s forward {spent['backward']:7.1f} s backward, "
            f"{int(run.nsteps[0])} frames, {run.status[0].value}{solves}"
        )
    (g, x, t), (g_exact, x_exact, t_exact) = found.values()
    apart = float((x - x.mean(0) - x_exact + x_exact.mean(0)).norm(dim=1).max())
    print(f"implicit: both to fmax {fmax}, ends {apart:.1e} Å apart at the farthest atom")
    print(f"  time ratio {t / t_exact:.3f} (wanted: at most 0.2)")
    print(f"  cosine of the gradients {cosine(g, g_exact):.5f} (wanted: at least 0.999)")


def guided(arguments: argparse.Namespace) -> None:
    full, ours = memory(arguments, "full:75", 75), memory(arguments, "guided:20", 75)
    print("guided: K = 20 with the tail by the same gradient descent, beside FullTape over the same relaxation")
    for name, found in (("FullTape", full), ("Guided", ours)):
        times = f"{found['forward']:6.1f} s forward {found['backward']:6.1f} s backward"
        print(f"  {name:10} {times} {found['mib']:7.0f} MiB, {found['frames']} frames")
    print(f"  memory: {full['mib'] / ours['mib']:.1f} times less (wanted: at least 3.5)")


def ways(case: Case, arguments: argparse.Namespace) -> None:
    exact, _, _ = case.gradient("full", 40)
    print("ways: 40 frames of gradient descent, or to fmax 0.01; cosine to the exact gradient of 40 frames")
    for name in WAYS:
        to_the_end = adjoints.make_adjoint(name).needs_minimum
        gradient, run, spent = case.gradient(name, 300 if to_the_end else 40, fmax=LOOSE if to_the_end else 0.0)
        mib = memory(arguments, name, int(run.nsteps[0]))["mib"]
        print(
            f"  {name:14} {int(run.nsteps[0]):4} frames  {spent['forward']:6.2f} + {spent['backward']:6.2f} s  "
            f"{mib:6.0f} MiB  cosine {cosine(gradient, exact):7.4f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--potential", default="mace-si")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cells", type=int, default=2, help="cubic cells along each axis")
    parser.add_argument("--frames", type=int, default=30, help="of the part replay")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["replay", "cell", "memory", "implicit", "guided", "ways"])
    parser.add_argument("--one", nargs=2, metavar=("ADJOINT", "FRAMES"), help="measure one case and print JSON")
    arguments = parser.parse_args()
    case = Case(arguments)
    if arguments.one:
        print(json.dumps(one(case, arguments.one[0], int(arguments.one[1]))))
        return
    parts = {
        "replay": lambda: replay(case, arguments),
        "cell": lambda: cell(case, arguments),
        "memory": lambda: memories(arguments),
        "implicit": lambda: implicit(case, arguments),
        "guided": lambda: guided(arguments),
        "ways": lambda: ways(case, arguments),
    }
    for name in arguments.parts:
        parts[name]()


if __name__ == "__main__":
    main()
