"""The implicit gradient against differences of minima, on everything that has one."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms, FixCartesian, FixCom, FixedLine, FixedPlane, FixScaled, FixSubsetCom, FixSymmetry
from conftest import cluster, lennard_jones, needs_mace, rattled, skewed
from test_adjoints import batch, check_slopes, gradient, mace_potential
from toys import Bowl, heap, held, shape, vacancy

from ase_bptt import Status, relax
from ase_bptt.adjoints import Implicit, SolveStatus
from ase_bptt.potentials.analytic import Morse
from ase_bptt.potentials.emt import EMT
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
    grads = gradient(wanted, shape(found.positions, structures))
    assert [solve.status for solve in found.solves] == [SolveStatus.SOLVED] * len(members)
    near = structures.replace(positions=found.positions.detach())

    def evaluate():
        again = relax(potential, near, stepper=stepper, fmax=1e-9, steps=800)
        assert set(again.status) == {Status.CONVERGED}
        return (shape(again.positions, near),)

    check_slopes(evaluate, [], wanted, grads, h=h, directions=directions, tolerance=1e-5)
    return grads


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True).repeat((2, 1, 1))
    del atoms[0]
    atoms.symbols[3] = "Ag"
    return rattled(atoms, 0.05)


def alloy() -> Atoms:
    return rattled(Atoms("Cu3Pt", positions=np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 0.9), 0.05)


def trimer() -> Atoms:
    return Atoms("Si3", positions=[[0, 0, 0], [2.3, 0.1, 0], [0.9, 2.0, 0.3]])


SYSTEMS = {
    "bowl": (lambda: Bowl(np.linspace(1, 9, 6)), lambda: [Bowl(np.linspace(1, 9, 6)).atoms(0.1)], 1e-2),
    "lj crystal": (lennard_jones, lambda: [vacancy()], 1e-3),
    "lj cluster": (lennard_jones, lambda: [cluster()], 1e-3),
    "lj batch": (lennard_jones, lambda: [vacancy(), heap(), cluster(), vacancy(seed=3)], 1e-3),
    "morse batch": (lambda: Morse(rho0=4.0), lambda: [heap(stretch=1.0), vacancy(a=1.38)], 1e-3),
    "emt batch": (EMT, lambda: [copper(), alloy()], 3e-3),
    "mace crystal": (mace_potential, lambda: [skewed()], 1e-2),
    "mace batch": (mace_potential, lambda: [trimer(), skewed()], 1e-2),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_mace if "mace" in n else ()) for n in SYSTEMS])
def test_the_gradient_is_the_slope_of_the_minimum(name):
    potential, members, h = SYSTEMS[name]
    stepper, directions = (NEWTON, 2) if name[:2] in ("lj", "mo") else ("bfgs", 1)
    check(potential().requires_grad_(), members(), h=h, stepper=stepper, directions=directions)


MIXED = [1.0, 2.0, 5.0, 7.0, 11.0]


def mixed() -> Atoms:
    atoms = heap()
    atoms.set_masses(MIXED)
    return atoms


CONSTRAINTS = {
    "atoms, crystal": lambda: held(vacancy(), FixAtoms([0, 2])),
    "one atom, cluster": lambda: held(heap(), FixAtoms([1])),
    "three atoms, cluster": lambda: held(heap(), FixAtoms([0, 1, 3])),
    "axes": lambda: held(vacancy(), FixCartesian([1, 3], [True, False, True])),
    "line": lambda: held(heap(), FixedLine([0, 4], [1, 2, -1])),
    "plane": lambda: held(heap(), FixedPlane([0, 1, 3], [0.3, 0, 1])),
    "plane, crystal": lambda: held(vacancy(), FixedPlane([0, 1, 5], [0.3, 0, 1])),
    "centre of mass": lambda: held(mixed(), FixCom()),
    "centre of a subset": lambda: held(mixed(), FixSubsetCom([0, 1, 4])),
    "symmetry": lambda: held(vacancy(amplitude=0), FixSymmetry),
    "scaled": lambda: held(vacancy(), FixScaled([0, 3], [True, False, True])),
    "several": lambda: held(vacancy(seed=4), FixAtoms([0]), FixedLine([1], [1, 1, 0]), FixCartesian([2], [1, 0, 0])),
    # A turn that these let begin stretches the dimer that they hold apart, and so costs energy.
    "strained axes": lambda: held(heap(stretch=1.4), FixCartesian([0, 1], [True, True, False])),
    "strained lines": lambda: held(heap(stretch=1.4), FixedLine([0], [0, 0, 1]), FixedLine([1], [0, 1, 1])),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_gradient_is_the_slope_of_the_constrained_minimum(name):
    check(lennard_jones().requires_grad_(), [CONSTRAINTS[name]()], h=1e-3)


def test_free_and_constrained_structures_share_a_batch():
    members = [CONSTRAINTS[name]() for name in ("strained axes", "atoms, crystal", "plane")]
    members.insert(1, vacancy(seed=2))
    potential = lennard_jones().requires_grad_()
    together = check(potential, members, h=1e-3)
    sums = [torch.zeros_like(p) for p in potential.parameters()]
    for atoms in members:
        alone = batch(atoms)
        grads = gradient(list(potential.parameters()), shape(minimum(potential, alone).positions, alone))
        sums = [total + g for total, g in zip(sums, grads, strict=True)]
    torch.testing.assert_close(sums, together, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("members", [[vacancy], [vacancy, heap]], ids=["alone", "batch"])
def test_the_gradient_in_the_cell_is_a_slope_too(members):
    check(lennard_jones(), [make() for make in members], h=1e-4, inputs="cells", directions=1)


def test_any_stepper_may_find_the_minimum():
    potential, found = lennard_jones().requires_grad_(), []
    for stepper in (NEWTON, LBFGS(maxstep=0.05, alpha=200.0), FIRE(dt=0.03, dtmax=0.08)):
        structures = batch(vacancy(), heap())
        relaxation = minimum(potential, structures, stepper=stepper)
        found.append(gradient(list(potential.parameters()), shape(relaxation.positions, structures)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-7)


def test_single_precision_gives_the_gradient_of_double_precision():
    found = {}
    for dtype in (torch.float64, torch.float32):
        potential, structures = lennard_jones().to(dtype).requires_grad_(), batch(vacancy(), heap())
        relaxation = minimum(potential, structures, Implicit(fmax=2e-3, tolerance=1e-5))
        assert relaxation.positions.dtype is dtype
        found[dtype] = gradient(list(potential.parameters()), shape(relaxation.positions, structures))
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
