"""Delta-Q and its companions: against brute force, symmetry and differences."""

from itertools import product

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from helpers.potentials import lennard_jones
from helpers.structures import argon, methanol, rattled, silicon, skewed

from ase_bptt import Structures, delta_q, relax
from ase_bptt.displacements import shortest_lattice_vector
from ase_bptt.losses import (
    displacements,
    log_delta_q,
    max_displacement,
    rmsd,
    squared_delta_q,
)

METRICS = [delta_q, log_delta_q, squared_delta_q, rmsd, max_displacement]
every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda f: f.__name__)


def slab() -> Atoms:
    """Periodic along x and y, with a cell vector that is not, and not at right angles."""
    atoms = Atoms("SiCSi", positions=[[0, 0, 0], [1.2, 1.0, 0.4], [2.2, 0.3, 1.0]], pbc=(True, True, False))
    atoms.set_cell([[2.9, 0, 0], [1.6, 2.6, 0], [0.7, 0.3, 6.0]])
    return atoms


def wire() -> Atoms:
    """Periodic along y alone, without other cell vectors."""
    atoms = Atoms("SiOSi", positions=[[0, 0, 0], [0.9, 0.7, 0.2], [0.1, 1.3, 1.0]], pbc=(False, True, False))
    atoms.set_cell([[0, 0, 0], [0.5, 2.1, 0], [0, 0, 0]])
    return atoms


def tilted() -> Atoms:
    """A cell so skewed that rounding fractional coordinates does not give the nearest image."""
    return Atoms(
        "SiGeP",
        positions=[[0, 0, 0], [1.0, 1.1, 0.3], [2.0, 0.6, 1.4]],
        cell=[[3.0, 0, 0], [2.6, 1.9, 0], [2.4, 1.2, 1.6]],
        pbc=True,
    )


ZOO = [silicon, skewed, slab, wire, tilted, methanol]
every_structure = pytest.mark.parametrize("make", ZOO, ids=lambda f: f.__name__)


def moved(atoms: Atoms, amplitude: float, seed: int = 3) -> Atoms:
    """The atoms with normally distributed displacements."""
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).normal(0, amplitude, (len(atoms), 3))
    return atoms


def scattered(atoms: Atoms, seed: int = 5) -> Atoms:
    """The same structure with every atom in some other cell."""
    atoms = atoms.copy()
    shifts = np.random.default_rng(seed).integers(-2, 3, (len(atoms), 3)) * atoms.pbc
    atoms.positions += shifts @ atoms.cell.array
    return atoms


def brute_force(a: Atoms, b: Atoms, weights: np.ndarray, reach: int = 3) -> float:
    """Least weighted sum of squares over the images of all atoms, searched in full.

    For given images the best drift is the weighted mean. The image of the first atom only shifts
    those of the others, so it stays.
    """
    shifts = np.array(list(product(*(range(-reach, reach + 1) if p else (0,) for p in a.pbc))))
    images = shifts @ a.cell.array
    choices = np.array(list(product(range(len(images)), repeat=len(a) - 1)))
    d = np.repeat((a.positions - b.positions)[None], len(choices), axis=0)
    d[:, 1:] += images[choices]
    d -= (np.einsum("i,nix->nx", weights, d) / weights.sum())[:, None]
    return np.einsum("i,nix->n", weights, d**2).min()


class TestNearestImages:
    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("make", [slab, wire, tilted, skewed], ids=lambda f: f.__name__)
    def test_delta_q_is_the_least_over_all_images(self, make, seed):
        b = make()
        a = moved(b, 0.3, seed)
        assert squared_delta_q(a, b) == pytest.approx(brute_force(a, b, b.get_masses()), rel=1e-9)
        ones = np.ones(len(b))
        assert rmsd(a, b) == pytest.approx(np.sqrt(brute_force(a, b, ones) / len(b)), rel=1e-9)

    def test_displacements_may_be_larger_than_the_cell(self):
        b = tilted()
        a = b.copy()
        a.positions[1] += 2 * b.cell[0] - 3 * b.cell[1] + b.cell[2]
        assert delta_q(a, b) == pytest.approx(0, abs=1e-12)

    def test_a_direction_that_is_not_periodic_has_no_images(self):
        b = slab()
        a = b.copy()
        a.positions[1] += b.cell[2]
        mu = b.get_masses()[1] * b.get_masses()[[0, 2]].sum() / b.get_masses().sum()
        assert delta_q(a, b) == pytest.approx(np.sqrt(mu) * np.linalg.norm(b.cell[2]))

    @every_metric
    @every_structure
    def test_cells_that_atoms_sit_in_do_not_matter(self, make, metric):
        b = make()
        a = moved(b, 0.1)
        assert metric(scattered(a), b) == pytest.approx(metric(a, b), rel=1e-9)
        assert metric(scattered(a), scattered(b, 8)) == pytest.approx(metric(a, b), rel=1e-9)

    @every_metric
    @every_structure
    def test_they_are_symmetric(self, make, metric):
        a, b = moved(make(), 0.1), make()
        assert metric(a, b) == pytest.approx(metric(b, a), rel=1e-9)


class TestDrift:
    @every_metric
    @every_structure
    def test_a_rigid_drift_is_no_distance(self, make, metric):
        a, b = make(), make()
        a.positions += [0.3, -1.7, 0.9]
        assert metric(a, b) == pytest.approx(0, abs=1e-9)

    @every_metric
    @pytest.mark.parametrize("fraction", [0.5, 0.37, 0.98])
    @pytest.mark.parametrize("make", [silicon, tilted, slab, argon], ids=lambda f: f.__name__)
    def test_a_drift_by_part_of_a_cell_vector_that_wraps_some_atoms_is_no_distance(self, make, fraction, metric):
        b = make()
        a = moved(b, 0.05)
        expected = metric(a, b)
        a.positions += fraction * b.cell[0]
        a.wrap()
        assert metric(a, b) == pytest.approx(expected, rel=1e-9)

    def test_delta_q_is_weighted_by_mass(self):
        b = Atoms("HO", positions=[[0, 0, 0], [1, 0, 0]])
        a = b.copy()
        a.positions[0, 0] -= 0.2
        light, heavy = b.get_masses()
        # The centre of mass stays: the reduced mass moves by the change of the bond.
        assert delta_q(a, b) == pytest.approx(0.2 * np.sqrt(light * heavy / (light + heavy)))
        assert squared_delta_q(a, b) == pytest.approx(0.04 * light * heavy / (light + heavy))
        assert rmsd(a, b) == pytest.approx(0.1)
        assert max_displacement(a, b) == pytest.approx(0.1)

    def test_log_delta_q_counts_relative_errors(self):
        a, b = moved(silicon(), 0.1), silicon()
        assert np.expm1(log_delta_q(a, b)) * 0.1 == pytest.approx(delta_q(a, b))

    def test_masses_given_by_the_user_count(self):
        b = Atoms("H2", positions=[[0, 0, 0], [1, 0, 0]], masses=[2.0, 6.0])
        a = moved(b, 0.0)
        a.positions[1, 0] += 0.1
        assert delta_q(a, b) == pytest.approx(0.1 * np.sqrt(12 / 8))

    def test_max_displacement_is_that_of_the_farthest_atom(self):
        b = silicon()
        a = b.copy()
        a.positions[3] += [0.8, 0, 0]
        assert max_displacement(a, b) == pytest.approx(0.8 * 7 / 8)
        assert rmsd(a, b) == pytest.approx(0.8 * np.sqrt(7) / 8)


class TestGradients:
    @every_metric
    @every_structure
    def test_an_exact_match_is_zero_with_zero_gradient(self, make, metric):
        now = Structures.from_atoms(make())
        now.positions.requires_grad_()
        found = metric(now, make())
        assert found.item() == 0
        found.sum().backward()
        assert torch.equal(now.positions.grad, torch.zeros_like(now.positions))

    # The rotation makes the sum of squares least, not the largest displacement.
    @pytest.mark.parametrize(
        ("metric", "align"),
        [*product(METRICS, [False]), *product(METRICS[:4], [True])],
        ids=lambda x: getattr(x, "__name__", x),
    )
    @every_structure
    def test_gradients_agree_with_differences(self, make, metric, align):
        b = make()
        start = scattered(moved(b, 0.1))
        now = Structures.from_atoms(start)
        now.positions.requires_grad_()
        metric(now, b, align=align).sum().backward()
        direction = np.random.default_rng(4).normal(size=(len(b), 3))
        direction /= np.linalg.norm(direction)

        def along(h):
            a = start.copy()
            a.positions += h * direction
            return metric(a, b, align=align)

        h = 1e-3
        difference = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
        assert (now.positions.grad.numpy() * direction).sum() == pytest.approx(difference, rel=1e-7, abs=1e-9)

    @every_metric
    def test_the_reference_is_a_constant(self, metric):
        a, b = Structures.from_atoms(moved(silicon(), 0.1)), Structures.from_atoms(silicon())
        a.positions.requires_grad_()
        b.positions.requires_grad_()
        metric(a, b).sum().backward()
        assert b.positions.grad is None
        assert a.positions.grad.norm() > 0

    @every_metric
    def test_gradients_reach_the_weights_through_a_relaxation(self, metric):
        potential = lennard_jones().requires_grad_()
        metric(relax(potential, argon(), steps=3), argon(seed=2)).sum().backward()
        assert potential.sigma.grad.abs() > 0


class TestBatches:
    @every_metric
    def test_two_atoms_give_a_float_and_all_else_a_tensor(self, metric):
        a, b = moved(silicon(), 0.1), silicon()
        assert isinstance(metric(a, b), float)
        for found in (metric([a], [b]), metric(Structures.from_atoms(a), b), metric(a, Structures.from_atoms(b))):
            assert isinstance(found, torch.Tensor)
            assert found.shape == (1,)
        assert metric([a, b], [b, b]).shape == (2,)

    @every_metric
    @pytest.mark.parametrize("align", [False, True])
    def test_a_batch_gives_what_its_members_give(self, metric, align):
        references = [make() for make in ZOO]
        now = [scattered(moved(b, 0.2, k)) for k, b in enumerate(references)]
        single = [metric(a, b, align=align) for a, b in zip(now, references, strict=True)]
        np.testing.assert_allclose(metric(now, references, align=align).numpy(), single, rtol=1e-10)

    @every_metric
    def test_a_relaxation_is_compared_where_it_ended(self, metric):
        relaxation = relax(lennard_jones(), [argon(), argon(seed=4)], steps=2)
        ends = relaxation.to_atoms()
        with torch.no_grad():
            found = metric(relaxation, [argon(seed=2)] * 2)
        np.testing.assert_allclose(found.numpy(), [metric(a, argon(seed=2)) for a in ends])

    @every_metric
    @pytest.mark.parametrize("of_reference", [torch.float32, torch.float64])
    def test_float32_stays_float32_whatever_the_reference_is(self, metric, of_reference):
        a, b = scattered(moved(silicon(), 0.1)), silicon()
        single = Structures.from_atoms(a, dtype=torch.float32)
        found = metric(single, Structures.from_atoms(b, dtype=of_reference))
        assert found.dtype is torch.float32
        assert found.item() == pytest.approx(metric(a, b), rel=1e-4)

    def test_displacements_lead_from_one_structure_to_the_other(self):
        b = silicon()
        a = moved(b, 0.1)
        d = displacements(scattered(a), b).numpy()
        expected = a.positions - b.positions
        np.testing.assert_allclose(d, expected - expected.mean(0), atol=1e-9)

    @every_metric
    @pytest.mark.parametrize(
        ("a", "b"), [("SiGe", "GeSi"), ("SiGe", "SiGeSi"), ("Si2", "Si3")], ids=["order", "more", "other"]
    )
    def test_other_atoms_are_refused_with_both_formulas(self, metric, a, b):
        a, b = (Atoms(s, positions=np.arange(3 * len(Atoms(s))).reshape(-1, 3)) for s in (a, b))
        with pytest.raises(ValueError, match="same atoms in the same order") as error:
            metric(a, b)
        assert a.get_chemical_formula() in str(error.value)
        assert b.get_chemical_formula() in str(error.value)


def turned(atoms: Atoms, reflect: bool = False) -> Atoms:
    atoms = atoms.copy()
    atoms.rotate(73, (1, 2, -0.5))
    if reflect:
        atoms.positions[:, 0] *= -1
    atoms.positions += [1.0, -2.0, 0.5]
    return atoms


class TestAlign:
    @every_metric
    @pytest.mark.parametrize("name", ["CH3OH", "H2O", "CO2", "N2", "C6H6", "H"])
    def test_a_rotated_molecule_is_the_same(self, name, metric):
        b = molecule(name)
        assert metric(turned(b), b, align=True) == pytest.approx(0, abs=1e-6)
        if len(b) > 1:
            assert metric(turned(b), b) > 0.1

    def test_a_mirror_image_is_not(self):
        chiral = Atoms(
            "CHFClBr", positions=[[0, 0, 0], [0, 0, 1.1], [1.3, 0, -0.4], [-0.8, 1.4, -0.5], [-0.9, -1.6, -0.6]]
        )
        assert delta_q(turned(chiral, reflect=True), chiral, align=True) > 1

    def test_the_rotation_found_is_the_best(self):
        b = methanol()
        a = turned(moved(b, 0.2))
        best = squared_delta_q(a, b, align=True)
        for seed in range(30):
            other = a.copy()
            axis = np.random.default_rng(seed).normal(size=3)
            other.rotate(np.random.default_rng(seed).uniform(0.5, 180), axis)
            assert squared_delta_q(other, b, align=True) == pytest.approx(best)
            assert squared_delta_q(other, b) >= best

    def test_a_crystal_is_never_rotated(self):
        b = rattled(bulk("Si", cubic=True), 0.1)
        a = b.copy()
        a.rotate(20, "z", rotate_cell=False)
        assert delta_q(a, b, align=True) == pytest.approx(delta_q(a, b))


@pytest.mark.parametrize("seed", range(5))
def test_the_shortest_lattice_vector_is_found_in_skewed_cells(seed):
    rng = np.random.default_rng(seed)
    atoms = Atoms("H", cell=np.array([[1, 0, 0], [2, 1, 0], [-1, 1, 1]]) @ rng.normal(scale=3, size=(3, 3)), pbc=True)
    whole = np.stack(np.meshgrid(*3 * [np.arange(-30, 31)])).reshape(3, -1).T
    lengths = np.linalg.norm(whole[whole.any(1)] @ atoms.cell.array, axis=1)
    assert shortest_lattice_vector(atoms) == pytest.approx(lengths.min())


def test_where_nothing_is_periodic_it_is_infinite():
    assert shortest_lattice_vector(Atoms("H", cell=[1, 1, 1])) == np.inf


@pytest.mark.parametrize("tilt", [[0, 0, 6.0], [7.0, 3.0, 6.0], [-40.0, 31.0, 6.0], [0, 0, 0]])
def test_a_cell_vector_that_is_not_periodic_does_not_matter(tilt):
    b, a = slab(), slab()
    a.positions += np.array([[0.1, 0, 2.5], [-0.2, 0.1, -1.9], [0, 0, 3.0]])
    a.positions[1] += 2 * a.cell[0] - a.cell[1]
    expected = delta_q(a, b)
    for atoms in (a, b):
        atoms.set_cell([*atoms.cell[:2], tilt])
    assert delta_q(a, b) == pytest.approx(expected, rel=1e-9)
