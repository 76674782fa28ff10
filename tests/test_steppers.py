"""One arithmetic, two drivers: against ASE's FIRE, a plain numpy loop, and each other."""

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.optimize import FIRE as AseFIRE
from conftest import argon, cluster, lennard_jones
from torch import nn

from ase_bptt import BPTTOptimizer, TorchCalculator, relax
from ase_bptt.steppers import FIRE, GradientDescent, make_stepper

STRUCTURES = [argon, cluster]


def ase_lj():
    return AseLennardJones(rc=2.4, ro=1.8, smooth=True)


def path_of(optimizer, steps):
    """Positions before each step and after the last."""
    return np.array([optimizer.atoms.positions.copy() for _ in optimizer.irun(fmax=0.0, steps=steps)])


def path_of_relax(atoms, stepper, steps):
    relaxation = relax(lennard_jones().requires_grad_(), atoms, stepper=stepper, fmax=0.0, steps=steps)
    frames = [positions for positions, _ in relaxation._record.frames]
    return torch.stack([*frames, relaxation.positions.detach()]).numpy()


def with_calculator(atoms, calc=None):
    atoms.calc = calc or TorchCalculator(lennard_jones())
    return atoms


FIRES = [
    {"dt": 0.03},
    {"dt": 0.05, "dtmax": 0.08, "Nmin": 2, "finc": 1.3, "fdec": 0.4, "astart": 0.2, "fa": 0.9, "a": 0.15},
    {"dt": 0.1, "maxstep": 0.05},
]


@pytest.mark.parametrize("make", STRUCTURES)
@pytest.mark.parametrize("numbers", FIRES, ids=["defaults", "all-numbers", "capped"])
def test_fire_moves_in_lockstep_with_ases(numbers, make):
    expected = path_of(AseFIRE(with_calculator(make(), ase_lj()), logfile=None, **numbers), 50)
    ours = path_of(BPTTOptimizer(with_calculator(make(), ase_lj()), logfile=None, **numbers), 50)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(path_of_relax(make(), FIRE(**numbers), 50), expected, rtol=0, atol=1e-10)
    assert np.ptp(expected, axis=0).max() > 0.01


def descend(atoms, steps, step_size, anneal=1.0, momentum=0.0, maxstep=0.2):
    path, velocity = [atoms.positions.copy()], 0.0
    for t in range(steps):
        velocity = momentum * velocity + atoms.get_forces()
        move = step_size * anneal**t * velocity
        atoms.positions += move * min(1.0, maxstep / np.linalg.norm(move, axis=1).max())
        path.append(atoms.positions.copy())
    return np.array(path)


GDS = [
    {"step_size": 0.002},
    {"step_size": 0.002, "anneal": 0.95},
    {"step_size": 0.002, "momentum": 0.6, "anneal": 0.99},
    {"step_size": 0.01, "maxstep": 0.01},
]


@pytest.mark.parametrize("make", STRUCTURES)
@pytest.mark.parametrize("numbers", GDS, ids=["plain", "annealed", "momentum", "capped"])
def test_gradient_descent_is_five_lines_of_numpy(numbers, make):
    expected = descend(with_calculator(make(), ase_lj()), 50, **numbers)
    atoms = with_calculator(make(), ase_lj())
    ours = path_of(BPTTOptimizer(atoms, stepper="gd", logfile=None, **numbers), 50)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10)
    there = path_of_relax(make(), GradientDescent(**numbers), 50)
    np.testing.assert_allclose(there, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", STRUCTURES)
@pytest.mark.parametrize("stepper", [FIRE(dt=0.03), GradientDescent(0.002, momentum=0.5)], ids=["fire", "gd"])
def test_both_drivers_take_the_same_path(stepper, make):
    ase = path_of(BPTTOptimizer(with_calculator(make()), stepper=stepper, logfile=None), 50)
    np.testing.assert_allclose(path_of_relax(make(), stepper, 50), ase, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stepper", [FIRE(dt=0.03), GradientDescent(0.002, momentum=0.5)], ids=["fire", "gd"])
def test_no_structure_feels_the_others_of_its_batch(stepper):
    # All three are at other branches of FIRE, and capped or not, at the same time.
    members = [argon(), cluster(), cluster(5, seed=3)]
    together = relax(lennard_jones(), members, stepper=stepper, fmax=0.0, steps=40)
    for k, atoms in enumerate(members):
        alone = relax(lennard_jones(), atoms, stepper=stepper, fmax=0.0, steps=40)
        torch.testing.assert_close(together[k].positions, alone.positions, rtol=0, atol=1e-10)


def one_step(stepper, forces, batch):
    batch = torch.tensor(batch)
    zeros = torch.zeros(len(batch), 3, dtype=torch.float64)
    state = stepper.init(zeros, int(batch.max()) + 1)
    return stepper.step(zeros, torch.tensor(forces, dtype=torch.float64), state, batch)


FORCES = [[3.0, 0, 0], [0, 4.0, 0], [0.1, 0, 0], [0, 0, 0]]


def test_gradient_descent_caps_the_longest_atom_step_of_each_structure():
    moved, _ = one_step(GradientDescent(0.1, maxstep=0.2), FORCES, [0, 0, 1, 1])
    expected = [[0.15, 0, 0], [0, 0.2, 0], [0.01, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(moved, expected, atol=1e-15)


def test_fire_caps_the_norm_of_the_whole_step_of_each_structure():
    moved, _ = one_step(FIRE(dt=1.0, maxstep=0.2), FORCES, [0, 0, 1, 1])
    expected = [[0.12, 0, 0], [0, 0.16, 0], [0.1, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(moved, expected, atol=1e-15)


@pytest.mark.parametrize("stepper", ["gd", "fire"])
def test_a_step_is_pure_and_out_of_place(stepper):
    stepper = make_stepper(stepper)
    positions = torch.rand(4, 3, dtype=torch.float64)
    batch, state = torch.tensor([0, 0, 1, 1]), stepper.init(positions, 2)
    forces = torch.rand(4, 3, dtype=torch.float64)
    before = [positions.clone(), forces.clone(), state.map(torch.clone)]
    first = stepper.step(positions, forces, state, batch)
    second = stepper.step(positions, forces, state, batch)
    assert torch.equal(first[0], second[0])
    assert torch.equal(positions, before[0])
    assert torch.equal(forces, before[1])
    for part in ("atoms", "structures"):
        for name, value in getattr(state, part).items():
            assert torch.equal(value, getattr(before[2], part)[name])


def test_a_state_is_selected_by_structure():
    state = FIRE().init(torch.arange(12.0).reshape(4, 3), 2)
    state.atoms["velocities"] += torch.arange(12.0).reshape(4, 3)
    state.structures["downhill"] += torch.tensor([5, 7])
    chosen = state.select(torch.tensor([2, 3]), torch.tensor([1]))
    assert chosen.atoms["velocities"].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert chosen.structures["downhill"].tolist() == [7]


def test_the_floats_of_a_state_are_replaced_in_their_own_order():
    state = FIRE().init(torch.zeros(4, 3), 2)
    again = state.with_floats([t + k + 1 for k, t in enumerate(state.floats())])
    assert again.atoms["velocities"].unique().tolist() == [1]
    assert again.structures["dt"].tolist() == pytest.approx([2.1, 2.1])
    assert again.structures["a"].tolist() == pytest.approx([3.1, 3.1])
    assert again.structures["downhill"] is state.structures["downhill"]


@pytest.mark.parametrize("name", ["gd", "fire"])
def test_unknown_numbers_are_named(name):
    with pytest.raises(TypeError, match=rf"The stepper '{name}' has no alpha, step\."):
        make_stepper(name, step=1, alpha=2)


def test_numbers_beside_a_stepper_object_are_refused():
    with pytest.raises(TypeError, match="Set dt on the stepper object itself"):
        make_stepper(FIRE(), dt=0.2)


def test_unknown_steppers_are_named():
    with pytest.raises(ValueError, match="no stepper 'newton'; there are gd, fire"):
        relax(lennard_jones(), argon(), stepper="newton")


@pytest.mark.parametrize(("name", "cls"), [("gd", GradientDescent), ("fire", FIRE), (None, FIRE)])
def test_a_stepper_comes_by_name_and_describes_itself_as_json(name, cls):
    stepper = make_stepper(name)
    described = json.loads(json.dumps(stepper.todict()))
    assert type(stepper) is cls
    assert described.pop("name") == cls.name
    assert cls(**described).todict() == stepper.todict()


def test_parameters_describe_themselves_as_numbers():
    stepper = GradientDescent(nn.Parameter(torch.tensor(0.25)))
    assert stepper.todict()["step_size"] == 0.25
    assert "step_size=0.25" in repr(stepper)
    assert [name for name, _ in stepper.named_parameters()] == ["step_size"]


def test_gradient_descent_with_maxstep_survives_a_crash_of_atoms():
    # Two atoms almost on one spot: forces of 1e9 eV/Å.
    atoms = Atoms("Ar2", positions=[[0, 0, 0], [0.2, 0, 0]])
    stepper = GradientDescent(0.002, maxstep=0.05)
    relaxation = relax(lennard_jones(), atoms, stepper=stepper, fmax=0.01, steps=200)
    assert relaxation.status[0].value == "converged"
    distance = (relaxation.positions[0] - relaxation.positions[1]).norm().item()
    assert distance == pytest.approx(2 ** (1 / 6), abs=1e-3)


def test_a_step_keeps_float32():
    positions = torch.zeros(2, 3)
    batch, stepper = torch.zeros(2, dtype=torch.int64), GradientDescent(0.05)
    moved, _ = stepper.step(positions, torch.ones(2, 3), stepper.init(positions, 1), batch)
    assert moved.dtype is torch.float32
    assert moved.unique().tolist() == pytest.approx([0.05])
