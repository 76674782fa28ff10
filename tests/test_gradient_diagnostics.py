"""Gradient diagnostics: figures against theory and dense Jacobians, and alarms where they belong."""

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from helpers.potentials import lennard_jones, needs_mace, tiny_mace
from helpers.structures import argon, cluster, rattled
from torch import nn

from ase_bptt import Potential, Prediction, Status, Structures, relax
from ase_bptt.adjoints import GradientWarning, Guided, Implicit, Replay, Truncated
from ase_bptt.adjoints.backward_sweep import Frames
from ase_bptt.diagnostics.gradient_report import diagnose_gradients
from ase_bptt.diagnostics.gradients import spectral_radius
from ase_bptt.stability import resolve_step_size, stability_limit
from ase_bptt.steppers import FIRE, GradientDescent

TETRAHEDRON = np.array([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
EIGENVALUES = (1.0, 3.0, 5.0, 8.0, 13.0, 20.0)


def rigid(positions: np.ndarray, rotations: bool = True) -> np.ndarray:
    """Orthonormal rigid motions, shape (3 n, 6) or (3 n, 3)."""
    motions = [np.tile(axis, (len(positions), 1)) for axis in np.eye(3)]
    if rotations:
        motions += [np.cross(axis, positions - positions.mean(0)) for axis in np.eye(3)]
    return np.linalg.qr(np.stack([m.ravel() for m in motions], axis=1))[0]


class Bowl(Potential):
    """A quadratic bowl about a tetrahedron, flat along its rigid motions, of known eigenvalues otherwise."""

    family = "bowl"
    cutoff = 1.0

    def __init__(self, eigenvalues=EIGENVALUES):
        super().__init__()
        random = np.random.default_rng(0).normal(size=(12, 6))
        directions = np.linalg.qr(np.hstack([rigid(TETRAHEDRON), random]))[0][:, 6:]
        self.directions = torch.from_numpy(directions)
        self.hessian = torch.from_numpy(directions * eigenvalues @ directions.T)
        self.stiffness = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, structures, edges):
        away = structures.positions.view(-1, 12) - torch.from_numpy(TETRAHEDRON).view(12)
        return Prediction(self.stiffness * (away @ self.hessian * away).sum(1) / 2)


def bowl_start(size: float = 0.01) -> Atoms:
    return rattled(Atoms("He4", positions=TETRAHEDRON), size)


def differentiated(potential, structures, direction=None, **arguments):
    """A relaxation after a backward pass of a loss that is linear in its positions."""
    run = relax(potential.requires_grad_(), structures, **arguments)
    noise = torch.from_numpy(np.random.default_rng(3).normal(size=run.positions.shape))
    direction = noise if direction is None else direction
    parts = [run.positions] if run.early is None else [run.positions, run.early.positions]
    sum((part * direction.view_as(part)).sum() for part in parts).backward()
    return run


# The spectral radius -------------------------------------------------------------------------


@pytest.mark.parametrize("at_rest", [True, False], ids=["first frame", "last frame"])
@pytest.mark.parametrize(
    ("step_size", "momentum"),
    [(0.05, 0.0), (0.09, 0.0), (0.12, 0.0), (0.02, 0.5), (0.05, 0.5), (0.05, 0.9), (0.16, 0.5)],
)
def test_of_gradient_descent_in_a_bowl_it_is_that_of_theory(step_size, momentum, at_rest):
    stepper = GradientDescent(step_size=step_size, momentum=momentum, maxstep=1e6)
    run = relax(Bowl(), bowl_start(0.0 if at_rest else 0.01), stepper=stepper, steps=8, fmax=1e-4)
    assert (run.nsteps.item() == 0) is at_rest
    roots = [np.roots([1, -(1 + momentum - step_size * k), momentum]) for k in EIGENVALUES]
    assert spectral_radius(run)[0] == pytest.approx(np.abs(roots).max(), rel=3e-3)


def dense_radius(run, motions: np.ndarray, fixed=()) -> float:
    """From all eigenvalues of the last frame's Jacobian, without rigid motions and fixed coordinates."""
    record = run.trajectory
    x, state = Frames(record).before(run.nsteps.item() - 1)
    n = x.numel()
    count = len(state.atoms)

    def frame(both):
        carried = [part.view_as(x) for part in both.split(n)[1:]]
        structures = run.start.replace(positions=both[:n].view_as(x))
        pairs = record.map.neighbor_list()
        after, then = record.map.frame(structures, state.with_floats(carried + state.floats()[count:]), pairs)
        return torch.cat([after.flatten(), *(v.flatten() for v in then.floats()[:count])])

    start = torch.cat([x.flatten(), *(v.flatten() for v in state.floats()[:count])])
    jacobian = torch.autograd.functional.jacobian(frame, start).numpy()
    keep = np.eye(len(start))
    keep[:n, :n] -= motions @ motions.T
    keep[list(fixed)] = 0
    return float(np.abs(np.linalg.eigvals(keep @ jacobian @ keep)).max())


STEPPERS = {
    "gd": GradientDescent(step_size=0.003),
    "momentum": GradientDescent(step_size=0.002, momentum=0.8),
    "annealed": GradientDescent(step_size=0.004, anneal=0.98),
    "fire": FIRE(dt=0.03, dtmax=0.06),
}


@pytest.mark.parametrize("name", STEPPERS)
@pytest.mark.parametrize("make", [argon, cluster])
def test_it_is_that_of_the_dense_jacobian(name, make):
    atoms = make()
    run = relax(lennard_jones().requires_grad_(), atoms, stepper=STEPPERS[name], fmax=0.01, steps=150)
    motions = rigid(run.positions.detach().numpy(), rotations=not atoms.pbc.any())
    assert spectral_radius(run, iterations=300)[0] == pytest.approx(dense_radius(run, motions), rel=0.003)


def test_fixed_atoms_do_not_count():
    atoms = cluster()
    atoms.set_constraint(FixAtoms([0, 2, 4]))
    run = relax(lennard_jones().requires_grad_(), atoms, stepper=STEPPERS["momentum"], fmax=0.01, steps=200)
    expected = dense_radius(run, np.zeros((18, 0)), fixed=[0, 1, 2, 6, 7, 8, 12, 13, 14])
    assert spectral_radius(run)[0] == pytest.approx(expected, rel=0.01)
    assert expected < 0.99


@needs_mace
def test_of_a_network():
    from ase_bptt.potentials.mace import MACE

    potential = MACE(tiny_mace(elements=(14,), atomic_inter_scale=20.0, max_ell=1)).requires_grad_()
    trimer = Atoms("Si3", positions=[[0, 0, 0], [2.3, 0.1, 0], [0.9, 2.0, 0.3]])
    run = relax(potential, trimer, stepper=GradientDescent(step_size=0.02, momentum=0.7), steps=10)
    motions = rigid(Frames(run.trajectory).before(run.nsteps.item() - 1)[0].numpy())
    assert spectral_radius(run)[0] == pytest.approx(dense_radius(run, motions), rel=0.01)


def test_each_structure_of_a_batch_has_its_own():
    stepper = STEPPERS["momentum"]
    together = relax(lennard_jones().requires_grad_(), [argon(), cluster()], stepper=stepper, fmax=0.01)
    alone = [relax(lennard_jones().requires_grad_(), a, stepper=stepper, fmax=0.01) for a in (argon(), cluster())]
    found = spectral_radius(together)
    assert found == pytest.approx([spectral_radius(run)[0] for run in alone], rel=0.01)
    assert spectral_radius(together[1])[0] == pytest.approx(found[1], rel=1e-6)


def test_a_stepper_without_a_gradient_has_none():
    with torch.no_grad():
        run = relax(lennard_jones(), cluster(), stepper="bfgs")
    with pytest.raises(TypeError, match="bfgs"):
        spectral_radius(run)
    assert diagnose_gradients(run).structures[0].radius is None


# The step size ---------------------------------------------------------------------------------


def test_the_limit_is_that_of_the_stiffest():
    soft, stiff = Atoms("Ar2", positions=[[0, 0, 0], [1.2, 0, 0]]), Atoms("Ar2", positions=[[0, 0, 0], [1.0, 0, 0]])
    limits = [stability_limit(lennard_jones(), [atoms]) for atoms in (soft, stiff)]
    assert limits[1] < limits[0]
    assert stability_limit(lennard_jones(), [soft, stiff]) == limits[1]
    assert stability_limit(Bowl(), Structures.from_atoms(bowl_start())) == pytest.approx(2 / 20, rel=1e-5)


def test_auto_becomes_a_number_and_a_number_stays():
    stepper = resolve_step_size(GradientDescent(step_size="auto", momentum=0.5), Bowl(), [bowl_start()])
    assert stepper.todict()["step_size"] == pytest.approx(0.05, rel=1e-5)
    assert stepper.momentum == 0.5
    for given in (GradientDescent(), FIRE()):
        assert resolve_step_size(given, Bowl(), [bowl_start()]) is given


def test_auto_where_nothing_is_stiff_and_where_nothing_is_sound():
    clash = Atoms("Ar2", positions=np.zeros((2, 3)))
    loose = resolve_step_size(GradientDescent(step_size="auto"), lennard_jones(), [Atoms("Ar")])
    assert loose.step_size == GradientDescent().step_size
    # What has no finite forces diverges whatever the step, and does not speak for the others.
    assert resolve_step_size(
        GradientDescent(step_size="auto"), lennard_jones(), [clash, cluster()]
    ).step_size == pytest.approx(0.5 * stability_limit(lennard_jones(), [cluster()]))
    with pytest.raises(ValueError, match="finite forces"):
        resolve_step_size(GradientDescent(step_size="auto"), lennard_jones(), [clash])


# Alarms ----------------------------------------------------------------------------------------


def alarm_of(found) -> str:
    (alarm,) = found.alarms
    return alarm


def test_a_sound_gradient_raises_no_alarm():
    stepper = GradientDescent(step_size=0.05)
    found = diagnose_gradients(differentiated(Bowl(), bowl_start(), stepper=stepper, fmax=0.005))
    assert found.alarms == ()
    assert "No alarm." in found.text()
    assert found.step_limit == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_step_above_the_limit_is_reported_with_the_step_to_use(momentum):
    stepper = GradientDescent(step_size=0.11 * (1 + momentum), momentum=momentum)
    run = differentiated(Bowl(), bowl_start(), stepper=stepper, steps=5)
    alarm = diagnose_gradients(run).alarms[-1]
    assert f"limit of {0.1 * (1 + momentum):.3g} Å^2/eV" in alarm
    assert "use 0.05" in alarm
    again = GradientDescent(step_size=0.05, momentum=momentum)
    assert diagnose_gradients(differentiated(Bowl(), bowl_start(), stepper=again, fmax=0.005)).alarms == ()


def test_step_sizes_of_elements_are_judged_by_what_they_do():
    def alarms(**step_size):
        stepper = GradientDescent(step_size=step_size, maxstep=1e6)
        atoms = bowl_start(0.0)
        atoms.symbols[0] = "Ne"
        return diagnose_gradients(relax(Bowl(), atoms, stepper=stepper, steps=1)).alarms

    limit = 0.1
    assert alarms(He=0.5 * limit, Ne=1.1 * limit) == ()
    assert "above the stability limit of 0.1" in alarms(He=0.5 * limit, Ne=9 * limit)[0]


def test_an_annealed_step_is_that_of_the_last_frame():
    stepper = GradientDescent(step_size=0.11, anneal=0.95)
    found = diagnose_gradients(differentiated(Bowl(), bowl_start(), stepper=stepper, fmax=0.005))
    (one,) = found.structures
    assert one.step_size == pytest.approx(0.11 * 0.95 ** (one.frames - 1))
    assert found.alarms == ()


def test_an_exploding_gradient_is_reported_with_the_frame():
    stiffest = Bowl().directions[:, -1]
    run = differentiated(
        Bowl(), bowl_start(1e-9), stiffest, stepper=GradientDescent(step_size=0.2), fmax=1e-12, steps=8
    )
    (one,) = diagnose_gradients(run).structures
    assert one.growth == one.peak == pytest.approx(3.0**8, rel=1e-6)
    assert (one.peak_frame, one.back_to) == (0, 0)
    assert any("explodes, by a factor of up to 6.6e+03 at frame 0" in alarm for alarm in diagnose_gradients(run).alarms)


def test_a_vanishing_gradient_is_reported():
    loss = Bowl().directions[:, 3]
    run = differentiated(Bowl(), bowl_start(), loss, stepper=GradientDescent(step_size=0.08), fmax=1e-4)
    (one,) = diagnose_gradients(run).structures
    assert one.growth == pytest.approx(0.36**one.frames, rel=1e-5)
    assert (one.peak, one.peak_frame) == (1, one.frames)
    assert "the gradient vanishes" in alarm_of(diagnose_gradients(run))


def test_a_saddle_is_reported_by_the_radius_and_by_the_solve():
    bowl = Bowl((-2.0, *EIGENVALUES[1:]))
    run = differentiated(bowl, bowl_start(0.0), stepper=GradientDescent(step_size=0.05), adjoint="replay")
    assert run.status == (Status.CONVERGED,)
    assert spectral_radius(run)[0] == pytest.approx(1.1, rel=1e-3)
    assert "no minimum but a saddle" in alarm_of(diagnose_gradients(run))
    with pytest.warns(GradientWarning, match="saddle"):
        implicit = differentiated(bowl, bowl_start(0.0), stepper="bfgs", adjoint="implicit")
    assert "unsolved (saddle)" in alarm_of(diagnose_gradients(implicit))


def test_an_implicit_gradient_that_is_not_solved_is_reported():
    with pytest.warns(GradientWarning, match="max_iterations"):
        run = differentiated(Bowl(), bowl_start(), stepper="bfgs", adjoint=Implicit(max_iterations=1))
    assert "raise max_iterations" in alarm_of(diagnose_gradients(run))
    with pytest.warns(GradientWarning, match="more steps"):
        run = differentiated(Bowl(), bowl_start(0.3), stepper="bfgs", adjoint="implicit", steps=1)
    assert "more steps" in alarm_of(diagnose_gradients(run))
    assert diagnose_gradients(run).structures[0].solve.iterations == 0


def test_what_did_not_relax_is_reported():
    with torch.no_grad():
        run = relax(Bowl(), bowl_start(0.3), stepper=GradientDescent(step_size=0.05), steps=3)
    assert alarm_of(diagnose_gradients(run)).startswith("Structure 0: not relaxed (out of steps)")
    # An unroll is meant to be short.
    run = differentiated(Bowl(), bowl_start(0.3), stepper=GradientDescent(step_size=0.05), steps=3)
    assert not diagnose_gradients(run).alarms
    clash = Atoms("Ar2", positions=np.zeros((2, 3)))
    run = differentiated(lennard_jones(), [clash, cluster()], stepper=STEPPERS["gd"], steps=200)
    assert alarm_of(diagnose_gradients(run)).startswith("Structure 0: not relaxed (diverged)")
    assert np.isnan(diagnose_gradients(run).structures[0].radius)


# What was measured ------------------------------------------------------------------------------


@pytest.mark.parametrize(("adjoint", "back_to"), [(Replay(every=3), 0), (Truncated(4), 26), (Guided(first=5), 0)])
def test_the_frames_that_the_gradient_reaches_are_those_of_the_adjoint(adjoint, back_to):
    run = differentiated(
        Bowl(), bowl_start(), stepper=GradientDescent(step_size=0.05), adjoint=adjoint, steps=30, fmax=1e-9
    )
    (one,) = diagnose_gradients(run).structures
    assert one.back_to == back_to
    assert 0 < one.growth < one.peak == 1
    assert (one.solve is not None) is adjoint.needs_minimum


def test_before_a_backward_pass_there_are_limits_and_radii_only():
    run = relax(Bowl(), bowl_start(), stepper=GradientDescent(step_size=0.05), fmax=0.005)
    (one,) = diagnose_gradients(run).structures
    assert one.radius == pytest.approx(0.95, rel=1e-3)
    assert one.growth is one.peak is one.back_to is one.solve is None


def test_structures_of_a_batch_that_stop_at_different_frames():
    stepper, starts = GradientDescent(step_size=0.002), [cluster(), argon(), cluster(seed=2)]
    together = differentiated(lennard_jones(), starts, stepper=stepper, fmax=0.05, steps=100)
    found = diagnose_gradients(together)
    assert len({v.frames for v in found.structures}) == 3
    for k, one in enumerate(found.structures):
        assert one.peak_frame <= one.frames
        (alone,) = diagnose_gradients(together[k]).structures
        assert (alone.frames, alone.growth, alone.peak_frame) == (one.frames, one.growth, one.peak_frame)


def test_text_fits_and_json_is_json():
    clash = Atoms("Ar2", positions=np.zeros((2, 3)))
    run = differentiated(lennard_jones(), [cluster(), clash, Atoms("Ar")] * 8, stepper=STEPPERS["momentum"], steps=3)
    found = diagnose_gradients(run, iterations=10)
    lines = found.text().splitlines()
    assert max(map(len, lines)) <= 80
    assert "  and 4 more" in lines
    read = json.loads(found.to_json())
    assert read["structures"][1]["radius"] is None
    assert read["structures"][1]["status"] == "diverged"
    assert read["structures"][2]["step_limit"] is None
    assert read["alarms"] == list(found.alarms)


def test_after_the_weights_have_changed_it_is_refused():
    run = differentiated(Bowl(), bowl_start(), stepper=GradientDescent(step_size=0.05))
    with torch.no_grad():
        run.trajectory.map.potential.stiffness += 1
    with pytest.raises(RuntimeError, match="weights"):
        diagnose_gradients(run)
