"""The same on a CUDA device; skipped where there is none."""

import numpy as np
import pytest
import torch
from ase import Atoms
from helpers.potentials import lennard_jones, needs_mace
from helpers.structures import argon, cluster, rattled, silicon, vacancy

from ase_bptt import RelaxationPair, Structures, TorchCalculator, Trainer, load_potential, relax
from ase_bptt.adjoints import FullTape, Guided, Implicit, OneStep, Replay, Truncated
from ase_bptt.neighbors import find_edges
from ase_bptt.testing import check_potential
from ase_bptt.throughput import relax_all

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

THROUGH = [Replay(), Replay(every=4), FullTape(), Truncated(5), Guided(5)]
AT_THE_END = [Implicit(tolerance=1e-10, fmax=1e-4), OneStep(fmax=1e-4)]


def gradients(potential, members, adjoint):
    start = Structures.from_atoms(members, device=potential.device, dtype=potential.dtype)
    start.positions.requires_grad_()
    frames = {"stepper": "fire", "steps": 15} if adjoint.through_frames else {"stepper": "bfgs", "steps": 300}
    run = relax(potential, start, fmax=0.05, adjoint=adjoint, **frames)
    loss = run.positions.square().sum()
    if run.early is not None:
        loss = loss + run.early.positions.square().sum()
    loss.backward()
    weights = torch.cat([p.grad.flatten() for p in potential.parameters() if p.grad is not None])
    return run, start.positions.grad.cpu(), weights.cpu()


@pytest.mark.parametrize("adjoint", [*THROUGH, *AT_THE_END], ids=str)
@pytest.mark.parametrize(
    ("make", "members"),
    [
        pytest.param(lennard_jones, lambda: [vacancy(), argon(), cluster()], id="lj"),
        pytest.param(lambda: load_potential("mace-si"), lambda: [silicon(1), silicon(2)], id="mace", marks=needs_mace),
    ],
)
def test_relaxations_and_gradients_equal_those_of_the_cpu(make, members, adjoint):
    here = gradients(make().requires_grad_(), members(), adjoint)
    there = gradients(make().requires_grad_().to("cuda"), members(), adjoint)
    assert there[0].positions.device.type == "cuda"
    assert here[0].nsteps.tolist() == there[0].nsteps.tolist()
    torch.testing.assert_close(there[0].positions.detach().cpu(), here[0].positions.detach(), atol=1e-6, rtol=0)
    for a, b in zip(here[1:], there[1:], strict=True):
        torch.testing.assert_close(b, a, atol=1e-6 * a.abs().max().item(), rtol=0)


@needs_mace
@pytest.mark.parametrize("batch_size", [3, None])
def test_many_end_as_on_the_cpu(batch_size):
    structures = [rattled(silicon().repeat((1 + k % 3, 1, 1)), 0.03, seed=k) for k in range(8)]
    here = dict(relax_all(load_potential("mace-si"), structures, steps=60))
    there = dict(relax_all(load_potential("mace-si", device="cuda"), structures, steps=60, batch_size=batch_size))
    for k, end in here.items():
        assert (there[k].status, there[k].nsteps) == (end.status, end.nsteps)
        np.testing.assert_allclose(there[k].atoms.positions, end.atoms.positions, atol=1e-6)


def test_pairs_are_found_where_the_structures_are(monkeypatch):
    monkeypatch.setattr("ase_bptt.neighbors.search._of_one", None)  # the host is not asked
    batch = Structures.from_atoms([silicon(), argon(), cluster(), Atoms("He")], device="cuda")
    found = find_edges(batch, 3.0)
    monkeypatch.undo()
    expected = find_edges(batch.to(torch.device("cpu"), torch.float64), 3.0)
    for name in ("i", "j", "shifts", "mirror"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name))


@needs_mace
@pytest.mark.parametrize("adjoint", ["replay", "implicit"])
def test_a_training_leaves_the_weights_that_the_cpu_leaves(adjoint):
    pairs = [RelaxationPair(silicon(k), silicon(k, 0.02), f"pair {k}", f"group {k}") for k in range(4)]
    weights = []
    for device in ("cpu", "cuda"):
        trainer = Trainer(load_potential("mace-si", device=device), adjoint=adjoint, progress=False, terms=["teacher"])
        trainer.fit(pairs[:3], pairs[3:], epochs=2)
        weights.append(torch.cat([p.detach().flatten().cpu() for p in trainer.potential.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=0)


@needs_mace
def test_the_public_check_passes():
    check_potential(load_potential("mace-si", device="cuda"), silicon())


def test_a_long_run_does_not_grow():
    structures = [argon(k) for k in range(4)]
    potential = lennard_jones().to("cuda")
    peaks = []
    for steps in (50, 500):
        torch.cuda.reset_peak_memory_stats()
        list(relax_all(potential, structures, fmax=1e-12, steps=steps))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.1 * peaks[0]


@needs_mace
def test_the_calculator_computes_on_the_device_given():
    atoms, twin = silicon(), silicon()
    atoms.calc, twin.calc = TorchCalculator("mace-si", device="cuda"), TorchCalculator("mace-si")
    assert atoms.calc.potential.device.type == "cuda"
    assert atoms.get_potential_energy() == pytest.approx(twin.get_potential_energy(), abs=1e-6)
