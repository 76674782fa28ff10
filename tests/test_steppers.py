"""One arithmetic, two drivers: against ASE's FIRE, a plain numpy loop, and each other."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.constraints import FixAtoms, FixedPlane
from ase.optimize import BFGS as AseBFGS
from ase.optimize import FIRE as AseFIRE
from ase.optimize import LBFGS as AseLBFGS
from helpers.potentials import lennard_jones
from helpers.structures import argon, cluster
from torch import nn

from ase_bptt import BPTTOptimizer, Status, Structures, TorchCalculator, relax
from ase_bptt.steppers import BFGS, FIRE, LBFGS, STEPPERS, GradientDescent, State, make_stepper

STRUCTURES = [argon, cluster]


def ase_lj():
    return AseLennardJones(rc=2.4, ro=1.8, smooth=True)


def path_of(optimizer, steps):
    """Positions before each step and after the last."""
    return np.array([optimizer.atoms.positions.copy() for _ in optimizer.irun(fmax=0.0, steps=steps)])


def path_of_relax(atoms, stepper, steps):
    relaxation = relax(lennard_jones().requires_grad_(), atoms, stepper=stepper, fmax=0.0, steps=steps)
    frames = [positions for positions, _ in relaxation.trajectory.frames]
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


# Short steps: with ASE's usual ones, moving an atom of `argon` by 1e-15 Å moves the end of ASE's own BFGS by 5e-10 Å.
QUASI_NEWTONS = [
    (AseBFGS, BFGS, {"maxstep": 0.05}),
    (AseBFGS, BFGS, {"alpha": 30.0, "maxstep": 0.03}),
    (AseLBFGS, LBFGS, {"maxstep": 0.05}),
    (AseLBFGS, LBFGS, {"alpha": 30.0, "maxstep": 0.03, "memory": 4, "damping": 0.9}),
]


@pytest.mark.parametrize("make", STRUCTURES)
@pytest.mark.parametrize(("theirs", "ours", "numbers"), QUASI_NEWTONS)
def test_quasi_newton_steps_end_where_ases_end(theirs, ours, numbers, make):
    atoms = with_calculator(make())
    theirs(atoms, logfile=None, **numbers).run(fmax=0.0, steps=20)
    with torch.no_grad():
        relaxation = relax(lennard_jones(), make(), stepper=ours(**numbers), fmax=0.0, steps=20)
    np.testing.assert_allclose(relaxation.positions, atoms.positions, rtol=0, atol=1e-10)
    assert abs(atoms.positions - make().positions).max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize(("theirs", "name"), [(AseBFGS, "bfgs"), (AseLBFGS, "lbfgs")])
def test_atoms_are_constrained_as_by_ases(theirs, name):
    atoms = with_calculator(cluster())
    atoms.set_constraint([FixAtoms([0]), FixedPlane(2, (1, 1, 0))])
    start = atoms.copy()
    theirs(atoms, logfile=None).run(fmax=0.0, steps=20)
    relaxation = relax(lennard_jones(), start, stepper=name, fmax=0.0, steps=20)
    np.testing.assert_allclose(relaxation.positions, atoms.positions, rtol=0, atol=1e-10)
    assert np.array_equal(relaxation.positions[0], start.positions[0])


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


EVERY = [FIRE(dt=0.03), GradientDescent(0.002, momentum=0.5), BFGS(), LBFGS(memory=10)]


@torch.no_grad()
@pytest.mark.parametrize("stepper", EVERY, ids=lambda stepper: stepper.name)
def test_no_structure_feels_the_others_of_its_batch(stepper):
    # All three are at other branches of FIRE, and capped or not, at the same time.
    members = [argon(), cluster(), cluster(5, seed=3)]
    together = relax(lennard_jones(), members, stepper=stepper, fmax=0.0, steps=40)
    for k, atoms in enumerate(members):
        alone = relax(lennard_jones(), atoms, stepper=stepper, fmax=0.0, steps=40)
        torch.testing.assert_close(together[k].positions, alone.positions, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("stepper", EVERY, ids=lambda stepper: stepper.name)
def test_members_that_stop_leave_the_others_as_they_are(stepper):
    members = [cluster(4), argon(), cluster(), Atoms("Ar", positions=[[1, 2, 3]]), cluster(5, seed=3)]
    together = relax(lennard_jones(), members, stepper=stepper, fmax=0.3, steps=60)
    alone = [relax(lennard_jones(), atoms, stepper=stepper, fmax=0.3, steps=60) for atoms in members]
    assert together.nsteps.tolist() == [int(one.nsteps[0]) for one in alone]
    assert len(set(together.nsteps.tolist())) > 2
    torch.testing.assert_close(together.positions, torch.cat([one.positions for one in alone]), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bfgs", "lbfgs"])
def test_a_structure_that_is_lost_does_not_take_the_others_along(name):
    far, near = cluster(), cluster(5, seed=3)
    far.positions[0] = far.positions[1] + 1e-9
    together = relax(lennard_jones(), [far, near], stepper=name, fmax=1e-3, steps=100)
    assert together.status[1] is Status.CONVERGED
    alone = relax(lennard_jones(), near, stepper=name, fmax=1e-3, steps=100)
    torch.testing.assert_close(together[1].positions, alone.positions, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["bfgs", "lbfgs"])
@pytest.mark.parametrize("adjoint", ["replay", "full"])
def test_a_tape_refuses_quasi_newton_steps(name, adjoint):
    with pytest.raises(TypeError, match=rf"The stepper '{name}' cannot be differentiated.*torch\.no_grad"):
        relax(lennard_jones().requires_grad_(), argon(), stepper=name, adjoint=adjoint, steps=3)


@pytest.mark.parametrize("name", ["bfgs", "lbfgs"])
def test_quasi_newton_steps_need_no_tape_where_nothing_requires_gradients(name):
    relaxation = relax(lennard_jones().requires_grad_(False), argon(), stepper=name, fmax=0.01, steps=100)
    assert relaxation.status == (Status.CONVERGED,)
    assert not relaxation.positions.requires_grad


def test_a_hessian_that_has_no_eigenvalues_ends_its_structure_only():
    stepper, batch = BFGS(), torch.tensor([0, 0, 1, 1])
    positions, forces = torch.zeros(4, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    _, state = stepper.step(positions, forces, stepper.init(positions, 2), batch)
    state.lists["hessian"] = (state.lists["hessian"][0] * torch.nan, state.lists["hessian"][1])
    moved, _ = stepper.step(positions, forces, state, batch)
    assert moved[:2].isnan().all()
    assert moved[2:].isfinite().all()


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


@pytest.mark.parametrize("stepper", [BFGS(0.2, alpha=10.0), LBFGS(0.2, alpha=10.0)], ids=["bfgs", "lbfgs"])
def test_quasi_newton_steps_begin_as_capped_descent(stepper):
    moved, _ = one_step(stepper, FORCES, [0, 0, 1, 1])
    expected = [[0.15, 0, 0], [0, 0.2, 0], [0.01, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(moved, expected, atol=1e-15)


def test_fire_caps_the_norm_of_the_whole_step_of_each_structure():
    moved, _ = one_step(FIRE(dt=1.0, maxstep=0.2), FORCES, [0, 0, 1, 1])
    expected = [[0.12, 0, 0], [0, 0.16, 0], [0.1, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(moved, expected, atol=1e-15)


@pytest.mark.parametrize("stepper", STEPPERS)
def test_a_step_is_pure_and_out_of_place(stepper):
    stepper = make_stepper(stepper)
    positions = torch.rand(4, 3, dtype=torch.float64)
    batch, state = torch.tensor([0, 0, 1, 1]), stepper.init(positions, 2)
    forces = torch.rand(4, 3, dtype=torch.float64)
    positions, state = stepper.step(positions, forces, state, batch)
    forces = torch.rand(4, 3, dtype=torch.float64)
    before = [positions.clone(), forces.clone(), state.map(torch.clone)]
    first = stepper.step(positions, forces, state, batch)
    second = stepper.step(positions, forces, state, batch)
    assert torch.equal(first[0], second[0])
    assert torch.equal(positions, before[0])
    assert torch.equal(forces, before[1])
    assert_same(state, before[2])
    assert_same(first[1], second[1])


def assert_same(one, other):
    for part in ("atoms", "structures", "lists"):
        torch.testing.assert_close(getattr(one, part), getattr(other, part), rtol=0, atol=0)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", STEPPERS)
def test_a_copy_of_stepper_and_state_continues_alike(name, again):
    stepper = make_stepper(name)
    positions, forces = torch.rand(2, 4, 3, dtype=torch.float64)
    batch = torch.tensor([0, 0, 1, 1])
    positions, state = stepper.step(positions, forces, stepper.init(positions, 2), batch)
    there, after = stepper.step(positions, -forces, state, batch)
    found, found_after = again(stepper).step(positions, -forces, again(state), batch)
    assert torch.equal(found, there)
    assert_same(found_after, after)


def test_a_state_is_selected_by_structure():
    state = FIRE().init(torch.arange(12.0).reshape(4, 3), 2)
    state.atoms["velocities"] += torch.arange(12.0).reshape(4, 3)
    state.structures["downhill"] += torch.tensor([5, 7])
    state.lists["hessian"] = (torch.eye(3), torch.ones(9, 9))
    chosen = state.select(torch.tensor([2, 3]), torch.tensor([1]))
    assert [t.shape for t in chosen.lists["hessian"]] == [(9, 9)]
    assert chosen.atoms["velocities"].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert chosen.structures["downhill"].tolist() == [7]


def test_the_floats_of_a_state_are_replaced_in_their_own_order():
    state = FIRE().init(torch.zeros(4, 3), 2)
    again = state.with_floats([t + k + 1 for k, t in enumerate(state.floats())])
    assert again.atoms["velocities"].unique().tolist() == [1]
    assert again.structures["dt"].tolist() == pytest.approx([2.1, 2.1])
    assert again.structures["a"].tolist() == pytest.approx([3.1, 3.1])
    assert again.structures["downhill"] is state.structures["downhill"]


def test_lists_are_mapped_and_their_floats_replaced_too():
    state = State({"x": torch.zeros(2, 3)}, {}, {"h": (torch.zeros(2), torch.zeros(3)), "k": (torch.tensor([1]),) * 2})
    again = state.with_floats([t + k for k, t in enumerate(state.floats())])
    assert [t.tolist() for t in again.lists["h"]] == [[1, 1], [2, 2, 2]]
    assert [t.tolist() for t in again.map(torch.neg).lists["k"]] == [[-1], [-1]]


@pytest.mark.parametrize("name", STEPPERS)
def test_unknown_numbers_are_named(name):
    with pytest.raises(TypeError, match=rf"The stepper '{name}' has no keyword 'step'.*; it has "):
        make_stepper(name, step=1, size=2)


@pytest.mark.parametrize("numbers", [{"alpha": 0.0}, {"maxstep": -0.1}, {"memory": -1}, {"damping": float("nan")}])
def test_numbers_that_make_no_sense_are_refused(numbers):
    (name,) = numbers
    with pytest.raises(ValueError, match=f"{name} must"):
        LBFGS(**numbers)


def test_numbers_beside_a_stepper_object_are_refused():
    with pytest.raises(TypeError, match="Set dt on the stepper object itself"):
        make_stepper(FIRE(), dt=0.2)


def test_unknown_steppers_are_named():
    with pytest.raises(ValueError, match="no stepper 'newton'; there are gd, fire, bfgs, lbfgs"):
        relax(lennard_jones(), argon(), stepper="newton")


@pytest.mark.parametrize(("name", "cls"), [*STEPPERS.items(), (None, FIRE)])
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


@pytest.mark.parametrize("stepper", [GradientDescent(0.05), BFGS(alpha=20.0), LBFGS(alpha=20.0)])
def test_a_step_keeps_float32(stepper):
    positions, batch = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    moved, state = stepper.step(positions, torch.ones(2, 3), stepper.init(positions, 1), batch)
    again, _ = stepper.step(moved, torch.ones(2, 3) / 2, state, batch)
    assert moved.dtype is again.dtype is torch.float32
    assert moved.unique().tolist() == pytest.approx([0.05])


# Numbers for each element and frame ---------------------------------------------------------------


def mixed(make=cluster):
    """Two elements, which Lennard-Jones does not tell apart."""
    atoms = make()
    atoms.symbols[::2] = "Ne"
    return atoms


def number(value, dtype=torch.float64):
    return nn.Parameter(torch.tensor(value, dtype=dtype))


ELEMENTS = {"Ar": 0.002, "Ne": 0.003}
FRAMES = [0.003, 0.002, 0.001]
GROUPS = {"element": ELEMENTS, "frame": FRAMES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("sizes", [{"Ne": 0.0021, "Ar": 0.0021, "O": 1.0}, [0.0021] * 3], ids=GROUPS)
def test_equal_step_sizes_are_one_bit_for_bit(sizes, learnt, dtype):
    numbers = {"anneal": 0.97, "momentum": 0.3, "maxstep": 0.01}
    found = []
    for step_size in (0.0021, sizes):
        stepper = GradientDescent(step_size, **numbers)
        stepper = stepper.learn() if learnt else stepper
        structures = Structures.from_atoms([mixed(argon), mixed()], dtype=dtype)
        found.append(relax(lennard_jones().to(dtype), structures, stepper=stepper, fmax=0.01, steps=20))
    assert found[0].positions.requires_grad
    assert torch.equal(found[0].positions, found[1].positions)
    assert found[0].nsteps.tolist() == found[1].nsteps.tolist()


def test_each_element_and_each_frame_has_its_own_step_size():
    numbers, forces = torch.tensor([10, 18, 18]), torch.ones(3, 3, dtype=torch.float64)
    batch = torch.tensor([0, 0, 1])
    for sizes, expected in ((ELEMENTS, [[3, 2, 2]] * 4), (FRAMES, [[3] * 3, [2] * 3, [1] * 3, [1] * 3])):
        stepper = GradientDescent(sizes, anneal=0.5)
        positions = torch.zeros_like(forces)
        state = stepper.start(positions, 2, numbers)
        for t, size in enumerate(expected):
            moved, state = stepper.step(positions, forces, state, batch)
            expected_moves = torch.tensor(size, dtype=torch.float64) * 1e-3 * 0.5**t
            torch.testing.assert_close(moved - positions, expected_moves[:, None].expand(3, 3), rtol=0, atol=1e-15)
            positions = moved


@pytest.mark.parametrize("make", STRUCTURES)
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_both_drivers_take_the_same_path_with_several_step_sizes(sizes, make):
    numbers = {"momentum": 0.4, "anneal": 0.99, "maxstep": 0.03}
    ase = path_of(
        BPTTOptimizer(with_calculator(mixed(make)), stepper=GradientDescent(sizes, **numbers), logfile=None), 50
    )
    tape = path_of_relax(mixed(make), GradientDescent(sizes, **numbers), 50)
    np.testing.assert_allclose(tape, ase, rtol=0, atol=1e-12)
    other = path_of_relax(mixed(make), GradientDescent(0.002, **numbers), 50)
    assert abs(other - tape).max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_members_with_several_step_sizes_stop_and_leave_the_others_as_they_are(sizes):
    members = [mixed(), argon(), mixed(argon), cluster(5, seed=3)]
    settings = {"stepper": GradientDescent(sizes, momentum=0.5), "fmax": 0.3, "steps": 60}
    together = relax(lennard_jones(), members, **settings)
    alone = [relax(lennard_jones(), atoms, **settings) for atoms in members]
    assert together.nsteps.tolist() == [int(one.nsteps[0]) for one in alone]
    assert len(set(together.nsteps.tolist())) > 1
    torch.testing.assert_close(together.positions, torch.cat([one.positions for one in alone]), rtol=0, atol=1e-10)


def test_an_element_without_a_step_size_is_named():
    message = "step_size has no entry for Ar, and the structures hold Ne, Ar: give one for each element."
    with pytest.raises(ValueError, match=message):
        relax(lennard_jones(), mixed(), stepper=GradientDescent({"Ne": 0.01, "O": 0.01}))


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ({"step_size": {"Si": 0.1, "Sj": 0.1, "x": 0.1}}, ValueError, "by their symbols, and 'Sj', 'x' is none"),
        ({"step_size": {"Si": 0.1, "H": -0.1}}, ValueError, r"step_size\[H\] must be positive, got -0.1"),
        ({"step_size": [0.1, 0.0]}, ValueError, r"step_size\[1\] must be positive, got 0"),
        ({"step_size": []}, ValueError, "step_size has no number in it: give at least one"),
        ({"step_size": {}}, ValueError, "step_size has no number in it: give at least one"),
        ({"step_size": "fast"}, ValueError, "or 'auto', not 'fast'"),
        ({"step_size": number([0.1, 0.2])}, TypeError, "holds one number, not 2: give a list or dict of Parameters"),
        ({"step_size": [number([0.1, 0.2])]}, TypeError, "holds one number, not 2: give a list or dict of Parameters"),
    ],
)
def test_step_sizes_that_make_no_sense_are_refused(numbers, error, message):
    with pytest.raises(error, match=message):
        GradientDescent(**numbers)


# Numbers that are learnt --------------------------------------------------------------------------

LEARNERS = {
    "gd": lambda: GradientDescent(0.002, 0.97, 0.3, maxstep=0.05),
    "gd by element": lambda: GradientDescent(ELEMENTS, 0.97, 0.3),
    "gd by frame": lambda: GradientDescent(FRAMES, 0.97, 0.3),
    "fire": lambda: FIRE(dt=0.03, dtmax=0.06, Nmin=1, a=0.15, astart=0.12, fa=0.98, finc=1.2, fdec=0.4),
}


@pytest.mark.parametrize("adjoint", ["replay", "full"])
@pytest.mark.parametrize("name", LEARNERS)
def test_the_gradient_of_every_learnable_hyperparameter_agrees_with_finite_differences(name, adjoint):
    stepper = LEARNERS[name]().learn()
    members = [mixed(), mixed(argon)]
    reference = torch.from_numpy(np.concatenate([atoms.positions for atoms in members])) + 0.1

    def loss():
        # Long enough for FIRE to have gone uphill, without which astart and fdec mean nothing.
        found = relax(lennard_jones(), members, stepper=stepper, fmax=0.0, steps=16, adjoint=adjoint)
        return (found.positions - reference).pow(3).sum()

    labels = stepper.hyperparameters()
    parameters = list(stepper.parameters())
    assert len(labels) == len(parameters) == {"gd": 3, "gd by element": 4, "gd by frame": 5, "fire": 6}[name]
    for parameter, analytic in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
        h, ends = 1e-4 * parameter.item(), []
        with torch.no_grad():
            for step in (-2, -1, 1, 2):
                parameter += step * h
                ends.append(loss().item())
                parameter -= step * h
        difference = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * h)
        assert analytic.abs() > 1e-6
        assert analytic.item() == pytest.approx(difference, rel=1e-6)


def test_learning_makes_parameters_of_what_is_named_and_keeps_those_that_are():
    own = number(0.003, torch.float32)
    stepper = GradientDescent({"Ne": own, "Ar": 0.1}, anneal=0.9)
    assert stepper.learn("step_size") is stepper
    assert stepper.step_size["Ne"] is own
    assert [(name, p.dtype) for name, p in stepper.named_parameters()] == [
        ("step_size.Ne", torch.float32),
        ("step_size.Ar", torch.float64),
    ]
    assert stepper.step_size["Ar"].item() == 0.1
    assert stepper.anneal == 0.9


@pytest.mark.parametrize("names", [("momentum", "anneal"), ("anneal",), ()])
def test_parameters_are_in_the_order_of_a_stepper_that_is_built_with_them(names):
    # An optimizer's state in a checkpoint goes by that order.
    stepper = GradientDescent({"Ne": 0.1, "Ar": number(0.1)})
    for name in names:
        stepper.learn(name)
    stepper.learn()
    built = GradientDescent({"Ne": number(0.1), "Ar": number(0.1)}, number(1.0), number(0.0))
    assert [name for name, _ in stepper.named_parameters()] == [name for name, _ in built.named_parameters()]
    fire = FIRE().learn("fa").learn("a", "dt").learn()
    built = FIRE(**{name: number(value) for name, value in FIRE().hyperparameters().items()})
    assert [name for name, _ in fire.named_parameters()] == [name for name, _ in built.named_parameters()]


@pytest.mark.parametrize(
    ("stepper", "names", "message"),
    [
        (GradientDescent(), ["maxstep", "speed"], "'gd' can learn step_size, anneal, momentum, but not maxstep, speed"),
        (FIRE(), ["dtmax"], "'fire' can learn dt, finc, fdec, a, astart, fa, but not dtmax"),
        (FIRE(), ["Nmin"], "but not Nmin"),
        (BFGS(), [], r"'bfgs' can learn nothing\."),
        (LBFGS(), ["alpha"], r"'lbfgs' can learn nothing, but not alpha\."),
        (GradientDescent("auto"), [], r"step_size='auto' is no number yet: call resolve_step_size\(limit\)"),
        (GradientDescent(anneal=2.0), [], "anneal is 2, and can be learnt from 1e-06 to 1.1 only"),
        (FIRE(dt=0.2, dtmax=0.1), ["dt"], "dt is 0.2, and can be learnt from 1e-06 to 0.1 only"),
    ],
)
def test_what_cannot_be_learnt_is_named(stepper, names, message):
    with pytest.raises(ValueError, match=message):
        stepper.learn(*names)
    assert not list(stepper.parameters())


def test_numbers_are_what_a_report_may_compare():
    assert FIRE().learn("dt").hyperparameters() == {
        "dt": 0.1,
        "finc": 1.1,
        "fdec": 0.5,
        "a": 0.1,
        "astart": 0.1,
        "fa": 0.99,
    }
    rest = {"anneal": 1.0, "momentum": 0.0}
    assert GradientDescent(number(0.1)).hyperparameters() == {"step_size": 0.1} | rest
    assert (
        GradientDescent(ELEMENTS).learn().hyperparameters() == {"step_size[Ar]": 0.002, "step_size[Ne]": 0.003} | rest
    )
    assert GradientDescent([0.3, number(0.2)]).hyperparameters() == {"step_size[0]": 0.3, "step_size[1]": 0.2} | rest
    assert GradientDescent("auto").hyperparameters() == rest
    assert BFGS().hyperparameters() == {}


@pytest.mark.parametrize("far", [-5.0, 5.0])
@pytest.mark.parametrize("name", LEARNERS)
def test_what_leaves_its_range_is_brought_back_to_its_end(name, far):
    stepper = LEARNERS[name]().learn()
    with torch.no_grad():
        for parameter in stepper.parameters():
            parameter += far
    stepper.clamp_parameters()
    found = stepper.hyperparameters()
    low = {"momentum": 0.0, "a": 0.0, "astart": 0.0, "fa": 0.0, "finc": 1.0}
    high = {"anneal": 1.1, "momentum": 0.999, "dt": 0.06, "fdec": 1.0, "a": 1.0, "astart": 1.0, "fa": 1.0}
    for label, value in found.items():
        start = LEARNERS[name]().hyperparameters()[label]
        assert value == (low.get(label, 1e-6) if far < 0 else high.get(label, start + far))
    assert all(parameter.requires_grad for parameter in stepper.parameters())


def test_what_is_in_its_range_and_what_is_not_learnt_stay_as_they_are():
    stepper = GradientDescent([0.1, 0.2], anneal=1.5).learn("step_size", "momentum")
    before = [(p._version, p.item()) for p in stepper.parameters()]
    stepper.clamp_parameters()
    assert [(p._version, p.item()) for p in stepper.parameters()] == before
    assert stepper.anneal == 1.5


@pytest.mark.parametrize("names", [["step_size"], ["momentum", "step_size"], ["anneal"], []], ids=str)
@pytest.mark.parametrize("name", ["gd", "gd by element", "gd by frame", "partly"])
def test_json_and_weights_build_the_same_stepper_again(name, names):
    make = LEARNERS.get(name, lambda: GradientDescent({"Ne": 0.3, "Ar": number(0.2), "O": 0.1}))
    stepper = make().learn(*names) if names else make()
    with torch.no_grad():
        for parameter in stepper.parameters():
            parameter *= 1 / 3
    described = json.loads(json.dumps(stepper.todict()))
    weights = {key: nn.Parameter(value) for key, value in stepper.state_dict().items()}
    again = make_stepper(described.pop("name"), **described | weights)
    again.load_state_dict(stepper.state_dict())
    assert again.todict() == stepper.todict()
    found, expected = list(again.named_parameters()), list(stepper.named_parameters())
    assert [key for key, _ in found] == [key for key, _ in expected]
    assert all(torch.equal(a, b) and a.dtype is b.dtype for (_, a), (_, b) in zip(found, expected))
    assert make_stepper("gd", **described).todict() == stepper.todict()


@pytest.mark.parametrize("sizes", [0.1, {"Ne": 0.1}, [0.1]])
@pytest.mark.parametrize("name", ["step_size.Ar", "step_size.1", "momentum.0"])
def test_weights_of_another_stepper_are_named(name, sizes):
    with pytest.raises(TypeError, match=f"The stepper 'gd' has no keyword '{name}'"):
        make_stepper("gd", step_size=sizes, **{name: number(0.1)})


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("sizes", [{"Ne": number(0.1), "Ar": 0.2}, [number(0.1), 0.2], "auto"], ids=["Z", "t", "auto"])
def test_several_step_sizes_are_copied_and_described(sizes, again):
    stepper = GradientDescent(sizes)
    copied = again(stepper)
    assert copied.todict() == stepper.todict()
    assert str(stepper.todict()["step_size"]) in repr(stepper)
    assert len(list(copied.parameters())) == len(list(stepper.parameters()))
    moved = stepper.to(torch.float32)
    assert all(parameter.dtype is torch.float32 for parameter in moved.parameters())


# Half the stability limit --------------------------------------------------------------------------


def test_auto_is_half_the_limit_once_it_is_known():
    stepper = GradientDescent("auto", anneal=number(0.9), momentum=0.7, maxstep=0.1)
    assert stepper.todict()["step_size"] == "auto"
    found = stepper.resolve_step_size(0.08)
    assert found.todict() == {"name": "gd", "step_size": 0.04, "anneal": 0.9, "momentum": 0.7, "maxstep": 0.1}
    assert found.anneal is stepper.anneal
    assert stepper.step_size == "auto"
    assert found.resolve_step_size(9.0) is found
    assert found.learn("step_size").step_size.item() == 0.04
    for other in (FIRE(), BFGS()):
        assert other.resolve_step_size(0.08) is other


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(ValueError, match="limit must be positive"):
        GradientDescent("auto").resolve_step_size(limit)


def test_auto_that_nobody_has_resolved_is_refused_with_a_sentence():
    stepper, x = GradientDescent("auto"), torch.zeros(2, 3, dtype=torch.float64)
    state, batch = stepper.init(x, 1), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"step_size='auto' is no number yet: call resolve_step_size\(limit\)"):
        stepper.step(x, x, state, batch)


@pytest.mark.parametrize("momentum", [0.0, 0.7, 0.95])
def test_half_the_limit_falls_into_a_bowl_and_stays_there(momentum):
    curvatures = torch.tensor([[50.0, 20.0, 0.5]], dtype=torch.float64)
    stepper = GradientDescent("auto", momentum=momentum, maxstep=9.0).resolve_step_size(2 / 50.0)
    x = torch.ones(1, 3, dtype=torch.float64)
    state, batch = stepper.init(x, 1), torch.tensor([0])
    for _ in range(1500):
        x, state = stepper.step(x, -curvatures * x, state, batch)
    assert x.abs().max() < 1e-6
