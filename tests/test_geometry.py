"""Distances and angles by nearest images: ASE's values, gradients by differences, and where gradients arrive."""

import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from helpers.potentials import lennard_jones
from helpers.structures import argon, cluster, skewed

from ase_bptt import BPTTOptimizer, Structures, TorchCalculator, load_potential, relax
from ase_bptt.losses import angles, distances
from ase_bptt.steppers import GradientDescent


def scattered(seed: int) -> Atoms:
    """Six atoms anywhere, in a cell that is skewed, periodic along some of its vectors."""
    rng = np.random.default_rng(seed)
    cell = 3 * np.eye(3) + rng.normal(0.0, 0.5, size=(3, 3))
    cell[1] += rng.integers(-3, 4) * cell[0]
    cell[2] += rng.integers(-2, 3) * cell[1]
    return Atoms("Ar6", positions=rng.uniform(-5, 5, (6, 3)), cell=cell, pbc=rng.random(3) < 0.75)


def shortest(atoms: Atoms, i: int, j: int) -> np.ndarray:
    """By trying all images."""
    whole = np.stack(np.meshgrid(*[np.arange(-24, 25) if p else [0] for p in atoms.pbc]), axis=-1).reshape(-1, 3)
    images = atoms.positions[j] - atoms.positions[i] + whole @ atoms.cell.array
    return images[np.square(images).sum(1).argmin()]


@pytest.mark.parametrize("seed", range(8))
def test_they_are_those_of_the_nearest_among_all_images(seed):
    atoms = scattered(seed)
    i, j, k = np.array([p for p in np.ndindex(6, 6, 6) if len(set(p)) == 3]).T[:, ::5]
    a, b = (np.array([shortest(atoms, *p) for p in zip(j, end, strict=True)]) for end in (i, k))
    np.testing.assert_allclose(distances(atoms, j, i)[0], np.linalg.norm(a, axis=1), atol=1e-12)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(angles(atoms, i, j, k)[0], np.degrees(np.arccos(cosine)), atol=1e-5)


@pytest.mark.parametrize("make", [argon, skewed, cluster, lambda: bulk("Cu") * 2, lambda: molecule("CH3OH")])
def test_they_are_those_of_ase(make):
    atoms, n = make(), len(make())
    atoms.rattle(0.1, seed=1)  # no two images are equally near
    i, j, k = np.array([p for p in np.ndindex(n, n, n) if p[0] != p[1] != p[2]]).T[:, ::3]
    expected = [atoms.get_distance(a, b, mic=True) for a, b in zip(i, j, strict=True)]
    np.testing.assert_allclose(distances(atoms, i, j)[0], expected, atol=1e-12)
    if n > 2:
        expected = [atoms.get_angle(a, b, c, mic=True) for a, b, c in zip(i, j, k, strict=True)]
        np.testing.assert_allclose(angles(atoms, i, j, k)[0], expected, atol=1e-5)


def test_the_nearest_image_in_a_skewed_cell_is_not_that_of_rounded_fractions():
    atoms = Atoms("Ar2", cell=[[1, 0, 0], [0.45, 0.5, 0], [0, 0, 5]], pbc=True)
    atoms.set_scaled_positions([[0, 0, 0], [0.45, 0.4, 0]])
    length = np.linalg.norm(shortest(atoms, 0, 1))
    assert distances(atoms, 0, 1).item() == pytest.approx(length, abs=1e-12)
    fractional = np.array([0.45, 0.4, 0]) - np.round([0.45, 0.4, 0])
    assert np.linalg.norm(fractional @ atoms.cell) > length + 0.01


def test_the_same_atoms_of_each_structure_are_measured():
    batch = [argon(), cluster(), skewed()]
    found = distances(batch, 0, -1)
    assert found.shape == (3,)
    for atoms, distance in zip(batch, found.tolist(), strict=True):
        assert distance == pytest.approx(atoms.get_distance(0, len(atoms) - 1, mic=True), abs=1e-12)
    many = distances(Structures.from_atoms(batch), [0, 1], [1, -1])
    assert many.shape == (3, 2)
    assert many[1].tolist() == pytest.approx([cluster().get_distance(a, b) for a, b in ((0, 1), (1, 5))], abs=1e-12)
    assert angles(batch[:2], 0, [1, 2], 3).shape == (2, 2)
    found = relax(lennard_jones(), batch[:2], steps=0)
    torch.testing.assert_close(distances(found, 0, 1), distances(batch[:2], 0, 1))
    torch.testing.assert_close(distances(found[1], 0, 1), distances(cluster(), 0, 1))


@pytest.mark.parametrize("atom", [6, -7])
def test_an_atom_that_is_not_there_is_named(atom):
    with pytest.raises(IndexError, match=rf"Structure 0 \(Ar6\) has no atom {atom}: it has 6 atoms"):
        distances([cluster(), cluster()], 0, atom)


def test_an_angle_of_two_atoms_is_refused():
    with pytest.raises(ValueError, match="An angle needs another atom on each side"):
        angles(cluster(), [0, 1], [1, 1], 2)


@pytest.mark.parametrize("seed", [0, 3, 5])
@pytest.mark.parametrize("measure", [lambda s: distances(s, [0, 2], 1), lambda s: angles(s, 0, [1, 4], 2)])
def test_gradients_by_positions_and_cells(measure, seed):
    start = Structures.from_atoms([scattered(seed), scattered(seed + 1)])

    def measured(positions, cells):
        return measure(start.replace(positions=positions, cells=cells))

    inputs = [start.positions.clone().requires_grad_(), start.cells.clone().requires_grad_()]
    assert torch.autograd.gradcheck(measured, inputs, atol=1e-5)
    assert torch.autograd.gradgradcheck(measured, inputs, atol=1e-4)


def test_cells_count_where_a_bond_crosses_them():
    """A strain stretches a bond through the boundary as it stretches any other."""
    atoms = bulk("Si")
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    start = Structures.from_atoms(atoms)
    stretched = torch.eye(3, dtype=torch.float64) + strain
    moved = start.replace(positions=start.positions @ stretched, cells=start.cells @ stretched)
    bond = distances(moved, 0, 1)
    bond.sum().backward()
    torch.testing.assert_close(strain.grad.trace(), bond.sum().detach())


@pytest.mark.parametrize("place", [[0, 0, 2.0], [0, 0, -2.0]])
def test_atoms_in_line_and_on_one_spot_have_finite_gradients(place):
    structures = Structures.from_atoms(Atoms("Ar4", positions=[[0, 0, 1.0], [0, 0, 0], place, [0, 0, 0]]))
    structures.positions.requires_grad_()
    angle, spot = angles(structures, 0, 1, 2), distances(structures, 1, 3)
    assert (angle.item(), spot.item()) == (0.0 if place[2] > 0 else 180.0, 0.0)
    (angle + spot).sum().backward()
    assert (structures.positions.grad == 0).all()


def test_single_precision_stays():
    atoms = molecule("H2O")
    structures = Structures.from_atoms(atoms, dtype=torch.float32)
    assert distances(structures, 0, 1).dtype is torch.float32
    assert angles(structures, 1, 0, 2).item() == pytest.approx(atoms.get_angle(1, 0, 2), abs=1e-3)


class TestTheStart:
    """After a run of BPTTOptimizer, gradients by the start are at relaxation.start.positions."""

    def bond(self, start: Atoms, potential, **arguments):
        """The relaxation of a short run, and a bond length and an angle at its end."""
        atoms = start.copy()
        atoms.calc = TorchCalculator(potential)
        optimizer = BPTTOptimizer(atoms, logfile=None, **arguments)
        optimizer.run(fmax=0.0, steps=5)
        relaxation = optimizer.relaxation
        return optimizer, (distances(relaxation, 0, 1) + 0.01 * angles(relaxation, 0, 1, 2)).sum()

    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("arguments", [{"dt": 0.03}, {"stepper": "gd", "step_size": 0.002, "momentum": 0.5}],
                             ids=["fire", "gd"])  # fmt: skip
    @pytest.mark.parametrize("make", [argon, cluster])
    def test_it_is_the_difference_between_runs_from_two_starts(self, make, arguments, frozen):
        potential, start = lennard_jones().requires_grad_(not frozen), make()
        optimizer, loss = self.bond(start, potential, **arguments)
        loss.backward()
        found = optimizer.relaxation.start.positions.grad
        direction, h = np.random.default_rng(1).normal(size=(len(start), 3)), 1e-5
        ends = []
        for sign in (1, -1):
            moved = start.copy()
            moved.positions += sign * h * direction
            ends.append(self.bond(moved, potential, **arguments)[1].item())
        assert (found * torch.from_numpy(direction)).sum().item() == pytest.approx(
            (ends[0] - ends[1]) / (2 * h), rel=1e-5
        )
        assert frozen == all(p.grad is None for p in potential.parameters())

    def test_it_is_what_relax_gives_for_a_start_that_requires_it(self):
        potential = load_potential("emt")
        start = bulk("Cu", cubic=True)
        start.rattle(0.1, seed=1)
        optimizer, loss = self.bond(start, potential, stepper="gd", step_size=0.02)
        loss.backward()
        batch = Structures.from_atoms(start)
        batch.positions.requires_grad_()
        found = relax(potential, batch, stepper=GradientDescent(0.02), fmax=0.0, steps=5)
        (distances(found, 0, 1) + 0.01 * angles(found, 0, 1, 2)).sum().backward()
        torch.testing.assert_close(
            optimizer.relaxation.start.positions.grad, batch.positions.grad, rtol=1e-10, atol=1e-12
        )

    def test_it_adds_up_as_gradients_of_weights_do(self):
        optimizer, loss = self.bond(cluster(), lennard_jones(), dt=0.03)
        loss.backward(retain_graph=True)
        once = optimizer.relaxation.start.positions.grad.clone()
        loss.backward()
        torch.testing.assert_close(optimizer.relaxation.start.positions.grad, 2 * once)
        optimizer.relaxation.start.positions.grad = None
        optimizer.run(fmax=0.0, steps=2)
        assert optimizer.relaxation.start.positions.grad is None

    @pytest.mark.parametrize("adjoint", ["truncated:2", "implicit", "one-step"])
    def test_it_is_zero_where_the_adjoint_takes_the_start_as_given(self, adjoint):
        atoms = cluster()
        atoms.calc = TorchCalculator(lennard_jones())
        with BPTTOptimizer(atoms, logfile=None, adjoint=adjoint, dt=0.03) as optimizer:
            optimizer.run(fmax=0.001, steps=400)
        relaxation = optimizer.relaxation
        distances(relaxation, 0, 1).sum().backward()
        assert (relaxation.start.positions.grad == 0).all()

    def test_a_restart_begins_a_record_of_its_own(self):
        """Of the frames since: its start is where it was read, and the velocities there are taken as given."""
        first = cluster()
        first.calc = TorchCalculator(lennard_jones())
        BPTTOptimizer(first, logfile=None, dt=0.03, restart="a.json").run(fmax=0.0, steps=4)
        again = first.copy()
        again.calc = TorchCalculator(lennard_jones())
        optimizer = BPTTOptimizer(again, logfile=None, dt=0.03, restart="a.json")
        optimizer.run(fmax=0.0, steps=3)
        relaxation = optimizer.relaxation
        assert relaxation.nsteps.tolist() == [3]
        np.testing.assert_array_equal(relaxation.start.positions.detach(), first.positions)
        distances(relaxation, 0, 1).sum().backward()
        assert relaxation.start.positions.grad.abs().max() > 0

    def test_parts_of_gradient_descent_are_joined_by_the_gradient_at_the_restart(self):
        """Without momentum the positions are all that a frame hands on, so the chain rule is one line."""
        numbers = {"logfile": None, "stepper": "gd", "step_size": 0.002}
        whole, first = cluster(), cluster()
        whole.calc = TorchCalculator(lennard_jones())
        optimizer = BPTTOptimizer(whole, **numbers)
        optimizer.run(fmax=0.0, steps=7)
        distances(optimizer.relaxation, 0, 1).sum().backward()
        first.calc = TorchCalculator(lennard_jones())
        before = BPTTOptimizer(first, **numbers)
        before.run(fmax=0.0, steps=4)
        head = before.relaxation
        again = first.copy()
        again.calc = TorchCalculator(lennard_jones())
        after = BPTTOptimizer(again, **numbers)
        after.run(fmax=0.0, steps=3)
        distances(after.relaxation, 0, 1).sum().backward()
        head.positions.backward(after.relaxation.start.positions.grad)
        expected = optimizer.relaxation.start.positions.grad
        torch.testing.assert_close(head.start.positions.grad, expected, rtol=1e-10, atol=1e-12)


def test_the_page_of_the_documentation_runs_and_says_where_gradients_are():
    page = (Path(__file__).parents[1] / "docs" / "gradients.rst").read_text()
    blocks = [block.split("\n\n\n")[0] for block in page.split(".. code-block:: python\n")[1:]]
    code = [
        textwrap.dedent("\n".join(line for line in block.splitlines() if line[:4] in ("", "    "))) for block in blocks
    ]
    names: dict = {}
    exec(code[0], names)
    assert names["relaxation"].start.positions.grad.shape == (4, 3)
    assert any(p.grad is not None for p in names["atoms"].calc.potential.parameters())
    exec(code[1], names)
    assert names["start"].positions.grad.abs().amax((1,)).min() > 0
