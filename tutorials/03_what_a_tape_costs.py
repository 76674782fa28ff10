"""What the gradient through a relaxation costs: time and memory of FullTape and Replay.

    python tutorials/03_what_a_tape_costs.py

A silicon cell of 15 atoms around a vacancy is relaxed for 5 to 40 frames, and the distance that it moved is
differentiated with respect to the weights, once with the graph of every frame kept (FullTape), once with the
frames recomputed in the backward pass (Replay, the default). Prints time and memory of both, whether the two
gradients agree, a check by a finite difference, what Replay stores of a frame, and how much the end still depends
on the start after more and more frames.

On larger cells the difference grows: benchmarks/adjoints.py measures 63 atoms. Linux and macOS
only, since the peak memory of a process comes from the operating system.
"""

import resource
import sys
import time

import torch
from ase.build import bulk

from ase_bptt import Structures, load_potential, relax
from ase_bptt.adjoints import FullTape, Replay
from ase_bptt.steppers import GradientDescent

torch.set_num_threads(1)
potential = load_potential("mace-si", dtype="float64")
atoms = bulk("Si", a=5.469, cubic=True) * (2, 1, 1)
del atoms[0]
atoms.rattle(0.05, seed=1)
start = Structures.from_atoms(atoms)
weights = list(potential.parameters())


def moved(adjoint, frames):
    """The squared distance that the atoms moved in so many frames, in Å^2, and the relaxation."""
    run = relax(potential, start, stepper=GradientDescent(step_size=0.02), fmax=0.0, steps=frames, adjoint=adjoint)
    return (run.positions - start.positions).square().sum(), run


def gradient(adjoint, frames):
    """Its gradient with respect to all weights, in one vector."""
    distance, _ = moved(adjoint, frames)
    found = torch.autograd.grad(distance, weights, allow_unused=True)
    return torch.cat([torch.zeros_like(w).flatten() if g is None else g.flatten() for w, g in zip(weights, found)])


def memory():
    """The most memory that this process ever held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# 1. Side by side. The peak of a process never falls, so the cheap runs go first, and each number of
#    MiB is what the run needed above the loaded potential.
FRAMES = (5, 10, 20, 40)
gradient(Replay(), 2)  # what is compiled at the first use is compiled now
loaded = memory()
seconds, mib, gradients = {}, {}, {}
for adjoint in (Replay(), FullTape()):
    for frames in FRAMES:
        began = time.perf_counter()
        gradients[adjoint.name, frames] = gradient(adjoint, frames)
        seconds[adjoint.name, frames] = time.perf_counter() - began
        mib[adjoint.name, frames] = memory() - loaded

print("frames   FullTape            Replay              gradients differ by less than 1e-12")
for frames in FRAMES:
    full, replay = gradients["full", frames], gradients["replay", frames]
    same = (full - replay).norm() < 1e-12 * full.norm()
    columns = "   ".join(f"{seconds[name, frames]:5.1f} s {mib[name, frames]:5.0f} MiB" for name in ("full", "replay"))
    print(f"{frames:6}   {columns}   {'yes' if same else 'no'}")
    assert same

# 2. The tape grows with every frame, Replay does not; both take time in proportion to the frames.
growth = (mib["full", 40] - mib["full", 20]) / 20
print(f"a frame more costs the tape {growth:.1f} MiB")
assert mib["full", 40] > 1.5 * mib["full", 20]
assert mib["replay", 40] < 0.2 * mib["full", 40]

# 3. A check: along one direction in the weights, the gradient agrees with a finite difference.
along = [torch.randn(w.shape, generator=torch.Generator().manual_seed(k)).to(w) for k, w in enumerate(weights)]
predicted = gradients["replay", 10] @ torch.cat([d.flatten() for d in along])
ends = []
for step in (1e-5, -1e-5):
    with torch.no_grad():
        for weight, direction in zip(weights, along):
            weight += step * direction
        ends.append(moved(None, 10)[0])
        for weight, direction in zip(weights, along):
            weight -= step * direction
derivative = (ends[0] - ends[1]) / 2e-5
print(f"derivative along a random direction: {predicted:.5f} by Replay, {derivative:.5f} by a finite difference")
assert abs(derivative - predicted) < 1e-4 * abs(predicted)

# 4. What Replay keeps of a frame are the positions and the stepper's state: for plain gradient descent
#    three numbers of eight bytes an atom, beside megabytes for the graph.
print(f"Replay keeps {start.positions.numel() * 8 / len(atoms):.0f} bytes an atom and frame")

# 5. More frames are not better. The nearer a run comes to its minimum, the less its end depends on where it began
#    and on its path, so that a gradient through a long run does not depend on how the basin was selected.
small = bulk("Si", a=5.469, cubic=True)
del small[0]
small.rattle(0.1, seed=1)
begin = Structures.from_atoms(small)
begin.positions.requires_grad_()
direction = torch.randn(begin.positions.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
direction -= direction.mean(0)  # the drift of the whole cell never fades
felt = {}
print("frames   displacement of the end per displacement of the start")
for frames in (5, 10, 20, 40, 80):
    end = relax(potential, begin, stepper=GradientDescent(momentum=0.7), fmax=0.0, steps=frames).positions
    (pulled,) = torch.autograd.grad((end * direction).sum(), begin.positions)
    felt[frames] = (pulled.norm() / direction.norm()).item()
    print(f"{frames:6}   {felt[frames]:.4f}")
assert felt[80] < felt[20] < felt[5]
