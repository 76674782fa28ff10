"""Folders as people have them: other calculations beside relaxations, in files that are whole."""

import bz2
import gzip
import logging
import lzma
from pathlib import Path

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import write as ase_write
from helpers.dft_files import (
    computed_frames,
    write_espresso,
    write_outcar,
    write_poscar_and_contcar,
    write_vasprun,
)
from helpers.shell import is_one_sentence
from helpers.structures import rattled, silicon

from ase_bptt import read_pairs
from ase_bptt.cli import build_parser, flags, main, pair_flags
from ase_bptt.pairs import InvalidPair, NotARelaxation
from ase_bptt.pairs.formats import read_frames
from ase_bptt.pairs.survey import Survey

BAND = " CHAIN: Read ICHAIN            0\n CHAIN: Running the NEB\n"
SPRINGS = " NEB:          SPRING     -5.000000\n"
RELAXATIONS = {
    "conjugate gradients": {"IBRION": 2, "NSW": 60, "ISIF": 2},
    "quasi-Newton": {"IBRION": 1, "NSW": 99, "ML_LMLFF": "F", "IMAGES": 0},
    "damped": {"IBRION": 3, "NSW": 20, "MDALGO": 0},
}
OTHERS = {
    "molecular dynamics": [{"IBRION": 0, "NSW": 10}, {"IBRION": 0, "NSW": 9, "ML_LMLFF": "T"},
                           {"IBRION": 0, "NSW": 9, "MDALGO": 3}],
    "finite differences": [{"IBRION": 5, "NSW": 1}, {"IBRION": 6, "NSW": 61, "ISIF": 3}],
    "perturbation theory": [{"IBRION": 7, "NSW": 1}, {"IBRION": 8, "NSW": 1}],
    "image of a nudged elastic band": [{"IBRION": 3, "NSW": 50, "IMAGES": 3}, {"IBRION": 1, "NSW": 50, "IMAGES": 1}],
    "saddle point search": [{"IBRION": 3, "NSW": 50, "ICHAIN": 2}, {"IBRION": 44, "NSW": 50}],
    "single-point calculation": [{"IBRION": 2, "NSW": 0}, {"IBRION": -1, "NSW": 5}],
    "machine-learned force field": [{"IBRION": 2, "NSW": 50, "ML_LMLFF": "T"}],
}  # fmt: skip
VASP = {"vasprun.xml": write_vasprun, "OUTCAR": write_outcar, "OUTCAR.gz": write_outcar}


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def beside_a_relaxation(folder: Path) -> None:
    (folder / "good").mkdir()
    write_vasprun(folder / "good" / "vasprun.xml", computed_frames(), **RELAXATIONS["damped"])


class TestOtherCalculations:
    @pytest.mark.parametrize("name", VASP)
    @pytest.mark.parametrize(("kind", "tags"), [(kind, tags) for kind, every in OTHERS.items() for tags in every])
    def test_of_vasp_are_passed_by_and_refused_alone(self, tmp_path, caplog, name, kind, tags):
        beside_a_relaxation(tmp_path)
        (tmp_path / "other").mkdir()
        VASP[name](tmp_path / "other" / name, computed_frames(2), **tags)
        assert [p.id for p in read_pairs(tmp_path)] == ["good"]
        assert warnings(caplog) == [f"Passed by 1 that are no relaxations: {kind} (1, as other/{name})."]
        with pytest.raises(
            NotARelaxation, match=rf"other/{name}: it is no relaxation \({kind}, \w+ = .*leave it out"
        ) as e:
            read_pairs(tmp_path / "other" / name)
        assert is_one_sentence(e.value)
        with pytest.raises(InvalidPair, match=rf"other holds no relaxation; passed by 1: {kind} \(1, as {name}\)\."):
            read_pairs(tmp_path / "other")
        # As structures to relax they are as good as any.
        assert len(read_frames(tmp_path / "other" / name)) == 3

    @pytest.mark.parametrize("name", VASP)
    @pytest.mark.parametrize("tags", RELAXATIONS.values(), ids=RELAXATIONS)
    def test_relaxations_are_read(self, tmp_path, caplog, name, tags):
        VASP[name](tmp_path / name, computed_frames(), **tags)
        assert len(read_pairs(tmp_path)) == 1
        assert not warnings(caplog)

    @pytest.mark.parametrize(("said", "is_image"), [(BAND, False), (BAND + SPRINGS, True), (SPRINGS, True)])
    def test_springs_make_a_band_and_the_words_of_each_vtst_build_do_not(self, tmp_path, said, is_image):
        write_outcar(tmp_path / "OUTCAR", computed_frames(), said, IBRION=3, NSW=50)
        if is_image:
            with pytest.raises(NotARelaxation, match="nudged elastic band"):
                read_pairs(tmp_path / "OUTCAR")
        else:
            assert len(read_pairs(tmp_path)) == 1

    def test_the_settings_in_effect_count_and_not_those_asked_for(self, tmp_path):
        write_outcar(tmp_path / "OUTCAR", computed_frames(), "   NSW = 7   in effect\n", NSW=0, IBRION=1)
        assert len(read_pairs(tmp_path)) == 1

    @pytest.mark.parametrize(
        ("said", "end", "kind"),
        [
            ("     Molecular Dynamics Calculation\n", "steps", "molecular dynamics"),
            ("     Entering Dynamics:    iteration =     1\n", "steps", "molecular dynamics"),
            ("     Over-damped Langevin Dynamics Calculation\n", "steps", "molecular dynamics"),
            ("     Damped Dynamics Calculation\n     Entering Dynamics:    iteration =     1\n", "steps", None),
            ("     BFGS Geometry Optimization\n", "bfgs converged in", None),
        ],
    )
    def test_of_pw_x_likewise(self, tmp_path, caplog, said, end, kind):
        beside_a_relaxation(tmp_path)
        write_espresso(tmp_path / "md.out", computed_frames(2), said, end)
        assert len(read_pairs(tmp_path)) == (1 if kind else 2)
        assert warnings(caplog) == ([f"Passed by 1 that are no relaxations: {kind} (1, as md.out)."] if kind else [])

    def test_a_lazy_start_says_the_same_from_its_index(self, tmp_path, caplog):
        beside_a_relaxation(tmp_path)
        for k in range(2):
            write_outcar(tmp_path / f"{k}.OUTCAR", computed_frames(k), IBRION=0, NSW=5)
        for _ in range(2):
            caplog.clear()
            assert len(read_pairs(tmp_path, lazy=True, index=tmp_path / "index")) == 1
            assert warnings(caplog) == ["Passed by 2 that are no relaxations: molecular dynamics (2, as 0.OUTCAR)."]


def one_step(path: Path) -> None:
    write_espresso(path, computed_frames()[:1], "     BFGS Geometry Optimization\n")


def scf(path: Path) -> None:
    write_espresso(path, computed_frames()[:1], end="no relaxation in")


def scf_without_forces(path: Path) -> None:
    scf(path)
    text = path.read_text()
    path.write_text(text[: text.index("     Forces acting")] + text[text.index("=---") :])


class TestFewFrames:
    @pytest.mark.parametrize(
        ("write", "kind"), [(one_step, "relaxation of a single step"), (scf, "single-point calculation"),
                            (scf_without_forces, "single-point calculation")]
    )  # fmt: skip
    def test_a_complete_run_of_one_step_is_not_said_to_be_cut(self, tmp_path, caplog, write, kind):
        beside_a_relaxation(tmp_path)
        write(tmp_path / "pw.out")
        assert len(read_pairs(tmp_path)) == 1
        assert warnings(caplog) == [f"Passed by 1 that are no relaxations: {kind} (1, as pw.out)."]
        with pytest.raises(NotARelaxation, match=rf"pw\.out: it holds 1 structure \({kind}\); a relaxation needs"):
            read_pairs(tmp_path / "pw.out")

    @pytest.mark.parametrize("name", ["vasprun.xml", "vasprun.xml.gz", "OUTCAR", "pw.out"])
    def test_none_at_all_is_refused_and_left_out_beside_others(self, tmp_path, name, capsys):
        beside_a_relaxation(tmp_path)
        path = tmp_path / "none" / name
        path.parent.mkdir()
        self.write_without_steps(path)
        with pytest.raises(InvalidPair, match=rf"none/{name}: it holds 0 structures; ") as error:
            read_pairs(tmp_path)
        assert is_one_sentence(error.value)
        with pytest.raises(InvalidPair, match="it holds 0 structures"):
            read_pairs(path, path)
        assert len(read_pairs(tmp_path, skip_invalid=True)) == 1
        assert main(["relax", str(path), "--potential", "emt", "--out", str(tmp_path / "x.traj")]) == 2
        assert "it holds 0 structures" in capsys.readouterr().err

    def write_without_steps(self, path: Path) -> None:
        if path.suffix == ".out":
            path.write_text("     Program PWSCF v.7.2 starts\n\n   JOB DONE.\n")
        elif path.name == "OUTCAR":
            write_outcar(path, computed_frames()[:1])
            text = path.read_text()
            path.write_text(text[: text.index("-----")] + text[text.index(" General timing") :])
        else:
            write_vasprun(path, computed_frames()[:1])
            text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
            text = text[: text.index(" <calculation")] + text[text.index(' <structure name="finalpos"') :]
            path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())

    def test_no_frame_and_no_relaxation_is_passed_by(self, tmp_path):
        beside_a_relaxation(tmp_path)
        write_vasprun(tmp_path / "vasprun.xml", computed_frames(), NSW=0, IBRION=-1)
        text = (tmp_path / "vasprun.xml").read_text()
        (tmp_path / "vasprun.xml").write_text(text[: text.index(" <calculation")] + "</modeling>\n")
        assert len(read_pairs(tmp_path)) == 1


class TestAppendedRuns:
    @pytest.mark.parametrize("symbol", ["Si", "P"])
    def test_of_one_material_are_one_relaxation_and_of_two_are_refused(self, tmp_path, symbol):
        texts = []
        for k, element in enumerate(["Si", symbol]):
            write_outcar(tmp_path / "OUTCAR", computed_frames(k, element), IBRION=1, NSW=9)
            texts.append((tmp_path / "OUTCAR").read_text())
        (tmp_path / "OUTCAR").write_text("".join(texts))
        if symbol == "Si":
            assert len(read_pairs(tmp_path)[0].frames) == 6
        else:
            with pytest.raises(InvalidPair, match="OUTCAR: 2 runs of different atoms are appended") as error:
                read_pairs(tmp_path)
            assert is_one_sentence(error.value)

    def test_likewise_of_pw_x(self, tmp_path):
        for k, frames in enumerate([computed_frames(), [f[:6] for f in computed_frames()]]):
            for frame, whole in zip(frames, computed_frames(), strict=True):
                frame.calc = whole.calc if k == 0 else type(whole.calc)(
                    frame, energy=-1.0, forces=whole.get_forces()[: len(frame)]
                )  # fmt: skip
            write_espresso(tmp_path / f"{k}.pwo", frames)
        (tmp_path / "both.pwo").write_text((tmp_path / "0.pwo").read_text() + (tmp_path / "1.pwo").read_text())
        with pytest.raises(InvalidPair, match=r"both\.pwo: 2 runs of different atoms"):
            read_pairs(tmp_path / "both.pwo")


class TestFailuresOfTheReader:
    @pytest.mark.parametrize(
        ("name", "said", "instead"),
        [("vasprun.xml", "-1.00000000", "****************"), ("vasprun.xml", "<c>Si </c>", "<c>Zz </c>"),
         ("OUTCAR", "-1.00000000 eV", "**************** eV"), ("OUTCAR", "   ions per type =", "   ions of a type =")],
    )  # fmt: skip
    def test_are_not_blamed_on_a_finished_file(self, tmp_path, name, said, instead):
        VASP[name](tmp_path / name, computed_frames())
        text = (tmp_path / name).read_text()
        assert said in text
        (tmp_path / name).write_text(text.replace(said, instead))
        with pytest.raises(InvalidPair, match=rf"{name}: its run has finished, but ASE's reader fails") as error:
            read_pairs(tmp_path)
        assert is_one_sentence(error.value)


def leg(first: float, last: float, seed: int = 1) -> list:
    """Two frames of one relaxation, between so many Å of noise and so many."""
    frames = [rattled(silicon(seed), amplitude, seed) for amplitude in (first, last)]
    for frame, whole in zip(frames, computed_frames(), strict=False):
        frame.calc = SinglePointCalculator(frame, energy=-1.0, forces=whole.get_forces())
    return frames


LEGS = {
    "custodian's": ["vasprun.xml.relax1.gz", "vasprun.xml.relax2.gz"],
    "three": ["OUTCAR.relax1", "OUTCAR.relax2.gz", "OUTCAR"],
    "dated": ["OUTCAR_11h05_30Mar2023", "OUTCAR_09h12_01Apr2023", "OUTCAR"],
    "mixed": ["a_vasprun_1.xml", "a_OUTCAR-2.gz"],
}


def written_leg(path: Path, frames: list) -> None:
    plain = path.with_name("OUTCAR" if "OUTCAR" in path.name else "vasprun.xml")
    (write_outcar if "OUTCAR" in path.name else write_vasprun)(plain, frames, IBRION=2, NSW=9)
    data = plain.read_bytes()
    plain.unlink()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


class TestNames:
    @pytest.mark.parametrize("lazy", [False, True])
    @pytest.mark.parametrize("names", LEGS.values(), ids=LEGS)
    def test_legs_are_one_relaxation_in_the_order_in_which_they_continue(self, tmp_path, names, lazy):
        (tmp_path / "run").mkdir()
        amplitudes = [0.2, 0.1, 0.05, 0.0]
        for k, name in enumerate(names):
            written_leg(tmp_path / "run" / name, leg(*amplitudes[k : k + 2]))
        for _ in range(2):
            (pair,) = read_pairs(tmp_path, lazy=lazy, index=tmp_path / "index" if lazy else None)
            np.testing.assert_allclose(pair.initial.positions, leg(0.2, 0)[0].positions, atol=1e-4)
            np.testing.assert_allclose(pair.relaxed.positions, leg(0, amplitudes[len(names)])[1].positions, atol=1e-4)
            assert len(pair.frames) == len(list(pair.frames)) == 2 * len(names)

    def test_runs_that_do_not_continue_each_other_are_relaxations_of_their_own(self, tmp_path):
        for k in range(3):
            written_leg(tmp_path / f"OUTCAR.run{k}", leg(0.2, 0.1 * (k != 1), k))
        assert [p.id for p in read_pairs(tmp_path)] == [f"OUTCAR.run{k}" for k in range(3)]

    def test_names_that_only_begin_like_those_of_vasp_are_not_read(self, tmp_path):
        beside_a_relaxation(tmp_path)
        for name in ("OUTCAR.png", "vasprun.xml.md5", "OUTCAR_notes.txt", "POSCAR.vesta"):
            (tmp_path / name).write_text("something else\n")
        assert len(read_pairs(tmp_path)) == 1

    @pytest.mark.parametrize("zipped", [(".gz", ".gz"), ("", ".gz"), (".bz2", ""), (".xz", ".gz")])
    def test_poscar_and_contcar_are_read_zipped_or_not(self, tmp_path, zipped):
        write_poscar_and_contcar(tmp_path, computed_frames())
        for name, end in zip(("POSCAR", "CONTCAR"), zipped, strict=True):
            self.zip(tmp_path / name, end)
        for path in (tmp_path, tmp_path / f"POSCAR{zipped[0]}", tmp_path / f"CONTCAR{zipped[1]}"):
            (pair,) = read_pairs(path)
            np.testing.assert_allclose(pair.initial.positions, computed_frames()[0].positions, atol=1e-6)

    def zip(self, path: Path, end: str) -> None:
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}[end]
        data = path.read_bytes()
        path.unlink()
        path.with_name(path.name + end).write_bytes(pack(data))

    @pytest.mark.parametrize("end", ["", ".gz"])
    @pytest.mark.parametrize(
        ("incar", "passed"),
        [("IBRION = 0\nNSW=100\n", True), ("nsw = 0 ! static", True), ("# NSW = 0\nIBRION=2 ; NSW = 30\n", False)],
    )
    def test_an_incar_says_what_a_contcar_is_the_end_of(self, tmp_path, incar, passed, end):
        beside_a_relaxation(tmp_path)
        (tmp_path / "run").mkdir()
        write_poscar_and_contcar(tmp_path / "run", computed_frames(4))
        (tmp_path / "run" / "INCAR").write_text(incar)
        self.zip(tmp_path / "run" / "INCAR", end)
        assert len(read_pairs(tmp_path)) == 2 - passed

    @pytest.mark.parametrize("name", ["relax.out", "relax.pwo", "relax.out.gz", "pw.log"])
    def test_pw_x_is_known_behind_any_lines_of_the_machine(self, tmp_path, name):
        write_espresso(tmp_path / "x", computed_frames())
        text = (tmp_path / "x").read_text()
        (tmp_path / "x").unlink()

        def written(text: str) -> None:
            data = ("a line of the machine\n" * 60_000 + text).encode()
            (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

        written(text)
        assert len(read_pairs(tmp_path / name if name == "pw.log" else tmp_path)) == 1
        written(text[: text.index("=---")])
        with pytest.raises(InvalidPair, match="the run did not finish or the file is cut"):
            read_pairs(tmp_path / name)

    @pytest.mark.parametrize("name", ["vasprun.xml.relax1", "OUTCAR.relax2.gz", "my_run"])
    def test_a_cut_file_of_another_name_is_refused_when_it_is_given(self, tmp_path, name):
        written_leg(tmp_path / ("OUTCAR" if name == "my_run" else name), leg(0.1, 0.0))
        path = next(tmp_path.iterdir()).rename(tmp_path / name)
        data = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
        data = data[: data.index(b' <structure name="finalpos"' if b"<modeling>" in data else b" General timing")]
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        with pytest.raises(InvalidPair, match="the run did not finish or the file is cut"):
            read_pairs(path)


class TestSelectiveDynamics:
    SAID = "   using selective dynamics as specified on POSCAR\n"

    def written(self, folder: Path, outcar: str, beside: str | None) -> None:
        write_outcar(folder / "OUTCAR", computed_frames(), self.SAID, IBRION=2, NSW=9)
        (folder / "OUTCAR").rename(folder / outcar)
        if beside is not None:
            held = computed_frames()[0]
            held.set_constraint(FixAtoms([1, 4, 5]))
            ase_write(folder / "x", held, format="vasp")
            data = (folder / "x").read_bytes()
            (folder / "x").unlink()
            (folder / beside).write_bytes(gzip.compress(data) if beside.endswith(".gz") else data)

    @pytest.mark.parametrize(
        ("outcar", "beside"),
        [("OUTCAR", "CONTCAR.gz"), ("OUTCAR", "POSCAR"), ("OUTCAR", "POSCAR.gz"), ("OUTCAR.relax1", "POSCAR.relax1.gz"),
         ("OUTCAR.relax1", "CONTCAR"), ("OUTCAR_1", "POSCAR")],
    )  # fmt: skip
    def test_are_read_from_the_file_beside_an_outcar(self, tmp_path, outcar, beside):
        self.written(tmp_path, outcar, beside)
        (pair,) = read_pairs(tmp_path)
        for atoms in (pair.initial, pair.relaxed):
            assert [sorted(c.index) for c in atoms.constraints] == [[1, 4, 5]]

    def test_without_one_the_outcar_is_refused(self, tmp_path):
        self.written(tmp_path, "OUTCAR", None)
        with pytest.raises(
            InvalidPair, match="OUTCAR: it was run with selective dynamics, which OUTCAR does not"
        ) as error:
            read_pairs(tmp_path)
        assert is_one_sentence(error.value)

    def test_nothing_is_held_where_the_run_did_not(self, tmp_path):
        self.written(tmp_path, "OUTCAR", "POSCAR.gz")
        write_outcar(tmp_path / "OUTCAR", computed_frames(), IBRION=2, NSW=9)
        assert not read_pairs(tmp_path)[0].initial.constraints


def charges(folder: Path, amplitudes: dict[str, float], noise: float = 0.2) -> None:
    """Relaxations from one start that end at different places."""
    for name, amplitude in amplitudes.items():
        start, end = leg(noise, 0.0)
        end.positions += amplitude * np.random.default_rng(5).normal(size=end.positions.shape)
        end.calc.atoms = end.copy()
        (folder / name).mkdir(parents=True)
        write_vasprun(folder / name / "vasprun.xml", [start, end], IBRION=2, NSW=9)


class TestEqualStarts:
    @pytest.mark.parametrize("lazy", [False, True])
    def test_are_one_group_and_named_with_how_far_apart_they_end(self, tmp_path, caplog, lazy):
        charges(tmp_path, {"q=-1": 0.0, "q=0": 0.25, "q=1": 0.5})
        pairs = read_pairs(tmp_path, lazy=lazy, index=tmp_path / "index" if lazy else None)
        assert {p.group for p in pairs} == {"q=-1"}
        (said,) = [text for text in warnings(caplog) if "begin in one structure" in text]
        assert said.startswith("q=-1, q=0, q=1 begin in one structure and end up to ")
        moves = 0.5 * np.random.default_rng(5).normal(size=(8, 3))
        assert f"{np.linalg.norm(moves - moves.mean(0), axis=1).max():.2f} Å apart" in said

    def test_that_end_alike_are_not_warned_of(self, tmp_path, caplog):
        charges(tmp_path, {"one": 0.0, "two": 0.01})
        assert len({p.group for p in read_pairs(tmp_path)}) == 1
        assert not warnings(caplog)

    def test_other_starts_that_end_elsewhere_are_apart(self, tmp_path, caplog):
        charges(tmp_path, {"one": 0.0})
        charges(tmp_path, {"two": 0.5}, noise=0.19)
        assert len({p.group for p in read_pairs(tmp_path)}) == 2
        assert not warnings(caplog)


class TestCopies:
    @pytest.mark.parametrize("lazy", [False, True])
    @pytest.mark.parametrize(
        "names", [("vasprun.xml", "vasprun.xml"), ("OUTCAR", "vasprun.xml.gz"), ("OUTCAR.gz", "OUTCAR")]
    )
    def test_count_once(self, tmp_path, caplog, names, lazy):
        for folder, name in zip(("backup/run", "run"), names, strict=True):
            (tmp_path / folder).mkdir(parents=True)
            VASP.get(name, write_vasprun)(tmp_path / folder / name, computed_frames(), IBRION=2, NSW=9)
        for _ in range(2):
            caplog.clear()
            (pair,) = read_pairs(tmp_path, lazy=lazy, index=tmp_path / "index" if lazy else None)
            assert pair.id == "backup/run"
            assert warnings(caplog) == [f"Counted once: 1 copies, as run/{names[1]} of backup/run/{names[0]}."]

    @pytest.mark.parametrize("change", ["energy", "end", "start"])
    def test_what_differs_a_little_is_no_copy(self, tmp_path, change):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            frames = computed_frames()
            if folder == "b" and change == "energy":
                frames[-1].calc.results["energy"] -= 0.01
            elif folder == "b":
                moved = frames[0 if change == "start" else -1]
                moved.positions[3, 1] += 0.01
                moved.calc.atoms = moved.copy()
            write_outcar(tmp_path / folder / "OUTCAR", frames)
        assert len(read_pairs(tmp_path)) == 2


def with_roles(n: int, key: str = "pair_id", between: bool = False) -> list:
    """The frames of n relaxations, as one file holds them."""
    frames = []
    for k in range(n):
        for frame, role in zip(computed_frames(k), ("initial", "between", "relaxed"), strict=True):
            frame.info |= {key: f"pair {k}", "role": role}
            if between or role != "between":
                frames.append(frame)
    return frames


class TestManyInOneFile:
    @pytest.mark.parametrize("lazy", [False, True])
    @pytest.mark.parametrize("key", ["pair_id", "id"])
    @pytest.mark.parametrize(("name", "between"), [("a.extxyz", False), ("a.traj", True), ("a.xyz", True)])
    def test_frames_with_a_name_and_a_role_are_so_many_relaxations(self, tmp_path, name, key, between, lazy):
        ase_write(tmp_path / name, with_roles(3, key, between))
        for _ in range(2):
            pairs = read_pairs(tmp_path, lazy=lazy, index=tmp_path / "index" if lazy else None)
            assert [p.id for p in pairs] == ["pair 0", "pair 1", "pair 2"]
            for k, pair in enumerate(pairs):
                np.testing.assert_allclose(pair.initial.positions, computed_frames(k)[0].positions, atol=1e-7)
                np.testing.assert_allclose(pair.relaxed.positions, computed_frames(k)[-1].positions, atol=1e-7)
                assert len(pair.frames) == 3 * between

    @pytest.mark.parametrize("lost", [2, 3])
    def test_one_without_its_partner_is_refused_or_left_out_by_name(self, tmp_path, lost):
        frames = with_roles(3)
        del frames[lost]
        ase_write(tmp_path / "a.extxyz", frames)
        with pytest.raises(
            InvalidPair, match=r"pair 1 of .*a\.extxyz: \d of its frames have the role initial"
        ) as error:
            read_pairs(tmp_path)
        assert is_one_sentence(error.value)
        assert [p.id for p in read_pairs(tmp_path, skip_invalid=True)] == ["pair 0", "pair 2"]

    @pytest.mark.parametrize("key", ["id", "name", "config_type", "material"])
    def test_two_ends_of_two_structures_are_refused(self, tmp_path, key):
        frames = computed_frames()
        frames[0].info[key], frames[-1].info[key] = "one", "another"
        ase_write(tmp_path / "a.extxyz", frames)
        with pytest.raises(
            InvalidPair, match=rf"a\.extxyz: {key} of its first frame is one and of its last another"
        ) as error:
            read_pairs(tmp_path)
        assert is_one_sentence(error.value)

    @pytest.mark.parametrize("key", ["role", "status", "steps"])
    def test_what_may_change_along_a_relaxation_is_not(self, tmp_path, key):
        frames = computed_frames()
        for k, frame in enumerate(frames):
            frame.info |= {"id": "same", key: k if key == "steps" else f"state {k}"}
        ase_write(tmp_path / "a.extxyz", frames[::2])
        assert [p.id for p in read_pairs(tmp_path)] == ["same"]


class TestForcesLeft:
    @pytest.mark.parametrize(("largest", "limit", "used"), [(0.6, 0.5, 0), (0.4, 0.5, 1), (0.6, 1.0, 1), (0.6, None, 1),
                                                            (0.1, 0.05, 0), (np.nan, 0.5, 0)])  # fmt: skip
    def test_what_is_far_from_relaxed_is_no_reference(self, tmp_path, caplog, largest, limit, used):
        beside_a_relaxation(tmp_path)
        ase_write(tmp_path / "bad.traj", computed_frames(2, largest=largest))
        assert len(read_pairs(tmp_path, max_reference_force=limit)) == 1 + used
        if not used:
            said = f"Passed by 1 that are no relaxations: not converged (1, as bad.traj with {largest:.2f} eV/Å left)."
            assert warnings(caplog) == [said]
            with pytest.raises(NotARelaxation, match=rf"bad\.traj: a force of {largest:.2f} eV/Å is left") as error:
                read_pairs(tmp_path / "bad.traj", max_reference_force=limit)
            assert is_one_sentence(error.value)

    def test_forces_on_fixed_atoms_do_not_count(self, tmp_path):
        frames = computed_frames(largest=3.0)
        for frame in frames:
            frame.set_constraint(FixAtoms([2]))
        ase_write(tmp_path / "a.traj", frames)
        assert len(read_pairs(tmp_path)) == 1

    def test_each_limit_has_an_index_of_its_own(self, tmp_path):
        beside_a_relaxation(tmp_path)
        ase_write(tmp_path / "bad.traj", computed_frames(2, largest=0.6))
        for limit, n in ((0.5, 1), (0.7, 2), (0.5, 1)):
            assert len(read_pairs(tmp_path, lazy=True, index=tmp_path / "index", max_reference_force=limit)) == n

    def test_the_flag_is_passed_on(self, tmp_path, monkeypatch):
        found = {}
        monkeypatch.setattr(pair_flags, "read_archive", lambda *paths, **how: found.update(how) or ([], Survey("")))
        parser = build_parser()
        for given, expected in (([], 0.5), (["--max-reference-force", "0.2"], 0.2)):
            for words in (["train"], ["evaluate"], ["info", "emt", "--pairs"]):
                pair_flags.read_grouped(flags.completed(parser, [*words, str(tmp_path), *given]))
                assert found["choices"].max_force == expected
