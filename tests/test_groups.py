"""Which structures are the same, which pairs belong together, and splits that keep them together."""

import numpy as np
import pytest
from ase import Atoms
from conftest import cluster, methanol, rattled, silicon

from ase_bptt import RelaxationPair
from ase_bptt.groups import classes, same_structure, split_by_group
from ase_bptt.pairs import InvalidPair


def moved_about(atoms: Atoms, seed: int) -> Atoms:
    """The same structure after a drift, in other cells and with its atoms of one element in another order."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(np.flatnonzero(atoms.numbers == z)) for z in np.unique(atoms.numbers)])
    atoms = atoms[order]
    atoms.positions += rng.normal(size=3)
    atoms.wrap(pbc=atoms.pbc)
    return atoms


def turned(atoms: Atoms) -> Atoms:
    atoms = atoms.copy()
    atoms.rotate(50, (1, 2, 3), rotate_cell=bool(atoms.pbc.any()))
    return atoms


def mirrored(atoms: Atoms) -> Atoms:
    atoms = atoms.copy()
    atoms.positions[:, 0] *= -1
    return atoms


STRUCTURES = pytest.mark.parametrize("make", [silicon, cluster, methanol], ids=lambda f: f.__name__)


class TestSameStructure:
    @pytest.mark.parametrize(
        "copy", [lambda a: moved_about(a, 3), turned, mirrored], ids=["moved", "turned", "mirrored"]
    )
    @STRUCTURES
    def test_motions_symmetry_and_order_do_not_matter(self, make, copy):
        assert same_structure(make(), copy(make()))
        assert same_structure(copy(make()), make())

    @STRUCTURES
    def test_an_atom_half_an_angstrom_away_does(self, make):
        other = make()
        other.positions[0] += [0.5, 0, 0]
        assert not same_structure(make(), other)

    def test_noise_of_a_relaxation_does_not(self):
        assert same_structure(silicon(), rattled(silicon(), 0.01))

    def test_elements_do(self):
        a, b = silicon(), silicon()
        a.symbols[0], b.symbols[0] = "Ge", "P"
        assert not same_structure(a, b)
        assert not same_structure(silicon(), silicon()[:-1])

    def test_which_of_the_sites_an_element_sits_on_does(self):
        a, b = (Atoms("SiGeSi", positions=[[0, 0, 0], [2.0, 0, 0], [5.0, 0, 0]]) for _ in range(2))
        b.symbols[:] = ["Ge", "Si", "Si"]
        assert not same_structure(a, b)

    def test_the_cell_does(self):
        other = silicon()
        other.set_cell(other.cell * 1.03)
        assert not same_structure(silicon(), other)

    def test_single_atoms_are_all_alike(self):
        assert same_structure(Atoms("Si"), Atoms("Si", positions=[[1, 2, 3]]))
        assert not same_structure(Atoms("Si"), Atoms("C"))


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ([], [0, 1, 2, 3, 4]),
        ([(0, 4)], [0, 1, 2, 3, 0]),
        ([(0, 2), (2, 4)], [0, 1, 0, 3, 0]),
        ([(3, 4), (1, 4), (0, 1)], [0, 0, 2, 0, 0]),
    ],
)
def test_classes_joins_what_is_related_in_one_or_more_steps(edges, expected):
    assert classes(5, lambda a, b: (a, b) in edges) == expected


def named(*groups: str) -> list[RelaxationPair]:
    return [RelaxationPair(silicon(), silicon(), f"{g}{k}", g) for k, g in enumerate(groups)]


class TestSplitting:
    pairs = named(*"aabbbcddddefghij")

    @pytest.mark.parametrize("seed", range(5))
    def test_a_group_is_never_split_and_nothing_is_lost(self, seed):
        split = split_by_group(self.pairs, seed=seed)
        sides = {name: {p.group for p in part} for name, part in split.items()}
        assert set(sides) == {"train", "valid", "test"}
        assert sum(len(side) for side in sides.values()) == 10
        assert set().union(*sides.values()) == set("abcdefghij")
        assert {name: len(side) for name, side in sides.items()} == {"train": 6, "valid": 2, "test": 2}
        assert sorted(p.id for part in split.values() for p in part) == sorted(p.id for p in self.pairs)

    def test_a_seed_gives_one_split_whatever_the_order_of_the_pairs(self):
        one, two = split_by_group(self.pairs, seed=3), split_by_group(self.pairs[::-1], seed=3)
        assert all({p.id for p in one[name]} == {p.id for p in two[name]} for name in one)

    def test_other_seeds_give_other_splits(self):
        tests = {tuple(p.id for p in split_by_group(self.pairs, seed=seed)["test"]) for seed in range(6)}
        assert len(tests) > 1

    def test_three_groups_are_one_each(self):
        split = split_by_group(named("a", "b", "c"))
        assert [len(part) for part in split.values()] == [1, 1, 1]

    @pytest.mark.parametrize("groups", ["a", "ab", "aabb"])
    def test_fewer_than_three_groups_are_refused(self, groups):
        with pytest.raises(InvalidPair, match=f"{len(groups)} pairs form {len(set(groups))} group.*give more kinds"):
            split_by_group(named(*groups))
