"""Going back through the frames: whichever states are stored, the gradient is the same, and its norms are reported."""

from unittest import mock

import pytest
import torch
from ase.constraints import FixAtoms, FixCom
from helpers.gradients import LEARNABLE, batch, gradient, mass_weighted_distance, nearby_positions
from helpers.potentials import Bowl, lennard_jones, needs_mace, tiny_mace
from helpers.structures import argon, cluster, pentamer, silicon, vacancy

from ase_bptt import BPTTOptimizer, Structures, TorchCalculator, delta_q, load_potential, relax
from ase_bptt.adjoints import Replay
from ase_bptt.adjoints.backward_sweep import Frames
from ase_bptt.iterated_map import IteratedMap
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.potentials.direct import Direct
from ase_bptt.steppers import FIRE, GradientDescent

FRAMES = 30


def members() -> Structures:
    structures = batch(argon(), cluster(), pentamer(), argon(seed=5))
    structures.cells.requires_grad_()
    return structures


def relaxed(potential, stepper, adjoint, frames=FRAMES):
    structures = members()
    return relax(potential, structures, stepper=stepper, fmax=0.3, steps=frames, adjoint=adjoint), structures


def everything(potential, stepper, adjoint, frames=FRAMES) -> tuple:
    """Relaxation and its gradient in all that it depends on."""
    relaxation, structures = relaxed(potential, stepper, adjoint, frames)
    inputs = [structures.positions, structures.cells, *potential.parameters(), *stepper.parameters()]
    return relaxation, gradient(
        inputs, mass_weighted_distance(relaxation, nearby_positions(structures)) + relaxation.energies.sum()
    )


@pytest.mark.parametrize("every", [3, 7, 100])
@pytest.mark.parametrize("stepper", LEARNABLE)
def test_states_that_are_found_again_give_the_same_gradient(stepper, every):
    potential, stepper = lennard_jones().requires_grad_(), LEARNABLE[stepper]()
    (usual, expected), (sparse, found) = (everything(potential, stepper, a) for a in (Replay(1), Replay(every)))
    nsteps = usual.nsteps.tolist()
    assert len(set(nsteps)) > 1, "no structure stopped before another"
    assert any(n % every for n in nsteps)
    assert torch.equal(sparse.positions, usual.positions)
    assert all(g.abs().max() > 0 for g in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 * other.abs().max().item())
    torch.testing.assert_close(sparse.adjoint_norms, usual.adjoint_norms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_runs_as_short_as_the_gap_between_states_have_gradients_too(frames):
    potential, stepper = lennard_jones().requires_grad_(), LEARNABLE["fire"]()
    (_, expected), (_, found) = (everything(potential, stepper, a, frames) for a in (Replay(), Replay(3)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_memory_and_calls_are_what_the_gap_says():
    potential = lennard_jones().requires_grad_()
    relaxation = relax(potential, argon(), fmax=0.0, steps=FRAMES, adjoint=Replay(7))
    record = relaxation.trajectory
    stored = [t for t, kept in enumerate(record.frames) if kept is not None]
    assert stored == [0, 7, 14, 21, 28]
    with mock.patch.object(LennardJones, "forward", autospec=True, side_effect=LennardJones.forward) as calls:
        relaxation.positions.square().sum().backward()
    # Each frame once on the way back, and those that were not stored once more before.
    assert calls.call_count == FRAMES + (FRAMES - len(stored))
    frames = Frames(record)
    for t in reversed(range(FRAMES)):
        frames.before(t)
        assert len(frames.recomputed) < 7
    assert [t for t, kept in enumerate(record.frames) if kept is not None] == stored


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("stepper", [FIRE(dt=0.03, dtmax=0.06), GradientDescent(0.002, momentum=0.5)])
def test_a_run_of_ase_has_the_gradient_of_relax(stepper, every):
    potential = lennard_jones().requires_grad_()
    atoms = pentamer()
    atoms.calc = TorchCalculator(potential)
    optimizer = BPTTOptimizer(atoms, logfile=None, stepper=stepper, adjoint=Replay(every))
    for steps in (12, 23):  # gone on with after its first gradient was taken
        optimizer.run(fmax=0.01, steps=steps - optimizer.nsteps)
        relaxation, expected = (
            optimizer.relaxation,
            relax(potential, pentamer(), stepper=stepper, fmax=0.01, steps=steps),
        )
        assert relaxation.nsteps.tolist() == [steps]
        target = nearby_positions(expected.start)
        grads = [
            gradient(list(potential.parameters()), mass_weighted_distance(r, target)) for r in (relaxation, expected)
        ]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(relaxation.adjoint_norms, expected.adjoint_norms, rtol=1e-9, atol=0)


def by_hand(potential, stepper, atoms, frames, loss) -> list[float]:
    """|dL/dX(t)| of one structure, from a tape that holds every frame."""
    iterated, start = IteratedMap(potential, stepper), Structures.from_atoms(atoms)
    start.positions.requires_grad_()
    positions, state, path = start.positions, iterated.start(start), [start.positions]
    for _ in range(frames):
        positions, state = iterated.frame(start.replace(positions=positions), state, iterated.neighbor_list())
        path.append(positions)
    return [g.norm().item() for g in torch.autograd.grad(loss(positions), path)]


@pytest.mark.parametrize("stepper", LEARNABLE)
def test_adjoint_norms_are_those_of_the_tape_at_each_frame(stepper):
    potential, stepper = lennard_jones().requires_grad_(), LEARNABLE[stepper]()
    relaxation, structures = relaxed(potential, stepper, Replay(4))
    assert relaxation.adjoint_norms is None
    assert relaxation[1].adjoint_norms is None
    target = nearby_positions(structures)
    (relaxation.positions - target).square().sum().backward()
    norms, nsteps = relaxation.adjoint_norms, relaxation.nsteps.tolist()
    assert norms.shape == (max(nsteps) + 1, len(structures))
    for k, (atoms, frames) in enumerate(zip((argon(), cluster(), pentamer(), argon(seed=5)), nsteps, strict=True)):
        rows = structures.atoms_of([k])
        expected = by_hand(potential, stepper, atoms, frames, lambda x, rows=rows: (x - target[rows]).square().sum())
        # One that has stopped stands where it stopped.
        expected += [expected[-1]] * (max(nsteps) - frames)
        assert norms[:, k].tolist() == pytest.approx(expected, rel=1e-8)
        assert torch.equal(relaxation[k].adjoint_norms, norms[:, [k]])


def test_adjoint_norms_in_a_bowl_fall_as_theory_has_it():
    values, eta, frames = torch.linspace(1, 9, 6, dtype=torch.float64), 0.05, 15
    potential = Bowl(values)
    structures = batch(potential.atoms(0.1))
    relaxation = relax(potential, structures, stepper=GradientDescent(eta, maxstep=9), fmax=0.0, steps=frames)
    pull = potential.modes.sum(1)
    (relaxation.positions.flatten() @ pull).backward()
    left = torch.arange(frames, -1, -1, dtype=torch.float64)
    expected = ((1 - eta * values)[None] ** left[:, None]).norm(dim=1)
    torch.testing.assert_close(relaxation.adjoint_norms[:, 0], expected, rtol=1e-10, atol=0)


def clipped(clip, frames):
    structures = batch(vacancy(0.08), cluster())
    stepper = GradientDescent(0.004, momentum=0.6)
    relaxation = relax(lennard_jones(), structures, stepper=stepper, fmax=0.0, steps=frames, adjoint=Replay(clip=clip))
    loss = (relaxation.positions - nearby_positions(structures)).square().sum()
    return gradient([structures.positions], loss)[0], relaxation.adjoint_norms, structures


def test_clipping_shortens_what_has_grown_and_nothing_else():
    exact, norms, structures = clipped(None, 12)
    growth = norms / norms[-1]
    assert growth.max() > 1.5, "nothing to clip"
    assert torch.equal(clipped(1.01 * growth.max().item(), 12)[0], exact)
    limit = 1.2
    short, shortened, _ = clipped(limit, 12)
    assert (shortened / shortened[-1]).max() <= limit * (1 + 1e-12)
    assert not torch.equal(short, exact)
    torch.testing.assert_close(structures.sum(short.square()).sum(1).sqrt(), shortened[0], rtol=1e-12, atol=0)
    # Before the first frame on the way back that is too long, the norms are the exact ones.
    for k in range(2):
        last = max((t for t in range(12) if growth[t, k] > limit), default=-1)
        torch.testing.assert_close(shortened[last + 1 :, k], norms[last + 1 :, k], rtol=1e-12, atol=0)


def test_clipping_one_frame_keeps_the_direction():
    (exact, norms, structures), (short, _, _) = clipped(None, 1), clipped(0.5, 1)
    factor = (0.5 * norms[1] / norms[0]).clamp(max=1)
    assert (factor < 1).all()
    torch.testing.assert_close(short, exact * factor[structures.batch, None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("stepper", LEARNABLE)
def test_differences_of_the_energy_give_the_gradient_that_second_derivatives_give(stepper, every):
    potential, stepper = lennard_jones().requires_grad_(), LEARNABLE[stepper]()
    exact, differences = Replay(), Replay(every=every, differences=True)
    (usual, expected), (quick, found) = (everything(potential, stepper, a) for a in (exact, differences))
    assert torch.equal(quick.positions, usual.positions)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-7 * other.abs().max().item())


@needs_mace
@pytest.mark.parametrize("constraint", [FixAtoms([0]), FixCom(), None], ids=["FixAtoms", "FixCom", "free"])
def test_differences_of_mace_under_constraints(constraint):
    potential = load_potential(tiny_mace(), dtype=torch.float64)
    starts = [silicon(seed=1, amplitude=0.05), silicon(seed=2, amplitude=0.1)]
    if constraint is not None:
        starts[1].set_constraint(constraint)
    found = []
    for adjoint in (Replay(), Replay(differences=True)):
        run = relax(potential, starts, stepper=FIRE(), fmax=0.01, steps=12, adjoint=adjoint)
        found.append(gradient(list(potential.parameters()), delta_q(run, [silicon(amplitude=0.0)] * 2).sum()))
    for one, other in zip(*reversed(found), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7 * other.abs().max().item())


def test_differences_ask_for_no_second_derivative_and_for_no_forces_again():
    potential = lennard_jones().requires_grad_()
    relaxation, _ = relaxed(potential, LEARNABLE["fire"](), Replay(differences=True))
    with mock.patch.object(LennardJones, "energy_and_forces", side_effect=AssertionError):
        relaxation.positions.square().sum().backward()
    assert potential.sigma.grad.abs() > 0


def test_an_optimizer_of_ase_refuses_them_likewise():
    atoms = argon()
    atoms.calc = TorchCalculator(lennard_jones().float().requires_grad_())
    optimizer = BPTTOptimizer(atoms, logfile=None, adjoint="replay:differences")
    optimizer.run(fmax=0, steps=2)
    with pytest.raises(ValueError, match="need float64"):
        _ = optimizer.relaxation


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: lennard_jones().float(), "Differences of energies need float64"),
        (lambda: Direct().double(), "not the negative gradient of an energy"),
    ],
    ids=["float32", "direct"],
)
def test_differences_are_refused_where_they_mean_nothing(make, sentence):
    with pytest.raises((ValueError, NotImplementedError), match=sentence):
        relax(make().requires_grad_(), argon(), steps=2, adjoint=Replay(differences=True))
