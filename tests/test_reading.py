"""Reading pairs: what is taken, what is refused and how it is said."""

import gzip
import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import read, write
from helpers.dft_files import WRITERS, changed_cell, spoilt, three_frames, write_database, write_poscar_and_contcar
from helpers.shell import is_one_sentence
from helpers.structures import moved_about, rattled, silicon

from ase_bptt import RelaxationPair, read_pairs
from ase_bptt.datasets import FOLDER
from ase_bptt.pairs import InvalidPair
from ase_bptt.pairs.formats import read_frames


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


def two_atoms_on_one_place(frames):
    frames[-1].positions[5] = frames[-1].positions[2] + frames[-1].cell[0] + [0, 0, 0.2]


def cell_not_a_number(frames):
    cell = frames[-1].cell.array
    cell[1, 1] = np.nan
    frames[-1].set_cell(cell)


def changed_pbc(frames):
    frames[-1].pbc = (True, True, False)


def only_one(frames):
    del frames[1:]


BAD = {
    frames_of_other_atoms: ["has 7 atoms", "relaxed one 8", "check both"],
    frames_of_other_order: ["PSi7", "SiPSi6", "the same order"],
    not_a_number: ["not a finite number", "write the file again"],
    changed_cell: ["its cell changes handedness", "the same cell vectors"],
    two_atoms_on_one_place: ["in its relaxed structure atoms 2 and 5 are 0.20 Å apart", "check its positions"],
    cell_not_a_number: ["a cell has no volume, or is not finite", "write the file again"],
    changed_pbc: ["periodic boundaries change"],
    only_one: ["1 structure", "as two files"],
}
every_fault = pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)


class TestReading:
    @pytest.mark.parametrize("suffix", ["extxyz", "xyz", "traj"])
    def test_a_file_is_one_relaxation_from_its_first_to_its_last_frame(self, tmp_path, suffix):
        frames = three_frames()
        write(tmp_path / f"a.{suffix}", frames)
        (pair,) = read_pairs(tmp_path / f"a.{suffix}")
        np.testing.assert_allclose(pair.initial.positions, frames[0].positions, atol=1e-7)
        np.testing.assert_allclose(pair.relaxed.positions, frames[-1].positions, atol=1e-7)
        assert pair.id == f"a.{suffix}"

    def test_a_folder_is_read_with_all_below_it_in_order(self, tmp_path):
        (tmp_path / "b" / "deep").mkdir(parents=True)
        for k, name in enumerate(["b/deep/x.traj", "a.extxyz", "b/c.xyz"]):
            write(tmp_path / name, three_frames(seed=k))
        (tmp_path / "notes.txt").write_text("no relaxation")
        assert [p.id for p in read_pairs(tmp_path)] == ["a.extxyz", "b/c.xyz", "b/deep/x.traj"]

    def test_ids_do_not_depend_on_how_the_path_was_written(self, tmp_path, monkeypatch):
        (tmp_path / "runs" / "a").mkdir(parents=True)
        write(tmp_path / "runs" / "a" / "x.traj", three_frames())
        monkeypatch.chdir(tmp_path)
        ways = ["runs", tmp_path / "runs", "./runs", "runs/", "runs/../runs"]
        assert {p.id for way in ways for p in read_pairs(way)} == {"a/x.traj"}
        ways = ["runs/a/x.traj", tmp_path / "runs" / "a" / "x.traj"]
        assert {p.id for way in ways for p in read_pairs(way)} == {"x.traj"}

    def test_two_files_are_taken_in_order(self, tmp_path):
        kept = [three_frames(k) for k in range(3)]
        write(tmp_path / "initial.extxyz", [frames[0] for frames in kept])
        write(tmp_path / "relaxed.traj", [frames[-1] for frames in kept])
        pairs = read_pairs(tmp_path / "initial.extxyz", tmp_path / "relaxed.traj")
        assert len(pairs) == 3
        for pair, frames in zip(pairs, kept, strict=True):
            np.testing.assert_allclose(pair.initial.positions, frames[0].positions, atol=1e-7)
            np.testing.assert_allclose(pair.relaxed.positions, frames[-1].positions, atol=1e-7)
        assert "structure 2 of" in pairs[2].id

    def test_an_id_in_the_file_names_the_pair(self, tmp_path):
        write(tmp_path / "a.extxyz", three_frames(id="my defect"))
        assert read_pairs(tmp_path)[0].id == "my defect"

    def test_a_path_with_an_at_sign_is_a_path(self, tmp_path):
        write(tmp_path / "a.extxyz", three_frames())
        (tmp_path / "a.extxyz").rename(tmp_path / "run@2.extxyz")
        assert len(read_pairs(tmp_path / "run@2.extxyz")) == 1

    def test_each_pair_gets_a_group_by_its_final_structure(self, tmp_path):
        for k, symbol in enumerate(["Si", "P", "Si"]):
            last = moved_about(three_frames(symbol=symbol)[-1], k)
            write(tmp_path / f"{k}.extxyz", [rattled(last, 0.1, k), last])
        groups = [p.group for p in read_pairs(tmp_path)]
        assert groups[0] == groups[2] != groups[1]
        assert all(groups)

    def test_an_unrelaxed_reference_is_named_in_a_warning(self, tmp_path, caplog):
        for k, largest in enumerate([0.04, 0.06]):
            frames = three_frames(k)
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
        good, bad = three_frames(), spoilt(spoil)
        write(tmp_path / "initial.extxyz", [good[0], bad[0]])
        write(tmp_path / "relaxed.extxyz", [good[-1], bad[-1]])
        with pytest.raises(InvalidPair, match=r"structure 1 of .*relaxed\.extxyz") as error:
            read_pairs(tmp_path / "initial.extxyz", tmp_path / "relaxed.extxyz")
        assert all(text in str(error.value) for text in BAD[spoil])

    @pytest.mark.parametrize("folder", [0, 1])
    def test_a_folder_beside_a_second_path_is_refused(self, tmp_path, folder):
        write(tmp_path / "a.extxyz", three_frames())
        paths = [tmp_path / "a.extxyz", tmp_path / "a.extxyz"]
        paths[folder] = tmp_path
        with pytest.raises(InvalidPair, match=f"{tmp_path} is a folder; give one folder of relaxations, or two files"):
            read_pairs(*paths)

    def test_two_files_of_different_length_are_refused_with_both_lengths(self, tmp_path):
        write(tmp_path / "initial.extxyz", three_frames()[:1] * 3)
        write(tmp_path / "relaxed.extxyz", three_frames()[:1] * 2)
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
        write(tmp_path / "there.extxyz", three_frames())
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
        write(tmp_path / "good.extxyz", three_frames())
        (pair,) = read_pairs(tmp_path, skip_invalid=True)
        assert pair.id.endswith("good.extxyz")
        record, summary = caplog.records
        assert record.levelno == summary.levelno == logging.WARNING
        assert all(text in record.message for text in ["Left out", "bad.extxyz", *BAD[spoil]])
        assert summary.message == "Left out 1 of 2."

    def test_an_unreadable_file_is_left_out(self, tmp_path):
        (tmp_path / "bad.extxyz").write_text("no structure")
        write(tmp_path / "good.extxyz", three_frames())
        assert len(read_pairs(tmp_path, skip_invalid=True)) == 1

    def test_bad_structures_of_two_files_are_left_out(self, tmp_path, caplog):
        good, bad = three_frames(), spoilt(changed_cell)
        write(tmp_path / "initial.extxyz", [good[0], bad[0], good[0]])
        write(tmp_path / "relaxed.extxyz", [good[-1], bad[-1], good[-1]])
        pairs = read_pairs(tmp_path / "initial.extxyz", tmp_path / "relaxed.extxyz", skip_invalid=True)
        assert [p.id.split(" of ")[0] for p in pairs] == ["structure 0", "structure 2"]
        assert "Left out: structure 1 of" in caplog.records[0].message
        assert caplog.records[1].message == "Left out 1 of 3."

    def test_it_raises_where_none_is_left(self, tmp_path):
        for k in range(2):
            write(tmp_path / f"{k}.extxyz", spoilt(changed_cell))
        with pytest.raises(InvalidPair, match=r"None of the 2 pairs .* can be used.*its cell changes"):
            read_pairs(tmp_path, skip_invalid=True)


CHOSEN = ["Al_s_02", "AlP_ss_00", "Al_i_20", "I_H_00", "I_T_00", "P_s_00", "P_s_20", "SeV_23", "V2_00", "V_01"]


@pytest.fixture(scope="module")
def relaxations() -> dict[str, list[Atoms]]:
    """Ten of the embedded ones; the forces that one ends with are too large."""
    found = {}
    for name in CHOSEN:
        frames = read(FOLDER / f"{name}.extxyz", index=":")
        found[name] = [frames[0], frames[len(frames) // 2], frames[-1]]
    found["P_s_20"][-1].calc.results["forces"] += [0, 0, 0.07]
    return found


def written(folder: Path, name: str, relaxations: dict[str, list[Atoms]]) -> None:
    for id, frames in relaxations.items():
        (folder / id).mkdir()
        WRITERS[name](folder / id / name, frames)


def partition(pairs) -> set[frozenset[str]]:
    """Which of the ten are together, whatever the groups are called."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        found.setdefault(pair.group, []).append(known_id(pair))
    return {frozenset(ids) for ids in found.values()}


def known_id(pair: RelaxationPair) -> str:
    return pair.id if pair.id in CHOSEN else Path(pair.id).parent.name


def assert_the_ten(pairs, relaxations) -> None:
    assert sorted(known_id(p) for p in pairs) == sorted(CHOSEN)
    together = {frozenset({"I_H_00", "I_T_00"}), frozenset({"P_s_00", "P_s_20"})}
    assert partition(pairs) == together | {frozenset({id}) for id in set(CHOSEN).difference(*together)}
    for pair in pairs:
        frames = relaxations[known_id(pair)]
        for found, expected in ((pair.initial, frames[0]), (pair.relaxed, frames[-1])):
            assert str(found.symbols) == str(expected.symbols)
            assert found.pbc.all()
            np.testing.assert_allclose(found.cell.array, expected.cell.array, atol=1e-5)
            np.testing.assert_allclose(found.positions, expected.positions, atol=6e-6)


class TestFormats:
    @pytest.mark.parametrize("name", WRITERS)
    def test_ten_relaxations_are_the_same_in_each_format(self, tmp_path, caplog, relaxations, name):
        written(tmp_path, name, relaxations)
        pairs = read_pairs(tmp_path)
        assert_the_ten(pairs, relaxations)
        warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        if name == "cp2k.out":  # the trajectories beside the outputs
            assert sum("read with its output" in warning for warning in warnings) == 1
            warnings = [warning for warning in warnings if "read with its output" not in warning]
        if name == "CONTCAR":
            assert not warnings
            assert all(p.relaxed.calc is None for p in pairs)
        else:
            assert len(warnings) == 1
            assert str(tmp_path / "P_s_20" / name) in warnings[0]
            for pair in pairs:
                expected = relaxations[known_id(pair)][-1]
                np.testing.assert_allclose(pair.relaxed.get_forces(), expected.get_forces(), atol=1e-6)
                assert abs(pair.relaxed.get_potential_energy() - expected.get_potential_energy()) < 1e-6

    @pytest.mark.parametrize("suffix", ["db", "json"])
    def test_and_in_a_database(self, tmp_path, caplog, relaxations, suffix):
        write_database(tmp_path / f"all.{suffix}", relaxations)
        assert_the_ten(read_pairs(tmp_path / f"all.{suffix}"), relaxations)
        (record,) = caplog.records
        assert f"P_s_20 of {tmp_path / 'all'}.{suffix}" in record.message

    @pytest.mark.parametrize("name", WRITERS)
    def test_one_file_is_read_alone(self, tmp_path, relaxations, name):
        frames = relaxations["AlP_ss_00"]
        WRITERS[name](tmp_path / name, frames)
        (pair,) = read_pairs(tmp_path / name)
        np.testing.assert_allclose(pair.relaxed.positions, frames[-1].positions, atol=6e-6)

    def test_a_poscar_stands_for_its_contcar(self, tmp_path):
        write_poscar_and_contcar(tmp_path, three_frames())
        (pair,) = read_pairs(tmp_path / "POSCAR")
        assert pair.id == "CONTCAR"

    def test_a_contcar_alone_is_refused_by_the_file_that_is_missing(self, tmp_path):
        write_poscar_and_contcar(tmp_path, three_frames())
        (tmp_path / "POSCAR").unlink()
        with pytest.raises(FileNotFoundError, match=r"There is no file .*POSCAR\."):
            read_pairs(tmp_path / "CONTCAR")
        with pytest.raises(FileNotFoundError, match="holds no relaxation"):
            read_pairs(tmp_path)

    def test_only_what_pw_x_wrote_is_taken_from_out_files(self, tmp_path, relaxations):
        WRITERS["relax.out"](tmp_path / "relax.out", relaxations["V2_00"])
        (tmp_path / "slurm-1.out").write_text("starting\n")
        (tmp_path / "nothing.out").touch()
        (pair,) = read_pairs(tmp_path)
        assert pair.id == "relax.out"

    def test_what_the_readers_of_ase_warn_of_does_not_reach_the_user(self, tmp_path, relaxations):
        WRITERS["OUTCAR"](tmp_path / "OUTCAR", relaxations["V2_00"])
        text = (tmp_path / "OUTCAR").read_text()
        (tmp_path / "OUTCAR").write_text(text.replace("in kB       0.00000", "in kB  ***********"))
        with pytest.warns(UserWarning, match="stress"):
            read(tmp_path / "OUTCAR", format="vasp-out")
        assert len(read_pairs(tmp_path)) == 1

    def test_wrapped_positions_are_at_the_nearest_images(self, tmp_path):
        frames = three_frames()
        wrapped = frames[-1].copy()
        frames[0].wrap()
        wrapped.positions += frames[0].positions.mean(0)
        wrapped.wrap()
        write(tmp_path / "a.extxyz", [frames[0], wrapped])
        (pair,) = read_pairs(tmp_path)
        moves = pair.relaxed.positions - pair.initial.positions
        assert np.linalg.norm(moves - moves.mean(0), axis=1).max() < 1.5

    def test_another_order_of_the_atoms_is_warned_of_by_file(self, tmp_path, caplog):
        frames = three_frames()
        write(tmp_path / "a.extxyz", [frames[0], frames[-1][[3, 2, 1, 0, 7, 6, 5, 4]]])
        (pair,) = read_pairs(tmp_path)
        (record,) = caplog.records
        assert str(tmp_path / "a.extxyz") in record.message
        assert "in the same order." in record.message
        # Nothing was put in order.
        assert pair.relaxed.get_distance(0, 5, mic=True) == pytest.approx(frames[-1].get_distance(3, 6, mic=True))


class TestOneSourceForARun:
    @pytest.mark.parametrize("best", range(5))
    def test_the_best_file_of_a_vasp_run_is_read_and_the_others_are_named(self, tmp_path, caplog, best):
        names = ["vasprun.xml", "vasprun.xml.gz", "OUTCAR", "OUTCAR.gz", "CONTCAR"][best:]
        for name in names:
            WRITERS[name](tmp_path / name, with_energies(three_frames()))
        with caplog.at_level(logging.DEBUG, "ase_bptt"):
            (pair,) = read_pairs(tmp_path)
        assert pair.id == names[0]
        told = [r for r in caplog.records if "left out" in r.message]
        assert [r.levelno for r in told] == [logging.DEBUG] * (len(names) - 1) + [logging.INFO] * (len(names) > 1)
        assert all(any(str(tmp_path / name) in r.message for r in told) for name in names[1:])
        if told:
            assert f"left out {len(names) - 1} files ({', '.join(sorted(names[1:]))})" in told[-1].message

    def test_runs_of_one_folder_are_told_apart_by_the_beginning_of_their_names(self, tmp_path):
        for k, name in enumerate(("a_vasprun.xml", "a_OUTCAR", "b_OUTCAR")):
            WRITERS[name[2:]](tmp_path / name, with_energies(three_frames(k // 2)))
        assert [Path(p.id).name for p in read_pairs(tmp_path)] == ["a_vasprun.xml", "b_OUTCAR"]

    def test_two_files_of_one_vasp_run_are_one_relaxation(self, tmp_path):
        for seed, (folder, names) in enumerate({"a": ("vasprun.xml", "OUTCAR"), "b": ("OUTCAR",)}.items()):
            (tmp_path / folder).mkdir()
            for name in names:
                WRITERS[name](tmp_path / folder / name, with_energies(three_frames(seed)))
        found = read_pairs(tmp_path)
        assert [p.id for p in found] == ["a", "b"]


def with_energies(frames: list[Atoms]) -> list[Atoms]:
    return [with_forces(frame, 0.01) for frame in frames]


def without_its_end(name: str, data: bytes) -> bytes:
    """As a job leaves it that is stopped: whole frames, no last words."""
    return data[
        : data.index({"vasprun.xml": b' <structure name="finalpos"', "OUTCAR": b" General timing"}.get(name, b"=---"))
    ]


class TestCutFiles:
    @pytest.mark.parametrize("name", ["vasprun.xml", "OUTCAR", "relax.pwo", "relax.out"])
    def test_a_run_that_did_not_finish_is_refused(self, tmp_path, name):
        WRITERS[name](tmp_path / name, with_energies(three_frames()))
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(without_its_end(name, whole))
        with pytest.raises(InvalidPair, match=f"{name}: the run did not finish or the file is cut; let it") as error:
            read_pairs(tmp_path)
        assert is_one_sentence(error.value)
        for suffix in (".gz",) if name in ("vasprun.xml", "OUTCAR") else ():
            (tmp_path / name).unlink()
            (tmp_path / (name + suffix)).write_bytes(gzip.compress(without_its_end(name, whole)))
            with pytest.raises(InvalidPair, match=rf"{name}\.gz: the run did not finish"):
                read_pairs(tmp_path)

    @pytest.mark.parametrize("name", WRITERS)
    def test_no_cut_goes_unseen(self, tmp_path, name):
        path = tmp_path / name
        frames = with_energies(three_frames())
        WRITERS[name](path, frames)
        data, whole = path.read_bytes(), read_frames(path)
        ends = np.unique(np.concatenate([np.linspace(0, len(data) - 1, 60).astype(int), len(data) - np.arange(1, 30)]))
        refusals = []
        for end in ends:
            path.write_bytes(data[:end])
            try:
                found = read_frames(path)
            except InvalidPair as error:
                refusals.append(error)
                continue
            # Nothing but the last words' ends was lost.
            for a, b in zip(found, whole, strict=True):
                np.testing.assert_array_equal(a.positions, b.positions)
                np.testing.assert_array_equal(a.cell.array, b.cell.array)
                if "forces" in getattr(b.calc, "results", {}):
                    np.testing.assert_array_equal(a.get_forces(), b.get_forces())
        assert len(refusals) > 55
        assert all(name in str(error) and is_one_sentence(error) for error in refusals)
        path.write_bytes(data)
        assert len(read_frames(path)) == len(whole)

    @pytest.mark.parametrize("name", [*WRITERS, "a.db", "POSCAR"])
    def test_an_empty_file_is_called_empty(self, tmp_path, name):
        WRITERS.get(name, WRITERS["CONTCAR"])(tmp_path / name, with_energies(three_frames()))
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InvalidPair, match=f"{name}: it is empty; its run died") as error:
            read_pairs(tmp_path / name)
        assert is_one_sentence(error.value)

    def test_a_contcar_cut_within_its_last_number_is_refused(self, tmp_path):
        write_poscar_and_contcar(tmp_path, three_frames())
        text = (tmp_path / "CONTCAR").read_text()
        (tmp_path / "CONTCAR").write_text("".join(text.splitlines(keepends=True)[:16])[:-5])
        with pytest.raises(InvalidPair, match="CONTCAR: it is cut"):
            read_pairs(tmp_path)
        (tmp_path / "CONTCAR").write_text("".join(text.splitlines(keepends=True)[:16]))
        assert len(read_pairs(tmp_path)) == 1

    @pytest.mark.parametrize(
        ("header", "body"),
        [("   Si\n  8\nDirect\n", ""), ("  8\nDirect\n", ""), ("   Si\n  8 ! eight\nSelective\nDirect\n", "  F F F")],
        ids=["VASP 5", "VASP 4", "selective dynamics"],
    )
    def test_all_layouts_of_a_poscar_are_counted_alike(self, tmp_path, header, body):
        frames = three_frames()
        write_poscar_and_contcar(tmp_path, frames)
        for name, atoms in (("POSCAR", frames[0]), ("CONTCAR", frames[-1])):
            rows = "\n".join(" ".join(f"{u:.10f}" for u in row) + body for row in atoms.get_scaled_positions())
            text = f"Si\n 1.0\n 5.43 0 0\n 0 5.43 0\n 0 0 5.43\n{header}{rows}"
            (tmp_path / name).write_text(text)
        assert len(read_pairs(tmp_path)) == 1
        (tmp_path / "CONTCAR").write_text(text[: text.rindex("\n")])
        with pytest.raises(InvalidPair, match="CONTCAR: it is cut: it holds fewer positions than atoms"):
            read_pairs(tmp_path)

    def test_an_empty_line_between_structures_is_refused_by_its_number(self, tmp_path):
        write(tmp_path / "a.extxyz", three_frames())
        lines = (tmp_path / "a.extxyz").read_text().splitlines(keepends=True)
        (tmp_path / "a.extxyz").write_text("".join([*lines[:20], "\n", *lines[20:]]))
        with pytest.raises(InvalidPair, match=r"a\.extxyz: line 21 is empty.*remove the line\."):
            read_pairs(tmp_path)
        (tmp_path / "a.extxyz").write_text("".join([*lines, "\n\n"]))
        assert len(read_pairs(tmp_path)) == 1

    def test_a_second_run_that_did_not_finish_is_seen_behind_the_first(self, tmp_path):
        WRITERS["relax.pwo"](tmp_path / "relax.pwo", with_energies(three_frames()))
        text = (tmp_path / "relax.pwo").read_text()
        (tmp_path / "relax.pwo").write_text(text + text)
        assert len(read_frames(tmp_path / "relax.pwo")) == 6
        (tmp_path / "relax.pwo").write_text(text + text[: text.index("JOB DONE")])
        with pytest.raises(InvalidPair, match="the run did not finish"):
            read_pairs(tmp_path)

    def test_a_last_step_without_forces_is_seen_though_the_job_is_done(self, tmp_path):
        WRITERS["relax.pwo"](tmp_path / "relax.pwo", with_energies(three_frames()))
        text = (tmp_path / "relax.pwo").read_text()
        at = text.rindex("!    total energy")
        text = text[:at] + "     convergence NOT achieved after 100 iterations: stopping\n\n   JOB DONE.\n"
        (tmp_path / "relax.pwo").write_text(text)
        with pytest.raises(InvalidPair, match=r"relax\.pwo: its last step has no forces, so the electronic steps did"):
            read_pairs(tmp_path)

    def test_an_unfinished_run_is_left_out_where_one_asks_for_it(self, tmp_path, caplog):
        for k in range(4):
            (tmp_path / str(k)).mkdir()
            WRITERS["OUTCAR"](tmp_path / str(k) / "OUTCAR", with_energies(three_frames(k)))
        (tmp_path / "2" / "OUTCAR").write_text("vasp")
        (tmp_path / "3" / "OUTCAR").write_text("")
        assert len(read_pairs(tmp_path, skip_invalid=True)) == 2
        assert [r.message.split(";")[0].removeprefix(f"Left out: {tmp_path}/") for r in caplog.records] == [
            "2/OUTCAR: the run did not finish or the file is cut",
            "3/OUTCAR: it is empty",
            "Left out 2 of 4.",
        ]


class TestDatabases:
    def database(self, folder: Path, keys, suffix: str = "db") -> Path:
        """Three relaxations; keys(k, relaxed) are those of a row."""
        path = folder / f"a.{suffix}"
        with connect(path) as database:
            for relaxed in (False, True):
                for k in [0, 1, 2] if relaxed else [2, 0, 1]:
                    database.write(self.frames(k)[-1 if relaxed else 0], **keys(k, relaxed))
        return path

    def frames(self, k: int) -> list[Atoms]:
        frames = three_frames(k)
        for frame in frames:
            frame.symbols[:k] = "P"
        return frames

    def assert_matched(self, pairs) -> None:
        assert len(pairs) == 3
        for pair in pairs:
            frames = self.frames(sum(pair.initial.symbols == "P"))
            np.testing.assert_allclose(pair.initial.positions, frames[0].positions)
            np.testing.assert_allclose(pair.relaxed.positions, frames[-1].positions)

    @pytest.mark.parametrize("suffix", ["db", "json"])
    @pytest.mark.parametrize(
        "keys",
        [
            lambda k, relaxed: {"pair": k, "name": "same for all"},
            lambda k, relaxed: {"name": f"defect {k}", "steps": 7 * relaxed},
            lambda k, relaxed: {"charge_state": k // 2, "site": k % 2},
            lambda k, relaxed: {"steps": k + 10 * relaxed},
        ],
        ids=["pair", "name", "all other keys", "formula"],
    )
    def test_rows_are_matched(self, tmp_path, keys, suffix):
        path = self.database(tmp_path, lambda k, relaxed: {"relaxed": relaxed, **keys(k, relaxed)}, suffix)
        self.assert_matched(read_pairs(path))

    def test_ids_are_names_or_rows_and_keys_can_name_groups(self, tmp_path):
        path = self.database(tmp_path, lambda k, relaxed: {"relaxed": relaxed, "pair": f"defect {k}", "kind": f"a{k}"})
        pairs = read_pairs(tmp_path)
        assert sorted(p.id for p in pairs) == ["defect 0", "defect 1", "defect 2"]
        assert all(p.relaxed.info["kind"] == f"a{p.id[-1]}" for p in pairs)
        path.unlink()
        path = self.database(tmp_path, lambda k, relaxed: {"relaxed": relaxed})
        assert sorted(p.id for p in read_pairs(path)) == [f"row {n} of a.db" for n in (4, 5, 6)]

    def test_a_relaxation_without_its_partner_is_refused_or_left_out_by_name(self, tmp_path, caplog):
        path = self.database(tmp_path, lambda k, relaxed: {"relaxed": relaxed and k != 1, "pair": f"p{k}"})
        with pytest.raises(
            InvalidPair, match=r"p1 of .*a\.db: 2 rows have relaxed=False and 0 relaxed=True; "
        ) as error:
            read_pairs(path)
        assert is_one_sentence(error.value)
        assert len(read_pairs(path, skip_invalid=True)) == 2
        assert caplog.records[-1].message == "Left out 1 of 3."

    def test_rows_that_could_belong_to_several_are_refused_with_the_mend(self, tmp_path):
        with connect(tmp_path / "a.db") as database:
            for k in range(2):
                for relaxed in (False, True):
                    database.write(silicon(k), relaxed=relaxed)
        with pytest.raises(InvalidPair, match=r"a\.db: which of its rows belong together .*a key pair") as error:
            read_pairs(tmp_path)
        assert is_one_sentence(error.value)

    def test_rows_without_the_key_are_left_out_with_a_word(self, tmp_path, caplog):
        path = self.database(tmp_path, lambda k, relaxed: {"pair": k} | ({} if k == 1 else {"relaxed": relaxed}))
        with caplog.at_level(logging.INFO, "ase_bptt"):
            assert len(read_pairs(path)) == 2
        assert f"{path}: left out 2 rows, which have no key relaxed." in caplog.text

    def test_a_database_without_the_key_is_refused_with_the_mend(self, tmp_path):
        path = self.database(tmp_path, lambda k, relaxed: {"pair": k})
        with pytest.raises(InvalidPair, match=r"a\.db: none of its 6 rows has the key relaxed; mark each") as error:
            read_pairs(path)
        assert is_one_sentence(error.value)

    def test_a_strangers_database_is_refused_and_stays_as_it_is(self, tmp_path):
        with closing(sqlite3.connect(tmp_path / "a.db")) as connection:
            connection.execute("CREATE TABLE music (title)")
            connection.commit()
        before = (tmp_path / "a.db").read_bytes()
        with pytest.raises(InvalidPair, match=r"a\.db: ASE cannot read it") as error:
            read_pairs(tmp_path)
        assert is_one_sentence(error.value)
        assert (tmp_path / "a.db").read_bytes() == before

    @pytest.mark.parametrize("suffix", ["db", "json"])
    def test_a_cut_database_is_refused_or_left_out(self, tmp_path, suffix):
        path = self.database(tmp_path, lambda k, relaxed: {"relaxed": relaxed}, suffix)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InvalidPair, match=rf"a\.{suffix}: ASE cannot read it .*so it is cut") as error:
            read_pairs(path)
        assert is_one_sentence(error.value)
        if suffix == "db":
            write(tmp_path / "good.extxyz", three_frames())
            assert len(read_pairs(tmp_path, skip_invalid=True)) == 1
