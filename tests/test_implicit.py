"""The implicit gradient against differences of minima, on everything that has one."""

import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian, FixCom, FixedLine, FixedPlane, FixScaled, FixSubsetCom, FixSymmetry
from helpers.gradients import SYSTEMS, batch, check_gradient, gradient, sum_of_distances
from helpers.potentials import Bowl, lennard_jones, needs_mace
from helpers.structures import constrained, pentamer, vacancy

from ase_bptt import Status, relax
from ase_bptt.adjoints import Implicit, SolveStatus
from ase_bptt.steppers import BFGS, FIRE, LBFGS

EXACT = Implicit(fmax=1e-9, tolerance=1e-11)
NEWTON = BFGS(maxstep=0.05, alpha=200.0)
"""Stiff enough for Lennard-Jones crystals, which ASE's own numbers scatter."""
LOOSE = {"steps": 800, "fmax": 1.0}
"""The adjoint itself asks for its fmax."""


def minimum(potential, structures, adjoint=EXACT, stepper=NEWTON):
    relaxation = relax(potential, structures, stepper=stepper, adjoint=adjoint, **LOOSE)
    assert set(relaxation.status) == {Status.CONVERGED}
    return relaxation


def check(potential, members, *, h, stepper=NEWTON, inputs=None, directions=2) -> list[torch.Tensor]:
    """Gradients in the weights (or these inputs of the batch) against differences of converged minima."""
    structures = batch(*members)
    structures.cells.requires_grad_(inputs == "cells")
    found = minimum(potential, structures, stepper=stepper)
    weights = [p for p in potential.parameters() if p.requires_grad]
    wanted = [structures.cells] if inputs == "cells" else weights
    grads = gradient(wanted, sum_of_distances(found.positions, structures))
    assert [solve.status for solve in found.solves] == [SolveStatus.SOLVED] * len(members)
    near = structures.replace(positions=found.positions.detach())

    def evaluate():
        again = relax(potential, near, stepper=stepper, fmax=1e-9, steps=800)
        assert set(again.status) == {Status.CONVERGED}
        return (sum_of_distances(again.positions, near),)

    check_gradient(evaluate, [], wanted, grads, h=h, directions=directions, tolerance=1e-5)
    return grads


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_mace if "mace" in n else ()) for n in SYSTEMS])
def test_the_gradient_agrees_with_differences_of_the_minimum(name):
    potential, members, h = SYSTEMS[name]
    stepper, directions = (NEWTON, 2) if name[:2] in ("lj", "mo") else ("bfgs", 1)
    check(potential().requires_grad_(), members(), h=h, stepper=stepper, directions=directions)


MIXED = [1.0, 2.0, 5.0, 7.0, 11.0]


def mixed() -> Atoms:
    atoms = pentamer()
    atoms.set_masses(MIXED)
    return atoms


CONSTRAINTS = {
    "atoms, crystal": lambda: constrained(vacancy(), FixAtoms([0, 2])),
    "one atom, cluster": lambda: constrained(pentamer(), FixAtoms([1])),
    "three atoms, cluster": lambda: constrained(pentamer(), FixAtoms([0, 1, 3])),
    "axes": lambda: constrained(vacancy(), FixCartesian([1, 3], [True, False, True])),
    "line": lambda: constrained(pentamer(), FixedLine([0, 4], [1, 2, -1])),
    "plane": lambda: constrained(pentamer(), FixedPlane([0, 1, 3], [0.3, 0, 1])),
    "plane, crystal": lambda: constrained(vacancy(), FixedPlane([0, 1, 5], [0.3, 0, 1])),
    "centre of mass": lambda: constrained(mixed(), FixCom()),
    "centre of a subset": lambda: constrained(mixed(), FixSubsetCom([0, 1, 4])),
    "symmetry": lambda: constrained(vacancy(amplitude=0), FixSymmetry),
    "scaled": lambda: constrained(vacancy(), FixScaled([0, 3], [True, False, True])),
    "several": lambda: constrained(
        vacancy(seed=4), FixAtoms([0]), FixedLine([1], [1, 1, 0]), FixCartesian([2], [1, 0, 0])
    ),
    # A turn that these let begin stretches the dimer that they hold apart, and so costs energy.
    "strained axes": lambda: constrained(pentamer(stretch=1.4), FixCartesian([0, 1], [True, True, False])),
    "strained lines": lambda: constrained(pentamer(stretch=1.4), FixedLine([0], [0, 0, 1]), FixedLine([1], [0, 1, 1])),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_gradient_agrees_with_differences_of_the_constrained_minimum(name):
    check(lennard_jones().requires_grad_(), [CONSTRAINTS[name]()], h=1e-3)


def test_free_and_constrained_structures_share_a_batch():
    members = [CONSTRAINTS[name]() for name in ("strained axes", "atoms, crystal", "plane")]
    members.insert(1, vacancy(seed=2))
    potential = lennard_jones().requires_grad_()
    together = check(potential, members, h=1e-3)
    sums = [torch.zeros_like(p) for p in potential.parameters()]
    for atoms in members:
        alone = batch(atoms)
        grads = gradient(list(potential.parameters()), sum_of_distances(minimum(potential, alone).positions, alone))
        sums = [total + g for total, g in zip(sums, grads, strict=True)]
    torch.testing.assert_close(sums, together, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("members", [[vacancy], [vacancy, pentamer]], ids=["alone", "batch"])
def test_the_gradient_in_the_cell_agrees_with_differences(members):
    check(lennard_jones(), [make() for make in members], h=1e-4, inputs="cells", directions=1)


def test_any_stepper_may_find_the_minimum():
    potential, found = lennard_jones().requires_grad_(), []
    for stepper in (NEWTON, LBFGS(maxstep=0.05, alpha=200.0), FIRE(dt=0.03, dtmax=0.08)):
        structures = batch(vacancy(), pentamer())
        relaxation = minimum(potential, structures, stepper=stepper)
        found.append(gradient(list(potential.parameters()), sum_of_distances(relaxation.positions, structures)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-7)


def test_single_precision_gives_the_gradient_of_double_precision():
    found = {}
    for dtype in (torch.float64, torch.float32):
        potential, structures = lennard_jones().to(dtype).requires_grad_(), batch(vacancy(), pentamer())
        relaxation = minimum(potential, structures, Implicit(fmax=2e-3, tolerance=1e-5))
        assert relaxation.positions.dtype is dtype
        found[dtype] = gradient(list(potential.parameters()), sum_of_distances(relaxation.positions, structures))
    for double, single in zip(*found.values(), strict=True):
        assert (double - single).abs() < 2e-3 * max(double.abs(), 0.1)


def test_the_gradient_and_its_damping_are_the_theory_of_the_bowl():
    values = torch.linspace(1, 9, 6, dtype=torch.float64)
    for damping in (0.0, 2.0):
        potential = Bowl(values.tolist())
        structures = batch(potential.atoms(0.1))
        relaxation = minimum(potential, structures, Implicit(fmax=1e-10, tolerance=1e-12, damping=damping))
        pull = torch.linspace(-1, 2, 9, dtype=torch.float64)
        to_hessian, to_load = gradient([potential.hessian, potential.load], relaxation.positions.flatten() @ pull)
        modes = potential.modes
        w = modes @ ((modes.T @ pull) / (values + damping))
        u = modes @ ((modes.T @ potential.load.detach()) / values)
        torch.testing.assert_close(to_load, w, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(to_hessian, -(torch.outer(w, u) + torch.outer(u, w)) / 2, rtol=1e-9, atol=1e-10)
