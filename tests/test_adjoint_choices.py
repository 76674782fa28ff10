"""Choosing an adjoint by name, number or JSON, pairs that cannot be, and runs that something else relaxed."""

import json

import numpy as np
import pytest
import torch
from ase import Atoms, optimize
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.constraints import FixBondLengths, FixScaled
from helpers.gradients import batch, gradient, sum_of_distances
from helpers.potentials import lennard_jones
from helpers.structures import argon, constrained, pentamer, skewed, vacancy

from ase_bptt import BPTTOptimizer, Status, TorchCalculator, relax
from ase_bptt.adjoints import ADJOINTS, FullTape, Guided, Implicit, OneStep, Replay, Truncated, make_adjoint
from ase_bptt.optimize.recording import as_relaxation
from ase_bptt.steppers import BFGS, GradientDescent

SPECS = {
    "full": FullTape(),
    "replay": Replay(),
    "replay:10": Replay(every=10),
    "replay:differences": Replay(differences=True),
    "truncated": Truncated(10),
    "truncated:5": Truncated(5),
    "implicit": Implicit(),
    "one-step": OneStep(),
    "guided": Guided(10),
    "guided:20": Guided(20),
}


def same(one, other) -> bool:
    return type(one) is type(other) and one.todict() == other.todict()


@pytest.mark.parametrize("spec", SPECS)
def test_names_and_numbers_make_adjoints(spec):
    assert same(make_adjoint(spec), SPECS[spec])


def test_every_adjoint_has_a_name_here():
    assert {type(adjoint).name for adjoint in SPECS.values()} == set(ADJOINTS)


@pytest.mark.parametrize(
    "bad", ["replays", "", "implicit:3", "full:1", "replay:", "guided:-3", "guided:2.5", "replay:0"]
)
def test_an_unknown_name_is_refused_and_the_known_ones_are_listed(bad):
    with pytest.raises(ValueError, match=f"no adjoint '{bad}'.*; there are full, replay:N, truncated:N, implicit"):
        make_adjoint(bad)


@pytest.mark.parametrize(("bad", "said"), [({"name": "x"}, "'x'"), ({"every": 2}, "None")])
def test_unknown_names_in_json_are_refused_in_the_same_way(bad, said):
    with pytest.raises(ValueError, match=f"no adjoint {said}; there are full, replay:N, truncated:N, implicit"):
        make_adjoint(bad)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda n: Replay(every=n), "every"),
        (Truncated, "window"),
        (Guided, "first"),
        (lambda n: Implicit(max_iterations=n), "max_iterations"),
    ],
    ids=["replay", "truncated", "guided", "implicit"],
)
@pytest.mark.parametrize("count", [0, -1, 2.5, 2.0, float("inf"), float("nan"), "3"])
def test_counts_that_are_not_whole_are_refused(make, name, count):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, at least 1, got {count}."):
        make(count)
    make(np.int64(3))


BAD = [
    lambda: Replay(every=0),
    lambda: Replay(clip=0.0),
    lambda: Truncated(0),
    lambda: Guided(0),
    lambda: Guided(3, weight=-1.0),
    lambda: Implicit(fmax=0.0),
    lambda: Implicit(damping=-1.0),
    lambda: Implicit(damping=float("nan")),
    lambda: Implicit(tolerance=0.0),
    lambda: Implicit(max_iterations=0),
    lambda: OneStep(step_size=0.0),
]


@pytest.mark.parametrize("make", BAD)
def test_numbers_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()


OTHERS = [
    Replay(every=3, clip=2.0),
    Implicit(fmax=1e-3, damping=0.1, tolerance=1e-5, max_iterations=7),
    OneStep(fmax=1e-3, step_size=0.02),
    Guided(7, weight=0.3, tail=None, solve=Implicit(damping=0.2)),
    Guided(7, tail=GradientDescent(0.01, momentum=0.3)),
    Guided(7, tail=BFGS(alpha=33.0)),
]


@pytest.mark.parametrize("adjoint", [*SPECS.values(), *OTHERS], ids=repr)
def test_json_brings_every_adjoint_back(adjoint):
    again = make_adjoint(json.loads(json.dumps(adjoint.todict())))
    assert same(again, adjoint)
    if adjoint.name == "guided":
        assert same(again.solve, adjoint.solve)
        assert type(again.tail) is type(adjoint.tail)


def test_none_and_objects_stay_what_they_are():
    adjoint = Implicit()
    assert make_adjoint(None) is None
    assert make_adjoint(adjoint) is adjoint


@pytest.mark.parametrize("stepper", ["bfgs", "lbfgs"])
@pytest.mark.parametrize("adjoint", [None, "full", "replay", "truncated:3", "guided:3"])
def test_steppers_without_a_gradient_are_refused_where_frames_are_gone_through(stepper, adjoint):
    with pytest.raises(TypeError, match=f"'{stepper}' cannot be differentiated.*take 'gd' or 'fire', the adjoint 'imp"):
        relax(lennard_jones(), argon(), stepper=stepper, adjoint=adjoint)
    with torch.no_grad():
        assert len(relax(lennard_jones(), argon(), stepper=stepper, adjoint=adjoint, steps=1)) == 1


@pytest.mark.parametrize(("adjoint", "words"), [("full", "keeps no tape"), ("guided:3", "cannot change its stepper")])
def test_an_ase_run_refuses_adjoints_that_it_leaves_nothing_for(adjoint, words):
    with pytest.raises(TypeError, match=f"An ASE run {words}.*(take|use) .*ase_bptt.relax"):
        BPTTOptimizer(argon(), logfile=None, adjoint=adjoint)


EXACT = Implicit(fmax=1e-5, tolerance=1e-9)


def calculated(atoms, potential) -> Atoms:
    atoms.calc = TorchCalculator(potential)
    return atoms


def expected(potential, atoms) -> list[torch.Tensor]:
    """From the minimum where ASE's optimizer has ended, by `relax`."""
    start = batch(atoms)
    relaxation = relax(
        potential, start, stepper=BFGS(maxstep=0.05, alpha=200.0), adjoint=Implicit(1e-9, tolerance=1e-9)
    )
    return gradient(list(potential.parameters()), sum_of_distances(relaxation.positions, start))


OPTIMIZERS = {
    "BFGS": lambda atoms: optimize.BFGS(atoms, logfile=None, alpha=200.0, maxstep=0.05),
    "BFGSLineSearch": lambda atoms: optimize.BFGSLineSearch(atoms, logfile=None, alpha=200.0, maxstep=0.05),
    "LBFGS": lambda atoms: optimize.LBFGS(atoms, logfile=None, alpha=200.0, maxstep=0.05),
    "ours": lambda atoms: BPTTOptimizer(atoms, logfile=None, stepper="bfgs", adjoint=EXACT, alpha=200.0, maxstep=0.05),
}


@pytest.mark.parametrize("make", [vacancy, pentamer])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_any_optimizer_of_ase_relaxed_has_a_gradient(name, make):
    potential = lennard_jones().requires_grad_()
    atoms, initial = calculated(make(), potential), make()
    optimizer = OPTIMIZERS[name](atoms)
    assert optimizer.run(fmax=1e-6, steps=300)
    if name == "ours":
        relaxation = optimizer.relaxation
        assert relaxation.nsteps.tolist() == [optimizer.nsteps]
    else:
        relaxation = as_relaxation(atoms, initial=initial, adjoint=EXACT, nsteps=optimizer.nsteps)
        np.testing.assert_array_equal(relaxation.start.positions.detach(), initial.positions)
    np.testing.assert_allclose(relaxation.positions.detach(), atoms.positions, rtol=0, atol=0)
    assert relaxation.status == (Status.CONVERGED,)
    assert relaxation.energies.item() == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    found = gradient(list(potential.parameters()), sum_of_distances(relaxation.positions, relaxation.start))
    torch.testing.assert_close(found, expected(potential, atoms), rtol=1e-4, atol=1e-5)
    assert relaxation.solves[0].residual < 1e-9


def test_what_was_not_relaxed_is_refused_with_its_force():
    atoms = calculated(vacancy(0.1), lennard_jones())
    with pytest.raises(ValueError, match=r"largest force on these atoms is .* eV/Å.*relax below its fmax of 0\.01"):
        as_relaxation(atoms)
    optimizer = BPTTOptimizer(atoms, logfile=None, stepper="bfgs", adjoint="implicit")
    optimizer.run(steps=1)
    with pytest.raises(ValueError, match="relax below its fmax"):
        _ = optimizer.relaxation


def refused() -> dict:
    foreign = argon()
    foreign.calc = AseLennardJones()
    lone = Atoms("Ar")  # at a minimum wherever it is
    other = constrained(
        calculated(Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 9]]), lennard_jones()), FixBondLengths([[0, 1]])
    )
    scaled = constrained(skewed(), FixScaled([0], [True, False, True]))
    scaled.positions[1] += 9
    scaled.set_pbc(False)
    return {
        "frames": (calculated(lone, lennard_jones()), "replay", TypeError, "Only 'implicit' and 'one-step'"),
        "calculator": (
            foreign,
            "implicit",
            RuntimeError,
            "Only a run on Atoms or on their FrechetCellFilter",
        ),
        "constraint": (other, "implicit", NotImplementedError, "FixBondLengths cannot be differentiated"),
        "skewed": (calculated(scaled, lennard_jones()), "one-step", NotImplementedError, "FixScaled constrain forces"),
    }


@pytest.mark.parametrize("name", refused())
def test_what_has_no_gradient_at_its_end_is_refused(name):
    atoms, adjoint, error, words = refused()[name]
    with pytest.raises(error, match=words):
        as_relaxation(atoms, adjoint=adjoint)


def test_weights_that_change_after_the_run_are_noticed():
    potential = lennard_jones().requires_grad_()
    atoms = calculated(pentamer(), potential)
    OPTIMIZERS["BFGS"](atoms).run(fmax=1e-3, steps=300)
    relaxation = as_relaxation(atoms)
    with torch.no_grad():
        potential.sigma += 0.01
    with pytest.raises(RuntimeError, match="were changed after this relaxation"):
        relaxation.positions.sum().backward()
