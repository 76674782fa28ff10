"""Which structures are the same, which pairs belong together, and splits that keep them together."""

from unittest import mock

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from helpers.structures import cluster, methanol, moved_about, rattled, silicon

from ase_bptt import RelaxationPair
from ase_bptt.pairs import InvalidPair, groups
from ase_bptt.pairs import structure_matching as sameness
from ase_bptt.pairs.groups import classes, split_by_group, split_into_folds, too_few
from ase_bptt.pairs.structure_matching import same_structure


def turned(atoms: Atoms) -> Atoms:
    atoms = atoms.copy()
    atoms.rotate(50, (1, 2, 3), rotate_cell=bool(atoms.pbc.any()))
    return atoms


def mirrored(atoms: Atoms) -> Atoms:
    atoms = atoms.copy()
    atoms.positions[:, 0] *= -1
    return atoms


def given_by(atoms: Atoms, choice: list[list[int]]) -> Atoms:
    """The structure with these combinations of its lattice vectors, those that are periodic, in place of them."""
    choice, found = np.array(choice), atoms.copy()
    choice = np.where(atoms.pbc[:, None] & atoms.pbc, choice, np.eye(3, dtype=int))
    if abs(round(np.linalg.det(choice))) != 1:
        choice = np.eye(3, dtype=int)
    found.set_cell(choice @ atoms.cell.array)
    found.wrap()
    return found


def strained() -> Atoms:
    """Neither axes nor angles are equal."""
    atoms = silicon(1, 0.1)
    atoms.set_cell(atoms.cell.array @ [[1.05, 0.02, 0], [0, 0.97, 0.04], [0.01, 0, 1.0]], scale_atoms=True)
    return atoms


def layer() -> Atoms:
    atoms = bulk("Mg", orthorhombic=True) * (2, 1, 1)
    atoms.center(vacuum=6, axis=2)
    atoms.pbc = (True, True, False)
    return atoms


CHOICES = {
    "permuted": [[0, 1, 0], [0, 0, 1], [1, 0, 0]],
    "b by a + b": [[1, 0, 0], [1, 1, 0], [0, 0, 1]],
    "left-handed": [[0, 1, 0], [1, 0, 0], [0, 0, 1]],
    "opposite": [[-1, 0, 0], [0, 1, 0], [0, 0, -1]],
    "far from reduced": [[1, 3, 0], [0, 1, -2], [0, 0, 1]],
}
CELLS = {
    "cubic": silicon,
    "strained": strained,
    "hexagonal": lambda: rattled(bulk("Mg") * (2, 2, 1), 0.1),
    "layer": layer,
    "flat": lambda: rattled(bulk("Si", a=5.43, cubic=True) * (1, 1, 4), 0.1),
}
STRUCTURES = pytest.mark.parametrize("make", [silicon, cluster, methanol], ids=lambda f: f.__name__)


def sodium_chloride() -> Atoms:
    return bulk("NaCl", "rocksalt", a=5.64, cubic=True)


def glass(n: int, seed: int = 1) -> Atoms:
    """Atoms at random places, none nearer than 2.1 Å: no gaps between shells."""
    rng, length = np.random.default_rng(seed), 3 * n ** (1 / 3)
    atoms = Atoms(cell=[length] * 3, pbc=True)
    while len(atoms) < n:
        place = rng.random(3) * length
        others = atoms.positions - place
        if (np.linalg.norm(others - length * np.rint(others / length), axis=1) > 2.1).all():
            atoms += Atoms("Si", positions=[place])
    return atoms


LARGE = pytest.mark.parametrize(
    "make",
    [
        lambda: bulk("Si", a=5.43, cubic=True) * 2,
        lambda: bulk("Si", a=5.43, cubic=True) * 3,
        lambda: sodium_chloride() * 3,
        lambda: bulk("Mg") * (4, 4, 4),
        lambda: glass(64),
        lambda: glass(216),
    ],
    ids=["64 Si", "216 Si", "216 NaCl", "128 Mg", "glass of 64", "glass of 216"],
)


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

    @pytest.mark.parametrize("amplitude", [0.01, 0.02])
    @LARGE
    def test_noise_in_a_large_cell_does_not(self, make, amplitude):
        first, *others = [rattled(make(), amplitude, seed) for seed in range(4)]
        assert all(same_structure(first, other) for other in [make(), *others])

    @pytest.mark.parametrize("direction", [(1, 0, 0), (1, 1, 0), (1, 1, 1), (-1, -1, -1), (0.3, -0.9, 0.5)])
    @LARGE
    def test_one_atom_of_many_does(self, make, direction):
        moved = rattled(make(), 0.01)
        moved.positions[17 if len(moved) < 200 else 170] += 0.5 * np.array(direction) / np.linalg.norm(direction)
        assert not same_structure(make(), moved)

    @LARGE
    def test_how_far_two_dopants_are_apart_does(self, make):
        near, far = make(), make()
        partner = np.argsort(near.get_distances(0, range(len(near)), mic=True))
        near.symbols[[0, partner[1]]] = far.symbols[[0, partner[20]]] = "As"
        assert not same_structure(near, far)

    @pytest.mark.parametrize(("one", "other"), [(1, 5), (5, 20), (20, 40), (40, 100)])
    def test_how_far_two_vacancies_are_apart_does(self, one, other):
        crystal = bulk("Si", a=5.43, cubic=True) * 3
        near = np.argsort(crystal.get_distances(0, range(216), mic=True))
        a, b = crystal.copy(), crystal.copy()
        del a[[0, near[one]]], b[[0, near[other]]]
        assert not same_structure(rattled(a, 0.01), b)

    def test_many_small_displacements_do(self):
        a = silicon(amplitude=0)
        b = a.copy()
        b.positions[4:] += 0.12
        assert not same_structure(a, b)

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

    @pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)
    @pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
    def test_by_which_lattice_vectors_it_is_given_does_not(self, make, choice):
        atoms = make()
        other = moved_about(given_by(atoms, choice), 2)
        assert same_structure(atoms, other)
        assert same_structure(turned(other), rattled(atoms, 0.003))
        other.set_cell(other.cell.array * 1.03, scale_atoms=True)
        assert not same_structure(atoms, other)

    @pytest.mark.parametrize("strain", [[0, 0, 0, 0, 0, 0.06], [0.03, -0.03, 0, 0, 0, 0], [0, 0, 0.02, 0, 0.05, 0]])
    def test_another_lattice_of_one_volume_does(self, strain):
        a, b, c, d, e, f = strain
        other = silicon()
        other.set_cell(other.cell.array @ np.array([[1 + a, f, e], [0, 1 + b, d], [0, 0, 1 + c]]), scale_atoms=True)
        assert not same_structure(silicon(), other)

    def test_one_atom_in_another_lattice_is_another_structure(self):
        assert not same_structure(bulk("Fe", "bcc", a=2.86), bulk("Fe", "fcc", a=3.6))
        assert same_structure(bulk("Cu", a=3.6), given_by(bulk("Cu", a=3.6), [[1, 1, 0], [0, 1, 0], [0, -2, 1]]))

    def test_a_box_that_is_not_periodic_does_not_matter(self):
        boxed = methanol()
        boxed.center(vacuum=5)
        assert same_structure(methanol(), boxed)

    def test_single_atoms_are_all_alike(self):
        assert same_structure(Atoms("Si"), Atoms("Si", positions=[[1, 2, 3]]))
        assert not same_structure(Atoms("Si"), Atoms("C"))


class TestGroups:
    def pairs(self, n: int) -> list[RelaxationPair]:
        """Every third in one of its own, the others in two large groups."""
        kinds = [silicon(k, 0.6) if k % 3 == 0 else moved_about(silicon(9_000 + k % 3, 0.6), k) for k in range(n)]
        return [RelaxationPair(atoms, atoms, str(k)) for k, atoms in enumerate(kinds)]

    def test_a_thousand_pairs_cost_a_look_at_each_structure(self):
        pairs = self.pairs(1000)
        with mock.patch.object(sameness, "_distances", side_effect=sameness._distances) as measured:
            found = groups.with_groups(pairs)
        assert measured.call_count == 1000
        names = [p.group for p in found]
        assert len(set(names)) == 334 + 2
        assert {names.count(name) for name in names} == {1, 333}

    def test_structures_without_a_partner_of_their_composition_are_not_looked_at(self):
        pairs = [RelaxationPair(a, a, str(k)) for k, a in enumerate([silicon(), silicon()[:-1], methanol()])]
        with mock.patch.object(sameness, "_distances", side_effect=AssertionError):
            assert [p.group for p in groups.with_groups(pairs)] == ["0", "1", "2"]

    def test_a_group_that_is_given_stays_and_names_its_structure(self):
        given = [
            RelaxationPair(p.initial, p.relaxed, p.id, g) for p, g in zip(self.pairs(6), ["", "", "", "", "x", ""])
        ]
        assert [p.group for p in groups.with_groups(given)] == ["0", "x", "2", "3", "x", "2"]


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

    @pytest.mark.parametrize(
        ("n", "train", "valid", "test"), [(3, 1, 1, 1), (20, 12, 4, 4), (25, 15, 5, 5), (80, 56, 8, 16)]
    )
    def test_validation_is_a_tenth_but_five_groups_where_a_fifth_is(self, n, train, valid, test):
        split = split_by_group(named(*(str(k) for k in range(n))))
        assert {name: len(part) for name, part in split.items()} == {"train": train, "valid": valid, "test": test}

    @pytest.mark.parametrize(("n", "valid", "test"), [(3, 1, 1), (8, 2, 2), (12, 2, 2)])
    def test_too_few_to_measure_by_are_warned_of(self, caplog, n, valid, test):
        atoms = Atoms("H")
        split_by_group([RelaxationPair(atoms, atoms, str(k), group=str(k)) for k in range(n)])
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.message.startswith(
            f"Too few kinds of structure to tell anything about others: of {n}, the validation set has {valid} and the "
            f"test set {test}. Hold out each kind once (--folds {min(n, 5)} "
        )
        assert f"--folds {min(n, 5)} " in record.message

    @pytest.mark.parametrize(("n", "valid"), [(3, 1), (12, 2), (15, 3), (50, 5)])
    def test_so_are_folds_with_too_few_to_choose_by(self, n, valid):
        atoms = Atoms("H")
        folds = split_into_folds(
            [RelaxationPair(atoms, atoms, str(k), group=str(k)) for k in range(n)], 3 if n < 5 else 5
        )
        few = f"others: of {n}, the validation set of a fold has {valid}. Add more kinds."
        assert too_few(*folds).endswith(few) if valid < 5 else not too_few(*folds)

    @pytest.mark.parametrize(
        ("kinds", "each", "warned"), [(25, 1, False), (25, 4, False), (12, 1, True), (12, 8, True)]
    )
    def test_kinds_count_and_not_structures(self, caplog, kinds, each, warned):
        atoms = Atoms("H")
        split_by_group([RelaxationPair(atoms, atoms, str(k), group=str(k % kinds)) for k in range(kinds * each)])
        assert len(caplog.records) == warned

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


class TestFolds:
    pairs = named(*"aaaaabbbcddddefghij")

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("k", [3, 4, 5, 10])
    def test_each_pair_is_tested_once_and_no_group_is_split(self, k, seed):
        found = split_into_folds(self.pairs, k, seed=seed)
        assert len(found) == k
        assert sorted(p.id for fold in found for p in fold["test"]) == sorted(p.id for p in self.pairs)
        for i, fold in enumerate(found):
            following, valid = ({p.group for p in side} for side in (found[(i + 1) % k]["test"], fold["valid"]))
            assert valid <= following
            assert len(valid) == max(min(5, len(following)), -(-len(following) // 2))
            assert sorted(p.id for side in fold.values() for p in side) == sorted(p.id for p in self.pairs)
            assert len(set().union(*({p.group for p in side} for side in fold.values()))) == sum(
                len({p.group for p in side}) for side in fold.values()
            )

    @pytest.mark.parametrize("seed", range(5))
    def test_folds_are_of_one_size_as_far_as_groups_allow(self, seed):
        sizes = [len(fold["test"]) for fold in split_into_folds(self.pairs, 4, seed=seed)]
        assert max(sizes) - min(sizes) <= 1

    def test_a_seed_gives_one_split_whatever_the_order_of_the_pairs_and_others_give_others(self):
        def tests(pairs, seed):
            return [frozenset(p.id for p in fold["test"]) for fold in split_into_folds(pairs, 4, seed=seed)]

        assert tests(self.pairs, 3) == tests(self.pairs[::-1], 3)
        assert len({frozenset(tests(self.pairs, seed)) for seed in range(4)}) > 1

    def test_more_folds_than_groups_are_refused(self):
        with pytest.raises(InvalidPair, match=r"4 pairs form 4 group.*5 folds need one each.*give more kinds"):
            split_into_folds(named(*"abcd"), 5)

    @pytest.mark.parametrize("k", [2, 0, -1])
    def test_fewer_than_three_folds_are_refused(self, k):
        with pytest.raises(ValueError, match=f"needs 3 folds at least.*got {k}"):
            split_into_folds(self.pairs, k)
