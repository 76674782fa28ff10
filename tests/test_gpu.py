"""The same on a CUDA device; skipped where there is none."""

import pytest
import torch
from conftest import argon, cluster, lennard_jones, needs_mace, silicon

from ase_bptt import Structures, TorchCalculator, load_potential, relax

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def gradients(potential, members, steps):
    start = Structures.from_atoms(members, device=potential.device, dtype=potential.dtype)
    start.positions.requires_grad_()
    run = relax(potential, start, steps=steps, fmax=0.05)
    run.positions.square().sum().backward()
    weights = torch.cat([p.grad.flatten() for p in potential.parameters() if p.grad is not None])
    return run, start.positions.grad.cpu(), weights.cpu()


@pytest.mark.parametrize(
    ("make", "members"),
    [
        pytest.param(lennard_jones, lambda: [argon(), cluster()], id="lj"),
        pytest.param(lambda: load_potential("mace-si"), lambda: [silicon(1), silicon(2)], id="mace", marks=needs_mace),
    ],
)
def test_relaxations_and_gradients_equal_those_of_the_cpu(make, members):
    here = gradients(make().requires_grad_(), members(), 15)
    there = gradients(make().requires_grad_().to("cuda"), members(), 15)
    assert there[0].positions.device.type == "cuda"
    assert here[0].nsteps.tolist() == there[0].nsteps.tolist()
    torch.testing.assert_close(there[0].positions.detach().cpu(), here[0].positions.detach(), atol=1e-6, rtol=0)
    for a, b in zip(here[1:], there[1:], strict=True):
        torch.testing.assert_close(b, a, atol=0, rtol=1e-6)


@needs_mace
def test_the_calculator_computes_where_it_is_told():
    atoms, twin = silicon(), silicon()
    atoms.calc, twin.calc = TorchCalculator("mace-si", device="cuda"), TorchCalculator("mace-si")
    assert atoms.calc.potential.device.type == "cuda"
    assert atoms.get_potential_energy() == pytest.approx(twin.get_potential_energy(), abs=1e-6)
