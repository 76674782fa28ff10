"""A potential whose forces are predicted directly: relaxed, differentiated, trained and saved as any other."""

import numpy as np
import pytest
import torch
from ase.calculators.calculator import PropertyNotImplementedError
from helpers.structures import cluster, rattled, silicon

from ase_bptt import RelaxationPair, TorchCalculator, Trainer, load_potential, relax, save_potential
from ase_bptt.neighbors import NeighborList
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.potentials.direct import Direct
from ase_bptt.steppers import FIRE, GradientDescent
from ase_bptt.structures import Structures


def direct(**changes):
    return Direct(**{"width": 8, "basis": 6} | changes).double()


def wide(seed):
    """A cluster with bonds as long as those of silicon."""
    atoms = cluster(seed=seed)
    atoms.positions *= 2.5
    return rattled(atoms, 0.1, seed)


def forces_of(potential, atoms):
    structures = Structures.from_atoms(atoms)
    return potential.energy_and_forces(structures, NeighborList(potential.cutoff)(structures))[1].numpy()


def test_its_forces_are_no_gradient_of_its_energy_and_sum_to_zero():
    potential, atoms, h = direct(), silicon(), 1e-4
    energies = []
    for step in (-h, h):
        moved = atoms.copy()
        moved.positions[0, 0] += step
        structures = Structures.from_atoms(moved)
        energies.append(potential(structures, NeighborList(potential.cutoff)(structures)).energy.item())
    forces = forces_of(potential, atoms)
    assert abs(forces[0, 0] + (energies[1] - energies[0]) / (2 * h)) > 1e-3
    np.testing.assert_allclose(forces.sum(0), 0, atol=1e-12)


def test_the_calculator_has_energy_and_forces_and_no_stress():
    atoms = silicon()
    atoms.calc = TorchCalculator(direct())
    assert np.isfinite(atoms.get_potential_energy())
    np.testing.assert_array_equal(atoms.get_forces(), forces_of(direct(), silicon()))
    assert "stress" not in atoms.calc.implemented_properties
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


def test_the_energy_is_never_differentiated(monkeypatch):
    """Its head may be anything, even one that has no derivative."""
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("something was differentiated"))
    structures = Structures.from_atoms(silicon())
    found = direct().results(structures, NeighborList(5.0)(structures))
    assert set(found) == {"energy", "forces"}
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("adjoint", ["replay", "full"])
@pytest.mark.parametrize("stepper", [GradientDescent(0.5), FIRE()], ids=["gd", "fire"])
def test_the_gradient_of_a_relaxation_is_the_difference_of_two(adjoint, stepper):
    potential, start, h = direct().requires_grad_(), wide(1), 1e-5
    reference = torch.from_numpy(wide(2).positions)

    def loss():
        run = relax(potential, start, stepper=stepper, fmax=0.0, steps=6, adjoint=adjoint)
        return (run.positions - reference).square().sum()

    loss().backward()
    weight = potential.force_head[0].weight
    flat = weight.grad.abs().argmax().item()
    ends = []
    for step in (-h, h):
        with torch.no_grad():
            weight.view(-1)[flat] += step
            ends.append(loss().item())
            weight.view(-1)[flat] -= step
    difference = (ends[1] - ends[0]) / (2 * h)
    assert abs(difference) > 1e-4
    assert weight.grad.view(-1)[flat].item() == pytest.approx(difference, rel=1e-5)


def test_it_learns_where_structures_relax_to():
    teacher = LennardJones(epsilon=0.3, sigma=2.5, rc=6.0, ro=4.5, smooth=True)
    starts = [wide(k) for k in range(6)]
    with torch.no_grad():
        ends = relax(teacher, starts, fmax=1e-3, steps=500).to_atoms()
    pairs = [RelaxationPair(a, b, str(k), str(k)) for k, (a, b) in enumerate(zip(starts, ends, strict=True))]
    trainer = Trainer(direct(), stepper=GradientDescent(0.2), lr=5e-3, steps=6, batch_size=3, progress=False)
    before = trainer.evaluate(pairs[4:]).mean
    trainer.fit(pairs[:4], epochs=15)
    assert trainer.evaluate(pairs[4:]).mean < 0.7 * before


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_saved_and_loaded_it_is_the_same(dtype):
    potential = load_potential(direct(seed=3), dtype=dtype)
    with torch.no_grad():
        potential.force_head[0].weight.mul_(1.1)
    save_potential(potential, "saved")
    loaded = load_potential("saved")
    assert loaded.config() == potential.config()
    for name, value in potential.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_by_name_it_is_the_same_each_time_and_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = load_potential("direct"), load_potential("direct")
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(ValueError, match="'direct' has no variant 'orb'"):
        load_potential("direct:orb")
