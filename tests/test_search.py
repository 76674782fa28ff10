"""The search for minima: its starts, the grouping of ends, and the command."""

import csv
import json
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import read, write
from helpers.potentials import wide_lennard_jones
from helpers.shell import drawn, is_refused, run

from ase_bptt import Status, save_potential, search_minima
from ase_bptt.search import WAYS, Starts, minima_of
from ase_bptt.search.starts import make_start, odd_sites, too_close
from ase_bptt.throughput import Relaxed
from ase_bptt.throughput.journal import Journal


def vacancy() -> Atoms:
    atoms = bulk("Si", cubic=True).repeat(2)
    del atoms[0]
    return atoms


def impurity() -> Atoms:
    atoms = bulk("Si", cubic=True)
    atoms.symbols[3] = "P"
    return atoms


def hexamer() -> Atoms:
    """Six atoms in a plane; the octahedron and the bipyramid are lower."""
    corners = [[np.cos(k * np.pi / 3), np.sin(k * np.pi / 3), 0.0] for k in range(6)]
    return Atoms("Ar6", positions=np.array(corners) * 2.9)


class TestStarts:
    @pytest.mark.parametrize("way", WAYS)
    def test_the_same_number_gives_the_same_start_and_another_one_another(self, way):
        atoms = impurity()
        every = [make_start(atoms, k, [way], None, seed=0).atoms.positions for k in range(12)]
        np.testing.assert_array_equal(every[5], make_start(atoms, 5, [way], None, seed=0).atoms.positions)
        assert np.abs(every[5] - make_start(atoms, 5, [way], None, seed=1).atoms.positions).max() > 1e-3
        np.testing.assert_array_equal(every[0], atoms.positions)
        for i in range(12):
            for j in range(i):
                assert np.abs(every[i] - every[j]).max() > 1e-3
        assert not any(too_close(make_start(atoms, k, [way], None, seed=0).atoms) for k in range(12))

    def test_bonds_of_the_site_are_distorted_and_no_others(self):
        atoms = impurity()
        start = make_start(atoms, 1, ["distort"], 3, seed=0)
        assert start.way == "2 bonds times 0.6"
        lengths = start.atoms.get_distances(3, range(8), mic=True) / np.maximum(
            atoms.get_distances(3, range(8), mic=True), 1e-9
        )
        assert sorted(np.delete(lengths, 3))[1] < 0.85
        moved = np.linalg.norm(start.atoms.positions - atoms.positions, axis=1)
        assert np.sum(moved > 0.2) == 2

    def test_a_place_without_an_atom(self):
        atoms = vacancy()
        start = make_start(atoms, 1, ["distort"], (0.0, 0.0, 0.0), seed=0)
        assert np.sum(np.linalg.norm(start.atoms.positions - atoms.positions, axis=1) > 0.3) == 2

    def test_odd_sites(self):
        np.testing.assert_allclose(odd_sites(impurity()), [impurity().positions[3]])
        # The four neighbours of a vacancy.
        assert len(odd_sites(vacancy())) == 4
        assert len(odd_sites(bulk("Si", cubic=True))) == 8

    def test_fixed_atoms_stay(self):
        atoms = impurity()
        atoms.set_constraint(FixAtoms([0, 1]))
        for k in range(1, 10):
            np.testing.assert_array_equal(make_start(atoms, k, WAYS, None, 0).atoms.positions[:2], atoms.positions[:2])

    def test_those_of_many_structures_and_own_ones(self):
        own = [impurity(), vacancy(), impurity()]
        starts = Starts([vacancy(), impurity()], n=3, own=own)
        assert len(starts) == 4 + 5
        assert [starts.start(k).way for k in starts.of(0)][-1] == "your own"
        assert [len(starts[k]) for k in starts.of(1)] == [8] * 5

    @pytest.mark.parametrize(
        ("how", "words"),
        [
            ({"ways": ["ratle"]}, "rattle"),
            ({"ways": []}, "No way to make starts"),
            ({"n": 0}, "n must be a whole number"),
            ({"site": 99}, "There is no atom 99: the structure has 8, counted from 0"),
            ({"own": [molecule("H2O")]}, "Start 0 of your own, H2O, has the atoms of none"),
        ],
    )
    def test_what_cannot_be(self, how, words):
        with pytest.raises(ValueError, match=words):
            Starts([impurity()], **{"n": 4} | how)


def end_of(atoms: Atoms, energy: float, status: Status = Status.CONVERGED) -> Relaxed:
    atoms = atoms.copy()
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)))
    return Relaxed(atoms, status, 3)


class TestGrouping:
    def test_ends_that_are_the_same_up_to_what_does_not_matter_are_one_minimum(self):
        atoms = impurity()
        shifted = atoms.copy()
        shifted.positions += [0.3, 0.4, 1.1]
        permuted = atoms[[7, 3, 2, 1, 0, 4, 5, 6]]
        another = atoms.copy()
        another.positions[3] += [0.8, 0.0, 0.0]
        lattice = atoms.copy()
        lattice.set_cell([[1, 0, 0], [1, 1, 0], [0, 0, 1]] @ atoms.cell.array)
        ends = [
            end_of(a, e) for a, e in ((another, 1.0), (atoms, 0.5), (shifted, 0.501), (permuted, 0.502), (lattice, 0.5))
        ]
        found = minima_of(Starts([atoms], n=5), 0, ends)
        assert [m.starts for m in found.minima] == [(1, 4, 2, 3), (0,)]
        assert [m.above for m in found.minima] == [0.0, 0.5]
        assert found.found_lower == 0.5

    def test_what_has_no_minimum_is_counted(self):
        atoms = impurity()
        close = atoms.copy()
        close.positions[1] = close.positions[0] + 0.3
        ends = [end_of(atoms, 0.0), end_of(atoms, 0.0, Status.OUT_OF_STEPS), end_of(atoms, 9.0, Status.DIVERGED),
                end_of(close, -50.0)]  # fmt: skip
        found = minima_of(Starts([atoms], n=4), 0, ends)
        assert (len(found.minima), found.unconverged, found.exploded, found.collapsed) == (1, 1, 1, 1)

    def test_equal_places_of_another_energy_are_two(self):
        atoms = impurity()
        found = minima_of(Starts([atoms], n=2), 0, [end_of(atoms, 0.0), end_of(atoms, 0.5)])
        assert len(found.minima) == 2


def test_a_flat_ring_is_found_to_fold():
    found = search_minima(wide_lennard_jones(2.5), hexamer(), n=8, fmax=0.02, steps=400)
    assert found.n_starts == 8
    assert sum(m.count for m in found.minima) + found.unconverged + found.exploded == 8
    energies = [m.energy for m in found.minima]
    assert energies == sorted(energies)
    again = search_minima(wide_lennard_jones(2.5), hexamer(), n=8, fmax=0.02, steps=400)
    assert [m.starts for m in again.minima] == [m.starts for m in found.minima]


def test_a_start_that_explodes_stops_early():
    from ase_bptt.cells import CELLS
    from ase_bptt.throughput import relax_stream

    close = Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 2.9]])
    work = [[(0, close, CELLS["fixed"])]]
    settings = {"stepper": "gd", "fmax": 1e-9, "steps": 50}
    ((_, end),) = relax_stream(wide_lennard_jones(2.5), work, explosion=-1.0, **settings)
    assert (end.status, end.nsteps) == (Status.DIVERGED, 0)
    ((_, end),) = relax_stream(wide_lennard_jones(2.5), work, **settings)
    assert end.nsteps == 50


class TestShell:
    @pytest.fixture
    def starts(self):
        structures = [hexamer(), hexamer()]
        structures[1].rattle(0.2, seed=1)
        for k, atoms in enumerate(structures):
            atoms.info["name"] = f"ring {k}"
        write("rings.extxyz", structures)
        write("own.extxyz", hexamer())
        save_potential(wide_lennard_jones(2.5), "lj")
        with mock.patch("matplotlib.figure.Figure.savefig", drawn):
            yield structures

    COMMAND = ("search", "rings.extxyz", "--potential", "./lj", "-n", 5, "--steps", 300)

    def test_it_writes_minima_a_table_and_a_picture(self, starts):
        code, out, err = run(*self.COMMAND, "--own", "own.extxyz")
        assert code == 0, err
        assert "2 structures, 12 starts" in out
        assert max(map(len, out.splitlines()[1:-1])) <= 80
        assert {p.name for p in Path("ase-bptt-search").iterdir()} == {
            "command.json", "minima.extxyz", "minima.csv", "minima.png", "report.html", "results.json",
        }  # fmt: skip
        minima = read("ase-bptt-search/minima.extxyz", ":")
        with open("ase-bptt-search/minima.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(minima) == len(rows)
        for atoms, row in zip(minima, rows, strict=True):
            assert atoms.info["structure"] == row["structure"]
            assert atoms.info["count"] == int(row["count"]) == len(row["starts"].split())
            assert atoms.get_potential_energy() == pytest.approx(float(row["energy"]), abs=1e-6)
        for name in ("ring 0", "ring 1"):
            above = [float(row["above"]) for row in rows if row["structure"] == name]
            assert above == sorted(above)
            assert above[0] == 0.0

    def test_json_and_a_dry_run(self, starts, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        code, out, _ = run(*self.COMMAND, "--dry-run")
        assert (code, "nothing was written" in out, "0: as given" in out) == (0, True, True)
        assert sorted(tmp_path.rglob("*")) == before
        code, out, err = run(*self.COMMAND, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["n"] == 2
        assert [row["starts"] for row in found["structures"]] == [5, 5]
        assert {row["structure"] for row in found["minima"]} == {"ring 0", "ring 1"}

    @pytest.mark.parametrize("sent", [signal.SIGINT])
    def test_a_stopped_search_continues(self, starts, sent):
        assert run(*self.COMMAND, "--out", "whole")[0] == 0
        real, added = Journal.add, []

        def stopping(self, index, end):
            if len(added) == 4:
                raise KeyboardInterrupt
            added.append(index)
            real(self, index, end)

        with mock.patch.object(Journal, "add", stopping):
            code, _, err = run(*self.COMMAND, "--out", "part")
        assert code == 130
        assert "search --out part --resume continues" in err
        with mock.patch.object(Journal, "add", lambda self, k, end: (added.append(k), real(self, k, end))):
            code, out, err = run("search", "--out", "part", "--resume")
        assert code == 0, err
        assert "4 of them done before" in out
        assert sorted(added) == list(range(10))
        tables = [Path(name, "minima.csv").read_text() for name in ("whole", "part")]
        assert tables[0] == tables[1]
        is_refused(run("search", "--out", "part", "--resume"), "search in part is complete")

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (["--site", "77"], ("There is no atom 77",)),
            (["--own", "rings.extxyz", "lj"], ("lj",)),
            (["--shard", "1/2", "--overwrite"], ("--overwrite is not for one of several",)),
        ],
    )
    def test_what_is_refused(self, starts, more, words):
        is_refused(run(*self.COMMAND, *more), *words)

    def test_flags_and_files(self, starts, tmp_path):
        assert run(*self.COMMAND, "--site", "1,2")[0] == 2
        assert run(*self.COMMAND, "--ways", "shake")[0] == 2
        is_refused(run("search", "--potential", "./lj"), "Give the files of the structures")
        is_refused(run("search", "nowhere.extxyz", "--potential", "./lj"), "nowhere.extxyz")
        (tmp_path / "ase-bptt-search").mkdir()
        (tmp_path / "ase-bptt-search" / "precious").touch()
        is_refused(run(*self.COMMAND), "ase-bptt-search is there already")
        is_refused(run(*self.COMMAND, "--overwrite"), "not one of our run folders")
