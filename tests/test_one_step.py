"""One step of gradient descent from the minimum, and nothing else."""

import numpy as np
import pytest
import torch
from ase.constraints import FixAtoms, FixedPlane
from helpers.gradients import batch, gradient, sum_of_distances
from helpers.potentials import Bowl, lennard_jones
from helpers.structures import constrained, pentamer, vacancy

from ase_bptt import Status, relax
from ase_bptt.adjoints import Implicit, OneStep
from ase_bptt.steppers import BFGS, GradientDescent

NEWTON = BFGS(maxstep=0.05, alpha=200.0)


@pytest.mark.parametrize("step_size", [0.05, 0.003])
def test_it_is_the_gradient_of_one_frame_from_the_relaxed_structure(step_size):
    potential = lennard_jones().requires_grad_()
    structures = batch(
        vacancy(),
        constrained(vacancy(), FixAtoms([0, 3])),
        pentamer(),
        constrained(pentamer(), FixedPlane([0], [0, 1, 1])),
    )
    relaxation = relax(potential, structures, stepper=NEWTON, adjoint=OneStep(fmax=1e-9, step_size=step_size))
    assert set(relaxation.status) == {Status.CONVERGED}
    near = structures.replace(positions=relaxation.positions.detach())
    frame = relax(potential, near, stepper=GradientDescent(step_size), fmax=0.0, steps=1, adjoint="full")
    found, expected = (
        gradient(list(potential.parameters()), sum_of_distances(r.positions, structures)) for r in (relaxation, frame)
    )
    assert expected[1].abs() > 0.01 * step_size
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_it_is_right_in_sign_along_each_mode_and_wrong_in_length():
    values = np.array([1.0, 4.0, 16.0])
    potential = Bowl(values)
    pull = torch.linspace(-1, 2, 6, dtype=torch.float64)
    found = []
    for adjoint in (OneStep(fmax=1e-9, step_size=0.05), Implicit(fmax=1e-9, tolerance=1e-12)):
        relaxation = relax(potential, batch(potential.atoms(0.1)), stepper=NEWTON, adjoint=adjoint, steps=400)
        found.append(potential.modes.T @ gradient([potential.load], relaxation.positions.flatten() @ pull)[0])
    np.testing.assert_allclose(found[0] / found[1], 0.05 * values, rtol=1e-8)
