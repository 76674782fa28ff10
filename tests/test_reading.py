"""Reading pairs: what is taken, what is refused and how it is said."""

import logging
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from conftest import argon, rattled, silicon
from test_groups import moved_about

from ase_bptt import read_pairs, reading
from ase_bptt.pairs import InvalidPair


def relaxation(seed: int = 1, symbol: str = "Si", id: str | None = None) -> list[Atoms]:
    """Three frames of one relaxation."""
    last = silicon(seed)
    last.symbols[0] = symbol
    if id is not None:
        last.info["id"] = id
    return [rattled(last, 0.2, seed), rattled(last, 0.1, seed), last]


def with_forces(atoms: Atoms, largest: float) -> Atoms:
    forces = np.zeros((len(atoms), 3))
    forces[2, 1] = largest
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=forces)
    return atoms


def frames_of_other_atoms(frames):
    frames[0] = frames[0][:-1]


def frames_of_other_order(frames):
    frames[-1].symbols[[0, 1]] = "Si", "P"


def not_a_number(frames):
    frames[-1].positions[2, 1] = np.nan


def changed_cell(frames):
    frames[-1].set_cell(frames[-1].cell * 1.01)


def cell_not_a_number(frames):
    cell = frames[-1].cell.array
    cell[1, 1] = np.nan
    frames[-1].set_cell(cell)


def changed_pbc(frames):
    frames[-1].pbc = (True, True, False)


def only_one(frames):
    del frames[1:]


BAD = {
    frames_of_other_atoms: ["7 atoms", "8 end", "check the two structures"],
    frames_of_other_order: ["PSi7", "SiPSi6", "the same order"],
    not_a_number: ["not a finite number", "write the file again"],
    changed_cell: ["its cell changes by 0.054 Å", "fixed cell"],
    cell_not_a_number: ["its cell changes", "fixed cell"],
    changed_pbc: ["periodic boundaries change"],
    only_one: ["1 structure", "as two files"],
}
every_fault = pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)


def spoilt(spoil) -> list[Atoms]:
    frames = relaxation(symbol="P")
    spoil(frames)
    return frames


def is_one_sentence(error) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and len(text) < 400


class TestReading:
    @pytest.mark.parametrize("suffix", ["extxyz", "xyz", "traj"])
    def test_a_file_is_one_relaxation_from_its_first_to_its_last_frame(self, tmp_path, suffix):
        frames = relaxation()
        write(tmp_path / f"a.{suffix}", frames)
        (pair,) = read_pairs(tmp_path / f"a.{suffix}")
        np.testing.assert_allclose(pair.initial.positions, frames[0].positions, atol=1e-7)
        np.testing.assert_allclose(pair.relaxed.positions, frames[-1].positions, atol=1e-7)
        assert pair.id == str(tmp_path / f"a.{suffix}")

    def test_a_folder_is_read_with_all_below_it_in_order(self, tmp_path):
        (tmp_path / "b" / "deep").mkdir(parents=True)
        for k, name in enumerate(["b/deep/x.traj", "a.extxyz", "b/c.xyz"]):
            write(tmp_path / name, relaxation(seed=k))
        (tmp_path / "notes.txt").write_text("no relaxation")
        assert [p.id for p in read_pairs(tmp_path)] == [
            str(tmp_path / name) for name in ("a.extxyz", "b/c.xyz", "b/deep/x.traj")
        ]

    def test_two_files_are_taken_in_order(self, tmp_path):
        kept = [relaxation(k) for k in range(3)]
        write(tmp_path / "initial.extxyz", [frames[0] for frames in kept])
        write(tmp_path / "relaxed.traj", [frames[-1] for frames in kept])
        pairs = read_pairs(tmp_path / "initial.extxyz", tmp_path / "relaxed.traj")
        assert len(pairs) == 3
        for pair, frames in zip(pairs, kept, strict=True):
            np.testing.assert_allclose(pair.initial.positions, frames[0].positions, atol=1e-7)
            np.testing.assert_allclose(pair.relaxed.positions, frames[-1].positions, atol=1e-7)
        assert "structure 2 of" in pairs[2].id

    def test_an_id_in_the_file_names_the_pair(self, tmp_path):
        write(tmp_path / "a.extxyz", relaxation(id="my defect"))
        assert read_pairs(tmp_path)[0].id == "my defect"

    def test_a_path_with_an_at_sign_is_a_path(self, tmp_path):
        write(tmp_path / "a.extxyz", relaxation())
        (tmp_path / "a.extxyz").rename(tmp_path / "run@2.extxyz")
        assert len(read_pairs(tmp_path / "run@2.extxyz")) == 1

    def test_each_pair_gets_a_group_by_its_final_structure(self, tmp_path):
        for k, symbol in enumerate(["Si", "P", "Si"]):
            last = moved_about(relaxation(symbol=symbol)[-1], k)
            write(tmp_path / f"{k}.extxyz", [rattled(last, 0.1, k), last])
        groups = [p.group for p in read_pairs(tmp_path)]
        assert groups[0] == groups[2] != groups[1]
        assert all(groups)

    def test_an_unrelaxed_reference_is_named_in_a_warning(self, tmp_path, caplog):
        for k, largest in enumerate([0.04, 0.06]):
            frames = relaxation(k)
            write(tmp_path / f"{k}.extxyz", [*frames[:-1], with_forces(frames[-1], largest)])
        assert len(read_pairs(tmp_path)) == 2
        (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert "1.extxyz" in record.message
        assert "0.060 eV/Å" in record.message


class TestRefusing:
    @every_fault
    def test_a_bad_relaxation_is_refused_by_file_and_mend(self, tmp_path, spoil):
        write(tmp_path / "bad.extxyz", spoilt(spoil))
        with pytest.raises(InvalidPair) as error:
            read_pairs(tmp_path)
        assert all(text in str(error.value) for text in ["bad.extxyz", *BAD[spoil]])
        assert is_one_sentence(error.value)

    @pytest.mark.parametrize("spoil", [f for f in BAD if f is not only_one], ids=lambda f: f.__name__)
    def test_a_bad_structure_of_two_files_is_refused_by_its_number(self, tmp_path, spoil):
        good, bad = relaxation(), spoilt(spoil)
        write(tmp_path / "initial.extxyz", [good[0], bad[0]])
        write(tmp_path / "relaxed.extxyz", [good[-1], bad[-1]])
        with pytest.raises(InvalidPair, match=r"structure 1 of .*relaxed\.extxyz") as error:
            read_pairs(tmp_path / "initial.extxyz", tmp_path / "relaxed.extxyz")
        assert all(text in str(error.value) for text in BAD[spoil])

    def test_two_files_of_different_length_are_refused_with_both_lengths(self, tmp_path):
        write(tmp_path / "initial.extxyz", relaxation()[:1] * 3)
        write(tmp_path / "relaxed.extxyz", relaxation()[:1] * 2)
        with pytest.raises(
            InvalidPair, match=r"initial.extxyz holds 3 .*relaxed.extxyz 2; both need the same"
        ) as error:
            read_pairs(tmp_path / "initial.extxyz", tmp_path / "relaxed.extxyz")
        assert is_one_sentence(error.value)

    @pytest.mark.parametrize("content", ["", "no structure at all\n", "2\nProperties=species:S:1:pos:R:3\nSi 0 0\n"])
    @pytest.mark.parametrize("name", ["a.extxyz", "a.traj", "vasprun.xml", "OUTCAR"])
    def test_a_file_that_cannot_be_read_is_named(self, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        with pytest.raises(InvalidPair, match=name) as error:
            read_pairs(tmp_path)
        assert is_one_sentence(error.value)

    def test_a_folder_without_relaxations_is_named_with_what_is_sought(self, tmp_path):
        (tmp_path / "notes.txt").write_text("nothing")
        with pytest.raises(FileNotFoundError, match=r"holds no relaxation.*vasprun\.xml.*\.extxyz, "):
            read_pairs(tmp_path)

    @pytest.mark.parametrize("arguments", [["absent"], ["absent", "there.extxyz"], ["there.extxyz", "absent"]])
    def test_a_missing_file_is_named(self, tmp_path, arguments):
        write(tmp_path / "there.extxyz", relaxation())
        with pytest.raises(FileNotFoundError, match=r"There is no file .*absent\."):
            read_pairs(*(tmp_path / name for name in arguments))

    def test_two_empty_files_are_refused(self, tmp_path):
        for name in ("a.extxyz", "b.extxyz"):
            (tmp_path / name).touch()
        with pytest.raises(InvalidPair, match=r"a\.extxyz") as error:
            read_pairs(tmp_path / "a.extxyz", tmp_path / "b.extxyz")
        assert is_one_sentence(error.value)


class TestSkipping:
    @every_fault
    def test_a_bad_pair_is_left_out_with_a_warning_that_says_why(self, tmp_path, caplog, spoil):
        write(tmp_path / "bad.extxyz", spoilt(spoil))
        write(tmp_path / "good.extxyz", relaxation())
        (pair,) = read_pairs(tmp_path, skip_invalid=True)
        assert pair.id.endswith("good.extxyz")
        record, summary = caplog.records
        assert record.levelno == summary.levelno == logging.WARNING
        assert all(text in record.message for text in ["Left out", "bad.extxyz", *BAD[spoil]])
        assert summary.message == "Left out 1 of 2."

    def test_an_unreadable_file_is_left_out(self, tmp_path):
        (tmp_path / "bad.extxyz").write_text("no structure")
        write(tmp_path / "good.extxyz", relaxation())
        assert len(read_pairs(tmp_path, skip_invalid=True)) == 1

    def test_it_raises_where_none_is_left(self, tmp_path):
        for k in range(2):
            write(tmp_path / f"{k}.extxyz", spoilt(changed_cell))
        with pytest.raises(InvalidPair, match=r"None of the 2 pairs .* can be used.*its cell changes"):
            read_pairs(tmp_path, skip_invalid=True)


def test_two_files_of_one_vasp_run_are_one_relaxation(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "read_frames", lambda path: list(read(str(path), index=":", format="extxyz")))
    frames = [argon(), argon(2)]
    for folder, names in {"a": ("vasprun.xml", "OUTCAR"), "b": ("OUTCAR",)}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            write(tmp_path / folder / name, frames, format="extxyz")
    found = read_pairs(tmp_path)
    assert [Path(p.id).relative_to(tmp_path).as_posix() for p in found] == ["a/vasprun.xml", "b/OUTCAR"]
