"""What the implicit gradient says where there is no minimum, or none that it can treat; and what it leaves at zero."""

from contextlib import nullcontext

import pytest
import torch
from ase import Atoms
from ase.constraints import FixScaled
from helpers.gradients import LEARNABLE, WEIGHT_CHANGES, batch, gradient, sum_of_distances
from helpers.potentials import Bowl, lennard_jones
from helpers.structures import cluster, constrained, pentamer, skewed, vacancy

from ase_bptt import Status, Structures, relax
from ase_bptt.adjoints import GradientWarning, Guided, Implicit, OneStep, SolveStatus
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.steppers import BFGS

NEWTON = BFGS(maxstep=0.05, alpha=200.0)


def linear() -> Atoms:
    return Atoms("Ar3", positions=[[-1.13, 0, 0], [0, 0, 0], [1.1, 0, 0]])


def planar() -> Atoms:
    return Atoms("Ar4", positions=[[0, 0.55, 0], [0, -0.55, 0], [0.97, 0, 0], [-1, 0, 0]])


def bend(positions) -> torch.Tensor:
    """Along the direction in which the energy of both symmetric molecules falls, and no rigid motion."""
    weights = torch.tensor([-1.0, 2, -1] if len(positions) == 3 else [1.0, 1, -1, -1]).to(positions)
    return weights @ positions[:, 2]


@pytest.mark.parametrize("make", [linear, planar])
def test_a_saddle_is_reported_and_leaves_the_others_alone(make):
    potential = lennard_jones().requires_grad_()
    arguments = {"stepper": NEWTON, "adjoint": Implicit(fmax=1e-6)}
    structures, sound = batch(make(), pentamer()), batch(pentamer())
    relaxation = relax(potential, structures, **arguments)
    alone = relax(potential, sound, **arguments)
    assert relaxation.status == (Status.CONVERGED, Status.CONVERGED)
    n = structures.counts[0]
    loss = bend(relaxation.positions[:n]) + sum_of_distances(relaxation.positions[n:], sound)
    with pytest.warns(GradientWarning, match=rf"Gradient of structure 0 \(Ar{n}\): .* saddle and no minimum") as told:
        found = gradient(list(potential.parameters()), loss)
    assert len(told) == 1
    expected = gradient(list(potential.parameters()), sum_of_distances(alone.positions, sound))
    assert [solve.status for solve in relaxation.solves] == [SolveStatus.SADDLE, SolveStatus.SOLVED]
    assert "no minimum" in relaxation.solves[0].status.sentence
    assert relaxation[0].solves == relaxation.solves[:1]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_too_few_iterations_are_reported_with_the_residual_left():
    potential = Bowl(torch.linspace(1, 40, 9).tolist())
    pull = torch.linspace(-1, 2, 12, dtype=torch.float64)
    pull = pull - pull.view(4, 3).mean(0).repeat(4)
    found = {}
    for cap in (1, 3, 50):
        relaxation = relax(
            potential, batch(potential.atoms(0.1)), stepper=NEWTON, adjoint=Implicit(max_iterations=cap), steps=400
        )
        capped = pytest.warns(GradientWarning, match=r"\(Ar4\): .* raise max_iterations")
        with capped if cap < 9 else nullcontext():
            (w,) = gradient([potential.load], relaxation.positions.flatten() @ pull)
        (solve,) = relaxation.solves
        left = (potential.hessian.detach() @ w - pull).norm() / pull.norm()
        assert solve.residual == pytest.approx(left.item(), rel=1e-6)
        found[cap] = solve
    assert [found[cap].status for cap in found] == [
        SolveStatus.OUT_OF_ITERATIONS,
        SolveStatus.OUT_OF_ITERATIONS,
        SolveStatus.SOLVED,
    ]
    assert [found[cap].iterations for cap in (1, 3)] == [1, 3]
    assert found[50].iterations <= 9
    assert found[3].residual > 1e-3 > found[50].residual


def test_damping_lets_soft_directions_count_less():
    # Softer directions are damped first, and the equation is solved sooner.
    iterations, lengths = [], []
    for damping in (0.0, 1.0, 100.0):
        potential = lennard_jones().requires_grad_()
        structures = batch(vacancy())
        relaxation = relax(potential, structures, stepper=NEWTON, adjoint=Implicit(damping=damping))
        grads = gradient(list(potential.parameters()), sum_of_distances(relaxation.positions, structures))
        iterations.append(relaxation.solves[0].iterations)
        lengths.append(torch.stack(grads).norm().item())
    assert iterations[0] >= iterations[1] > iterations[2]
    assert lengths[0] > lengths[1] > lengths[2] > 0


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep()], ids=lambda a: a.name)
def test_a_member_that_did_not_relax_gives_no_gradient(adjoint):
    potential = lennard_jones().requires_grad_()
    near = relax(potential, pentamer(), stepper=NEWTON, adjoint=adjoint, steps=100).to_atoms()
    arguments = {"stepper": NEWTON, "adjoint": adjoint, "steps": 4}
    structures, sound = batch(vacancy(0.1), near), batch(near)
    relaxation, alone = (relax(potential, s, **arguments) for s in (structures, sound))
    assert relaxation.status == (Status.OUT_OF_STEPS, Status.CONVERGED)
    weights = list(potential.parameters())
    with pytest.warns(GradientWarning, match="structure 0 .* give it more steps"):
        found = gradient(weights, sum_of_distances(relaxation.positions, structures))
    torch.testing.assert_close(found, gradient(weights, sum_of_distances(alone.positions, sound)), rtol=1e-12, atol=0)
    assert [solve.status for solve in relaxation.solves] == [SolveStatus.UNRELAXED, SolveStatus.SOLVED]
    assert "more steps" in relaxation.solves[0].status.sentence
    nothing = relax(potential, batch(vacancy(0.1)), **arguments)
    with pytest.warns(GradientWarning, match="no minimum to take a gradient"):
        assert all(g == 0 for g in torch.autograd.grad(nothing.positions.square().sum(), weights))


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep()], ids=lambda a: a.name)
def test_initial_positions_and_the_steppers_numbers_get_exact_zeros(adjoint):
    potential, stepper = lennard_jones().requires_grad_(), LEARNABLE["fire"]()
    structures = batch(vacancy(), pentamer())
    relaxation = relax(potential, structures, stepper=stepper, adjoint=adjoint, steps=500)
    assert set(relaxation.status) == {Status.CONVERGED}
    inputs = [structures.positions, *stepper.parameters(), potential.sigma]
    *zeros, to_sigma = torch.autograd.grad(sum_of_distances(relaxation.positions, structures), inputs)
    assert not any(g.any() for g in zeros)
    assert to_sigma != 0


def test_structures_are_relaxed_to_the_adjoints_own_fmax():
    potential = lennard_jones().requires_grad_()
    for adjoint, most in ((Implicit(), 0.01), (Implicit(fmax=1e-4), 1e-4), (Guided(3), 0.01), (OneStep(), 0.01)):
        assert relax(potential, pentamer(), fmax=0.5, adjoint=adjoint, steps=500).fmax < most
    relaxation = relax(potential, pentamer(), fmax=1e-3, adjoint=Implicit(), steps=500)
    assert relaxation.fmax < 1e-3


@pytest.mark.parametrize("change", WEIGHT_CHANGES)
@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Guided(3)], ids=lambda a: a.name)
def test_backward_refuses_other_weights_than_forward(adjoint, change):
    potential = lennard_jones().requires_grad_()
    relaxation = relax(potential, pentamer(), stepper="fire", adjoint=adjoint, steps=500)
    ends = [relaxation.positions] if relaxation.early is None else [relaxation.positions, relaxation.early.positions]
    change(potential)
    for positions in ends:
        with pytest.raises(RuntimeError, match="were changed after this relaxation"):
            positions.sum().backward()


class Direct(LennardJones):
    """Forces that a network might have predicted without an energy."""

    conservative = False


EVERY = pytest.mark.parametrize("adjoint", ["implicit", "one-step", "guided:3"])


@EVERY
def test_forces_that_are_no_gradient_are_refused(adjoint):
    potential = Direct(smooth=True, rc=2.4, ro=1.8)
    with pytest.raises(NotImplementedError, match=r"not the negative gradient of an energy.*take 'replay'"):
        relax(potential, pentamer(), adjoint=adjoint)
    # Without a gradient there is nothing to refuse.
    with torch.no_grad():
        assert len(relax(potential, pentamer(), adjoint=adjoint, steps=2)) == 1
    assert relax(potential, pentamer(), adjoint="replay", steps=2).positions.requires_grad


@EVERY
def test_constraints_without_a_minimum_are_refused_by_name(adjoint):
    members = [cluster(), constrained(skewed(), FixScaled([0], [True, False, True]))]
    with pytest.raises(NotImplementedError, match="FixScaled constrain forces and steps along different directions"):
        relax(lennard_jones(), members, adjoint=adjoint)


def test_frozen_weights_get_no_gradient_and_cells_theirs():
    potential = lennard_jones().requires_grad_(False)
    structures = Structures.from_atoms([vacancy()])
    structures.cells.requires_grad_()
    relaxation = relax(potential, structures, stepper=NEWTON, adjoint=Implicit())
    sum_of_distances(relaxation.positions, structures).backward()
    assert structures.cells.grad.abs().max() > 0
    assert all(p.grad is None for p in potential.parameters())
