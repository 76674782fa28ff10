"""Two gradients of one relaxation: each is what it would be on its own."""

import pytest
import torch
from helpers.gradients import LEARNABLE, batch, gradient, sum_of_distances
from helpers.potentials import lennard_jones
from helpers.structures import pentamer, vacancy

from ase_bptt import Status, Structures, relax
from ase_bptt.adjoints import GradientWarning, Guided, Implicit, Replay
from ase_bptt.steppers import BFGS, FIRE, GradientDescent

NEWTON = BFGS(maxstep=0.05, alpha=200.0)
SOLVE = Implicit(fmax=1e-4, tolerance=1e-9)
STEPPERS = {"fire": lambda: FIRE(dt=0.03, dtmax=0.08), "gd": lambda: GradientDescent(0.001, momentum=0.6)}
TAILS = {"none": None, "bfgs": NEWTON}


def structures(potential) -> Structures:
    """The second has relaxed before any frame, the third after a few."""
    settled = relax(potential, pentamer(), stepper=NEWTON, fmax=1e-5, adjoint="implicit").to_atoms()
    nearly = settled.copy()
    nearly.positions[0, 0] += 2e-5
    found = batch(vacancy(), settled, nearly, pentamer())
    found.cells.requires_grad_()
    return found


@pytest.mark.parametrize("first", [1, 6, 20])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("stepper", STEPPERS)
def test_the_early_end_is_replay_and_the_late_end_is_implicit(stepper, tail, first):
    potential, stepper = lennard_jones().requires_grad_(), STEPPERS[stepper]()
    start = structures(potential)
    guided = relax(potential, start, stepper=stepper, steps=900, adjoint=Guided(first, tail=TAILS[tail], solve=SOLVE))
    assert set(guided.status) == {Status.CONVERGED}
    begun = relax(potential, start, stepper=stepper, fmax=SOLVE.fmax, steps=first, adjoint=Replay())
    early = guided.early
    assert early.nsteps.tolist() == begun.nsteps.tolist()
    assert early.nsteps.tolist()[:2] == [first, 0]
    assert early.status == begun.status
    assert torch.equal(early.positions, begun.positions)
    assert torch.equal(early.forces, begun.forces)
    inputs = [start.positions, start.cells, *potential.parameters()]
    losses = [sum_of_distances(r.positions, start) + r.energies.sum() for r in (early, begun)]
    grads = [gradient(inputs, loss) for loss in losses]
    assert torch.equal(losses[0], losses[1])
    assert all(g.abs().max() > 0 for g in grads[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(early.adjoint_norms, begun.adjoint_norms, rtol=1e-12, atol=0)

    there = start.replace(positions=guided.positions.detach().requires_grad_())
    alone = relax(potential, there, adjoint=SOLVE)
    assert not alone.nsteps.any()
    late, expected = (gradient(inputs[1:], sum_of_distances(r.positions, start)) for r in (guided, alone))
    torch.testing.assert_close(late, expected, rtol=1e-9, atol=1e-10)
    assert [solve.status for solve in guided.solves] == [solve.status for solve in alone.solves]


@pytest.mark.parametrize("stepper", STEPPERS)
def test_without_a_tail_the_run_continues_as_if_not_interrupted(stepper):
    potential, stepper = lennard_jones().requires_grad_(), STEPPERS[stepper]()
    start = structures(potential)
    guided = relax(potential, start, stepper=stepper, steps=900, adjoint=Guided(7, tail=None, solve=SOLVE))
    whole = relax(potential, start, stepper=stepper, steps=900, fmax=SOLVE.fmax, adjoint=SOLVE)
    assert torch.equal(guided.positions, whole.positions)
    assert torch.equal(guided.nsteps, whole.nsteps)
    grads = [gradient(list(potential.parameters()), sum_of_distances(r.positions, start)) for r in (guided, whole)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)


def test_a_quasi_newton_tail_takes_fewer_frames_and_no_memory():
    potential = lennard_jones().requires_grad_()
    start, stepper = batch(vacancy(), pentamer()), STEPPERS["fire"]()
    plain, quick = (
        relax(potential, start, stepper=stepper, steps=900, adjoint=Guided(10, tail=tail, solve=SOLVE))
        for tail in (None, NEWTON)
    )
    assert (quick.nsteps > 10).all()
    assert (quick.nsteps < plain.nsteps).all()
    torch.testing.assert_close(
        sum_of_distances(quick.positions, start).detach(),
        sum_of_distances(plain.positions, start).detach(),
        rtol=1e-4,
        atol=1e-4,
    )
    for run in (quick, plain):
        assert (len(run.early.trajectory.frames), len(run.trajectory.frames)) == (10, 0)


def test_both_losses_go_backward_together():
    potential = lennard_jones().requires_grad_()
    inputs, found = list(potential.parameters()), {}
    for wanted in ("early", "late", "both"):
        start = batch(vacancy(), pentamer())
        guided = relax(potential, start, stepper=STEPPERS["fire"](), steps=900, adjoint=Guided(8, tail=NEWTON))
        early, late = sum_of_distances(guided.early.positions, start), sum_of_distances(guided.positions, start)
        found[wanted] = gradient(inputs, {"early": early, "late": late, "both": late + 0.5 * early}[wanted])
    for both, early, late in zip(found["both"], found["early"], found["late"], strict=True):
        torch.testing.assert_close(both, late + 0.5 * early, rtol=1e-12, atol=1e-12)


def test_a_member_of_the_relaxation_has_its_own_early_end():
    potential = lennard_jones().requires_grad_()
    start = batch(vacancy(), pentamer())
    guided = relax(potential, start, stepper=STEPPERS["fire"](), steps=900, adjoint=Guided(8, tail=NEWTON))
    atoms = start.atoms_of([1])
    assert torch.equal(guided[1].early.positions, guided.early.positions[atoms])
    assert guided[1].early.nsteps.tolist() == [8]
    early = [a.positions for a in guided.early.to_atoms()]
    assert not (early[1] == guided.to_atoms()[1].positions).all()


def test_runs_that_end_before_the_first_frames_are_over():
    potential = lennard_jones().requires_grad_()
    start = batch(vacancy())
    guided = relax(potential, start, stepper=STEPPERS["fire"](), steps=3, adjoint=Guided(8, tail=NEWTON))
    assert guided.status == guided.early.status == (Status.OUT_OF_STEPS,)
    assert torch.equal(guided.early.positions, guided.positions)
    with pytest.warns(GradientWarning, match="give it more steps"):
        (late,) = gradient([potential.sigma], sum_of_distances(guided.positions, start))
    (early,) = gradient([potential.sigma], sum_of_distances(guided.early.positions, start))
    assert late == 0
    assert early != 0


def test_frozen_weights_leave_the_early_gradient_in_the_initial_positions():
    potential = lennard_jones().requires_grad_(False)
    start = batch(pentamer())
    guided = relax(potential, start, stepper=STEPPERS["fire"](), steps=900, adjoint=Guided(8, tail=NEWTON))
    early, late = (
        torch.autograd.grad(sum_of_distances(r.positions, start), start.positions)[0] for r in (guided.early, guided)
    )
    assert early.abs().max() > 0
    assert not late.any()


@pytest.mark.parametrize("stepper", LEARNABLE)
def test_the_steppers_numbers_learn_from_the_early_end_alone(stepper):
    potential, stepper = lennard_jones().requires_grad_(), LEARNABLE[stepper]()
    start = batch(vacancy(), pentamer())
    guided = relax(potential, start, stepper=stepper, steps=400, adjoint=Guided(25, tail=NEWTON))
    numbers = list(stepper.parameters())
    assert all(g != 0 for g in torch.autograd.grad(sum_of_distances(guided.early.positions, start), numbers))
    assert all(g == 0 for g in torch.autograd.grad(sum_of_distances(guided.positions, start), numbers))
