"""Low-rank updates: the identity at first, trained through relaxations, folded into plain weights."""

import copy

import pytest
import torch
from ase.build import bulk
from helpers.potentials import lennard_jones, mace_of_irreps, needs_chgnet, needs_mace, tiny_chgnet
from helpers.structures import rattled, skewed

from ase_bptt.calculator import TorchCalculator
from ase_bptt.neighbors import NeighborList
from ase_bptt.potentials import load_potential, save_potential
from ase_bptt.relaxation import relax
from ase_bptt.structures import Structures
from ase_bptt.tuning import low_rank
from ase_bptt.weights import weights_version


def vectors():
    """A MACE whose messages have vectors: its linear maps consist of several blocks."""
    return mace_of_irreps("8x0e + 8x1o")


FAMILIES = [
    pytest.param(mace_of_irreps, id="mace", marks=needs_mace),
    pytest.param(vectors, id="mace-vectors", marks=needs_mace),
    pytest.param(tiny_chgnet, id="chgnet", marks=needs_chgnet),
]
families = pytest.mark.parametrize("make", FAMILIES)


def results(potential, atoms=None):
    structures = Structures.from_atoms(atoms or skewed(), dtype=potential.dtype)
    return potential.results(structures, NeighborList(potential.cutoff)(structures))


def same(a, b, tolerance=1e-12):
    return all(torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance) for name in ("energy", "forces"))


def moved(potential):
    """With updates that are not zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in potential.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return potential


def gradient_of_relaxation(potential):
    relaxation = relax(potential, skewed(), steps=3, fmax=1e-6, stepper="gd")
    return (relaxation.positions**2).sum()


@families
def test_it_begins_as_the_identity(make):
    potential = make()
    before = results(potential)
    added = low_rank.add(potential)
    assert added > 5
    after = results(potential)
    assert torch.equal(before["energy"], after["energy"])
    assert torch.equal(before["forces"], after["forces"])


@families
def test_the_updates_alone_get_gradients_through_a_relaxation(make):
    potential = make()
    low_rank.add(potential, rank=2)
    moved(potential)
    gradient_of_relaxation(potential).backward()
    for name, p in potential.named_parameters():
        if "original" in name or "parametrizations" not in name:
            assert p.grad is None, name
    reached = [p.grad for name, p in potential.named_parameters() if "readout" in name and p.requires_grad]
    reached = reached or [p.grad for name, p in potential.named_parameters() if ".mlp." in name and p.requires_grad]
    assert reached
    assert all(g is not None and g.abs().max() > 0 for g in reached)


@families
def test_the_gradient_of_an_update_agrees_with_finite_differences(make):
    """Of the final positions of a few frames: second derivatives of the energy are in it."""
    potential = make()
    low_rank.add(potential, rank=2)
    moved(potential)
    gradient_of_relaxation(potential).backward()
    every = [p for p in potential.parameters() if p.grad is not None]
    p = max(every, key=lambda p: p.grad.abs().max())
    k, h = int(p.grad.abs().argmax()), 1e-4
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            p.view(-1)[k] += sign * h
            found.append(gradient_of_relaxation(potential).item())
            p.view(-1)[k] -= sign * h
    assert p.grad.view(-1)[k].item() == pytest.approx((found[0] - found[1]) / (2 * h), rel=1e-5)


@needs_mace
def test_the_symmetry_is_kept():
    potential = vectors()
    low_rank.add(potential)
    moved(potential)
    atoms = skewed()
    turned = atoms.copy()
    turned.rotate(40, (1, 2, 3), rotate_cell=True)
    here, there = results(potential, atoms), results(potential, turned)
    assert here["energy"].item() == pytest.approx(there["energy"].item(), abs=1e-10)
    assert here["forces"].norm(dim=1).tolist() == pytest.approx(there["forces"].norm(dim=1).tolist(), abs=1e-9)


@families
def test_merged_it_is_a_plain_potential_with_the_same_energies(make):
    potential = make()
    base = results(potential)
    names = [name for name, _ in potential.named_parameters()]
    frozen = names[0]
    dict(potential.named_parameters())[frozen].requires_grad_(False)
    low_rank.add(potential)
    moved(potential)
    tuned = results(potential)
    assert not same(base, tuned, 1e-3)
    plain = low_rank.merged(potential)
    assert same(results(plain), tuned)
    assert not low_rank.has(plain)
    # The original is what it was: a copy shares nothing with it.
    assert low_rank.has(potential)
    assert same(results(potential), tuned)
    assert low_rank.merge(potential) is potential
    assert same(results(potential), tuned)
    assert [name for name, _ in potential.named_parameters()] == names
    assert [name for name, p in potential.named_parameters() if not p.requires_grad] == [frozen]


@families
def test_a_deep_copy_goes_its_own_way(make):
    potential = make()
    low_rank.add(potential)
    base = results(potential)
    twin = moved(copy.deepcopy(potential))
    assert same(results(potential), base)
    tuned = results(twin)
    assert not same(tuned, base, 1e-3)
    low_rank.merge(twin)
    assert same(results(potential), base)
    assert same(results(twin), tuned)


@families
def test_the_state_comes_back(make):
    potential = make()
    low_rank.add(potential, rank=3, alpha=6.0)
    moved(potential)
    again = make()
    low_rank.restore(again, low_rank.settings(potential))
    again.load_state_dict(potential.state_dict())
    assert same(results(again), results(potential), 1e-15)
    assert low_rank.settings(again) == low_rank.settings(potential)
    assert low_rank.settings(low_rank.merge(again)) is None


@families
def test_what_is_saved_is_plain(make, tmp_path):
    potential = make()
    low_rank.add(potential)
    moved(potential)
    save_potential(low_rank.merged(potential), tmp_path / "tuned")
    tuned = results(potential)
    ours = load_potential(tmp_path / "tuned")
    native = load_potential(tmp_path / "tuned" / potential.native_name, trust=True, dtype=torch.float64)
    # chgnet's own loader builds in float32.
    for found, tolerance in ((ours, 1e-12), (native, 1e-5 if potential.family == "chgnet" else 1e-12)):
        assert not low_rank.has(found)
        assert same(results(found), tuned, tolerance)


@needs_mace
def test_a_change_of_an_update_is_noticed():
    potential = mace_of_irreps()
    low_rank.add(potential)
    before = weights_version(potential)
    moved(potential)
    assert weights_version(potential) != before
    relaxation = relax(potential, skewed(), steps=2, fmax=1e-6, stepper="gd")
    moved(potential)
    with pytest.raises(RuntimeError, match="changed after this relaxation"):
        relaxation.positions.sum().backward()


@needs_mace
def test_the_calculator_sees_training_and_merging():
    potential = mace_of_irreps()
    low_rank.add(potential)
    atoms = skewed()
    atoms.calc = TorchCalculator(potential)
    base = atoms.get_potential_energy()
    moved(potential)
    tuned = atoms.get_potential_energy()
    assert abs(tuned - base) > 1e-4
    low_rank.merge(potential)
    assert atoms.get_potential_energy() == pytest.approx(tuned, abs=1e-10)


@needs_mace
def test_the_weights_as_they_are_used():
    potential = mace_of_irreps()
    names = [name for name, _ in potential.named_parameters()]
    low_rank.add(potential, patterns="*readouts*")
    moved(potential)
    used = low_rank.weights(potential)
    assert set(used) == set(names)
    assert used["model.readouts.0.linear.weight"].requires_grad
    assert not used["model.interactions.0.linear.weight"].requires_grad
    plain = dict(low_rank.merged(potential).named_parameters())
    for name, weight in used.items():
        assert torch.equal(weight, plain[name])


@needs_mace
def test_the_dtype_can_change():
    potential = moved(mace_of_irreps())
    low_rank.add(potential)
    single = load_potential(moved(potential), dtype="float32")
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    atoms = rattled(bulk("Si"))
    assert results(single, atoms)["energy"].item() == pytest.approx(
        results(potential, atoms)["energy"].item(), abs=1e-4
    )


@needs_mace
def test_only_what_trains_gets_updates_unless_it_is_named():
    potential = mace_of_irreps()
    potential.requires_grad_(False)
    with pytest.raises(ValueError, match="no linear maps that are to be trained"):
        low_rank.add(potential)
    potential.model.readouts.requires_grad_()
    assert low_rank.add(potential) == 3
    low_rank.merge(potential)
    assert low_rank.add(potential, patterns=["*interactions.0.linear*"]) == 2


@needs_mace
@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"rank": 0}, "rank must be positive"),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"patterns": ["readout"]}, "No weight matches 'readout'; there are .*readouts"),
        ({"patterns": ["*symmetric_contractions*"]}, "no linear maps that are to be trained"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(how, match):
    potential = mace_of_irreps()
    with pytest.raises(ValueError, match=match):
        low_rank.add(potential, **how)
    assert not low_rank.has(potential)
    assert all(p.requires_grad for p in potential.parameters())


def test_a_potential_without_linear_maps():
    with pytest.raises(ValueError, match="This lj potential has no linear maps,"):
        low_rank.add(lennard_jones())
    potential = lennard_jones()
    assert low_rank.merge(potential) is potential
    assert low_rank.merged(potential) is potential


@needs_mace
def test_twice_is_refused():
    potential = mace_of_irreps()
    low_rank.add(potential)
    with pytest.raises(ValueError, match="has low-rank updates already"):
        low_rank.add(potential)
