"""The stiffest direction against a dense Hessian, and gradient descent on both sides of its bound."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms, FixCom, FixScaled
from helpers.potentials import lennard_jones, needs_mace, tiny_mace
from helpers.structures import argon, cluster, rattled, skewed

from ase_bptt import relax
from ase_bptt.neighbors import NeighborList
from ase_bptt.potentials import as_potential
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.stability import hessian_product, largest_curvature
from ase_bptt.steppers import FIRE, GradientDescent
from ase_bptt.structures import Structures


class ForcesOnly(LennardJones):
    """Forces that cannot be differentiated again."""

    def energy_and_forces(self, structures, pairs, *, create_graph=False):
        return super().energy_and_forces(structures, pairs)


def forces(potential, atoms: Atoms) -> np.ndarray:
    structures = Structures.from_atoms(atoms, dtype=potential.dtype)
    pairs = NeighborList(potential.cutoff)(structures)
    return potential.energy_and_forces(structures, pairs)[1].double().numpy().ravel()


def dense_hessian(potential, atoms: Atoms, step: float = 1e-4) -> np.ndarray:
    columns = []
    for k in range(3 * len(atoms)):
        ends = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions.flat[k] += sign * step
            ends.append(forces(potential, moved))
        columns.append((ends[1] - ends[0]) / (2 * step))
    hessian = np.array(columns)
    return (hessian + hessian.T) / 2


@pytest.mark.parametrize(
    "family", [lennard_jones, lambda: ForcesOnly(smooth=True, rc=2.4, ro=1.8)], ids=["lj", "forces"]
)
@pytest.mark.parametrize("make", [argon, cluster])
def test_the_largest_eigenvalue_is_that_of_the_dense_hessian(family, make):
    potential, atoms = family(), make()
    expected = np.linalg.eigvalsh(dense_hessian(lennard_jones(), atoms))
    assert largest_curvature(potential, atoms) == pytest.approx(expected[-1], rel=1e-4)


def test_it_is_the_largest_and_not_the_most_negative():
    # Compressed beyond the inflection the bond is soft; drawn out, its curvature is negative.
    atoms = Atoms("Ar2", positions=[[0, 0, 0], [1.35, 0, 0]])
    eigenvalues = np.linalg.eigvalsh(dense_hessian(lennard_jones(), atoms))
    assert -eigenvalues[0] > eigenvalues[-1] > 0
    assert largest_curvature(lennard_jones(), atoms) == pytest.approx(eigenvalues[-1], rel=1e-4)


@pytest.mark.parametrize("make", [argon, cluster])
def test_both_ways_to_multiply_agree(make):
    v = np.random.default_rng(0).normal(size=3 * len(make()))
    by_gradient = hessian_product(lennard_jones(), make())(v)
    by_differences = hessian_product(ForcesOnly(smooth=True, rc=2.4, ro=1.8), make())(v)
    np.testing.assert_allclose(by_differences, by_gradient, rtol=1e-5, atol=1e-5 * np.abs(by_gradient).max())


@pytest.mark.parametrize(("constraint", "kept"), [(FixAtoms([0, 1, 2]), slice(9, None)), (FixCom(), slice(None))])
def test_constrained_directions_do_not_count(constraint, kept):
    atoms = cluster()
    atoms.set_constraint(constraint)
    expected = np.linalg.eigvalsh(dense_hessian(lennard_jones(), cluster())[kept, kept])[-1]
    assert largest_curvature(lennard_jones(), atoms) == pytest.approx(expected, rel=1e-4)


def test_constraints_along_oblique_directions_are_bounded_by_the_whole():
    atoms = rattled(argon(), 0)
    atoms.set_cell(atoms.cell.array + np.array([[0, 0, 0], [0.3, 0, 0], [0, 0.2, 0]]), scale_atoms=True)
    whole = largest_curvature(lennard_jones(), atoms)
    atoms.set_constraint(FixScaled(0, [True, False, False]))
    assert largest_curvature(lennard_jones(), atoms) == whole


@needs_mace
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 1e-3)])
def test_a_network_in_either_precision(dtype, tolerance):
    expected = np.linalg.eigvalsh(dense_hessian(as_potential(tiny_mace()), skewed()))[-1]
    assert largest_curvature(as_potential(tiny_mace().to(dtype)), skewed()) == pytest.approx(expected, rel=tolerance)


def test_nothing_that_holds_means_no_bound():
    assert largest_curvature(lennard_jones(), Atoms("Ar")) == 0
    assert largest_curvature(lennard_jones(), Atoms("Ar2", positions=[[0, 0, 0], [9, 0, 0]])) == 0


def test_forces_that_are_not_finite_are_reported():
    assert np.isnan(largest_curvature(lennard_jones(), Atoms("Ar2", positions=np.zeros((2, 3)))))


def test_what_does_not_converge_has_no_limit(monkeypatch):
    monkeypatch.setattr("ase_bptt.stability.TOLERANCE", 1e-12)
    monkeypatch.setattr("ase_bptt.stability.RESTARTS", 1)
    assert np.isnan(largest_curvature(lennard_jones(), argon() * (3, 3, 3)))


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize(("factor", "converges"), [(0.98, True), (1.02, False)])
def test_gradient_descent_converges_below_the_bound_and_not_above(momentum, factor, converges):
    potential = lennard_jones()
    with torch.no_grad():
        minimum = relax(potential, cluster(), stepper=FIRE(dt=0.03, dtmax=0.06), fmax=1e-6, steps=3000).to_atoms()
        bound = (1 + momentum) * 2 / largest_curvature(potential, minimum)
        stepper = GradientDescent(step_size=factor * bound, momentum=momentum)
        run = relax(potential, rattled(minimum, 1e-3), stepper=stepper, fmax=1e-3, steps=1000)
    assert (run.fmax.item() < 1e-3) is converges


def test_weights_and_structure_are_left_as_they_are():
    potential, atoms = lennard_jones().requires_grad_(), cluster()
    largest_curvature(potential, atoms)
    assert all(p.grad is None and p.requires_grad for p in potential.parameters())
    np.testing.assert_array_equal(atoms.positions, cluster().positions)
