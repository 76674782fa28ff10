"""A batch of structures as tensors."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms, FixCom
from helpers.structures import argon, cluster, methanol, silicon, skewed

from ase_bptt import Structures
from ase_bptt.structures import as_structures

MEMBERS = [silicon, methanol, lambda: Atoms("He"), skewed]


def members():
    return [make() for make in MEMBERS]


@pytest.fixture
def structures():
    return Structures.from_atoms(members())


def test_atoms_come_one_after_another(structures):
    assert structures.counts == (8, 6, 1, 2)
    assert len(structures) == 4
    assert structures.n_atoms == 17
    assert structures.batch.tolist() == [0] * 8 + [1] * 6 + [2] + [3] * 2
    assert structures.positions.dtype is torch.float64
    assert structures.cells.shape == (4, 3, 3)
    assert structures.pbc.tolist() == [[True] * 3, [False] * 3, [False] * 3, [True] * 3]


def test_atoms_come_back_as_they_were(structures):
    for before, after in zip(members(), structures.to_atoms(), strict=True):
        assert before == after
        np.testing.assert_array_equal(after.get_masses(), before.get_masses())


def test_masses_that_were_set_are_kept():
    atoms = methanol()
    atoms.set_masses([13.0, *atoms.get_masses()[1:]])
    assert Structures.from_atoms(atoms).masses[0] == 13
    assert Structures.from_atoms(atoms).to_atoms()[0].get_masses()[0] == 13


def test_the_tensors_are_copies_in_both_directions():
    atoms = argon()
    structures = Structures.from_atoms(atoms)
    there, back = structures.positions.clone(), structures.to_atoms()[0]
    atoms.positions += 1
    back.positions += 1
    assert torch.equal(structures.positions, there)


def test_float32_comes_back_as_float64():
    structures = Structures.from_atoms(argon(), dtype=torch.float32)
    assert {structures.positions.dtype, structures.cells.dtype, structures.masses.dtype} == {torch.float32}
    assert structures.numbers.dtype is torch.int64
    assert structures.to_atoms()[0].positions.dtype == np.float64


def test_volumes_are_zero_without_a_cell(structures):
    expected = [silicon().get_volume(), 0, 0, skewed().get_volume()]
    np.testing.assert_allclose(structures.volumes, expected, atol=1e-12)


def test_a_left_handed_cell_has_a_positive_volume():
    atoms = bulk("Si")
    atoms.set_cell(atoms.cell[::-1])
    assert Structures.from_atoms(atoms).volumes.item() == pytest.approx(abs(bulk("Si").cell.volume))


@pytest.mark.parametrize("keep", [[0, 1, 2, 3], [3, 0], [2], [1, 1]])
def test_selected_structures_are_what_their_atoms_are(structures, keep):
    chosen, expected = structures.select(keep), Structures.from_atoms([members()[k] for k in keep])
    assert chosen.counts == expected.counts
    for name in ("positions", "cells", "pbc", "numbers", "masses", "batch", "volumes"):
        assert torch.equal(getattr(chosen, name), getattr(expected, name)), name
    assert torch.equal(structures.positions[structures.atoms_of(keep)], chosen.positions)


def test_none_of_them_can_be_selected(structures):
    nothing = structures.select([])
    assert len(nothing) == nothing.n_atoms == 0
    assert nothing.sum(nothing.positions).shape == (0, 3)
    assert nothing.to_atoms() == []


def test_selection_passes_gradients_on(structures):
    structures.positions.requires_grad_()
    structures.cells.requires_grad_()
    chosen = structures.select([2, 0])
    (chosen.positions.sum() + chosen.volumes.sum()).backward()
    assert structures.positions.grad[:, 0].tolist() == [1] * 8 + [0] * 6 + [1] + [0] * 2
    assert structures.cells.grad[0].abs().max() > 0
    assert not structures.cells.grad[3].any()


def test_replacing_forgets_what_was_computed_from_the_old(structures):
    before = structures.volumes
    other = structures.replace(cells=structures.cells * 2)
    torch.testing.assert_close(other.volumes, before * 8)
    assert torch.equal(structures.volumes, before)
    assert other.positions is structures.positions


def test_sums_and_maxima_are_per_structure(structures):
    values = torch.arange(17.0, dtype=torch.float64)
    assert structures.sum(values).tolist() == [28, 63, 14, 31]
    assert structures.max(values).tolist() == [7, 13, 14, 16]
    np.testing.assert_allclose(
        structures.sum(structures.positions), [a.positions.sum(0) for a in members()], atol=1e-12
    )


def test_a_maximum_that_is_not_a_number_stays_with_its_structure(structures):
    values = torch.ones(17, dtype=torch.float64)
    values[9] = torch.nan
    assert torch.isnan(structures.max(values)).tolist() == [False, True, False, False]
    assert torch.isnan(structures.sum(values)).tolist() == [False, True, False, False]


def test_the_largest_force_is_the_longest_vector_of_each_structure(structures):
    forces = torch.zeros(17, 3, dtype=torch.float64)
    forces[2] = torch.tensor([3.0, 0, 4.0])
    forces[12] = torch.tensor([0, -2.0, 0])
    forces.requires_grad_()
    largest = structures.largest_force(forces)
    assert largest.tolist() == [5, 2, 0, 0]
    largest.sum().backward()
    assert forces.grad[2].tolist() == pytest.approx([0.6, 0, 0.8])
    assert forces.grad[12].tolist() == [0, -1, 0]
    assert not forces.grad[14:].any()


def test_names_of_constraints_are_kept():
    fixed = argon()
    fixed.set_constraint([FixAtoms([0]), FixCom()])
    structures = Structures.from_atoms([cluster(), fixed])
    assert structures.constraints == ((), ("FixAtoms", "FixCom"))
    assert structures.select([1]).constraints == (("FixAtoms", "FixCom"),)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="at least one Atoms object"):
        Structures.from_atoms([])


def test_structures_stay_what_they_are(structures):
    assert as_structures(structures) is structures
    assert len(as_structures(molecule("H2O"))) == 1
    assert as_structures([molecule("H2O")] * 3, dtype=torch.float32).positions.dtype is torch.float32
