"""Every adapter: against differences of its energy, against the family's own calculator, against physics."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones as AseLennardJones
from conftest import argon, cluster, lennard_jones, methanol, needs_chgnet, needs_mace, silicon, skewed, tiny_mace

from ase_bptt.neighbors import NeighborList
from ase_bptt.potentials.lennard_jones import LennardJones
from ase_bptt.structures import Structures


def evaluate(potential, atoms):
    structures = Structures.from_atoms(atoms, dtype=potential.dtype)
    return potential.results(structures, NeighborList(potential.cutoff)(structures))


def mace_potential(**changes):
    from ase_bptt.potentials.mace import MACE

    return MACE(tiny_mace(**changes))


def chgnet_potential(variant=None, dtype=torch.float64):
    from ase_bptt.potentials.chgnet import CHGNet

    return CHGNet.from_name(variant).to(dtype)


CASES = [
    pytest.param(lambda: lennard_jones(smooth=True), argon, id="lj-smooth-crystal"),
    pytest.param(lambda: lennard_jones(smooth=False), cluster, id="lj-cluster"),
    pytest.param(mace_potential, silicon, id="mace-silicon", marks=needs_mace),
    pytest.param(mace_potential, skewed, id="mace-primitive", marks=needs_mace),
    pytest.param(mace_potential, lambda: Atoms(methanol()[[0, 1]]), id="mace-molecule", marks=needs_mace),
    pytest.param(chgnet_potential, silicon, id="chgnet-silicon", marks=needs_chgnet),
    pytest.param(chgnet_potential, skewed, id="chgnet-primitive", marks=needs_chgnet),
    pytest.param(chgnet_potential, methanol, id="chgnet-molecule", marks=needs_chgnet),
]


@pytest.mark.parametrize(("make", "atoms"), CASES)
def test_forces_are_minus_the_slope_of_the_energy(make, atoms):
    potential, atoms, h = make(), atoms(), 1e-4
    forces = evaluate(potential, atoms)["forces"].numpy()
    for a, k in [(0, 0), (1, 2), (len(atoms) - 1, 1)]:
        energies = []
        for step in (-2, -1, 1, 2):
            moved = atoms.copy()
            moved.positions[a, k] += step * h
            energies.append(evaluate(potential, moved)["energy"].item())
        slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * h)
        assert forces[a, k] == pytest.approx(-slope, abs=1e-6)


@pytest.mark.parametrize(("make", "atoms"), [c for c in CASES if "molecule" not in c.id and "cluster" not in c.id])
def test_stress_is_the_slope_of_the_energy_with_strain(make, atoms):
    potential, atoms, h = make(), atoms(), 1e-4
    stress = evaluate(potential, atoms)["stress"][0].numpy()
    for a, b in [(0, 0), (1, 2), (0, 1)]:
        energies = []
        for step in (-2, -1, 1, 2):
            strain = np.zeros((3, 3))
            strain[a, b] += step * h / 2
            strain[b, a] += step * h / 2
            moved = atoms.copy()
            moved.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
            energies.append(evaluate(potential, moved)["energy"].item())
        slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * h)
        assert stress[a, b] == pytest.approx(slope / atoms.get_volume(), abs=1e-6)


@pytest.mark.parametrize(("make", "atoms"), CASES)
def test_invariance_under_translation_rotation_and_permutation(make, atoms):
    potential, atoms = make(), atoms()
    before = evaluate(potential, atoms)
    moved = atoms.copy()
    moved.translate([0.3, -17.0, 5.1])
    moved.rotate(35, [1, 2, 3], rotate_cell=True)
    order = np.random.default_rng(0).permutation(len(atoms))
    after = evaluate(potential, moved[order])
    turn = Atoms("H3", positions=np.eye(3))
    turn.rotate(35, [1, 2, 3])
    assert after["energy"].item() == pytest.approx(before["energy"].item(), abs=1e-6)
    np.testing.assert_allclose(after["forces"], before["forces"].numpy()[order] @ turn.positions, atol=1e-6)


@pytest.mark.parametrize(("make", "atoms"), CASES)
def test_a_batch_gives_what_each_member_gives_alone(make, atoms):
    potential = make()
    members = [atoms(), Atoms(atoms()[:1]), atoms()[::-1]]
    members[1].set_cell(members[0].cell)
    together = evaluate(potential, members)
    alone = [evaluate(potential, m) for m in members]
    np.testing.assert_allclose(together["energy"], torch.cat([r["energy"] for r in alone]), atol=1e-10)
    np.testing.assert_allclose(together["forces"], torch.cat([r["forces"] for r in alone]), atol=1e-10)


@pytest.mark.parametrize(("make", "atoms"), CASES)
def test_atomic_energies_sum_to_the_energy(make, atoms):
    found = evaluate(make(), atoms())
    assert found["atomic_energies"].sum().item() == pytest.approx(found["energy"].item(), abs=1e-8)


@pytest.mark.parametrize(("make", "atoms"), CASES)
def test_the_second_derivative_reaches_the_weights(make, atoms):
    potential = make().requires_grad_()
    structures = Structures.from_atoms(atoms())
    structures.positions.requires_grad_()
    pairs = NeighborList(potential.cutoff)(structures)
    _, forces = potential.energy_and_forces(structures, pairs, create_graph=True)
    forces.square().sum().backward()
    assert structures.positions.grad.abs().max() > 0
    assert max(p.grad.abs().max().item() for p in potential.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("atoms", [argon, cluster])
def test_lennard_jones_equals_ases(smooth, atoms):
    atoms = atoms()
    atoms.calc = AseLennardJones(rc=2.4, ro=1.8, smooth=smooth)
    potential = lennard_jones(smooth)
    found = evaluate(potential, atoms)
    assert found["energy"].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
    np.testing.assert_allclose(found["forces"], atoms.get_forces(), atol=1e-10)
    np.testing.assert_allclose(found["atomic_energies"], atoms.get_potential_energies(), atol=1e-10)
    if atoms.cell.rank == 3:
        structures = Structures.from_atoms(atoms)
        stresses = potential.stresses(structures, NeighborList(potential.cutoff)(structures))
        np.testing.assert_allclose(found["stress"][0], atoms.get_stress(voigt=False), atol=1e-10)
        np.testing.assert_allclose(
            stresses[:, [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]].detach(), atoms.get_stresses(), atol=1e-10
        )


@needs_mace
@pytest.mark.parametrize("atoms", [silicon, skewed, methanol], ids=["silicon", "primitive", "molecule"])
def test_mace_equals_its_own_calculator(atoms):
    from mace.calculators import MACECalculator

    atoms = atoms()
    model = tiny_mace(elements=(1, 6, 8, 14))
    from ase_bptt.potentials.mace import MACE

    found = evaluate(MACE(model), atoms)
    atoms.calc = MACECalculator(models=model, device="cpu", default_dtype="float64")
    assert found["energy"].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    np.testing.assert_allclose(found["forces"], atoms.get_forces(), atol=1e-6)
    if atoms.cell.rank == 3:
        np.testing.assert_allclose(found["stress"][0], atoms.get_stress(voigt=False), atol=1e-6)


@pytest.fixture
def chgnet_module(capsys):
    """A loader of chgnet's own modules; it greets on standard output."""
    from chgnet.model.model import CHGNet

    yield lambda variant: CHGNet.load(model_name=variant, use_device="cpu", verbose=False)
    capsys.readouterr()


@needs_chgnet
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
@pytest.mark.parametrize("variant", ["0.3.0", "0.2.0", "r2scan"])
@pytest.mark.parametrize("atoms", [silicon, skewed], ids=["silicon", "primitive"])
class TestCHGNetParity:
    def test_float32_equals_its_own_calculator_and_leaves_it_alone(self, variant, atoms, chgnet_module):
        from chgnet.model.dynamics import CHGNetCalculator

        atoms = atoms()
        calc = CHGNetCalculator(chgnet_module(variant), use_device="cpu")
        evaluate(chgnet_potential(variant, torch.float64), atoms)
        atoms.calc = calc
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        stress, magmoms = atoms.get_stress(voigt=False), atoms.get_magnetic_moments()
        found = evaluate(chgnet_potential(variant, torch.float32), atoms)
        # A float32 energy of 2 atoms has steps of 5e-7 eV/atom, and a sum of 5 of them may round apart.
        tolerance = 1e-6 if len(atoms) > 2 else 4e-6
        assert found["energy"].item() / len(atoms) == pytest.approx(energy / len(atoms), abs=tolerance)
        np.testing.assert_allclose(found["forces"], forces, atol=1e-4)
        np.testing.assert_allclose(found["stress"][0], stress, atol=1e-5)
        np.testing.assert_allclose(found["magmoms"], magmoms, atol=1e-5)

    def test_float64_equals_its_own_graph_in_float64(self, variant, atoms, chgnet_module, monkeypatch):
        from chgnet.graph import converter, crystalgraph
        from chgnet.model import model as chgnet_model
        from pymatgen.io.ase import AseAtomsAdaptor

        for module in (converter, crystalgraph, chgnet_model):
            monkeypatch.setattr(module, "TORCH_DTYPE", torch.float64)
        atoms, model = atoms(), chgnet_module(variant).double()
        model.composition_model.float()
        expected = model.predict_structure(AseAtomsAdaptor.get_structure(atoms), task="efsm")
        found = evaluate(chgnet_potential(variant, torch.float64), atoms)
        assert found["energy"].item() / len(atoms) == pytest.approx(float(expected["e"]), abs=1e-6)
        np.testing.assert_allclose(found["forces"], expected["f"], atol=1e-6)
        np.testing.assert_allclose(found["stress"][0], expected["s"] / 160.21766208, atol=1e-6)


def test_unknown_elements_are_named():
    potential = lennard_jones()
    potential.atomic_numbers = frozenset({14, 18})
    with pytest.raises(NotImplementedError, match=r"no parameters for Cu; it knows Si Ar"):
        potential.check(Structures.from_atoms(bulk("Cu")))


def test_a_lone_atom_has_no_forces():
    found = evaluate(LennardJones(), Atoms("Ar"))
    assert found["energy"].item() == 0
    assert not found["forces"].any()
    assert torch.isnan(found["stress"]).all()
