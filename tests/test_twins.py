"""The torch twins of ASE's EMT, LennardJones and MorsePotential, against ASE's own and against differences."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, graphene, molecule
from ase.calculators.calculator import CalculationFailed, PropertyNotImplementedError
from ase.calculators.emt import EMT as AseEMT
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.calculators.morse import MorsePotential
from ase.cluster import Icosahedron
from helpers.structures import rattled

from ase_bptt import TorchCalculator, load_potential, relax
from ase_bptt.neighbors import NeighborList
from ase_bptt.potentials import save_potential
from ase_bptt.potentials.analytic import LennardJones, Morse
from ase_bptt.potentials.emt import EMT
from ase_bptt.steppers import FIRE
from ase_bptt.structures import Structures

STRAIN = np.eye(3) + np.array([[0.02, 0.03, 0], [0, -0.02, 0.05], [0, 0, 0.01]])


def alloy() -> Atoms:
    atoms = bulk("Pd", cubic=True) * (2, 1, 1)
    atoms.symbols = "AlNiCuPdAgPtAuCu"
    return rattled(atoms)


def adsorbed() -> Atoms:
    atoms = fcc111("Pt", (2, 2, 2), vacuum=6.0)
    add_adsorbate(atoms, "O", 1.3, "fcc")
    return rattled(atoms, 0.05)


def strained() -> Atoms:
    atoms = bulk("Ni") * (1, 2, 1)
    atoms.set_cell(atoms.cell.array @ STRAIN, scale_atoms=True)
    return rattled(atoms)


def skewed() -> Atoms:
    """Vectors far from the shortest ones, and atoms outside of the cell."""
    atoms = rattled(bulk("Au") * (1, 1, 2))
    atoms.cell[1] += 3 * atoms.cell[0]
    atoms.positions[0] -= 2 * atoms.cell[2]
    return atoms


ZOO = {
    "atom": lambda: Atoms("Au"),
    "atom-in-a-cell": lambda: Atoms("Cu", cell=[20, 20, 20], pbc=True),
    "two-far-apart": lambda: Atoms("AlN", positions=[[0, 0, 0], [0, 0, 30]]),
    "two-and-one-far-apart": lambda: Atoms("H2Pt", positions=[[0, 0, 0], [0, 0, 0.8], [0, 0, 30]]),
    "molecule": lambda: rattled(molecule("CH3OH"), 0.02),
    "molecule-in-a-box": lambda: rattled(molecule("N2", cell=[4, 5, 6]), 0.02),
    "cluster": lambda: rattled(Icosahedron("Ag", 2)),
    "one-atom-crystal": lambda: bulk("Cu"),
    "crystal": lambda: rattled(bulk("Al", cubic=True)),
    "alloy": alloy,
    "strained": strained,
    "skewed": skewed,
    "slab": adsorbed,
    "sheet-without-a-cell-above": lambda: rattled(graphene(size=(2, 1, 1)), 0.05),
    "wire": lambda: rattled(Atoms("Ni2", positions=[[0, 0, 0], [0.5, 0, 2.2]], cell=[0, 0, 4.6], pbc=[0, 0, 1]), 0.05),
}
TWINS = {
    "emt": (lambda: EMT(), lambda: AseEMT()),
    "emt-asap": (lambda: EMT(asap_cutoff=True), lambda: AseEMT(asap_cutoff=True)),
    "morse": (lambda: Morse(), lambda: MorsePotential()),
    "morse-long": (
        lambda: Morse(epsilon=0.7, rho0=4.0, r0=2.1, rcut1=1.2, rcut2=3.1),
        lambda: MorsePotential(epsilon=0.7, rho0=4.0, r0=2.1, rcut1=1.2, rcut2=3.1),
    ),
    "lj": (lambda: LennardJones(sigma=1.1, rc=6.0), lambda: AseLennardJones(sigma=1.1, rc=6.0)),
    "lj-smooth": (
        lambda: LennardJones(0.4, 1.3, rc=6.0, ro=3.0, smooth=True),
        lambda: AseLennardJones(epsilon=0.4, sigma=1.3, rc=6.0, ro=3.0, smooth=True),
    ),
}
each_twin = pytest.mark.parametrize("twin", TWINS)
each_structure = pytest.mark.parametrize("structure", ZOO)
new = pytest.mark.parametrize("make", [EMT, lambda: EMT(asap_cutoff=True), Morse], ids=["emt", "emt-asap", "morse"])


def evaluate(potential, atoms):
    structures = Structures.from_atoms(atoms, dtype=potential.dtype)
    return potential.results(structures, NeighborList(potential.cutoff)(structures))


def differentiable_forces(potential, atoms):
    structures = Structures.from_atoms(atoms)
    structures.positions.requires_grad_()
    pairs = NeighborList(potential.cutoff)(structures)
    return structures.positions, potential.energy_and_forces(structures, pairs, create_graph=True)[1]


@each_twin
@each_structure
def test_every_property_equals_ases(twin, structure):
    make, make_ases = TWINS[twin]
    atoms, reference = ZOO[structure](), ZOO[structure]()
    atoms.calc, reference.calc = TorchCalculator(make()), make_ases()
    names = ["energy", "free_energy", "forces", "energies"]
    if atoms.cell.rank == 3:
        names += ["stress", "stresses"] if "lj" in twin else ["stress"]
    for name in names:
        expected = reference.calc.get_property(name, reference)
        np.testing.assert_allclose(atoms.calc.get_property(name, atoms), expected, rtol=1e-12, atol=1e-10, err_msg=name)


@each_twin
@pytest.mark.parametrize("structure", ["molecule", "cluster", "sheet-without-a-cell-above", "wire"])
def test_without_a_volume_there_is_no_stress(twin, structure):
    atoms = ZOO[structure]()
    atoms.calc = TorchCalculator(TWINS[twin][0]())
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


@pytest.mark.parametrize("symbol", EMT().elements)
def test_every_element_of_emt_equals_ases(symbol):
    atoms = rattled(bulk(symbol, "fcc", a=3.7), 0.1)
    atoms.calc = AseEMT()
    found = evaluate(EMT(), atoms)
    assert found["energy"].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
    np.testing.assert_allclose(found["stress"][0], atoms.get_stress(voigt=False), atol=1e-10)


@each_twin
@pytest.mark.parametrize("structure", ["cluster", "alloy", "slab"])
def test_forces_are_the_negative_gradient_of_the_energy(twin, structure):
    potential, atoms, h = TWINS[twin][0](), ZOO[structure](), 1e-4
    forces = evaluate(potential, atoms)["forces"].numpy()
    for a, k in [(0, 0), (1, 2), (len(atoms) - 1, 1)]:
        energies = []
        for step in (-2, -1, 1, 2):
            moved = atoms.copy()
            moved.positions[a, k] += step * h
            energies.append(evaluate(potential, moved)["energy"].item())
        difference = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * h)
        # Pairs that cross EMT's cutoff within a step change the energy by up to 1e-6 eV.
        assert forces[a, k] == pytest.approx(-difference, rel=1e-7, abs=1e-6)


@new
@pytest.mark.parametrize("structure", ["molecule", "cluster", "alloy"])
def test_second_derivatives_are_differences_of_forces(make, structure):
    potential, atoms, h = make().requires_grad_(), ZOO[structure](), 1e-5
    direction = np.random.default_rng(0).normal(size=(len(atoms), 3))
    positions, forces = differentiable_forces(potential, atoms)
    along = torch.from_numpy(direction)
    curvature, *derivatives = torch.autograd.grad((forces * along).sum(), [positions, *potential.parameters()])

    moved = [atoms.copy(), atoms.copy()]
    for sign, copy in zip((-1, 1), moved, strict=True):
        copy.positions += sign * h * direction
    before, after = (evaluate(potential, copy)["forces"] for copy in moved)
    np.testing.assert_allclose(curvature, (after - before) / (2 * h), rtol=1e-6, atol=1e-5)

    for weight, derivative in zip(potential.parameters(), derivatives, strict=True):
        values, difference = weight.data.clone(), torch.zeros(weight.numel(), dtype=weight.dtype)
        for k in range(weight.numel()):
            for sign in (-1, 1):
                weight.data.view(-1)[k] += sign * h
                difference[k] += sign * (evaluate(potential, atoms)["forces"] * along).sum() / (2 * h)
                weight.data.copy_(values)
        np.testing.assert_allclose(derivative.reshape(-1), difference, rtol=1e-5, atol=1e-5)


@new
def test_a_batch_gives_what_each_member_gives_alone(make):
    potential, members = make(), [structure() for structure in ZOO.values()]
    together = evaluate(potential, members)
    alone = [evaluate(potential, atoms) for atoms in members]
    for name, value in together.items():
        np.testing.assert_allclose(value, torch.cat([a[name] for a in alone]), rtol=1e-13, atol=1e-12, err_msg=name)


def test_a_lone_atom_has_finite_gradients():
    potential = EMT().requires_grad_()
    structures = Structures.from_atoms(Atoms("Cu"))
    potential(structures, NeighborList(potential.cutoff)(structures)).energy.sum().backward()
    is_copper = torch.tensor([symbol == "Cu" for symbol in potential.elements])
    assert potential.E0.grad.tolist() == (-1.0 * is_copper).tolist()
    for name in ("s0", "V0", "eta2", "kappa", "lambda_", "n0"):
        assert not getattr(potential, name).grad.any(), name


@new
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_saved_and_loaded_it_is_the_same(make, dtype, tmp_path):
    potential = make().to(dtype)
    with torch.no_grad():
        for weight in potential.parameters():
            weight.mul_(1.03)
    save_potential(potential, tmp_path)
    loaded = load_potential(tmp_path)
    assert (type(loaded), loaded.dtype, loaded.cutoff) == (type(potential), dtype, potential.cutoff)
    for name, value in evaluate(potential, alloy()).items():
        assert torch.equal(value, evaluate(loaded, alloy())[name]), name


@new
def test_float32_is_close(make):
    exact, rounded = evaluate(make(), alloy()), evaluate(make().float(), alloy())
    assert rounded["forces"].dtype is torch.float32
    np.testing.assert_allclose(rounded["forces"], exact["forces"], atol=1e-3)


def test_a_trained_radius_leaves_the_cutoff_where_it_is():
    potential, morse, cutoffs = EMT(), Morse(), (EMT().cutoff, Morse().cutoff)
    with torch.no_grad():
        potential.s0.mul_(1.1)
        morse.r0.mul_(1.1)
    assert (potential.cutoff, morse.cutoff) == cutoffs
    copper = ZOO["one-atom-crystal"]()
    only_silver = EMT()
    with torch.no_grad():
        only_silver.s0[only_silver.elements.index("Ag")] *= 1.1
    assert torch.equal(evaluate(only_silver, copper)["energy"], evaluate(EMT(), copper)["energy"])
    gap = Atoms("H2", positions=[[0, 0, 0], [0, 0, cutoffs[1] + 1e-6]])
    assert evaluate(morse, gap)["energy"].item() == 0


def test_unknown_elements_are_refused():
    atoms = Atoms("CuSi", positions=[[0, 0, 0], [0, 0, 2]])
    message = "no parameters for Si; it knows H C N O Al Ni Cu Pd Ag Pt Au"
    atoms.calc = TorchCalculator("emt")
    with pytest.raises(NotImplementedError, match=message):
        atoms.get_potential_energy()
    with pytest.raises(NotImplementedError, match=message):
        relax("emt", atoms)
    with pytest.raises(IndexError):
        evaluate(EMT(), atoms)


@pytest.mark.parametrize(("name", "family"), [("emt", EMT), ("morse", Morse), ("lj", LennardJones)])
def test_they_are_found_by_name(name, family):
    potential = load_potential(name)
    assert type(potential) is family
    assert all(weight.requires_grad for weight in potential.parameters())
    with pytest.raises(ValueError, match=f"'{name}' has no variant 'other'"):
        load_potential(f"{name}:other")


@pytest.mark.parametrize("name", ["emt", "morse"])
def test_atoms_on_one_spot_are_a_failed_calculation(name):
    atoms = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 0]], calculator=TorchCalculator(name))
    with pytest.raises(CalculationFailed, match="Cu2: are two atoms on one spot"):
        atoms.get_forces()


def test_a_cutoff_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match=r"0 <= rcut1 < rcut2, got 2\.7 and 1\.9"):
        Morse(rcut1=2.7, rcut2=1.9)


@pytest.mark.parametrize("weight", ["s0", "eta2", "V0", "lambda_"])
def test_the_gradient_of_a_relaxation_is_the_difference_of_two(weight):
    start, h = rattled(Atoms("Cu3Al", positions=[[0, 0, 0], [2.5, 0, 0], [1.2, 2.2, 0], [1.2, 0.7, 2.1]]), 0.1), 1e-5
    reference = torch.from_numpy(start.positions)

    def loss(potential):
        return (relax(potential, start, stepper=FIRE(), fmax=0.0, steps=8).positions - reference).square().sum()

    potential = EMT().requires_grad_()
    copper = potential.elements.index("Cu")
    loss(potential).backward()
    ends = []
    for sign in (-1, 1):
        shifted = EMT()
        with torch.no_grad():
            getattr(shifted, weight)[copper] += sign * h
            ends.append(loss(shifted).item())
    difference = (ends[1] - ends[0]) / (2 * h)
    assert abs(difference) > 1e-3
    assert getattr(potential, weight).grad[copper].item() == pytest.approx(difference, rel=1e-5)
