"""The last frames only, against a tape by hand that begins there."""

from itertools import pairwise

import pytest
import torch
from ase import Atoms
from helpers.gradients import LEARNABLE, batch, gradient, mass_weighted_distance, nearby_positions
from helpers.potentials import Bowl, lennard_jones
from helpers.structures import argon, cluster, pentamer

from ase_bptt import BPTTOptimizer, Structures, TorchCalculator, relax
from ase_bptt.adjoints import Replay, Truncated
from ase_bptt.iterated_map import IteratedMap
from ase_bptt.steppers import GradientDescent


def dimer() -> Atoms:
    """Stops after few frames."""
    return Atoms("Ar2", positions=[[0, 0, 0], [0, 0.1, 1.08]])


MEMBERS = (argon, cluster, dimer, pentamer)
FRAMES = 25


def tape(potential, stepper, structures, frames, window) -> torch.Tensor:
    """Where one structure ends, attached to its last frames alone."""
    iterated = IteratedMap(potential, stepper)
    neighbors, positions, state = iterated.neighbor_list(), structures.positions, iterated.start(structures)
    for t in range(frames):
        if 0 < t == frames - window:
            positions, state = positions.detach(), state.map(torch.Tensor.detach)
        positions, state = iterated.frame(structures.replace(positions=positions), state, neighbors)
    return positions


@pytest.mark.parametrize("window", [1, 4, 12, 100])
@pytest.mark.parametrize("stepper", LEARNABLE)
def test_it_is_the_gradient_of_a_tape_that_begins_late(stepper, window):
    potential, stepper = lennard_jones().requires_grad_(), LEARNABLE[stepper]()
    structures = batch(*(make() for make in MEMBERS))
    structures.cells.requires_grad_()
    relaxation = relax(potential, structures, stepper=stepper, fmax=0.3, steps=FRAMES, adjoint=Truncated(window))
    nsteps, target = relaxation.nsteps.tolist(), nearby_positions(structures)
    weights = [*potential.parameters(), *stepper.parameters()]
    found = gradient([structures.positions, structures.cells, *weights], (relaxation.positions - target).square().sum())
    sums = [torch.zeros_like(p) for p in weights]
    for k, frames in enumerate(nsteps):
        alone, rows = structures.select([k]), structures.atoms_of([k])
        alone = alone.replace(
            positions=alone.positions.detach().requires_grad_(), cells=alone.cells.detach().requires_grad_()
        )
        end = tape(potential, stepper, alone, frames, window)
        torch.testing.assert_close(end, relaxation.positions[rows], rtol=0, atol=1e-11)
        to_x, to_cell, *rest = gradient([alone.positions, alone.cells, *weights], (end - target[rows]).square().sum())
        torch.testing.assert_close(found[0][rows], to_x, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(found[1][[k]], to_cell, rtol=1e-8, atol=1e-9)
        assert found[0][rows].any() == (frames <= window)
        sums = [total + g for total, g in zip(sums, rest, strict=True)]
    torch.testing.assert_close(found[2:], sums, rtol=1e-8, atol=1e-9)
    if window == 1:
        ends = sorted(nsteps)
        assert any(late - window > early > 0 for early, late in pairwise(ends)), "no gap of no frames"


@pytest.mark.parametrize("stepper", LEARNABLE)
def test_a_window_that_holds_all_frames_is_replay(stepper):
    potential, stepper, found = lennard_jones().requires_grad_(), LEARNABLE[stepper](), []
    for adjoint in (Truncated(FRAMES), Replay()):
        structures = batch(*(make() for make in MEMBERS))
        relaxation = relax(potential, structures, stepper=stepper, fmax=0.3, steps=FRAMES, adjoint=adjoint)
        inputs = [structures.positions, *potential.parameters(), *stepper.parameters()]
        found.append(
            [
                *gradient(inputs, mass_weighted_distance(relaxation, nearby_positions(structures))),
                relaxation.adjoint_norms,
            ]
        )
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 20])
def test_in_a_bowl_it_is_so_many_terms_of_neumanns_series(window):
    values, eta = torch.linspace(1, 9, 6, dtype=torch.float64), 0.05
    potential = Bowl(values)
    stepper = GradientDescent(eta, maxstep=9)
    structures = batch(potential.atoms(0.1))
    relaxation = relax(potential, structures, stepper=stepper, fmax=0.0, steps=40, adjoint=Truncated(window))
    pull = potential.modes.sum(1)
    (found,) = gradient([potential.load], relaxation.positions.flatten() @ pull)
    terms = sum((1 - eta * values) ** n for n in range(window)) * eta
    torch.testing.assert_close(potential.modes.T @ found, terms, rtol=1e-9, atol=0)


def test_only_the_last_states_of_each_structure_are_stored():
    potential = lennard_jones().requires_grad_()
    structures = batch(*(make() for make in MEMBERS))
    relaxation = relax(potential, structures, stepper=LEARNABLE["fire"](), fmax=0.3, steps=FRAMES, adjoint=Truncated(4))
    wanted = {t for n in relaxation.nsteps.tolist() for t in range(max(0, n - 4), n)}
    frames = relaxation.trajectory.frames
    assert {t for t, kept in enumerate(frames) if kept is not None} == wanted
    assert len(wanted) < len(frames)
    # Nothing is known of what lies before.
    relaxation.positions.square().sum().backward()
    norms = relaxation.adjoint_norms
    assert norms.shape == (len(frames) + 1, len(MEMBERS))
    for k, n in enumerate(relaxation.nsteps.tolist()):
        assert norms[:, k].count_nonzero() == len(norms) - max(0, n - 4)
        assert (norms[max(0, n - 4) :, k] > 0).all()


def test_a_run_of_ase_has_the_gradient_of_relax():
    potential, atoms = lennard_jones().requires_grad_(), pentamer()
    atoms.calc = TorchCalculator(potential)
    optimizer = BPTTOptimizer(atoms, logfile=None, dt=0.03, adjoint=Truncated(5))
    for steps in (12, 20):
        optimizer.run(fmax=1e-3, steps=steps - optimizer.nsteps)
        expected = relax(
            potential, pentamer(), stepper=optimizer.stepper, fmax=1e-3, steps=steps, adjoint="truncated:5"
        )
        target = nearby_positions(Structures.from_atoms(pentamer()))
        relaxations = (optimizer.relaxation, expected)
        grads = [gradient(list(potential.parameters()), mass_weighted_distance(r, target)) for r in relaxations]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)
    assert sum(kept is not None for kept in optimizer.relaxation.trajectory.frames) <= 10
