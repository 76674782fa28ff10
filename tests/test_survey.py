"""What a whole archive holds: relaxations over several folders, methods, charges, and all else, each with its count."""

import gzip
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from ase import units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write as ase_write
from helpers.dft_files import (
    computed_frames,
    write_aims,
    write_cp2k,
    write_espresso,
    write_outcar,
    write_poscar_and_contcar,
    write_vasprun,
)
from helpers.shell import is_one_sentence, run
from helpers.structures import rattled, silicon

from ase_bptt import read_pairs
from ase_bptt.pairs import InvalidPair, NotARelaxation, loading
from ase_bptt.pairs.loading import Choices
from ase_bptt.pairs.reading import read_archive

RELAX = {"IBRION": 2, "NSW": 50}


def frames_between(*amplitudes: float, largest: float = 0.01) -> list:
    """Frames on the way to one minimum, so many Å of noise from it."""
    frames = [rattled(silicon(1), amplitude, 1) for amplitude in amplitudes]
    for frame in frames:
        forces = np.zeros((len(frame), 3))
        forces[2, 1] = largest
        frame.calc = SinglePointCalculator(frame, energy=-1.0 - frame.positions[0, 0], forces=forces)
    return frames


def written(path: Path, frames: list, said: str = "", **tags: object) -> Path:
    """An output of VASP of this name, in a folder that is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if "OUTCAR" in path.name:
        write_outcar(path, frames, said, **RELAX | tags)
    else:
        write_vasprun(path, frames, **RELAX | tags)
    return path


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(params=[False, True], ids=["eager", "lazy"])
def reading(request, tmp_path_factory):
    """Both ways of reading."""
    index = tmp_path_factory.mktemp("index") if request.param else None
    return lambda path: read_pairs(path, lazy=request.param, index=index)


class TestChainsOverFolders:
    @pytest.mark.parametrize(
        "names",
        [("calc-000/OUTCAR", "calc-001/OUTCAR"), ("b_relax_1/vasprun.xml", "a_relax_2/OUTCAR.gz", "c/vasprun.xml.gz"),
         ("v/vasp_gam/OUTCAR", "v/vasp_std/vasprun.xml"), ("x/launcher/1/OUTCAR", "x/launcher/2/OUTCAR", "y/OUTCAR")],
    )  # fmt: skip
    def test_are_one_pair_from_the_first_start_to_the_last_end(self, tmp_path, reading, names, caplog):
        amplitudes = [0.2, 0.12, 0.06, 0.0]
        for k, name in enumerate(names):
            # Before the last leg it is not converged, which is no fault.
            written(
                tmp_path / name, frames_between(*amplitudes[k : k + 2], largest=0.9 if k + 1 < len(names) else 0.01)
            )
        for _ in range(2):
            (pair,) = reading(tmp_path)
            np.testing.assert_allclose(pair.initial.positions, frames_between(0.2)[0].positions, atol=1e-4)
            end = frames_between(amplitudes[len(names)])[0].positions
            np.testing.assert_allclose(pair.relaxed.positions, end, atol=1e-4)
            assert len(pair.frames) == 2 * len(names)
        assert not warnings(caplog)

    def test_a_leg_may_begin_at_the_step_that_the_one_before_did_not_compute(self, tmp_path):
        written(tmp_path / "1" / "OUTCAR", frames_between(0.2, 0.12, largest=2.0))
        write_poscar_and_contcar(tmp_path / "1", frames_between(0.2, 0.1))
        written(tmp_path / "2" / "OUTCAR", frames_between(0.1, 0.05, largest=2.0))
        written(tmp_path / "3" / "vasprun.xml", frames_between(0.05, 0.02, largest=2.0))
        text = (tmp_path / "3" / "vasprun.xml").read_text()
        write_vasprun(tmp_path / "x", frames_between(0.01, 0.01))
        final = (tmp_path / "x").read_text()
        cut = ' <structure name="finalpos"'
        (tmp_path / "3" / "vasprun.xml").write_text(text[: text.index(cut)] + final[final.index(cut) :])
        (tmp_path / "x").unlink()
        written(tmp_path / "4" / "OUTCAR", frames_between(0.01, 0.0))
        (pair,) = read_pairs(tmp_path)
        assert len(pair.frames) == 8
        np.testing.assert_allclose(pair.initial.positions, frames_between(0.2)[0].positions, atol=1e-4)

    @pytest.mark.parametrize("kept", ["error.1", "error.1.tar.gz"])
    def test_it_begins_where_custodian_first_started_it(self, tmp_path, kept):
        written(tmp_path / "run" / "OUTCAR", frames_between(0.1, 0.0))
        stopped = tmp_path / "run" / "error.1"
        written(stopped / "OUTCAR", frames_between(0.2, 0.1))
        (stopped / "OUTCAR").write_text((stopped / "OUTCAR").read_text()[:900])
        write_poscar_and_contcar(stopped, frames_between(0.2, 0.1))
        if kept.endswith(".gz"):
            with tarfile.open(tmp_path / "run" / kept, "w:gz") as files:
                for name in ("POSCAR", "CONTCAR", "OUTCAR"):
                    files.add(stopped / name, name)
            for file in stopped.iterdir():
                file.unlink()
            stopped.rmdir()
        (pair,) = read_pairs(tmp_path)
        np.testing.assert_allclose(pair.initial.positions, frames_between(0.2)[0].positions, atol=1e-4)

    @pytest.mark.parametrize(
        ("tags", "kept"),
        [({"LHFCALC": "T", "HFSCREEN": 0.2, "GGA": "PE"}, 1), ({"GGA": "PS"}, 1), ({"GGA": "PE", "LSORBIT": "T"}, 1),
         ({"GGA": "PE", "METAGGA": "R2SCAN"}, 1), ({"GGA": "PE", "ENCUT": 700}, 1), ({"GGA": "PE", "IVDW": 12}, 1)],
    )  # fmt: skip
    def test_a_further_calculation_is_no_pair_of_its_own(self, tmp_path, reading, tags, kept, caplog):
        written(tmp_path / "one" / "vasprun.xml", frames_between(0.2, 0.1), GGA="PE", LSORBIT="F", ENCUT=400)
        written(tmp_path / "two" / "vasprun.xml", frames_between(0.1, 0.03), **{"LSORBIT": "F"} | tags)
        (pair,) = reading(tmp_path)
        is_leg = "ENCUT" in tags
        assert len(pair.frames) == (4 if is_leg else 2)
        said = (
            "Passed by 1 that are no relaxations: further calculation of a relaxed structure (1, as two/vasprun.xml)."
        )
        assert warnings(caplog)[: not is_leg] == [said] * (not is_leg)

    def test_in_another_charge_it_is_a_relaxation_of_its_own(self, tmp_path, caplog):
        known = "   VRHFIN =Si: s2p2\n   ZVAL   =   4.00\n"
        written(tmp_path / "q0" / "OUTCAR", frames_between(0.2, 0.1), known, NELECT=32.0)
        written(tmp_path / "q1" / "OUTCAR", frames_between(0.1, 0.0), known, NELECT=31.0)
        for lazy in (False, True):
            pairs = read_pairs(tmp_path, lazy=lazy, index=tmp_path / "index" if lazy else None)
            assert [p.relaxed.info["charge"] for p in pairs] == [0.0, 1.0]
            # The start of one is the target of the other: they stay on one side of a split.
            assert len({p.group for p in pairs}) == 1
        assert not warnings(caplog)

    @pytest.mark.parametrize("name", ["a.extxyz", "a.traj"])
    def test_what_nobody_knows_the_origin_of_is_a_relaxation_of_its_own(self, tmp_path, name):
        for folder, amplitudes in (("1", (0.2, 0.1)), ("2", (0.1, 0.0))):
            (tmp_path / folder).mkdir()
            ase_write(tmp_path / folder / name, frames_between(*amplitudes))
        assert len(read_pairs(tmp_path)) == 2

    def test_two_that_did_not_move_are_no_circle(self, tmp_path):
        for k in range(3):
            frames = frames_between(0.1, 0.1)
            for frame in frames:
                frame.calc.results["energy"] = -1.0 - k
            written(tmp_path / str(k) / "OUTCAR", frames)
        assert len(read_pairs(tmp_path)) == 1


class TestMethods:
    @pytest.mark.parametrize(
        ("one", "other", "said"),
        [({"GGA": "PE"}, {"GGA": "PS"}, "functional PBE (1, as a/vasprun.xml), PBEsol (1, as b/vasprun.xml)"),
         ({"LHFCALC": "T", "HFSCREEN": 0.2}, {"LHFCALC": "T", "HFSCREEN": 0},
          "functional HSE06 (1, as a/vasprun.xml), PBE0 (1, as b/vasprun.xml)"),
         ({"LSORBIT": "T"}, {"LSORBIT": "F"}, "spin-orbit coupling yes (1, as a/vasprun.xml), no"),
         ({"GGA": "PE", "ENCUT": 400}, {"GGA": "PE", "ENCUT": 520}, None)],
    )  # fmt: skip
    def test_an_archive_that_mixes_them_is_told_of(self, tmp_path, caplog, one, other, said):
        written(tmp_path / "a" / "vasprun.xml", frames_between(0.2, 0.0), **one)
        frames = computed_frames(5, "P")
        written(tmp_path / "b" / "vasprun.xml", frames, **other)
        read_pairs(tmp_path)
        found = [text for text in warnings(caplog) if "several methods" in text]
        assert len(found) == (said is not None)
        assert said is None or said in found[0]

    def test_u_counts_for_the_elements_of_both(self, tmp_path, caplog):
        header = "   VRHFIN =P: s2p3\n   VRHFIN =Si: s2p2\n   LEXCH  = PE\n"
        u = "   angular momentum for each species LDAUL = 1 -1\n   U (eV)           for each species LDAUU = {} 0.0\n"
        j = "   J (eV)           for each species LDAUJ =   0.0 0.0\n"
        for k, value in enumerate(("3.0", "4.0")):
            written(tmp_path / str(k) / "OUTCAR", computed_frames(k + 1, "P"), header + u.format(value) + j)
        written(tmp_path / "2" / "OUTCAR", frames_between(0.2, 0.0), "   LEXCH  = PE\n")
        read_pairs(tmp_path)
        (said,) = [text for text in warnings(caplog) if "several methods" in text]
        assert "U (eV) of P 3 (1, as 0/OUTCAR), 4 (1, as 1/OUTCAR)" in said
        assert "of Si" not in said

    def test_pw_x_says_its_functional_and_cutoff(self, tmp_path):
        said = "     kinetic-energy cutoff     =      60.0000  Ry\n     Exchange-correlation= SLA  PW   PBX  PBC\n"
        write_espresso(tmp_path / "a.out", computed_frames(), said)
        _, survey = read_archive(tmp_path)
        assert {name: [*values] for name, values in survey.settings.items() if not name.startswith("U ")} == {
            "functional": ["PBE"],
            "cutoff": ["60 Ry"],
        }


class TestWhatAnOutputHolds:
    HEADER = "   VRHFIN =P: s2p3\n   VRHFIN =Si: s2p2\n   ZVAL   =   5.00  4.00\n"

    @pytest.mark.parametrize(("electrons", "charge"), [(33.0, 0.0), (32.0, 1.0), (35.0, -2.0), (32.5, 0.5)])
    def test_the_charge_is_the_valence_minus_the_electrons(self, tmp_path, electrons, charge):
        written(tmp_path / "OUTCAR", computed_frames(symbol="P"), self.HEADER, NELECT=electrons)
        (pair,) = read_pairs(tmp_path)
        assert [atoms.info["charge"] for atoms in (pair.initial, pair.relaxed)] == [charge] * 2

    @pytest.mark.parametrize(
        "said",
        ["     number of electrons       =        31.00\n     atomic species   valence    mass     pseudopotential\n"
         "        P              5.00    30.97376     P ( 1.00)\n        Si1            4.00    28.08550   Si( 1.00)\n",
         "  tot_charge = 2\n"],
    )  # fmt: skip
    def test_of_pw_x_likewise(self, tmp_path, said):
        write_espresso(tmp_path / "a.pwo", computed_frames(symbol="P"), said + "\n")
        assert read_pairs(tmp_path)[0].relaxed.info["charge"] == 2.0

    def test_moments_at_the_start(self, tmp_path):
        written(tmp_path / "OUTCAR", computed_frames(), "   MAGMOM = 2*3.0 5*0 -1\n", ISPIN=2)
        assert read_pairs(tmp_path)[0].initial.get_initial_magnetic_moments().tolist() == [3, 3, 0, 0, 0, 0, 0, -1]
        written(tmp_path / "OUTCAR", computed_frames(), "   MAGMOM = 2*3.0 5*0\n", ISPIN=2)
        assert not read_pairs(tmp_path)[0].initial.has("initial_magmoms")

    @pytest.mark.parametrize("line", ["atom:{k:5d}    charge:    4.0    magn:  {x:8.4f}    constr:    0.0000",
                                      "atom {k:3d} (R=0.218)  charge=  4.0  magn=  {x:8.4f}"])  # fmt: skip
    def test_moments_of_pw_x_at_the_start_and_at_the_end(self, tmp_path, line):
        species = (
            "     atomic species   valence    mass     pseudopotential\n        P1             5.00    30.97376   P\n"
            "        Si             4.00    28.08550   Si( 1.00)\n\n     Starting magnetic structure \n"
            "     atomic species   magnetization\n        P1           0.400\n        Si          -0.100\n\n"
        )
        sites = "".join("     " + line.format(k=k, x=0.1 * k) + "\n" for k in range(1, 9))
        write_espresso(tmp_path / "a.out", computed_frames(symbol="P"))
        text = (tmp_path / "a.out").read_text().replace("   Cartesian axes\n", f"{species}   Cartesian axes\n")
        text = text.replace("           P   tau(", "           P1  tau(")
        text = text.replace("!    total energy", f"     Magnetic moment per site:\n{sites}\n!    total energy")
        (tmp_path / "a.out").write_text(text)
        (pair,) = read_pairs(tmp_path)
        assert pair.initial.get_initial_magnetic_moments() == pytest.approx([2.0, *7 * [-0.4]])
        assert pair.relaxed.get_magnetic_moments() == pytest.approx(0.1 * np.arange(1, 9))

    def test_fixed_atoms_of_pw_x(self, tmp_path):
        write_espresso(tmp_path / "a.out", computed_frames(symbol="P"))
        lines = (tmp_path / "a.out").read_text().splitlines(keepends=True)
        for k in (k for k, line in enumerate(lines) if line.startswith("ATOMIC_POSITIONS")):
            lines[k + 2] = lines[k + 2].rstrip() + "   0   0   0\n"
            lines[k + 4] = lines[k + 4].rstrip() + "   1   0   1\n"
        (tmp_path / "a.out").write_text("".join(lines))
        (pair,) = read_pairs(tmp_path)
        for atoms in (pair.initial, pair.relaxed):
            whole, partly = atoms.constraints
            assert whole.index.tolist() == [1]
            assert (partly.index.tolist(), partly.mask.tolist()) == ([3], [False, True, False])

    def test_fixed_atoms_of_fhi_aims(self, tmp_path):
        geometry = (
            "  lattice_vector 5 0 0\n  constrain_relaxation .true.\n  atom 0 0 0 P\n    constrain_relaxation .true.\n"
            "  atom 0 0 0 Si\n    constrain_relaxation x\n    constrain_relaxation z\n" + 6 * "  atom 1 1 1 Si\n"
        )
        write_aims(tmp_path / "aims.out", computed_frames(symbol="P"), f"  Geometry relaxation: BFGS.\n{geometry}")
        whole, partly = read_pairs(tmp_path)[0].initial.constraints
        assert whole.index.tolist() == [0]
        assert (partly.index.tolist(), partly.mask.tolist()) == ([1], [True, False, True])

    def test_moments_of_fhi_aims_likewise(self, tmp_path):
        geometry = "  atom 0 0 0 P\n    initial_moment 1.5\n" + 7 * "  atom 1 1 1 Si\n"
        said = f"  default_initial_moment 0.25\n  Geometry relaxation: Textbook BFGS.\n{geometry}"
        write_aims(tmp_path / "aims.out", computed_frames(symbol="P"), said)
        rows = "".join(f"  |  {k:4d}   {0.1 * k:9.6f}  0.0\n" for k in range(1, 9))
        spins = f"  Summary of the per-atom spin analysis:\n  |\n  |  atom       spin   l=0\n{rows}  |\n"
        text = (tmp_path / "aims.out").read_text()
        (tmp_path / "aims.out").write_text(text.replace("          Have a nice", f"{spins}          Have a nice"))
        (pair,) = read_pairs(tmp_path)
        assert pair.initial.get_initial_magnetic_moments() == pytest.approx([1.5, *7 * [0.25]])
        assert pair.relaxed.get_magnetic_moments() == pytest.approx(0.1 * np.arange(1, 9))

    @pytest.mark.parametrize(
        ("calculation", "kind"), [("scf", "single-point calculation"), ("vc-md", "molecular dynamics"), ("relax", None)]
    )
    @pytest.mark.parametrize("where", ["beside", "echoed"])
    def test_the_input_of_pw_x_says_what_it_is(self, tmp_path, calculation, kind, where):
        said = f"&CONTROL\n  calculation = '{calculation}'\n  nstep = 80 ! at most\n/\n"
        write_espresso(tmp_path / "a.out", computed_frames(), end="     something else, after")
        if where == "beside":
            (tmp_path / "a.in").write_text(said)
        else:
            (tmp_path / "a.out").write_text(said + (tmp_path / "a.out").read_text())
        if kind is None:
            assert len(read_pairs(tmp_path)) == 1
        else:
            with pytest.raises(NotARelaxation, match=rf"\({kind}, calculation = {calculation}\)"):
                read_pairs(tmp_path / "a.out")

    def test_electrons_that_did_not_converge_are_not_called_a_cut(self, tmp_path):
        write_espresso(tmp_path / "a.out", computed_frames())
        text = (tmp_path / "a.out").read_text()
        last = text.rindex("     Forces acting")
        end = text.index("ATOMIC_POSITIONS", last)
        said = "     convergence NOT achieved after 100 iterations: stopping\n\n"
        (tmp_path / "a.out").write_text(text[:last] + said + text[end:])
        with pytest.raises(InvalidPair, match="no forces, so the electronic steps did not converge") as error:
            read_pairs(tmp_path)
        assert is_one_sentence(error.value)


class TestOtherCodes:
    @pytest.mark.parametrize(
        ("name", "said", "code"),
        [("a.log", "Entering Gaussian System", "Gaussian"), ("b.castep", " CASTEP version 22", "CASTEP"),
         ("c.out", "   O   R   C   A", "ORCA"), ("d.out", "Quantum ESPRESSO suite", "another program of Quantum E")],
    )  # fmt: skip
    def test_are_passed_by_with_their_name(self, tmp_path, caplog, name, said, code):
        written(tmp_path / "good" / "OUTCAR", computed_frames())
        (tmp_path / name).write_text(f"\n{said}\n")
        assert len(read_pairs(tmp_path)) == 1
        (said,) = warnings(caplog)
        assert said.startswith(f"Passed by 1 that are no relaxations: output of {code}")
        assert said.endswith(f"(1, as {name}).")

    @pytest.mark.parametrize(
        ("time", "kind"), [("", "trajectory of CP2K, read with its output"), (" time = 0.5,", "molecular dynamics")]
    )
    def test_a_trajectory_without_its_cell_is_refused(self, tmp_path, time, kind):
        (tmp_path / "x-pos-1.xyz").write_text("".join(f"1\n i =  {k},{time} E = -1.0\nSi 0 0 {k}\n" for k in range(3)))
        with pytest.raises(NotARelaxation, match="it is a trajectory of CP2K, which has no cell") as error:
            read_pairs(tmp_path / "x-pos-1.xyz")
        assert is_one_sentence(error.value)
        assert error.value.kind == kind

    def test_what_ase_alone_reads_is_said_not_to_be_checked(self, tmp_path, caplog):
        ase_write(tmp_path / "XDATCAR", frames_between(0.1, 0.0), format="vasp-xdatcar")
        assert len(read_pairs(tmp_path / "XDATCAR")) == 1
        assert "whether it is a relaxation, and complete, is not checked" in warnings(caplog)[0]


class TestCp2k:
    @pytest.mark.parametrize("new", [True, False])
    @pytest.mark.parametrize("run_type", ["GEO_OPT", "CELL_OPT"])
    def test_what_is_in_several_files_is_one_relaxation(self, tmp_path, new, run_type):
        frames = frames_between(0.2, 0.0)
        if run_type == "CELL_OPT":
            calc = frames[1].calc
            frames[1].set_cell(frames[1].cell.array @ [[1.01, 0, 0], [0.01, 0.99, 0], [0, 0.02, 1]], scale_atoms=True)
            frames[1].calc = SinglePointCalculator(frames[1], **calc.results)
        write_cp2k(tmp_path / "a.out", frames, run_type=run_type, new=new)
        (pair,) = read_pairs(tmp_path)
        for found, frame in zip((pair.initial, pair.relaxed), frames, strict=True):
            np.testing.assert_allclose(found.positions, frame.positions, atol=1e-6)
            np.testing.assert_allclose(found.cell.array, frame.cell.array, atol=1e-5)
        assert pair.freedom.name == ("full" if run_type == "CELL_OPT" else "fixed")
        assert pair.relaxed.get_potential_energy() == pytest.approx(frames[1].get_potential_energy())
        np.testing.assert_allclose(pair.relaxed.get_forces(), frames[1].get_forces(), atol=1e-8)
        _, survey = read_archive(tmp_path)
        assert {name: [*values] for name, values in survey.settings.items() if not name.startswith("U ")} == {
            "charge": ["0"], "cutoff": ["600 Ry"], "functional": ["PBE"], "pseudopotential of Si": ["Si GTH-PBE-Q4"],
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("run_type", "kind"),
        [("ENERGY", "single-point calculation"), ("ENERGY_FORCE", "single-point calculation"),
         ("MD", "molecular dynamics"), ("BAND", "image of a nudged elastic band"),
         ("VIBRATIONAL_ANALYSIS", "finite differences"), ("BSSE", "BSSE")],
    )  # fmt: skip
    def test_what_is_no_relaxation_is_passed_by(self, tmp_path, caplog, run_type, kind):
        written(tmp_path / "good" / "OUTCAR", computed_frames())
        write_cp2k(tmp_path / "a.out", computed_frames(2), run_type=run_type)
        for file in tmp_path.glob("a-*"):
            file.unlink()
        assert len(read_pairs(tmp_path)) == 1
        assert warnings(caplog) == [f"Passed by 1 that are no relaxations: {kind} (1, as a.out)."]

    @pytest.mark.parametrize("said", [" DIMER| Step\n", " DIMER| something\n"])
    def test_a_search_for_saddle_points_is_none(self, tmp_path, said):
        write_cp2k(tmp_path / "a.out", computed_frames(), said)
        with pytest.raises(NotARelaxation, match="saddle point search"):
            read_pairs(tmp_path / "a.out")

    @pytest.mark.parametrize("lost", ["PROGRAM ENDED AT", "-pos-1.xyz", "step", "atoms", "scf", "coordinates"])
    def test_what_is_not_whole_is_refused(self, tmp_path, lost):
        write_cp2k(tmp_path / "a.out", computed_frames())
        path, steps = tmp_path / "a.out", tmp_path / "a-pos-1.xyz"
        said = {
            "PROGRAM ENDED AT": "did not finish or the file is cut", "-pos-1.xyz": r"a-pos-1\.xyz, which is not beside",
            "step": r"a-pos-1\.xyz has no step 2, its last", "atoms": "its atoms are not those of the output",
            "scf": "the electronic steps did not converge", "coordinates": "no coordinates, or no cell",
        }  # fmt: skip
        if lost == "-pos-1.xyz":
            steps.unlink()
        elif lost == "step":
            steps.write_text(steps.read_text()[:-40])
        elif lost == "atoms":
            steps.write_text(steps.read_text().replace("Si", "P"))
        elif lost == "scf":
            head, _, tail = path.read_text().rpartition("SCF run converged")
            path.write_text(f"{head}SCF run NOT converged{tail}")
        else:
            path.write_text(path.read_text().replace(lost, "").replace(lost.upper(), ""))
        with pytest.raises(InvalidPair, match=said[lost]) as error:
            read_pairs(path)
        assert is_one_sentence(error.value)

    @pytest.mark.parametrize(("gradient", "limit", "used"), [(1e-4, 0.5, 1), (0.02, 0.5, 0), (0.02, 1.1, 1)])
    def test_the_gradient_that_is_left_says_whether_it_is_converged(self, tmp_path, gradient, limit, used):
        written(tmp_path / "good" / "OUTCAR", computed_frames())
        end = "MAXIMUM NUMBER OF OPTIMIZATION STEPS REACHED"
        write_cp2k(tmp_path / "a.out", computed_frames(2), end=end, gradient=gradient, forces=False)
        assert len(read_pairs(tmp_path, max_reference_force=limit)) == 1 + used

    @pytest.mark.parametrize(
        ("said", "fixed", "cell"),
        [("&FIXED_ATOMS\n LIST 1..3 8\n&END\n", [0, 1, 2, 7], "full"),
         ("&FIXED_ATOMS\n COMPONENTS_TO_FIX Z\n LIST 2\n&END\n KEEP_ANGLES TRUE\n", None, "mask"),
         ("  CONSTRAINT Z\n  EXTERNAL_PRESSURE [bar] 10000.0\n", [], "mask")],
    )  # fmt: skip
    @pytest.mark.parametrize("name", ["a.inp", "a-1.restart"])
    def test_its_input_says_what_was_held(self, tmp_path, said, fixed, cell, name):
        write_cp2k(tmp_path / "a.out", computed_frames(), run_type="CELL_OPT")
        (tmp_path / name).write_text(said)
        if fixed is None:
            (constraint,) = read_pairs(tmp_path)[0].initial.constraints
            assert type(constraint).__name__ == "FixCartesian"
        else:
            (pair,) = read_pairs(tmp_path)
            assert [k for c in pair.initial.constraints for k in c.index] == fixed
            assert pair.freedom.pressure == pytest.approx(units.GPa * ("PRESSURE" in said))
        assert read_pairs(tmp_path)[0].freedom.name == cell

    @pytest.mark.parametrize("pressure", ["1e4 0 0 0 1e4 0 0 0 1e4", "1e4 0 0 \\\n 0 1e4 0 0 0 \\\n 1e4", "10000"])
    def test_an_isotropic_tensor_is_a_pressure(self, tmp_path, pressure):
        write_cp2k(tmp_path / "a.out", computed_frames(), run_type="CELL_OPT")
        (tmp_path / "a.inp").write_text(f"EXTERNAL_PRESSURE {pressure}\n")
        assert read_pairs(tmp_path)[0].freedom.pressure == pytest.approx(units.GPa)

    @pytest.mark.parametrize("pressure", ["[GPa] 1.0", "1 0 0 0 2 0 0 0 1"])
    def test_any_other_is_refused(self, tmp_path, pressure):
        write_cp2k(tmp_path / "a.out", computed_frames(), run_type="CELL_OPT")
        (tmp_path / "a.inp").write_text(f"EXTERNAL_PRESSURE {pressure}\n")
        with pytest.raises(InvalidPair, match=r"EXTERNAL_PRESSURE .* is not one number of bar") as error:
            read_pairs(tmp_path / "a.out")
        assert is_one_sentence(error.value)

    @pytest.mark.parametrize("step", [2, 1])
    def test_a_restart_file_has_the_last_structure(self, tmp_path, step):
        frames = computed_frames()
        write_cp2k(tmp_path / "a.out", frames, run_type="CELL_OPT", forces=False)
        (tmp_path / "a-pos-1.xyz").unlink()
        rows = "".join(f"{a.symbol} {a.x:.12f} {a.y:.12f} {a.z:.12f}\n" for a in frames[2])
        cell = "".join(
            f"  {x} {a:.10E} {b:.10E} {c:.10E}\n" for x, (a, b, c) in zip("ABC", frames[2].cell, strict=True)
        )
        (tmp_path / "a-1.restart").write_text(
            " &GLOBAL\n  RUN_TYPE  CELL_OPT\n &END\n &GEO_OPT\n  STEP_START_VAL  7\n &END\n &CELL_OPT\n"
            f"  STEP_START_VAL  {step}\n &END\n &CELL\n{cell} &END\n &COORD\n{rows} &END COORD\n"
        )
        if step == 1:
            with pytest.raises(InvalidPair, match=r"a-1\.restart has no step 2, its last"):
                read_pairs(tmp_path / "a.out")
        else:
            (pair,) = read_pairs(tmp_path)
            np.testing.assert_allclose(pair.relaxed.positions, frames[2].positions, atol=1e-9)
            np.testing.assert_allclose(pair.relaxed.cell.array, frames[2].cell.array, atol=1e-9)

    def test_cells_with_more_digits_and_a_lazy_start(self, tmp_path):
        frames = computed_frames()
        write_cp2k(tmp_path / "a.out", frames, run_type="CELL_OPT")
        rows = [f"{k} 0.0 " + " ".join(f"{x:.10f}" for x in (f.cell.array + 0.01 * k).ravel()) + " 1.0\n"
                for k, f in enumerate(frames)]  # fmt: skip
        (tmp_path / "a-1.cell").write_text("#   Step   Time [fs]       Ax [Angstrom] ...\n" + "".join(rows))
        for _ in range(2):
            (pair,) = read_pairs(tmp_path, lazy=True, index=tmp_path / "index")
            np.testing.assert_allclose(pair.relaxed.cell.array, frames[-1].cell.array + 0.02, atol=1e-9)
        (tmp_path / "a-1.cell").unlink()
        (pair,) = read_pairs(tmp_path, lazy=True, index=tmp_path / "index")
        np.testing.assert_allclose(pair.relaxed.cell.array, frames[-1].cell.array, atol=1e-5)

    def test_a_leg_that_continues_another_is_no_pair_of_its_own(self, tmp_path):
        for k, amplitudes in enumerate([(0.2, 0.1), (0.1, 0.0)]):
            (tmp_path / str(k)).mkdir()
            write_cp2k(tmp_path / str(k) / "cp2k.out", frames_between(*amplitudes))
        assert len(read_pairs(tmp_path)) == 1


class TestFhiAims:
    @pytest.mark.parametrize(
        ("said", "n", "kind"),
        [("", 1, "single-point calculation"), ("  Molecular dynamics time step = 1 fs\n", 3, "molecular dynamics"),
         ("  MD_run 10 NVT_parrinello 300\n", 3, "molecular dynamics")],
    )  # fmt: skip
    def test_what_is_no_relaxation_is_passed_by(self, tmp_path, caplog, said, n, kind):
        written(tmp_path / "good" / "OUTCAR", computed_frames())
        write_aims(tmp_path / "aims.out", computed_frames(2)[:n], said)
        assert len(read_pairs(tmp_path)) == 1
        assert warnings(caplog) == [f"Passed by 1 that are no relaxations: {kind} (1, as aims.out)."]

    @pytest.mark.parametrize(
        ("said", "charge"), [("  Charge =   0.1E+01: ...\n", 1.0), ("  Charge =  -2.0: ...\n", -2)]
    )
    def test_its_charge(self, tmp_path, said, charge):
        write_aims(tmp_path / "aims.out", computed_frames(), "  Geometry relaxation: Trust radius method.\n" + said)
        (pair,) = read_pairs(tmp_path)
        assert pair.relaxed.info["charge"] == charge

    def test_a_cut_one_is_refused(self, tmp_path):
        write_aims(tmp_path / "aims.out", computed_frames())
        text = (tmp_path / "aims.out").read_text()
        (tmp_path / "aims.out").write_text(text.replace("Have a nice day", ""))
        with pytest.raises(InvalidPair, match="the run did not finish or the file is cut"):
            read_pairs(tmp_path)


class TestTable:
    def archive(self, folder: Path, broken: bool = False) -> Path:
        written(folder / "a" / "vasprun.xml", frames_between(0.2, 0.0), GGA="PE", ENCUT=400)
        written(folder / "copy" / "vasprun.xml", frames_between(0.2, 0.0), GGA="PE", ENCUT=400)
        written(folder / "md" / "OUTCAR", computed_frames(2), IBRION=0)
        written(folder / "far" / "OUTCAR", computed_frames(3, largest=0.7))
        if broken:
            (folder / "cut").mkdir()
            (folder / "cut" / "OUTCAR").write_text((folder / "md" / "OUTCAR").read_text().replace("IBRION", "X")[:3000])
        return folder

    def test_names_each_kind_with_its_number_and_an_example(self, tmp_path):
        _, survey = read_archive(self.archive(tmp_path))
        assert [line.split() for line in survey.table().splitlines()] == [
            [f"{tmp_path}:"],
            ["relaxations", "used", "1", "a/vasprun.xml"],
            ["molecular", "dynamics", "1", "md/OUTCAR"],
            ["not", "converged", "1", "far/OUTCAR", "with", "0.70", "eV/Å", "left"],
            ["copies", "1", "copy/vasprun.xml", "of", "a/vasprun.xml"],
            ["cutoff", "400", "eV"],
            ["functional", "PBE"],
        ]
        json.dumps(survey.todict())

    @pytest.mark.parametrize("command", [("info", "emt", "--pairs"), ("train", "--potential", "emt", "--dry-run")])
    def test_the_commands_print_it_first(self, tmp_path, command):
        self.archive(tmp_path / "runs")
        _, out, err = run(command[0], *(["runs", *command[1:]] if command[0] == "train" else [*command[1:], "runs"]))
        assert out.startswith("runs:\n  relaxations used ")
        assert "Passed by" not in err

    def test_what_is_broken_stops_the_run_after_the_whole_table(self, tmp_path):
        self.archive(tmp_path / "runs", broken=True)
        code, out, err = run("info", "emt", "--pairs", "runs")
        assert code == 2
        assert ["cannot", "be", "used", "1", "cut/OUTCAR:", "the", "run"] in [
            line.split()[:7] for line in out.splitlines()
        ]
        assert err.startswith("ase-bptt: runs/cut/OUTCAR: the run did not finish")
        with pytest.raises(InvalidPair) as error:
            read_archive("runs")
        assert error.value.survey.used == 1
        assert len(read_archive("runs", choices=Choices(skip_invalid=True))[0]) == 1

    def test_json_alone_is_printed_where_it_is_asked_for(self, tmp_path):
        self.archive(tmp_path / "runs")
        _, out, err = run("info", "emt", "--pairs", "runs", "--json")
        assert "relaxations used" not in out
        assert "Passed by 2" in err


class TestProcesses:
    def test_several_read_the_same_in_the_same_order(self, tmp_path, monkeypatch):
        for k in range(4):
            written(tmp_path / str(k) / "OUTCAR", computed_frames(k))
        (tmp_path / "bad.out").write_bytes(gzip.compress(b"x"))
        written(tmp_path / "md" / "vasprun.xml", computed_frames(), IBRION=0)
        monkeypatch.setattr(loading, "WORTH", 0)
        seen: list[tuple[int, int]] = []
        both = [read_archive(tmp_path, processes=n, progress=lambda *done: seen.append(done)) for n in (1, 2)]
        assert [p.digest() for p in both[0][0]] == [p.digest() for p in both[1][0]]
        assert both[0][1] == both[1][1]
        assert seen == 2 * [(k, 5) for k in range(1, 6)]
