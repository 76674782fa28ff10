"""One pair: what is refused, periodic images, the order of atoms."""

import logging
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.geometry import find_mic
from ase.io import write
from helpers.structures import cluster, methanol, rattled, silicon, skewed

from ase_bptt import RelaxationPair
from ase_bptt import pairs as pairs_module
from ase_bptt.pairs import InvalidPair, check_pair
from ase_bptt.pairs.cell_changes import unwrapped, warn_of_moves
from ase_bptt.pairs.reading import read_pairs


def large_and_skewed() -> Atoms:
    """18 atoms in a cell with angles of 40 and 140 degrees, where rounding scaled positions fails."""
    atoms = make_supercell(skewed(), [[3, 0, 0], [2, 3, 0], [-2, 1, 1]])
    return rattled(atoms, 0.02)


def slab() -> Atoms:
    atoms = silicon()
    atoms.center(vacuum=4, axis=2)
    atoms.pbc = (True, True, False)
    return atoms


def surface_without_a_third_vector() -> Atoms:
    atoms = slab()
    atoms.cell[2] = 0
    return atoms


ZOO = pytest.mark.parametrize(
    "make", [silicon, skewed, large_and_skewed, slab, surface_without_a_third_vector], ids=lambda f: f.__name__
)


class TestImages:
    @pytest.mark.parametrize("drift", [0, 0.3, 5.0], ids=lambda d: f"drift {d}")
    @pytest.mark.parametrize("seed", range(4))
    @ZOO
    def test_wrapped_atoms_come_back_whatever_the_drift(self, make, seed, drift):
        rng = np.random.default_rng(seed)
        initial = make()
        along = rng.normal(size=3) * initial.pbc
        drift = drift * along / np.linalg.norm(along)
        moves = rng.normal(scale=0.15, size=(len(initial), 3))
        wrapped = initial.copy()
        wrapped.positions += moves + drift
        wrapped.positions += rng.integers(-3, 4, (len(initial), 3)) * initial.pbc @ initial.cell.array
        found = unwrapped(initial, wrapped)
        change = found.positions - initial.positions
        np.testing.assert_allclose(change - change.mean(0), moves - moves.mean(0), atol=1e-9)
        # The drift that is left is the shortest of its images.
        shorter = change.mean(0) + np.stack(np.meshgrid(*3 * [[-1, 0, 1]])).reshape(3, -1).T @ (
            initial.cell.array * initial.pbc[:, None]
        )
        assert np.linalg.norm(change.mean(0)) <= np.linalg.norm(shorter, axis=1).min() + 1e-9

    @ZOO
    def test_a_drift_by_half_a_cell_does_not_tear_the_structure(self, make):
        initial, wrapped = make(), rattled(make(), 0.1, seed=7)
        moves = wrapped.positions - initial.positions
        wrapped.positions += 0.5 * (initial.cell.array[0] + initial.cell.array[1])
        wrapped.wrap()
        change = unwrapped(initial, wrapped).positions - initial.positions
        np.testing.assert_allclose(change - change.mean(0), moves - moves.mean(0), atol=1e-9)

    @ZOO
    def test_not_even_where_half_of_the_atoms_fall_on_either_side(self, make):
        initial = make()
        moves = np.outer(0.02 * (-1.0) ** np.arange(len(initial)), initial.cell.array[0])
        relaxed = initial.copy()
        relaxed.positions += moves + 0.5 * initial.cell.array[0]
        relaxed.positions[1::2] -= initial.cell.array[0]
        change = unwrapped(initial, relaxed).positions - initial.positions
        np.testing.assert_allclose(change - change.mean(0), moves - moves.mean(0), atol=1e-9)

    @pytest.mark.parametrize("seed", range(8))
    @ZOO
    def test_atoms_that_go_anywhere_are_nearest_to_where_they_were_seen_from_the_drift(self, make, seed):
        rng = np.random.default_rng(seed)
        initial, relaxed = make(), make()
        relaxed.positions += rng.normal(scale=2, size=relaxed.positions.shape) + rng.normal(scale=3, size=3)
        change = unwrapped(initial, relaxed).positions - initial.positions
        from_drift = change - change.mean(0)
        nearest = find_mic(from_drift, initial.cell, initial.pbc)[1]
        np.testing.assert_allclose(np.linalg.norm(from_drift, axis=1), nearest, atol=1e-9)

    @pytest.mark.parametrize("tilt", [[0, 0, 6.0], [-40.0, 31.0, 6.0]])
    def test_a_cell_vector_that_is_not_periodic_does_not_matter(self, tilt):
        initial = Atoms("Si3", positions=[[0, 0, 0], [1.2, 1.0, 2.4], [2.2, 0.3, 4.0]], pbc=(True, True, False))
        initial.set_cell([[2.9, 0, 0], [1.6, 2.6, 0], tilt])
        relaxed = initial.copy()
        relaxed.positions += [[0.1, 0, 0.9], [-0.1, 0.2, -0.3], [0, 0.1, 1.1]]
        wrapped = relaxed.copy()
        wrapped.positions[1] += 2 * initial.cell[0] - initial.cell[1]
        np.testing.assert_allclose(unwrapped(initial, wrapped).positions, relaxed.positions, atol=1e-9)

    @ZOO
    def test_positions_change_by_whole_cell_vectors(self, make):
        rng = np.random.default_rng(0)
        initial, relaxed = make(), make()
        relaxed.positions = rng.normal(scale=9, size=relaxed.positions.shape)
        moved = unwrapped(initial, relaxed).positions - relaxed.positions
        shifts = moved @ np.linalg.inv(relaxed.cell.complete().array)
        assert np.abs(shifts).max() > 0.5
        np.testing.assert_allclose(shifts, np.rint(shifts), atol=1e-9)
        np.testing.assert_allclose(shifts[:, ~initial.pbc], 0, atol=1e-9)

    @pytest.mark.parametrize("make", [silicon, cluster, methanol], ids=lambda f: f.__name__)
    def test_nothing_changes_where_nothing_was_wrapped(self, make):
        initial = make()
        relaxed = rattled(initial, 0.1, seed=5)
        assert unwrapped(initial, relaxed) is relaxed

    def test_isolated_atoms_may_go_where_they_like(self):
        initial = cluster()
        relaxed = rattled(initial, 20, seed=5)
        assert unwrapped(initial, relaxed) is relaxed

    def test_results_stay_with_the_structure(self):
        initial, relaxed = silicon(), silicon()
        relaxed.positions[3] += relaxed.cell[1]
        forces = np.random.default_rng(0).normal(size=(8, 3))
        relaxed.calc = SinglePointCalculator(relaxed, energy=-1.5, forces=forces)
        found = unwrapped(initial, relaxed)
        np.testing.assert_array_equal(found.get_forces(), forces)
        assert found.get_potential_energy() == -1.5


class TestOrder:
    def relaxed_in_order(self, order, drift=0.0) -> tuple[Atoms, Atoms]:
        initial = bulk("Si", a=5.43, cubic=True) * (2, 1, 1)
        initial.symbols[[0, 5]] = "P"
        relaxed = rattled(initial, 0.05)
        relaxed.positions += drift
        relaxed = relaxed[order]
        relaxed.wrap()
        return initial, unwrapped(initial, relaxed)

    @pytest.mark.parametrize("drift", [0.0, 0.4])
    def test_another_order_within_an_element_is_warned_of_with_the_mend(self, caplog, drift):
        order = [5, *range(1, 5), 0, *range(15, 5, -1)]
        warn_of_moves(*self.relaxed_in_order(order, drift), "a/OUTCAR")
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "a/OUTCAR" in record.message
        assert "write both structures in the same order." in record.message

    def test_the_same_order_is_not(self, caplog):
        warn_of_moves(*self.relaxed_in_order(list(range(16)), drift=0.4), "a")
        assert not caplog.records

    def test_a_hop_into_a_vacancy_is_not(self, caplog):
        sites = bulk("Si", a=5.43, cubic=True) * (2, 2, 2)
        initial, relaxed = sites[1:], sites[1:]
        near = np.argmin(sites.get_distances(0, range(1, 64), mic=True))
        relaxed.positions[near] = sites.positions[0]
        relaxed = unwrapped(initial, relaxed)
        assert np.linalg.norm(relaxed.positions - initial.positions, axis=1).max() > 2
        warn_of_moves(initial, relaxed, "a")
        assert not caplog.records


class TestWithoutAPath:
    """A relaxed structure that is the initial one: the run did nothing, or a file was copied over the other."""

    SAID = "its relaxed structure is its initial one"

    def written(self, folder, kind, relaxed: Atoms) -> Path:
        initial = bulk("Si", a=5.43, cubic=True)
        if kind == "CONTCAR":
            write(folder / "POSCAR", initial)
            write(folder / "CONTCAR", relaxed)
            return folder
        if kind == "extxyz":
            write(folder / "a.extxyz", [initial, relaxed])
        else:
            with connect(folder / "a.db") as db:
                for atoms, done in ((initial, False), (relaxed, True)):
                    db.write(atoms, relaxed=done, pair="a")
        return next(folder.glob("a.*"))

    @pytest.mark.parametrize("kind", ["CONTCAR", "extxyz", "db"])
    @pytest.mark.parametrize("shift", [0.0, 5.43])
    def test_is_told_of(self, tmp_path, caplog, kind, shift):
        same = bulk("Si", a=5.43, cubic=True)
        same.positions[3, 0] += shift  # another image of the same site
        (pair,) = read_pairs(self.written(tmp_path, kind, same))
        assert [self.SAID in record.message for record in caplog.records] == [True]
        np.testing.assert_allclose(pair.relaxed.positions, pair.initial.positions, atol=1e-9)

    @pytest.mark.parametrize("kind", ["CONTCAR", "extxyz", "db"])
    def test_one_that_has_moved_is_not(self, tmp_path, caplog, kind):
        moved = bulk("Si", a=5.43, cubic=True)
        moved.positions[0, 0] += 0.001
        read_pairs(self.written(tmp_path, kind, moved))
        assert self.SAID not in caplog.text


class TestClashes:
    @pytest.mark.parametrize("which", ["initial", "relaxed"])
    @pytest.mark.parametrize("make", [silicon, skewed, slab, cluster], ids=lambda f: f.__name__)
    def test_two_atoms_on_one_place_are_refused_with_both_and_the_structure(self, make, which):
        pair = {"initial": make(), "relaxed": make()}
        across = pair[which].cell[0] * pair[which].pbc[0]
        pair[which].positions[1] = pair[which].positions[0] + across + [0.3, 0, 0]
        with pytest.raises(InvalidPair, match=f"x: in its {which} structure atoms . and . are 0.30 Å apart") as error:
            check_pair(**pair, name="x")
        assert {"0", "1"} <= set(str(error.value).split())
        pair[which].positions[1] = make().positions[1]
        check_pair(**pair, name="x")

    def test_an_atom_too_near_to_its_own_image_is_refused(self):
        atoms = Atoms("Si", cell=[0.4, 5, 5], pbc=True)
        with pytest.raises(InvalidPair, match=r"0\.40 Å apart.*its cell and their units"):
            check_pair(atoms, atoms, "x")

    @pytest.mark.parametrize("cell", [[5, 5, 0], [[5, 0, 0], [0, 5, 0], [5, 5, 0]]])
    def test_a_periodic_cell_without_a_volume_is_refused(self, cell):
        atoms = Atoms("Si2", positions=[[0, 0, 0], [2, 0, 0]], cell=cell, pbc=True)
        with pytest.raises(InvalidPair, match=r"Si2 is periodic along .* (zero|dependent): set its cell or its pbc"):
            check_pair(atoms, atoms, "x")

    def test_work_grows_with_the_number_of_atoms_not_with_its_square(self):
        found = []

        def counted(*arguments):
            found.append(real(*arguments))
            return found[-1]

        real = pairs_module.find_edges
        big = bulk("Si", a=5.43, cubic=True) * (8, 8, 8)
        with mock.patch.object(pairs_module, "find_edges", counted):
            check_pair(big, rattled(big, 0.02), "x")
        assert [len(f.i) for f in found] == [0, 0]


class TestChecks:
    def test_a_pair_that_did_not_move_is_taken(self):
        check_pair(silicon(), silicon(), "x")

    def test_no_atoms_are_refused(self):
        with pytest.raises(InvalidPair, match="x: it has no atoms"):
            check_pair(Atoms(), Atoms(), "x")

    def test_a_cell_that_changes_is_free_to_move(self):
        relaxed = silicon()
        relaxed.set_cell(relaxed.cell * 1.01, scale_atoms=True)
        check_pair(silicon(), relaxed, "x")
        assert RelaxationPair(silicon(), relaxed, "x").freedom.name == "full"
        assert RelaxationPair(silicon(), relaxed, "x", cell="hydrostatic", pressure=0.1).freedom.pressure == 0.1
        assert RelaxationPair(silicon(), silicon(), "x").freedom.name == "fixed"

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda a: a.set_cell(a.cell.array[[1, 0, 2]]), "handedness"),
            (lambda a: a.set_cell(a.cell.array @ [[1, 0, 0], [2, 1, 0], [0, 0, 1]]), "choice of cell vectors"),
            (lambda a: a.set_cell([[5, 0, 0], [5, 0, 0], [0, 0, 5]]), "no volume"),
        ],
    )
    def test_cells_that_no_relaxation_leads_to_are_refused(self, change, sentence):
        relaxed = silicon()
        change(relaxed)
        with pytest.raises(InvalidPair, match=rf"x: .*{sentence}"):
            check_pair(silicon(), relaxed, "x")

    def test_forces_that_are_not_numbers_are_warned_of(self, caplog):
        relaxed = silicon()
        relaxed.calc = SinglePointCalculator(relaxed, forces=np.full((8, 3), np.nan))
        check_pair(silicon(), relaxed, "x")
        assert "x: the reference still has a force of nan" in caplog.text
