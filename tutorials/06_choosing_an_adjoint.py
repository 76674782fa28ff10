"""Which adjoint: its cost, its cosine to the exact gradient, and what it does not depend on.

    python tutorials/06_choosing_an_adjoint.py

Two embedded silicon defects are relaxed with the embedded potential, and the squared distance to where DFT put
them is differentiated with respect to the weights, once by each adjoint. Prints seconds, the cosine between
each gradient and the exact one of the whole relaxation, and what each needs; then the same
defect in two minima; the double well, in which
only a gradient through few frames depends on how the basin is selected; an ordinary ASE run differentiated
afterwards; and two reports of gradient diagnostics.

docs/adjoints.rst explains the results. Memory is measured by 03_what_a_tape_costs.py.
"""

import time

import torch
from ase import Atoms
from ase.optimize import BFGS

from ase_bptt import Structures, TorchCalculator, as_relaxation, load_potential, losses, relax
from ase_bptt.adjoints import FullTape, Guided, Implicit, OneStep, Replay, Truncated
from ase_bptt.datasets import si_defects
from ase_bptt.diagnostics.gradient_report import diagnose_gradients
from ase_bptt.potentials.analytic import DoubleWell
from ase_bptt.steppers import GradientDescent

torch.set_num_threads(1)
potential = load_potential("mace-si", dtype="float64")
weights = list(potential.parameters())
pairs = {pair.id: pair for split in ("train", "valid", "test") for pair in si_defects(split)}
descent = GradientDescent(step_size=0.05, momentum=0.7)  # the Trainer's own


def loss_of(relaxation, reference):
    """Delta-Q squared at the end; with Guided, also after the first frames."""
    reference = Structures.from_atoms([reference])
    loss = losses.squared_delta_q(relaxation, reference).mean()
    if relaxation.early is not None:
        loss = loss + losses.squared_delta_q(relaxation.early, reference).mean()
    return loss


def flat(loss):
    """Its gradient with respect to all weights, in one vector."""
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([torch.zeros_like(w).flatten() if g is None else g.flatten() for w, g in zip(weights, found)])


def gradient(name, adjoint, stepper):
    """The gradient for one defect, and its relaxation."""
    pair = pairs[name]
    relaxation = relax(potential, [pair.initial], stepper=stepper, fmax=0.01, steps=300, adjoint=adjoint)
    return flat(loss_of(relaxation, pair.relaxed)), relaxation


def cosine(a, b):
    """1 where both gradients point the same way."""
    return torch.cosine_similarity(a, b, dim=0).item()


# 1. Every adjoint. Those that go through the frames need a stepper that is differentiable; the others need only the
#    minimum, and BFGS reaches it fastest. Guided has a second loss, after its first frames, so its gradient is
#    a different one.
DEFECTS = ("SV_01", "AsV_00")
WAYS = {
    "FullTape()": (FullTape(), descent, "every frame in memory"),
    "Replay()": (Replay(), descent, "every frame's positions"),
    "Replay(every=10)": (Replay(every=10), descent, "every tenth frame's positions"),
    "Truncated(10)": (Truncated(10), descent, "the last 10 frames"),
    "Truncated(3)": (Truncated(3), descent, "the last 3 frames"),
    "Implicit()": (Implicit(), "bfgs", "a minimum, by any path"),
    "OneStep()": (OneStep(), "bfgs", "a minimum, by any path"),
    "Guided(10)": (Guided(10), descent, "the first 10 frames and a minimum"),
}
gradient("SV_01", Replay(), descent)  # what is compiled at the first use is compiled now
exact, found = {}, {}
print("                   " + "".join(f"{name:<20}" for name in DEFECTS) + "needs")
for label, (adjoint, stepper, needs) in WAYS.items():
    columns = ""
    for name in DEFECTS:
        began = time.perf_counter()
        found[label, name], relaxation = gradient(name, adjoint, stepper)
        took = time.perf_counter() - began
        exact.setdefault(name, found[label, name])
        columns += f"{took:5.1f} s   {cosine(found[label, name], exact[name]):7.4f}   "
    print(f"{label:<18} {columns} {needs}")
for name in DEFECTS:
    for label in ("Replay()", "Replay(every=10)"):
        assert (found[label, name] - exact[name]).norm() < 1e-8 * exact[name].norm()
    assert cosine(found["Implicit()", name], exact[name]) > 0.999

# 2. A gradient at a minimum is that of the minimum which was reached. This split interstitial has several: the two
#    update rules reach different ones, and the gradients there are unrelated.
for label, adjoint, stepper in (
    ("Replay, gradient descent", Replay(), descent),
    ("Implicit, BFGS", Implicit(), "bfgs"),
):
    found[label], relaxation = gradient("I_X_00", adjoint, stepper)
    reference = Structures.from_atoms([pairs["I_X_00"].relaxed])
    print(f"I_X_00 by {label}: ends at a Delta-Q of {losses.delta_q(relaxation, reference).item():.1f}")
print(f"cosine of the two gradients: {cosine(found['Replay, gradient descent'], found['Implicit, BFGS']):.2f}")

# 3. Which basin? A dimer starts just on the wrong side of a barrier, and the height of a bump near the start decides
#    which of two minima it reaches. The bump vanishes at both of them: the converged end does not depend on its height.
well = DoubleWell()
start = Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 3.02]])


def felt(relaxation):
    """dL/dheight, where L is the squared distance of the dimer's length from the right minimum, 2.5 Å."""
    length = (relaxation.positions[1] - relaxation.positions[0]).norm()
    return torch.autograd.grad((length - 2.5).square(), well.height)[0].item()


short = GradientDescent(step_size=0.004)
print("double well    frames   dL/dheight")
sensitivities = {}
for frames in (10, 20, 40, 80, 120):
    sensitivities[frames] = felt(relax(well, start, stepper=short, steps=frames, fmax=0.0))
    print(f"Replay         {frames:6}   {sensitivities[frames]:10.2e}")
at_end = felt(relax(well, start, stepper=short, adjoint=Implicit(), steps=1000))
guided = relax(well, start, stepper=short, adjoint=Guided(10), steps=1000)
print(f"Implicit      the end   {at_end + 0.0:10.2e}")
print(f"Guided(10)    the end   {felt(guided) + 0.0:10.2e}")
early = felt(guided.early)
print(f"              early     {early:10.2e}")
assert at_end == 0.0
assert abs(sensitivities[120]) < abs(sensitivities[80]) < abs(sensitivities[40]) < abs(sensitivities[10])
assert abs(early - sensitivities[10]) < 1e-9

# 4. Any optimizer of ASE may be used to reach the minimum: the implicit gradient needs the end only.
pair = pairs["SV_01"]
atoms = pair.initial.copy()
atoms.calc = TorchCalculator(potential)
BFGS(atoms, logfile=None).run(fmax=0.01)
by_ase = flat(loss_of(as_relaxation(atoms), pair.relaxed))
print(f"SV_01 by ase.optimize.BFGS, cosine to the exact gradient: {cosine(by_ase, exact['SV_01']):.4f}")

# 5. Is the gradient reliable? After the backward pass, a report: the longest stable step, how fast a gradient
#    decays from frame to frame, by how much it grew in the backward pass, and alarms. First both defects by the
#    Trainer's default rule, then a vacancy by plain gradient descent, whose step is too long for the stiffest bond.
#    "growth" is |dL/dX| before the first frame over that at the end.
sound = relax(potential, [pairs[name].initial for name in DEFECTS], stepper=descent, steps=75, fmax=0.01)
references = Structures.from_atoms([pairs[name].relaxed for name in DEFECTS])
flat(losses.squared_delta_q(sound, references).mean())
report = diagnose_gradients(sound)
print(report.text())
assert not report.alarms
hasty = relax(potential, [pairs["V_00"].relaxed], stepper=GradientDescent(step_size=0.15), steps=12, fmax=0.01)
flat(loss_of(hasty, pairs["V_00"].relaxed))
report = diagnose_gradients(hasty)
print(report.text())
assert any("step size" in alarm for alarm in report.alarms)
