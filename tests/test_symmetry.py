"""The symmetry of a start in its relaxation: kept as DFT codes keep it, broken, or left free."""

import logging

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian
from helpers.dft_files import write_cp2k, write_espresso, write_outcar, write_vasprun
from helpers.shell import run

from ase_bptt import RelaxationPair, evaluate, load_potential, read_pairs
from ase_bptt.evaluation import space_group
from ase_bptt.pairs.symmetry import RATTLE, with_symmetry
from ase_bptt.pairs.targets import Target
from ase_bptt.training.training_data import VariedStarts


def vacancy(breathing: float = 0.0) -> Atoms:
    """Silicon with a vacancy, whose neighbours moved outwards by so many Å."""
    atoms = bulk("Si", cubic=True)
    centre = atoms.positions[0].copy()
    del atoms[0]
    for k in range(len(atoms)):
        d = atoms.positions[k] - centre
        d = d - atoms.cell.array.diagonal() * np.rint(d / atoms.cell.array.diagonal())
        if np.linalg.norm(d) < 2.5:
            atoms.positions[k] += breathing * d / np.linalg.norm(d)
    return atoms


def kept(pair: RelaxationPair) -> list[bool]:
    return [any(type(c).__name__ == "FixSymmetry" for c in atoms.constraints) for atoms in (pair.initial, pair.relaxed)]


def computed(frames: list[Atoms]) -> list[Atoms]:
    for frame in frames:
        frame.calc = SinglePointCalculator(frame, energy=-1.0, forces=np.zeros((len(frame), 3)))
    return frames


def three(broken: float = 0.0) -> list[Atoms]:
    """A relaxation that keeps the symmetry of its start, or breaks it by so many Å."""
    frames = [vacancy(x) for x in (0.0, 0.05, 0.1)]
    frames[-1].positions[0, 0] += broken
    return computed(frames)


class TestOneStart:
    @pytest.mark.parametrize(
        ("atoms", "has_any"),
        [(vacancy(), True), (bulk("Cu"), True), (bulk("NaCl", "rocksalt", a=5.6), True)],
        ids=["vacancy", "fcc", "rocksalt"],
    )
    def test_keep_holds_the_space_group_of_both_ends(self, atoms, has_any):
        pair = RelaxationPair(atoms, atoms.copy(), "a")
        assert kept(with_symmetry(pair, "keep")) == [has_any] * 2
        assert with_symmetry(pair, "free") is pair
        assert with_symmetry(pair) is pair

    def test_what_has_no_symmetry_or_no_cell_is_left_as_it_is(self):
        rattled = vacancy()
        rattled.rattle(0.1, seed=1)
        for atoms in (rattled, Atoms("N2", [[0, 0, 0], [0, 0, 1.1]])):
            pair = RelaxationPair(atoms, atoms, "a")
            assert with_symmetry(pair, "keep") is pair

    def test_fixed_atoms_and_moments_lower_the_symmetry(self):
        def order(change) -> int:
            atoms = bulk("Fe", cubic=True) * (2, 1, 1)
            change(atoms)
            found = with_symmetry(RelaxationPair(atoms, atoms.copy(), "a"), "keep").initial.constraints
            return len(found[-1].rotations) if found and hasattr(found[-1], "rotations") else 1

        whole = order(lambda atoms: None)
        assert order(lambda atoms: atoms.set_constraint(FixAtoms([0]))) < whole
        assert order(lambda atoms: atoms.set_initial_magnetic_moments([2, -2, 2, 2])) < whole
        # Which directions a rotation would have to keep is not looked at.
        assert order(lambda atoms: atoms.set_constraint(FixCartesian([0], (1, 0, 0)))) == 1

    @pytest.mark.parametrize("cell", ["full", "hydrostatic", "fixed", "constant-volume", (1, 1, 0, 0, 0, 1)])
    def test_break_leaves_none_within_what_may_move(self, cell):
        pair = RelaxationPair(bulk("Si", cubic=True), bulk("Si", cubic=True), "a", cell=cell)
        found = with_symmetry(pair, "break")
        assert space_group(found.initial, 1e-3) == "P1 (1)"
        assert found.relaxed.positions == pytest.approx(pair.relaxed.positions)
        moves = found.initial.get_scaled_positions() - pair.initial.get_scaled_positions()
        moves = (moves - np.rint(moves)) @ pair.initial.cell.array
        assert 0.5 * RATTLE < np.sqrt((moves**2).mean()) < 1.5 * RATTLE
        change = found.initial.cell.array - pair.initial.cell.array
        assert (np.abs(change).max() > 1e-3) == (cell in ("full", "constant-volume") or isinstance(cell, tuple))
        if cell == "constant-volume":
            assert found.initial.get_volume() == pytest.approx(pair.initial.get_volume(), rel=1e-3)
        if isinstance(cell, tuple):
            assert np.abs(change[2]).max() < 1e-12

    def test_break_repeats_depends_on_the_seed_and_leaves_fixed_atoms(self):
        atoms = vacancy()
        atoms.set_constraint(FixAtoms([0, 3]))
        pair = with_symmetry(RelaxationPair(atoms, atoms.copy(), "a"), "keep")
        one, again, other = (with_symmetry(pair, "break", seed=seed).initial for seed in (0, 0, 1))
        np.testing.assert_array_equal(one.positions, again.positions)
        assert np.abs(one.positions - other.positions).max() > 0.01
        np.testing.assert_array_equal(one.positions[[0, 3]], atoms.positions[[0, 3]])
        assert [type(c).__name__ for c in one.constraints] == ["FixAtoms"]

    def test_an_unknown_name_is_answered(self):
        with pytest.raises(ValueError, match=r"'kept'.*keep"):
            with_symmetry(RelaxationPair(vacancy(), vacancy(), "a"), "kept")

    def test_a_reference_that_lost_it_is_told_of(self, caplog):
        pair = RelaxationPair(three()[0], three(0.3)[-1], "odd", symmetry="keep")
        # What the run says of itself cannot be so.
        assert with_symmetry(pair) is pair
        assert not caplog.records
        assert kept(with_symmetry(pair, "keep")) == [True, False]
        assert "odd: its reference has lost symmetry of its start" in caplog.text

    def test_a_cell_that_lost_it_counts_too(self):
        strained = bulk("Cu", cubic=True)
        strained.set_cell(strained.cell.array * [[1.02], [1], [1]], scale_atoms=True)
        pair = RelaxationPair(bulk("Cu", cubic=True), strained, "a", cell="full", symmetry="keep")
        assert with_symmetry(pair) is pair
        scaled = bulk("Cu", cubic=True, a=3.7)
        pair = RelaxationPair(bulk("Cu", cubic=True), scaled, "a", cell="full", symmetry="keep")
        assert kept(with_symmetry(pair)) == [True, True]


SYMMETRIC = "      8 Sym. Ops., with inversion, found\n"


class TestReading:
    @pytest.mark.parametrize("lazy", [False, True])
    @pytest.mark.parametrize("symmetry", ["break", "keep", "free", None])
    def test_equal_starts_stay_in_one_group(self, tmp_path, lazy, symmetry):
        for k, amplitude in enumerate((0.0, 0.3)):
            frames = three(amplitude)
            (tmp_path / str(k)).mkdir()
            (write_vasprun if k else write_outcar)(tmp_path / str(k) / ("vasprun.xml" if k else "OUTCAR"), frames)
        pairs = read_pairs(tmp_path, symmetry=symmetry, lazy=lazy, index=tmp_path / "index" if lazy else None)
        assert len(pairs) == 2
        assert len({pair.group for pair in pairs}) == 1

    @pytest.mark.parametrize(
        ("name", "write", "keeps"),
        [
            ("vasprun.xml", lambda path, frames: write_vasprun(path, frames, ISYM=2), True),
            ("OUTCAR", lambda path, frames: write_outcar(path, frames, ISYM=3), True),
            ("vasprun.xml", lambda path, frames: write_vasprun(path, frames, ISYM=0), False),
            ("OUTCAR", lambda path, frames: write_outcar(path, frames, ISYM=-1), False),
            ("OUTCAR", write_outcar, False),
            ("a.out", lambda path, frames: write_espresso(path, frames, SYMMETRIC), True),
            ("a.out", lambda path, frames: write_espresso(path, frames, "   No symmetry found\n"), False),
            ("a.out", lambda path, frames: write_espresso(path, frames, f"  nosym = .true.\n{SYMMETRIC}"), False),
            ("a.out", write_cp2k, False),
        ],
    )
    @pytest.mark.parametrize("lazy", [False, True])
    def test_what_the_run_did_is_the_default(self, tmp_path, name, write, keeps, lazy):
        write(tmp_path / name, three())
        how = {"lazy": lazy, "index": tmp_path / "index" if lazy else None}
        for _ in range(1 + lazy):
            (pair,) = read_pairs(tmp_path, **how)
            assert kept(pair) == [keeps, keeps]
        assert kept(read_pairs(tmp_path, symmetry="keep", **how)[0]) == [True, True]
        assert kept(read_pairs(tmp_path, symmetry="free", **how)[0]) == [False, False]
        (pair,) = read_pairs(tmp_path, symmetry="break", **how)
        assert 0.01 < np.abs(pair.initial.positions - three()[0].positions).max() < 0.3
        assert kept(pair) == [False, False]

    def test_an_unknown_name_is_answered_before_anything_is_read(self, tmp_path):
        with pytest.raises(ValueError, match="symmetry"):
            read_pairs(tmp_path / "nothing", symmetry="no")

    def test_starts_that_are_drawn_keep_it_in_the_cell_too(self):
        """A strain that FixSymmetry never relaxes would be an error that no training removes."""
        relaxed = bulk("Cu", "hcp", a=2.56, c=4.2)
        initial = relaxed.copy()
        initial.set_cell(initial.cell * [[1.02], [1.02], [1.03]], scale_atoms=True)
        kept = with_symmetry(RelaxationPair(initial, relaxed, "Cu", cell="full"), "keep")
        target = Target(kept.relaxed, kept.relaxed, "Cu", cell="full")
        for drawn in (
            *VariedStarts([kept, target], 0.5, 0.03, (0, 1)),
            *VariedStarts([kept, target], 0.5, 0.03, (0, 2)),
        ):
            assert space_group(drawn.initial, 1e-6) == space_group(relaxed, 1e-6)
            change = drawn.initial.cell.cellpar() - relaxed.cell.cellpar()
            assert np.abs(change[:3]).max() > 1e-3

    def test_starts_that_it_moved_are_evaluated_and_trained_on(self, tmp_path, caplog):
        caplog.set_level(logging.ERROR)
        for k, element in enumerate(("Cu", "Ni", "Pd")):
            frames = [bulk(element, a=a, cubic=True) for a in (3.7, 3.8)]
            (tmp_path / "runs" / str(k)).mkdir(parents=True)
            write_vasprun(tmp_path / "runs" / str(k) / "vasprun.xml", computed(frames), ISYM=2, ISIF=3)
        groups = {}
        for how in ("keep", "break"):
            found = evaluate(load_potential("emt"), read_pairs(tmp_path / "runs", symmetry=how), steps=20)
            groups[how] = [space_group(end, 1e-5) for end in found.ends]
        assert groups["keep"] == ["Fm-3m (225)"] * 3
        assert "Fm-3m (225)" not in groups["break"]
        words = ["runs", "--potential", "emt", "--symmetry", "break", "--epochs", "1", "--steps", "3", "--out", "tuned"]
        code, _, err = run("train", *words)
        assert code == 0, err
        code, _, err = run("evaluate", "runs", "--potential", "emt", "--symmetry", "keep", "--steps", "3", "--out", "e")
        assert code == 0, err
