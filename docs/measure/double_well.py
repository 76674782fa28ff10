"""How much of a choice that the first frames make is left in the gradient, against the number of frames.

python docs/measure/double_well.py

A dimer in a double well starts on the wrong side of the barrier, and a bump beside the start decides which minimum it
falls into. Prints |dL/dheight| of the squared distance to the other minimum for Replay after so many frames, and
for Guided and Implicit at the minimum; writes docs/double_well.png.
"""

from pathlib import Path

import torch
from ase import Atoms

from ase_bptt import relax
from ase_bptt.adjoints import Guided, Implicit
from ase_bptt.potentials.analytic import DoubleWell
from ase_bptt.report.plots import BLUE, GREY, ORANGE, new_figure
from ase_bptt.steppers import GradientDescent

STEP = 0.004
FRAMES = (1, 2, 4, 6, 8, 10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 100, 120)
FIRST = 10
FEW = (8, 40)
"""Frames that teach the basin."""
LOWEST, HIGHEST = 1e-12, 1e3

potential = DoubleWell()
start = Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 3.02]])


def felt(relaxation):
    """|dL/dheight| in Å^2/eV, for the squared distance of the length from the minimum at 2.5 Å."""
    length = (relaxation.positions[1] - relaxation.positions[0]).norm()
    (derivative,) = torch.autograd.grad((length - 2.5).square(), potential.height)
    return abs(derivative.item())


def run(adjoint, steps, fmax):
    """From 3.02 Å by plain gradient descent."""
    return relax(potential, start, stepper=GradientDescent(STEP), adjoint=adjoint, steps=steps, fmax=fmax)


replay = [felt(run("replay", frames, 0.0)) for frames in FRAMES]
end = run(Guided(FIRST), 1000, 1e-6)
guided = felt(end) + felt(end.early)
implicit = felt(run(Implicit(fmax=1e-6), 1000, 1e-6))

print("frames   |dL/dheight| by Replay, Å^2/eV")
for frames, value in zip(FRAMES, replay, strict=True):
    print(f"{frames:6}   {value:.1e}")
print(f"at the minimum, {implicit:.1e} by Implicit and {guided:.1e} by Guided with {FIRST} frames")

figure = new_figure(3.0)
axes = figure.add_subplot()
axes.axvspan(*FEW, color=BLUE, alpha=0.07, linewidth=0)
axes.plot(FRAMES, replay, "o-", color=BLUE, markersize=4, label="Replay, so many frames")
axes.axhline(guided, color=ORANGE, linestyle="--", label=f"Guided, {FIRST} frames and the end")
assert implicit == 0
axes.plot([1, FRAMES[-1]], [LOWEST, LOWEST], color=GREY, linewidth=4, label="Implicit, the end: exactly 0")
axes.set(yscale="log", xlim=(0, FRAMES[-1] + 2), ylim=(LOWEST, HIGHEST))
axes.set_xlabel("frames")
axes.set_ylabel("|dL/dheight| (Å$^2$/eV)")
axes.text(sum(FEW) / 2, HIGHEST / 2, "8 to 40", ha="center", va="top", fontsize=9)
axes.legend(loc="lower left", frameon=False, fontsize=9)
figure.savefig(Path(__file__).parents[1] / "double_well.png", dpi=150)
