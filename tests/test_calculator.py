"""TorchCalculator: what ASE asks of a Calculator."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc100
from ase.calculators.calculator import CalculationFailed, PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.io import Trajectory, read, write
from ase.mep import DimerControl, MinModeAtoms, MinModeTranslate
from ase.optimize import BFGS
from helpers.potentials import lennard_jones, needs_chgnet, needs_mace, tiny_mace, wide_lennard_jones
from helpers.structures import argon, cluster, methanol, silicon, skewed

from ase_bptt import TorchCalculator


def mace_potential():
    from ase_bptt.potentials.mace import MACE

    return MACE(tiny_mace(elements=(14,), max_ell=1))


def chgnet_potential():
    from ase_bptt.potentials.chgnet import CHGNet

    return CHGNet.from_name(None)


EVERY = [
    pytest.param(lennard_jones, argon, id="lj"),
    pytest.param(lambda: lennard_jones().to(torch.float32), argon, id="lj-float32"),
    pytest.param(mace_potential, skewed, id="mace", marks=needs_mace),
    pytest.param(chgnet_potential, silicon, id="chgnet", marks=needs_chgnet),
]
SHAPES = {
    "energy": (),
    "free_energy": (),
    "forces": ("n", 3),
    "stress": (6,),
    "energies": ("n",),
    "stresses": ("n", 6),
    "magmoms": ("n",),
}


def with_calculator(atoms, potential=None, **arguments):
    atoms.calc = TorchCalculator(potential or lennard_jones(), **arguments)
    return atoms


@pytest.fixture
def counted(monkeypatch):
    """The number of evaluations so far, as a list to look at."""
    calls, calculate = [], TorchCalculator.calculate

    def spied(self, *args, **kwargs):
        calls.append(1)
        return calculate(self, *args, **kwargs)

    monkeypatch.setattr(TorchCalculator, "calculate", spied)
    return calls


@pytest.mark.parametrize(("potential", "make"), EVERY)
def test_results_are_float64_arrays_that_know_nothing_of_torch(potential, make):
    atoms = with_calculator(make(), potential())
    for name in atoms.calc.implemented_properties:
        value = atoms.calc.get_property(name, atoms)
        shape = tuple(len(atoms) if k == "n" else k for k in SHAPES[name])
        assert np.shape(value) == shape, name
        if shape:
            assert type(value) is np.ndarray
            assert value.dtype == np.float64
            assert value.flags["C_CONTIGUOUS"]
        else:
            assert type(value) is float
        assert np.isfinite(value).all()


@pytest.mark.parametrize(("potential", "make"), EVERY)
def test_asking_for_a_property_gives_a_copy(potential, make):
    atoms = with_calculator(make(), potential())
    atoms.get_forces()[:] = 7
    assert not (atoms.get_forces() == 7).any()


@pytest.mark.parametrize(("potential", "make"), EVERY)
def test_the_energy_repeats_bit_for_bit(potential, make):
    atoms = with_calculator(make(), potential())
    first, forces = atoms.get_potential_energy(), atoms.get_forces()
    atoms.calc.reset()
    assert atoms.get_potential_energy() == first
    assert np.array_equal(atoms.get_forces(), forces)
    assert atoms.get_potential_energy(force_consistent=True) == first


@pytest.mark.parametrize(("potential", "make"), EVERY)
def test_parts_sum_to_wholes(potential, make):
    atoms = with_calculator(make(), potential())
    tolerance = 1e-8 if atoms.calc.potential.dtype is torch.float64 else 1e-4
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy(), abs=tolerance)
    np.testing.assert_allclose(atoms.get_forces().sum(0), 0, atol=tolerance)
    if "stresses" in atoms.calc.implemented_properties:
        np.testing.assert_allclose(atoms.get_stresses().sum(0), atoms.get_stress(), atol=tolerance)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("make", [argon, lambda: argon(seed=3) * (2, 1, 1)])
def test_lennard_jones_equals_ases_in_every_property(make, smooth):
    ours, ases = with_calculator(make(), lennard_jones(smooth)), make()
    ases.calc = AseLennardJones(rc=2.4, ro=1.8, smooth=smooth)
    for name in ("energy", "free_energy", "forces", "stress", "energies", "stresses"):
        expected = ases.calc.get_property(name, ases)
        np.testing.assert_allclose(ours.calc.get_property(name, ours), expected, atol=1e-10, err_msg=name)


def test_stress_is_in_voigts_order_and_positive_under_tension():
    atoms, h = with_calculator(argon()), 1e-5
    stress = atoms.get_stress()
    assert np.unique(stress.round(6)).size == 6
    for k, (a, b) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += sign * h / 2
            strain[b, a] += sign * h / 2
            moved = atoms.copy()
            moved.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            energies.append(with_calculator(moved).get_potential_energy())
        difference = (energies[0] - energies[1]) / (2 * h) / atoms.get_volume()
        assert stress[k] == pytest.approx(difference, abs=1e-5)
    stretched = argon()
    stretched.set_cell(stretched.cell * 1.1, scale_atoms=True)
    assert with_calculator(stretched).get_stress()[:3].min() > 0


@pytest.mark.parametrize("name", ["stress", "stresses"])
def test_a_molecule_has_no_stress(name):
    atoms = with_calculator(cluster())
    with pytest.raises(PropertyNotImplementedError, match="three-dimensional cell"):
        atoms.calc.get_property(name, atoms)
    assert atoms.get_forces().shape == (6, 3)
    assert "stress" not in atoms.calc.results


@pytest.mark.parametrize("name", ["dipole", "charges", "magmoms", "nonsense"])
def test_properties_that_it_does_not_have_are_refused_as_ase_wants(name):
    atoms = with_calculator(argon())
    with pytest.raises(PropertyNotImplementedError, match=name):
        atoms.calc.get_property(name, atoms)


def test_nothing_is_calculated_where_that_is_not_allowed(counted):
    atoms = with_calculator(argon())
    assert atoms.calc.get_property("energy", atoms, allow_calculation=False) is None
    atoms.get_potential_energy()
    assert atoms.calc.get_property("stresses", atoms, allow_calculation=False) is None
    assert len(counted) == 1


def test_one_pass_gives_energy_forces_and_stress(counted):
    atoms = with_calculator(argon())
    atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(), atoms.get_potential_energies()
    assert len(counted) == 1
    atoms.get_stresses(), atoms.get_stresses(), atoms.get_forces()
    assert len(counted) == 2


CHANGES = {
    "positions": lambda atoms: atoms.rattle(1e-8),
    "cell": lambda atoms: atoms.set_cell(atoms.cell * 1.001),
    "pbc": lambda atoms: atoms.set_pbc((True, True, False)),
    "numbers": lambda atoms: atoms.set_atomic_numbers([18, 18, 18, 10]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_atoms_are_calculated_again(change, counted):
    atoms = with_calculator(argon())
    atoms.get_forces()
    CHANGES[change](atoms)
    assert atoms.calc.calculation_required(atoms, ["energy"])
    found = atoms.get_forces()
    assert len(counted) == 2
    np.testing.assert_array_equal(found, with_calculator(atoms.copy()).get_forces())


def test_other_changes_are_not(counted):
    atoms = with_calculator(argon())
    atoms.get_forces()
    atoms.info["name"] = "A1"
    atoms.set_tags([1, 2, 3, 4])
    atoms.set_momenta(np.ones((4, 3)))
    atoms.get_forces()
    assert len(counted) == 1


def add_in_place(potential):
    with torch.no_grad():
        potential.epsilon *= 2


def replace_weights(potential):
    state = {"epsilon": torch.tensor(2.0).double(), "sigma": torch.tensor(1.0).double()}
    potential.load_state_dict(state, assign=True)


def take_a_step(potential):
    potential.epsilon.grad = -torch.ones_like(potential.epsilon)
    torch.optim.SGD([potential.epsilon], lr=1.0).step()


@pytest.mark.parametrize("change", [add_in_place, replace_weights, take_a_step])
def test_changed_weights_drop_the_results(change):
    atoms = with_calculator(argon())
    before = atoms.get_potential_energy()
    change(atoms.calc.potential)
    assert atoms.get_potential_energy() == pytest.approx(2 * before, rel=1e-12)
    assert atoms.get_stresses().shape == (4, 6)


def test_flags_and_gradients_of_the_potential_are_left_alone():
    potential = lennard_jones()
    potential.epsilon.requires_grad_(False)
    potential.sigma.grad = torch.tensor(7.0).double()
    atoms = with_calculator(argon(), potential)
    atoms.get_potential_energy(), atoms.get_stress(), atoms.get_stresses()
    assert atoms.calc.potential is potential
    assert [p.requires_grad for p in (potential.epsilon, potential.sigma)] == [False, True]
    assert potential.epsilon.grad is None
    assert potential.sigma.grad == 7


def test_it_works_under_no_grad():
    expected = with_calculator(argon()).get_forces()
    with torch.no_grad():
        np.testing.assert_array_equal(with_calculator(argon()).get_forces(), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda calc: pickle.loads(pickle.dumps(calc))])
def test_copies_calculate_the_same_and_share_nothing(clone):
    atoms = with_calculator(argon())
    energy = atoms.get_potential_energy()
    other = clone(atoms.calc)
    assert other.results["energy"] == energy
    again = argon()
    again.calc = other
    assert again.get_potential_energy() == energy
    add_in_place(atoms.calc.potential)
    assert again.get_potential_energy() == energy


def test_it_is_hashable_and_equal_to_itself_only():
    a, b = TorchCalculator(lennard_jones()), TorchCalculator(lennard_jones())
    assert len({a, b, a}) == 2


def test_it_describes_itself_as_json():
    calc = TorchCalculator(lennard_jones())
    assert json.loads(json.dumps(calc.todict())) == {"potential": "lj", "dtype": "float64", "skin": 0.5}
    assert calc.name == "torchcalculator"
    assert not calc.label


def test_atoms_given_to_it_get_it():
    atoms = argon()
    calc = TorchCalculator(lennard_jones(), atoms=atoms)
    assert atoms.calc is calc


def test_calculate_can_be_called_directly():
    calc = TorchCalculator(lennard_jones())
    calc.calculate(argon(), ["forces"], ["positions"])
    assert calc.results["forces"].shape == (4, 3)


@pytest.mark.parametrize(("potential", "make"), EVERY)
def test_a_trajectory_keeps_the_results(potential, make):
    atoms = with_calculator(make(), potential())
    atoms.get_stress()
    with Trajectory("a.traj", "w") as trajectory:
        trajectory.write(atoms)
    write("a.extxyz", atoms)
    again = read("a.traj")
    assert again.get_potential_energy() == atoms.get_potential_energy()
    np.testing.assert_array_equal(again.get_forces(), atoms.get_forces())
    np.testing.assert_array_equal(again.get_stress(), atoms.get_stress())
    np.testing.assert_allclose(read("a.extxyz").get_forces(), atoms.get_forces(), atol=1e-7)


def test_a_float32_potential_is_asked_for_by_dtype_and_the_original_stays():
    potential = lennard_jones()
    atoms = with_calculator(argon(), potential, dtype="float32")
    assert atoms.calc.potential.dtype is torch.float32
    assert potential.dtype is torch.float64
    exact = with_calculator(argon(), potential)
    assert atoms.get_potential_energy() != exact.get_potential_energy()
    np.testing.assert_allclose(atoms.get_forces(), exact.get_forces(), rtol=1e-4, atol=1e-4)


def test_atoms_on_one_spot_are_a_failed_calculation():
    atoms = with_calculator(Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 0]]))
    with pytest.raises(CalculationFailed, match="Ar2: are two atoms on one spot"):
        atoms.get_potential_energy()


def test_elements_that_the_potential_does_not_know_are_named():
    potential = lennard_jones()
    potential.atomic_numbers = frozenset({18})
    with pytest.raises(NotImplementedError, match="no parameters for H C O; it knows Ar"):
        with_calculator(methanol(), potential).get_potential_energy()


def test_a_cell_filter_relaxes_to_the_pressure_that_was_asked_for():
    atoms = with_calculator(argon())
    atoms.set_cell(atoms.cell * 1.02, scale_atoms=True)
    assert BFGS(FrechetCellFilter(atoms, scalar_pressure=0.05), logfile=None).run(fmax=1e-4, steps=200)
    np.testing.assert_allclose(atoms.get_stress(), [-0.05] * 3 + [0] * 3, atol=1e-4)


def test_a_list_of_neighbours_with_a_skin_gives_what_one_without_gives():
    skinned, bare = with_calculator(argon(), skin=0.5), with_calculator(argon(), skin=0.0)
    for seed in range(5):
        for atoms in (skinned, bare):
            atoms.rattle(0.05, seed=seed)
        np.testing.assert_allclose(skinned.get_forces(), bare.get_forces(), atol=1e-10)


def test_one_calculator_serves_many_structures():
    calc = TorchCalculator(lennard_jones())
    for make in (argon, cluster, lambda: Atoms("Ar"), argon):
        atoms, alone = make(), with_calculator(make())
        atoms.calc = calc
        assert atoms.get_potential_energy() == alone.get_potential_energy()


def test_a_position_that_is_not_a_number_is_refused():
    atoms = argon()
    atoms.positions[0, 0] = np.nan
    atoms.calc = TorchCalculator(lennard_jones())
    with pytest.raises(CalculationFailed, match="not a finite number"):
        atoms.get_potential_energy()


def test_flags_of_a_given_potential_stay_even_where_it_is_cast():
    potential = lennard_jones().requires_grad_(False)
    calc = TorchCalculator(potential, dtype="float32")
    assert calc.potential is not potential
    assert not any(p.requires_grad for p in (*potential.parameters(), *calc.potential.parameters()))


def test_a_dimer_climbs_to_the_saddle_that_ases_calculator_leads_to():
    def climb(calculator):
        slab = fcc100("Al", (2, 2, 2), vacuum=6.0)
        add_adsorbate(slab, "Al", 1.6, "hollow")
        slab.set_constraint(FixAtoms(mask=slab.get_tags() > 0))
        slab.calc = calculator
        control = DimerControl(
            initial_eigenmode_method="displacement", displacement_method="vector", logfile=None,
            mask=[False] * 8 + [True],
        )  # fmt: skip
        dimer = MinModeAtoms(slab, control, random_seed=1)
        dimer.displace(displacement_vector=np.vstack([np.zeros((8, 3)), [0.3, 0.1, 0.1]]))
        with MinModeTranslate(dimer, trajectory=None, logfile=None) as run:
            run.run(fmax=0.02, steps=60)
        return slab.positions, dimer.get_curvature(), run.nsteps

    (x, theirs, m), (y, ours, n) = climb(EMT()), climb(TorchCalculator("emt"))
    np.testing.assert_allclose(y, x, atol=1e-9)
    assert ours == pytest.approx(theirs, abs=1e-8)
    assert ours < 0
    assert m == n > 3


class TestSet:
    """What is set takes effect, and the parameters that go into files are those that are computed with."""

    def test_a_potential_and_its_dtype_take_effect(self):
        atoms = silicon()
        atoms.calc = TorchCalculator(wide_lennard_jones(2.5), skin=0.3)
        before = atoms.get_potential_energy()
        other = wide_lennard_jones(2.7)
        assert atoms.calc.set(potential=other, dtype="float32") == {"dtype": "float32"}
        assert atoms.calc.potential.dtype is torch.float32
        assert atoms.calc.parameters == {"potential": "lj", "dtype": "float32", "skin": 0.3}
        assert other.dtype is torch.float64
        fresh = silicon()
        fresh.calc = TorchCalculator(other, dtype="float32")
        assert atoms.get_potential_energy() == fresh.get_potential_energy() != before

    def test_dtype_alone_makes_a_copy_that_keeps_the_weights(self):
        potential = wide_lennard_jones(2.5)
        calculator = TorchCalculator(potential)
        assert calculator.set(dtype=torch.float32) == {"dtype": "float32"}
        assert calculator.potential is not potential
        assert potential.dtype is torch.float64

    def test_what_is_there_already_changes_nothing(self):
        atoms = silicon()
        atoms.calc = TorchCalculator("emt", skin=0.3)
        atoms.symbols[:] = "Cu"
        energy, potential = atoms.get_potential_energy(), atoms.calc.potential
        assert atoms.calc.set(**atoms.calc.parameters) == {}
        assert atoms.calc.set(potential=potential, device="cpu") == {}
        assert atoms.calc.potential is potential
        assert atoms.calc.results["energy"] == energy

    def test_a_skin_takes_effect(self):
        atoms = silicon()
        atoms.calc = TorchCalculator(wide_lennard_jones(2.5), skin=0.3)
        energy = atoms.get_potential_energy()
        assert atoms.calc.set(skin=1.0) == {"skin": 1.0}
        assert (atoms.calc.parameters["skin"], atoms.calc.results) == (1.0, {})
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-12)
        with pytest.raises(ValueError, match="skin must not be negative"):
            atoms.calc.set(skin=-1.0)
        assert atoms.calc.parameters["skin"] == 1.0

    def test_a_potential_of_another_cutoff_may_be_assigned(self):
        short, long = wide_lennard_jones(2.5), wide_lennard_jones(2.5, rc=8.0)
        atoms, fresh = silicon(), silicon()
        atoms.calc = TorchCalculator(short)
        atoms.get_potential_energy()
        atoms.calc.potential = long
        fresh.calc = TorchCalculator(long)
        assert atoms.get_potential_energy() == fresh.get_potential_energy()
        np.testing.assert_array_equal(atoms.get_forces(), fresh.get_forces())

    def test_a_module_that_was_cast_where_it_is_is_recorded_as_it_is(self):
        atoms = silicon()
        atoms.calc = TorchCalculator(wide_lennard_jones(2.5))
        atoms.get_potential_energy()
        atoms.calc.potential.to(torch.float32)
        atoms.get_potential_energy()
        assert atoms.calc.parameters["dtype"] == "float32"

    def test_names_that_are_not_known_leave_no_trace(self):
        calculator = TorchCalculator(wide_lennard_jones(2.5))
        with pytest.warns(UserWarning, match="ignores 'nonsense': it can change potential, device"):
            assert calculator.set(nonsense=3) == {}
        assert "nonsense" not in calculator.parameters

    def test_what_cannot_be_loaded_changes_nothing(self):
        calculator = TorchCalculator(wide_lennard_jones(2.5))
        parameters, potential = dict(calculator.parameters), calculator.potential
        for wrong in ({"potential": "no such"}, {"dtype": "float8"}):
            with pytest.raises(ValueError, match="There is no"):
                calculator.set(**wrong)
        assert (calculator.parameters, calculator.potential) == (parameters, potential)
