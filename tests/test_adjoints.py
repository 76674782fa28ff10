"""The heart: gradients through whole relaxations, against differences of whole relaxations."""

import pytest
import torch
from ase import Atoms
from helpers.gradients import (
    LEARNABLE,
    WEIGHT_CHANGES,
    add_in_place,
    batch,
    check_gradient,
    gradient,
    loss_and_decisions,
    mass_weighted_distance,
    nearby_positions,
)
from helpers.potentials import lennard_jones, needs_mace, stiff_mace
from helpers.structures import argon, cluster, skewed, trimer

from ase_bptt import BPTTOptimizer, Prediction, Status, Structures, TorchCalculator, relax
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.steppers import FIRE, GradientDescent

ADJOINTS = ["full", "replay"]


class Case:
    """A potential, a batch and a stepper, and the steps of a difference in each input."""

    def __init__(self, potential, members, stepper, fmax, h_weights, capped=False):
        self.potential, self.members, self.stepper, self.fmax = potential, members, stepper, fmax
        self.h = {"weights": h_weights, "positions": 1e-5}
        self.capped = capped


LJ = (lambda: lennard_jones().requires_grad_(), (argon, cluster))
MACE = (stiff_mace, (skewed, trimer))
CASES = {
    "lj-gd": Case(*LJ, lambda: GradientDescent(0.002, momentum=0.5), 0.002, 1e-6),
    "lj-fire": Case(*LJ, lambda: FIRE(dt=0.03, dtmax=0.06), 0.02, 1e-6),
    "lj-gd-capped": Case(*LJ, lambda: GradientDescent(0.002, maxstep=0.02), 0.002, 1e-6, capped=True),
    "lj-fire-capped": Case(*LJ, lambda: FIRE(dt=0.03, dtmax=0.06, maxstep=0.1), 0.02, 1e-6, capped=True),
    "mace-gd": Case(*MACE, lambda: GradientDescent(0.01, anneal=0.99), 0.2, 1e-3),
    "mace-fire": Case(*MACE, lambda: FIRE(dt=0.05, dtmax=0.2), 0.2, 1e-3),
}
EVERY = [pytest.param(name, marks=needs_mace if "mace" in name else ()) for name in CASES]


@pytest.mark.parametrize("frames", [10, 50])
@pytest.mark.parametrize("name", EVERY)
def test_gradients_agree_with_finite_differences_of_the_whole_relaxation(name, frames):
    case = CASES[name]
    potential, stepper = case.potential(), case.stepper()
    structures = batch(*(make() for make in case.members))
    reference = nearby_positions(structures)

    def evaluate():
        return loss_and_decisions(potential, structures, reference, stepper=stepper, fmax=case.fmax, steps=frames)

    loss, *usual = evaluate()
    nsteps, trace = usual
    weights = [p for p in potential.parameters() if p.requires_grad]
    grads = gradient([*weights, structures.positions], loss)
    assert frames < 50 or min(nsteps) < frames, "no structure stopped early"
    assert not case.capped or any(True in step[1] for step in trace if step[0] == "capped")
    downhill = [step[1] for step in trace if step[0] == "downhill"]
    assert frames < 50 or not downhill or any(0 in n for n in downhill[1:]), "FIRE only went down"
    for what, inputs, analytic in [
        ("weights", weights, grads[:-1]),
        ("positions", [structures.positions], grads[-1:]),
    ]:
        check_gradient(evaluate, usual, inputs, analytic, h=case.h[what])


@pytest.mark.parametrize("stepper", LEARNABLE)
def test_gradients_in_hyperparameters_and_cells_agree_with_finite_differences(stepper):
    potential, stepper = lennard_jones().requires_grad_(), LEARNABLE[stepper]()
    structures = batch(argon(), cluster())
    structures.cells.requires_grad_()
    reference = nearby_positions(structures)

    def evaluate():
        return loss_and_decisions(potential, structures, reference, stepper=stepper, fmax=0.02, steps=20)

    loss, *usual = evaluate()
    inputs = [*stepper.parameters(), structures.cells]
    grads = gradient(inputs, loss)
    assert all(g.abs().sum() > 0 for g in grads)
    for x, g in zip(inputs, grads, strict=True):
        check_gradient(evaluate, usual, [x], [g], h=1e-6, directions=1)


@pytest.mark.parametrize("frames", [0, 1, 30])
@pytest.mark.parametrize("stepper", LEARNABLE)
@pytest.mark.parametrize(("make", "members"), [LJ, pytest.param(*MACE, marks=needs_mace)], ids=["lj", "mace"])
def test_replay_gives_the_gradient_of_the_full_tape(make, members, stepper, frames):
    potential, stepper = make(), LEARNABLE[stepper]()
    found = {}
    for adjoint in ADJOINTS:
        structures = batch(*(member() for member in members), members[0](seed=5))
        structures.cells.requires_grad_()
        relaxation = relax(potential, structures, stepper=stepper, fmax=0.3, steps=frames, adjoint=adjoint)
        loss = mass_weighted_distance(relaxation, nearby_positions(structures)) + relaxation.energies.sum()
        inputs = [structures.positions, structures.cells, *potential.parameters(), *stepper.parameters()]
        found[adjoint] = (relaxation.positions, relaxation.nsteps, gradient(inputs, loss))
    torch.testing.assert_close(*(found[a][0] for a in ADJOINTS), rtol=0, atol=1e-12)
    assert torch.equal(*(found[a][1] for a in ADJOINTS))
    for full, replay in zip(*(found[a][2] for a in ADJOINTS), strict=True):
        assert (full - replay).norm() <= 1e-10 * full.norm()


def test_a_structure_alone_has_the_gradient_that_it_has_in_a_batch():
    potential = lennard_jones().requires_grad_()
    together = batch(argon(), cluster(), argon(seed=4))
    arguments = {"stepper": FIRE(dt=0.03, dtmax=0.06), "fmax": 0.3, "steps": 30}
    target = nearby_positions(together)
    loss = mass_weighted_distance(relax(potential, together, **arguments), target)
    grads = gradient([together.positions, *potential.parameters()], loss)
    sums = [torch.zeros_like(p) for p in potential.parameters()]
    for k, atoms in enumerate([argon(), cluster(), argon(seed=4)]):
        alone, rows = batch(atoms), together.atoms_of([k])
        loss = mass_weighted_distance(relax(potential, alone, **arguments), target[rows])
        to_positions, *to_weights = gradient([alone.positions, *potential.parameters()], loss)
        torch.testing.assert_close(to_positions, grads[0][rows], rtol=1e-9, atol=1e-9)
        sums = [total + g for total, g in zip(sums, to_weights, strict=True)]
    torch.testing.assert_close(sums, grads[1:], rtol=1e-9, atol=1e-9)


def finished(how, potential):
    """A loss after a relaxation, differentiable."""
    if how == "ase":
        atoms = argon()
        atoms.calc = TorchCalculator(potential)
        optimizer = BPTTOptimizer(atoms, logfile=None, dt=0.03)
        optimizer.run(steps=5)
        return optimizer.relaxation.positions.square().sum()
    return relax(potential, argon(), steps=5, adjoint=how).positions.square().sum()


@pytest.mark.parametrize("change", WEIGHT_CHANGES)
@pytest.mark.parametrize("how", [*ADJOINTS, "ase"])
def test_backward_refuses_other_weights_than_forward(how, change):
    potential = lennard_jones().requires_grad_()
    loss = finished(how, potential)
    change(potential)
    with pytest.raises(RuntimeError, match="were changed after this relaxation"):
        loss.backward()


@pytest.mark.parametrize("how", ADJOINTS)
def test_backward_refuses_another_stepper_than_forward(how):
    stepper = LEARNABLE["gd"]()
    loss = relax(lennard_jones(), argon(), stepper=stepper, steps=5, adjoint=how).positions.sum()
    with torch.no_grad():
        stepper.step_size *= 2
    with pytest.raises(RuntimeError, match="were changed after this relaxation"):
        loss.backward()


def test_energies_and_fmax_refuse_other_weights_than_forward():
    potential = lennard_jones().requires_grad_()
    relaxation = relax(potential, argon(), steps=3)
    add_in_place(potential)
    for name in ("energies", "fmax"):
        with pytest.raises(RuntimeError, match="were changed after this relaxation"):
            getattr(relaxation, name)


def test_replay_refuses_initial_positions_that_were_changed_in_place():
    structures = batch(argon())
    loss = relax(lennard_jones(), structures, steps=5, adjoint="replay").positions.square().sum()
    with torch.no_grad():
        structures.positions += 0.1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("how", ADJOINTS)
def test_backward_and_step_and_relaxing_again_is_the_training_loop(how):
    potential = lennard_jones().requires_grad_()
    optimizer = torch.optim.SGD(potential.parameters(), lr=1e-3)
    structures = Structures.from_atoms(argon())
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = mass_weighted_distance(relax(potential, structures, steps=20, adjoint=how), structures.positions)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_weights_that_are_frozen_before_backward_get_no_gradient():
    potential = lennard_jones().requires_grad_()
    loss = relax(potential, argon(), steps=5, adjoint="replay").positions.square().sum()
    potential.sigma.requires_grad_(False)
    loss.backward()
    assert potential.sigma.grad is None
    assert potential.epsilon.grad.abs() > 0


@pytest.mark.parametrize("how", ADJOINTS)
def test_frozen_weights_leave_the_gradient_in_the_initial_positions(how):
    potential = lennard_jones().requires_grad_(False)
    structures = batch(argon())
    relax(potential, structures, steps=5, adjoint=how).positions.square().sum().backward()
    assert structures.positions.grad.abs().max() > 0
    assert all(p.grad is None for p in potential.parameters())


def test_replay_stores_the_states_only():
    # 24 bytes of positions and 24 of velocities an atom, whatever the potential.
    relaxation = relax(lennard_jones().requires_grad_(), argon(), fmax=0.0, steps=30, adjoint="replay")
    frames = relaxation.trajectory.frames
    assert len(frames) == 30
    for positions, state in frames:
        stored = [positions, *state.atoms.values(), *state.structures.values()]
        assert len(stored) == 6
        assert sum(t.untyped_storage().nbytes() for t in stored) <= 48 * 4 + 4 * 8
        assert not any(t.requires_grad for t in stored)
    assert relaxation.positions.grad_fn.name().startswith("_Replayed")


def test_the_full_tape_stores_no_states():
    assert relax(lennard_jones().requires_grad_(), argon(), steps=3, adjoint="full").trajectory.frames == []


@pytest.mark.parametrize("stepper", LEARNABLE)
@pytest.mark.parametrize("how", ADJOINTS)
def test_frames_without_any_force_are_the_identity(how, stepper):
    # Forces and velocities are exactly zero here, where norms have no derivative.
    structures = batch(Atoms("Ar"), Atoms("Ar", positions=[[1, 2, 3]]))
    stepper, potential = LEARNABLE[stepper](), lennard_jones().requires_grad_()
    relaxation = relax(potential, structures, stepper=stepper, fmax=0.0, steps=5, adjoint=how)
    assert relaxation.nsteps.tolist() == [5, 5]
    assert torch.equal(relaxation.positions, structures.positions)
    loss = (relaxation.positions * 3).sum() + relaxation.energies.sum() + relaxation.fmax.sum()
    loss.backward()
    assert torch.equal(structures.positions.grad, torch.full((2, 3), 3.0, dtype=torch.float64))
    assert all(p.grad is None or p.grad == 0 for p in (*potential.parameters(), *stepper.parameters()))


class Holed(LennardJones):
    """Lennard-Jones with no energy where the atoms of a dimer are closer than `edge`."""

    edge = 0.0

    def forward(self, structures, edges):
        found = super().forward(structures, edges)
        length = edges.vectors(structures).norm(dim=1)
        shortest = length.new_full((len(structures),), 9.0)
        shortest = shortest.scatter_reduce(0, structures.batch[edges.i], length, "amin")
        jump = shortest.new_tensor([self.edge if count == 2 else 0 for count in structures.counts])
        return Prediction(found.energy + 0 * (shortest - jump).sqrt())


@pytest.mark.parametrize("falls", ["at once", "after some frames"])
@pytest.mark.parametrize("stepper", ["gd", "fire"])
@pytest.mark.parametrize("how", ADJOINTS)
def test_a_member_that_is_not_finite_leaves_the_others_alone(how, stepper, falls):
    potential = Holed(smooth=True, rc=2.4, ro=1.8).requires_grad_()
    dimer = Atoms("Ar2", positions=[[0, 0, 0], [1.5, 0, 0]])
    potential.edge = 1.6 if falls == "at once" else 1.2
    loose = Atoms("Ar3", positions=[[0, 0, 0], [1.2, 0, 0], [0.5, 1.25, 0]])
    arguments = {"stepper": CASES[f"lj-{stepper}"].stepper(), "fmax": 1e-3, "steps": 40, "adjoint": how}
    sound = batch(loose)
    holed = batch(loose, dimer)
    alone, together = (relax(potential, s, **arguments) for s in (sound, holed))
    assert together.status[1] is Status.DIVERGED
    assert (together.nsteps[1] == 0) == (falls == "at once")
    assert together.nsteps[0] > together.nsteps[1]
    torch.testing.assert_close(together.positions[:3], alone.positions, rtol=0, atol=1e-12)
    assert torch.isfinite(together.positions).all()

    reference = nearby_positions(sound)
    losses = [(r.positions[:3] - reference).square().sum() + r.energies[0] + r.fmax[0] for r in (alone, together)]
    grads = [
        gradient([s.positions, *potential.parameters()], loss) for s, loss in zip((sound, holed), losses, strict=True)
    ]
    torch.testing.assert_close(grads[1][0][:3], grads[0][0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads[1][1:], grads[0][1:], rtol=1e-10, atol=1e-10)
    assert not grads[1][0][3:].any()


@pytest.mark.parametrize("how", ADJOINTS)
def test_a_batch_where_nothing_is_finite_is_still_a_relaxation(how):
    potential = Holed(smooth=True, rc=2.4, ro=1.8).requires_grad_()
    potential.edge = 1.6
    structures = batch(Atoms("Ar2", positions=[[0, 0, 0], [1.5, 0, 0]]))
    relaxation = relax(potential, structures, adjoint=how)
    assert torch.equal(relaxation.positions, structures.positions)
    assert torch.isnan(relaxation.energies).all()
    assert torch.isnan(relaxation.fmax).all()


@pytest.mark.parametrize("name", ["tape", ""])
def test_an_unknown_adjoint_is_named(name):
    with pytest.raises(ValueError, match=f"no adjoint '{name}'.*; there are full, replay"):
        relax(lennard_jones(), argon(), adjoint=name)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_without_a_frame_the_end_is_the_start(adjoint):
    potential, fixed, moving = lennard_jones(), Structures.from_atoms([cluster()]), batch(cluster())
    weights = list(potential.parameters())
    for structures in (fixed, moving):
        inputs = [x for x in (structures.positions, *weights) if x.requires_grad]
        relaxation = relax(potential, structures, steps=0, fmax=1e-9, adjoint=adjoint, stepper="gd")
        found = gradient(inputs, relaxation.positions.square().sum())
        expected = {id(structures.positions): 2 * structures.positions.detach()}
        for x, g in zip(inputs, found, strict=True):
            assert torch.equal(g, expected.get(id(x), torch.zeros_like(x)))
