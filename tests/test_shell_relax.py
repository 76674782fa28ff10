"""ase-bptt relax: every structure comes back where it would have ended alone, in the format that was asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase.constraints import (
    FixAtoms,
    FixBondLengths,
    FixCartesian,
    FixCom,
    FixedLine,
    FixedPlane,
    FixScaled,
    Hookean,
)
from ase.db import connect
from ase.io import read, write
from ase.io.formats import filetype
from helpers.potentials import needs_mace, wide_lennard_jones
from helpers.shell import cluster_relaxation, is_refused, run
from helpers.structures import cluster, silicon

from ase_bptt import relax, save_potential
from ase_bptt.cli.relax import warn_of_lost_constraints


@pytest.fixture
def starts(tmp_path):
    structures = [cluster_relaxation(k)[0] for k in range(4)]
    for k, atoms in enumerate(structures):
        atoms.info = {"name": f"start {k}"}
    write("starts.extxyz", structures)
    save_potential(wide_lennard_jones(2.5), "lj")
    return structures


def relaxed(*arguments):
    return run("relax", "starts.extxyz", "--potential", "./lj", "--fmax", 0.01, *arguments)


@pytest.mark.parametrize("out", ["relaxed.extxyz", "relaxed.traj", "relaxed.db", "deep/er/relaxed.xyz"])
def test_all_are_written_in_order_whatever_the_format(starts, tmp_path, out):
    code, said, err = relaxed("--out", out)
    assert code == 0, err
    assert "4 of 4 converged" in said
    rows = [row.toatoms() for row in connect(out).select()] if out.endswith(".db") else read(out, index=":")
    for start, end in zip(starts, rows, strict=True):
        alone = relax(wide_lennard_jones(2.5), start, fmax=0.01, steps=500)
        np.testing.assert_allclose(end.positions, alone.to_atoms().positions, atol=1e-6)
        assert end.get_potential_energy() == pytest.approx(alone.energies.item(), abs=1e-6)
    assert not list(tmp_path.rglob("*part*"))


def test_what_the_structures_carry_is_kept_and_how_they_ended_added(starts):
    assert relaxed("--out", "r.extxyz")[0] == 0
    for k, atoms in enumerate(read("r.extxyz", index=":")):
        assert atoms.info["name"] == f"start {k}"
        assert atoms.info["relaxation"] == "converged"
        assert atoms.info["relaxation_frames"] > 0


def test_json_tells_of_each(starts):
    code, out, _ = relaxed("--json")
    found = json.loads(out)
    assert (code, found["n"], found["converged"], found["left_out"], found["out"]) == (0, 4, 4, 0, "relaxed.extxyz")
    row = found["structures"][2]
    alone = relax(wide_lennard_jones(2.5), starts[2], fmax=0.01, steps=500)
    assert row["name"] == "structure 2 of starts.extxyz"
    assert row["status"] == "converged"
    assert row["nsteps"] == int(alone.nsteps[0])
    assert row["energy"] == pytest.approx(alone.energies.item(), abs=1e-6)
    assert row["fmax"] == pytest.approx(alone.fmax.item(), abs=1e-6)
    assert row["fmax"] < 0.01


def test_structures_that_do_not_converge_are_named_and_the_code_says_so(starts):
    code, out, err = relaxed("--steps", 2)
    assert code == 3
    assert "0 of 4 converged" in out
    assert "structure 3 of starts.extxyz: out of steps after 2 frames" in err
    assert {atoms.info["relaxation"] for atoms in read("relaxed.extxyz", index=":")} == {"out of steps"}


@pytest.mark.parametrize("stepper", ["fire", "gd", "bfgs"])
def test_steppers_by_name(starts, stepper):
    code, _, err = relaxed("--stepper", stepper)
    assert code == 0, err


def test_several_files_of_several_formats(starts):
    for k, start in enumerate(starts[:2]):
        start.cell, start.pbc = [20, 20, 20], True
        write(f"POSCAR_{k}", start, format="vasp")
    code, out, err = run("relax", "POSCAR_0", "POSCAR_1", "starts.extxyz", "--potential", "./lj", "--json")
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)["structures"]][:3] == [
        "POSCAR_0", "POSCAR_1", "structure 0 of starts.extxyz",
    ]  # fmt: skip


def test_constraints_are_obeyed_and_kept(starts):
    start = starts[0]
    start.set_constraint(FixAtoms([0, 3]))
    write("held.traj", [start, starts[1]])
    assert run("relax", "held.traj", "--potential", "./lj", "--out", "r.traj")[0] == 0
    held, free = read("r.traj", index=":")
    np.testing.assert_array_equal(held.positions[[0, 3]], start.positions[[0, 3]])
    assert np.abs(held.positions - start.positions).max() > 0.01
    assert held.constraints[0].todict() == start.constraints[0].todict()
    assert not free.constraints


CONSTRAINTS = {
    "FixAtoms": FixAtoms([0, 3]),
    "FixCartesian": FixCartesian([1], [True, False, True]),
    "FixScaled": FixScaled([0], [True, True, False]),
    "FixedPlane": FixedPlane([2], [0, 0, 1]),
    "FixedLine": FixedLine([2], [1, 1, 1]),
    "FixCom": FixCom(),
    "Hookean": Hookean(0, [0.0, 0.0, 0.0], rt=1.0, k=0.1),
    "FixBondLengths": FixBondLengths([[0, 1]]),
}
HELD = {
    "r.traj": set(CONSTRAINTS),
    "r.db": set(CONSTRAINTS),
    "r.extxyz": {"FixAtoms", "FixCartesian"},
    "POSCAR": {"FixAtoms", "FixScaled", "FixedPlane"},
    "r.cif": set(),
}


@pytest.mark.parametrize("out", HELD)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_that_a_format_cannot_hold_are_told_before_they_are_lost(tmp_path, caplog, out, name):
    atoms = cluster_relaxation(0)[0]
    atoms.set_cell([20, 20, 20])
    atoms.pbc = True
    atoms.set_constraint(CONSTRAINTS[name])
    free = atoms.copy()
    free.set_constraint()
    warn_of_lost_constraints(Path(out), filetype(out, read=False), [free, atoms])
    if name in HELD[out]:
        assert not caplog.text
    else:
        assert f"{out}: this format cannot hold the constraints {name}, which 1 of the structures has" in caplog.text
    assert not list(tmp_path.iterdir())


def test_of_several_constraints_only_those_that_are_lost_are_told(starts):
    start = starts[0]
    start.set_constraint([FixAtoms([0]), FixedLine([1], [1, 1, 1]), FixedPlane([2], [0, 0, 1])])
    write("held.traj", [start, starts[1]])
    code, _, err = run("relax", "held.traj", "--potential", "./lj")
    assert code == 0
    assert "relaxed.extxyz: this format cannot hold the constraints FixedLine, FixedPlane, which 1 of" in err
    assert ".traj or .db" in err
    held, free = read("relaxed.extxyz", index=":")
    assert [type(c).__name__ for c in held.constraints] == ["FixAtoms"]
    assert not free.constraints
    code, _, err = run("relax", "held.traj", "--potential", "./lj", "--out", "relaxed.traj", "--dry-run")
    assert "cannot hold" not in err


def test_each_axis_of_a_constraint_is_asked_for(caplog):
    along, oblique = cluster_relaxation(0)[0], cluster_relaxation(1)[0]
    for atoms, axis in ((along, [0, 0, 1]), (oblique, [0, 1, 1])):
        atoms.set_cell([20, 20, 20])
        atoms.set_constraint(FixedLine([0], axis))
    warn_of_lost_constraints(Path("POSCAR"), "vasp", [along, along, oblique])
    assert "FixedLine, which 1 of the structures has" in caplog.text


def test_a_dry_run_writes_nothing(starts, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = relaxed("--dry-run")
    assert (code, "nothing was written" in out) == (0, True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_of_many_says_that_all_are_relaxed(starts, tmp_path):
    sentence = "Every structure of a file is relaxed; ase convert -n -1 FILE last.extxyz writes the last alone."
    assert sentence in relaxed("--dry-run")[1].splitlines()
    for name, k in (("other.traj", 0), ("one.extxyz", 1)):
        write(name, starts[k])
    code, said, err = run("relax", "other.traj", "one.extxyz", "--potential", "./lj", "--dry-run")
    assert (code, said.splitlines()[0][:13]) == (0, "2 structures;"), err
    assert sentence not in said


class TestRefusing:
    def test_a_file_that_is_there_is_kept(self, starts, tmp_path):
        (tmp_path / "relaxed.extxyz").write_text("precious")
        is_refused(relaxed(), "relaxed.extxyz is there already", "--overwrite")
        assert (tmp_path / "relaxed.extxyz").read_text() == "precious"
        assert relaxed("--overwrite")[0] == 0

    def test_a_complete_run_is_not_resumed(self, starts):
        assert relaxed()[0] == 0
        is_refused(relaxed("--resume"), "relaxed.extxyz", "complete")

    @pytest.mark.parametrize("out", ["r.zzz", "r"])
    def test_a_format_that_ase_does_not_know(self, starts, out):
        is_refused(relaxed("--out", out), out, ".extxyz")

    def test_many_structures_in_a_format_of_one(self, starts):
        is_refused(relaxed("--out", "POSCAR"), "POSCAR", "one structure", "4")

    def test_a_step_size_without_gradient_descent(self, starts):
        is_refused(relaxed("--step-size", 0.1), "--step-size", "gd")

    @needs_mace
    def test_an_unknown_element_names_its_structure_and_is_left_out_if_asked(self, tmp_path):
        write("mixed.extxyz", [silicon(), cluster(), silicon(2)])
        arguments = ("relax", "mixed.extxyz", "--potential", "mace-si", "--steps", 3)
        is_refused(run(*arguments), "structure 1 of mixed.extxyz", "Ar")
        code, out, err = run(*arguments, "--skip-invalid", "--json")
        assert code == 3
        assert (json.loads(out)["n"], json.loads(out)["left_out"]) == (2, 1)
        assert "Left out: structure 1 of mixed.extxyz" in err

    @pytest.mark.parametrize(
        ("spoil", "dtype", "words"),
        [
            (lambda a: a.set_cell([1e-3] * 3), "float64", "less than 0.01 Å^3 for each of its atoms"),
            (lambda a: a.set_cell([20, 20, 0]), "float64", "periodic along a cell vector of length zero"),
            (lambda a: a.translate([0, 0, 1e7]), "float32", "float32 does not resolve"),
            (lambda a: a.translate([0, 0, 1e15]), "float64", "float64 does not resolve"),
        ],
        ids=["tiny", "flat", "far", "astronomical"],
    )
    def test_an_extreme_geometry_is_named_and_the_others_are_relaxed(self, starts, spoil, dtype, words):
        bad = starts[1].copy()
        bad.set_cell([20, 20, 20])
        bad.pbc = True
        spoil(bad)
        write("mixed.traj", [starts[0], bad, starts[2]])
        arguments = ("relax", "mixed.traj", "--potential", "./lj", "--dtype", dtype, "--fmax", 0.05)
        is_refused(run(*arguments), "structure 1 of mixed.traj", words)
        code, out, err = run(*arguments, "--skip-invalid", "--json")
        assert code == 3
        assert (json.loads(out)["converged"], json.loads(out)["left_out"]) == (2, 1)
        assert "Left out: structure 1 of mixed.traj" in err

    def test_a_far_atom_and_a_long_cell_are_no_reason_to_refuse(self, starts):
        far, long = starts[0].copy(), starts[1].copy()
        far.positions[0, 2] += 1e7
        long.set_cell([20, 20, 1e6])
        long.pbc = True
        write("sparse.traj", [far, long, starts[2]])
        code, out, err = run("relax", "sparse.traj", "--potential", "./lj", "--json")
        assert code == 0, err
        assert json.loads(out)["converged"] == 3

    def test_a_folder_instead_of_files(self, starts, tmp_path):
        (tmp_path / "many").mkdir()
        is_refused(run("relax", "many", "--potential", "./lj"), "many is a folder", "POSCAR")

    def test_a_folder_instead_of_an_output_file(self, starts):
        is_refused(relaxed("--out", "."), "is a folder", "relaxed.extxyz")
