"""Many structures: each ends where it would have ended alone, whoever drives it, and is given when it stops."""

import numpy as np
import pytest
import torch
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.constraints import ExternalForce, FixAtoms, FixBondLengths, Hookean
from ase.optimize import BFGS
from ase.optimize import FIRE as AseFIRE
from helpers.potentials import lennard_jones
from helpers.structures import argon, cluster, constrained

from ase_bptt import Status, relax
from ase_bptt.steppers import FIRE, GradientDescent
from ase_bptt.throughput import Relaxed, relax_all

SETTINGS = {"fmax": 0.02, "steps": 200}


def whole(ends) -> list[Relaxed]:
    """All ends, in the order of the structures."""
    return [end for _, end in sorted(ends, key=lambda item: item[0])]


def fire() -> FIRE:
    return FIRE(dt=0.03, dtmax=0.06)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_each_ends_as_it_would_alone(batch_size):
    structures = [argon(1), cluster(), argon(2), argon(3)]
    ends = whole(relax_all(lennard_jones(), structures, stepper=fire(), batch_size=batch_size, **SETTINGS))
    for start, end in zip(structures, ends, strict=True):
        alone = relax(lennard_jones(), start, stepper=fire(), **SETTINGS)
        np.testing.assert_allclose(end.atoms.positions, alone.to_atoms().positions, atol=1e-10)
        assert (end.status, end.nsteps) == (Status.CONVERGED, int(alone.nsteps[0]))
        assert end.atoms.get_potential_energy() == pytest.approx(alone.energies.item(), abs=1e-10)


def test_a_structure_is_given_as_soon_as_it_stops():
    near, far = argon(), argon(2)
    near.positions = relax(lennard_jones(), near, stepper=fire(), **SETTINGS).to_atoms().positions
    found = relax_all(lennard_jones(), [far, near], stepper=fire(), **SETTINGS)
    assert next(found)[0] == 1
    assert next(found)[0] == 0


def test_gradients_are_neither_made_nor_switched_off_for_the_caller():
    potential = lennard_jones().requires_grad_()
    for _, end in relax_all(potential, [argon()], stepper=fire(), **SETTINGS):
        assert torch.is_grad_enabled()
        assert end.status is Status.CONVERGED
    assert all(p.grad is None for p in potential.parameters())


@pytest.mark.parametrize("constraint", [FixAtoms([0, 2]), FixBondLengths([[0, 1]])], ids=["atoms", "bonds"])
@pytest.mark.parametrize(
    ("stepper", "optimizer", "settings"),
    [(fire, AseFIRE, {"dt": 0.03, "dtmax": 0.06, "downhill_check": False}), (lambda: "bfgs", BFGS, {})],
    ids=["fire", "bfgs"],
)
def test_constraints_are_obeyed_as_ase_obeys_them(constraint, stepper, optimizer, settings):
    start = constrained(argon(), constraint)
    (end,) = whole(relax_all(lennard_jones(), [start], stepper=stepper(), **SETTINGS))
    twin = start.copy()
    twin.calc = AseLennardJones(smooth=True, rc=2.4, ro=1.8)
    with optimizer(twin, logfile=None, **settings) as run:
        assert run.run(**SETTINGS)
    np.testing.assert_allclose(end.atoms.positions, twin.positions, atol=1e-7)
    assert end.nsteps == run.nsteps
    np.testing.assert_allclose(end.atoms.get_forces(), twin.get_forces(), atol=1e-6)
    assert len(end.atoms.constraints) == 1


@pytest.mark.parametrize(
    "constraint",
    [Hookean(0, [5.0, 0, 0], rt=1.0, k=0.3), Hookean(0, 1, rt=0.8, k=2.0), ExternalForce(0, 2, 0.1), FixAtoms([0])],
    ids=["spring to a point", "spring of a bond", "external force", "fixed atoms"],
)
def test_the_energy_of_a_constraint_counts_once(constraint):
    start = constrained(argon(), constraint)
    (end,) = whole(relax_all(lennard_jones(), [start], stepper=fire(), fmax=0.05, steps=20))
    live = end.atoms.copy()
    live.calc = AseLennardJones(smooth=True, rc=2.4, ro=1.8)
    np.testing.assert_allclose(end.atoms.get_potential_energy(), live.get_potential_energy(), atol=1e-8)
    np.testing.assert_allclose(end.atoms.get_forces(), live.get_forces(), atol=1e-7)
    # What is stored, and written to files, is the potential's alone.
    for name in ("energy", "forces"):
        np.testing.assert_allclose(end.atoms.calc.results[name], live.calc.results[name], atol=1e-7)


def test_constrained_and_free_ones_come_back_in_order():
    structures = [constrained(argon(), FixAtoms([0])), argon(2), constrained(cluster(), FixAtoms([1])), argon(3)]
    found = list(relax_all(lennard_jones(), structures, stepper=fire(), **SETTINGS))
    assert {k for k, _ in found} == {0, 1, 2, 3}
    assert [len(end.atoms) for end in whole(iter(found))] == [4, 4, 6, 4]


@pytest.mark.parametrize("constrain", [False, True])
def test_what_diverges_says_so_and_holds_nobody_up(constrain):
    broken = argon(4)
    broken.positions[1, 2] = np.nan
    if constrain:
        broken.set_constraint(FixAtoms([3]))
    ends = whole(relax_all(lennard_jones(), [broken, argon(2)], stepper=fire(), **SETTINGS))
    assert [end.status for end in ends] == [Status.DIVERGED, Status.CONVERGED]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_is_thrown_beyond_all_bounds_diverges_where_it_was_and_the_others_go_on(dtype):
    unbound = GradientDescent(0.002, maxstep=1e14)
    broken = argon(4)
    broken.positions[1] = broken.positions[0] + [0.05, 0, 0]
    potential = lennard_jones().to(dtype)
    alone = relax(potential, argon(2), stepper=unbound, **SETTINGS)
    ends = whole(relax_all(potential, [broken, argon(2)], stepper=unbound, **SETTINGS))
    assert [end.status for end in ends] == [Status.DIVERGED, Status.CONVERGED]
    assert ends[1].nsteps == int(alone.nsteps[0])
    with torch.enable_grad():
        found = relax(potential.requires_grad_(), [broken, argon(2)], stepper=unbound, **SETTINGS)
    assert found.status == (Status.DIVERGED, Status.CONVERGED)
    assert found.positions.isfinite().all()


def test_the_structures_given_are_left_as_they_are():
    start = constrained(argon(), FixAtoms([0]))
    whole(relax_all(lennard_jones(), [start, argon(2)], stepper=fire(), **SETTINGS))
    np.testing.assert_array_equal(start.positions, argon().positions)
    assert start.calc is None
