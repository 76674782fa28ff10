"""Which gradient knows how a basin was chosen: a double well with a bump that only the start of the path feels."""

import pytest
import torch
from ase import Atoms
from helpers.gradients import batch

from ase_bptt import Status, relax
from ase_bptt.adjoints import Guided, Implicit
from ase_bptt.potentials.analytic import DoubleWell
from ase_bptt.steppers import GradientDescent

LEFT, RIGHT = 2.5, 3.5
STEP = GradientDescent(0.004)


def start():
    """Just on the wrong side of the barrier at 3 Å."""
    return batch(Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 3.02]]))


def length(relaxation):
    return (relaxation.positions[1] - relaxation.positions[0]).norm()


def loss(relaxation):
    return (length(relaxation) - LEFT).square()


def sensitivity(potential, relaxation) -> float:
    return torch.autograd.grad(loss(relaxation), potential.height)[0].item()


def unrolled(frames, potential=None) -> float:
    potential = potential or DoubleWell()
    return sensitivity(potential, relax(potential, start(), stepper=STEP, steps=frames, fmax=0.0, adjoint="replay"))


def test_the_start_falls_into_the_wrong_minimum():
    relaxation = relax(DoubleWell(), start(), stepper=STEP, fmax=1e-6, steps=1000)
    assert relaxation.status[0] is Status.CONVERGED
    assert length(relaxation).item() == pytest.approx(RIGHT, abs=1e-6)


@pytest.mark.parametrize("stepper", [STEP, "fire", "bfgs"])
def test_the_implicit_gradient_knows_nothing_of_the_choice(stepper):
    potential = DoubleWell()
    relaxation = relax(potential, start(), stepper=stepper, adjoint=Implicit(fmax=1e-6), steps=1000)
    assert loss(relaxation) > 0.9
    assert abs(sensitivity(potential, relaxation)) < 1e-10
    assert relaxation.solves[0].residual < 1e-3


def test_the_unrolled_gradient_knows_it_while_frames_are_few():
    found = {frames: unrolled(frames) for frames in (8, 20, 40, 120, 240, 480)}
    # A higher bump pushes to the left, and so lowers the loss.
    assert all(found[frames] < -0.01 for frames in (8, 20, 40))
    early = max(abs(found[frames]) for frames in (8, 20, 40))
    assert abs(found[120]) < 1e-2 * early
    assert abs(found[240]) < 1e-4 * abs(found[120])
    assert abs(found[480]) < 1e-10


def test_the_unrolled_gradient_agrees_with_finite_differences():
    h = 1e-5
    ends = []
    for height in (h, -h):
        potential = DoubleWell(height)
        ends.append(loss(relax(potential, start(), stepper=STEP, steps=40, fmax=0.0)).item())
    assert unrolled(40) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("first", [8, 20, 40])
def test_the_guided_gradient_knows_it_at_a_minimum(first):
    potential = DoubleWell()
    relaxation = relax(potential, start(), stepper=STEP, adjoint=Guided(first), fmax=1e-6, steps=1000)
    assert length(relaxation).item() == pytest.approx(RIGHT, abs=1e-6)
    assert abs(sensitivity(potential, relaxation)) < 1e-10
    assert sensitivity(potential, relaxation.early) == pytest.approx(unrolled(first), rel=1e-12)


@pytest.mark.parametrize(("adjoint", "end"), [(Implicit(), RIGHT), (Guided(20), LEFT)], ids=["implicit", "guided"])
def test_descending_the_guided_gradient_finds_the_right_minimum(adjoint, end):
    potential = DoubleWell()
    optimizer = torch.optim.SGD(potential.parameters(), lr=0.1)
    for _ in range(20):
        relaxation = relax(potential, start(), stepper=STEP, adjoint=adjoint, steps=1000)
        optimizer.zero_grad()
        total = loss(relaxation) + (0 if relaxation.early is None else loss(relaxation.early))
        total.backward()
        optimizer.step()
    assert length(relax(potential, start(), stepper=STEP, fmax=1e-3, steps=1000)).item() == pytest.approx(end, abs=1e-3)


def test_a_bump_that_reaches_a_minimum_is_refused():
    with pytest.raises(ValueError, match="must end before"):
        DoubleWell(centre=0.8)
