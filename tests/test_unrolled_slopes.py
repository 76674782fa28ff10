"""Unrolled gradients against differences of whole relaxations, on the systems that test_adjoints.py has not."""

import pytest
import torch
from helpers.gradients import SYSTEMS, batch, check_gradient, gradient, loss_and_decisions, nearby_positions

from ase_bptt.steppers import FIRE, GradientDescent

STEPPERS = {
    "bowl": (GradientDescent(0.05, momentum=0.3), FIRE(dt=0.05, dtmax=0.2)),
    "morse batch": (GradientDescent(0.002, momentum=0.3), FIRE(dt=0.02, dtmax=0.05)),
    "emt batch": (GradientDescent(0.01, momentum=0.3), FIRE(dt=0.05, dtmax=0.1)),
}


@pytest.mark.parametrize("adjoint", ["full", "replay", "replay:4"])
@pytest.mark.parametrize("stepper", [0, 1], ids=["gd", "fire"])
@pytest.mark.parametrize("name", STEPPERS)
def test_the_gradient_agrees_with_finite_differences_of_the_whole_relaxation(name, stepper, adjoint):
    make, members, _ = SYSTEMS[name]
    potential, structures = make().requires_grad_(), batch(*members())
    reference = nearby_positions(structures)
    settings = {"stepper": STEPPERS[name][stepper], "fmax": 1e-3, "steps": 15}

    def evaluate():
        return loss_and_decisions(potential, structures, reference, **settings)

    usual = evaluate()[1:]
    weights = [p for p in potential.parameters() if p.requires_grad]
    grads = gradient(
        [*weights, structures.positions],
        loss_and_decisions(potential, structures, reference, **settings, adjoint=adjoint)[0],
    )
    assert max(usual[0]) > 5
    for inputs, analytic in ((weights, grads[:-1]), ([structures.positions], grads[-1:])):
        check_gradient(evaluate, list(usual), inputs, analytic, h=1e-5, directions=1)
    assert all(torch.isfinite(g).all() for g in grads)
