"""ase-bptt evaluate and info: figures that agree with the library's, and files that hold them."""

import csv
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from ase.io import read, write
from helpers.potentials import wide_lennard_jones
from helpers.shell import is_refused, run, write_relaxations

from ase_bptt import evaluate, load_potential, read_pairs, relax, save_potential
from ase_bptt.evaluation.compare import compare
from ase_bptt.throughput.journal import Journal


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_relaxations(folder)
    save_potential(wide_lennard_jones(2.52), folder / "better")
    return folder


@pytest.fixture(scope="module")
def one(data):
    return run("evaluate", data / "pairs", "--potential", data / "lj", "--out", data / "one", "--group", "kind")


@pytest.fixture(scope="module")
def two(data):
    arguments = ("--potential", data / "better", "--against", data / "lj", "--out", data / "two", "--json")
    return run("evaluate", data / "pairs", *arguments)


class TestOnePotential:
    def test_the_table_holds_what_evaluate_finds(self, data, one):
        code, out, err = one
        assert code == 0, err
        found = evaluate(load_potential(data / "lj"), read_pairs(data / "pairs"))
        results = json.loads((data / "one" / "results.json").read_text())
        assert results["test"]["mean_after"] == pytest.approx(found.mean)
        assert results["test"]["mean_before"] is None
        assert results["test"]["kinds"] == 3
        for row, printed in zip(found.rows, results["rows_after"], strict=True):
            assert printed["id"] == row.id
            assert printed["delta_q"] == pytest.approx(row.delta_q)
            assert printed["residual_force"] == pytest.approx(row.residual_force)
            assert row.id in out
        assert "right basin: the relaxation from the initial" in out
        assert "kind 1" in out

    def test_files(self, data, one):
        folder = data / "one"
        names = {"results.json", "table.csv", "report.html", "relaxed.extxyz", "command.json"}
        names |= {"by_group.png", "displacements.png"}
        assert {p.name for p in folder.iterdir()} == names
        rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
        assert [row["id"] for row in rows] == [f"cluster {k}" for k in range(5)]
        assert len(read(folder / "relaxed.extxyz", index=":")) == 5
        assert "cluster 3" in (folder / "report.html").read_text()


class TestTwoPotentials:
    def test_they_are_compared_pair_by_pair(self, data, two):
        code, out, err = two
        assert code == 0, err
        found = json.loads(out)
        pairs = read_pairs(data / "pairs")
        before, after = (evaluate(load_potential(data / name), pairs) for name in ("lj", "better"))
        assert found["test"]["mean_before"] == pytest.approx(before.mean)
        assert found["test"]["mean_after"] == pytest.approx(after.mean)
        expected = compare(before, after)
        assert found["comparison"]["mean"]["value"] == pytest.approx(expected.mean.value)
        assert found["comparison"]["p_value"] == pytest.approx(expected.p_value)
        assert found["against"] == str(data / "lj")
        assert found["kept_as_it_was"] is False
        assert found["test"]["mean_after"] < 0.5 * found["test"]["mean_before"]

    def test_the_page_shows_both(self, data, two):
        page = (data / "two" / "report.html").read_text()
        assert "Wilcoxon" in page
        rows = list(csv.DictReader((data / "two" / "table.csv").read_text().splitlines()))
        assert float(rows[0]["delta_q_after"]) < float(rows[0]["delta_q_before"])


def test_a_folder_that_is_there_is_kept(data, one):
    arguments = ("evaluate", data / "pairs", "--potential", data / "lj", "--out", data / "one")
    is_refused(run(*arguments), "one is there already", "--overwrite")
    assert run(*arguments, "--overwrite", "--steps", 2)[0] == 0


def test_a_dry_run_writes_nothing(data, tmp_path):
    code, out, _ = run("evaluate", data / "pairs", "--potential", data / "lj", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out) == {"dry_run": True, "n": 5, "kinds": json.loads(out)["kinds"], "run": "ase-bptt-evaluation"}
    assert not list(tmp_path.iterdir())


class TestInfo:
    def test_what_a_potential_is(self, data):
        code, out, _ = run("info", data / "lj")
        assert code == 0
        assert "lj" in out
        assert "float64" in out
        assert "will it help" not in out.lower()

    def test_the_verdict_on_pairs(self, data):
        code, out, err = run("info", data / "lj", "--pairs", data / "pairs", "--sample", 2)
        assert code == 0, err
        assert "Will training through the relaxation help? yes" in out

    def test_json(self, data):
        code, out, _ = run("info", data / "lj", "--json")
        assert code == 0
        assert json.loads(out)["family"] == "lj"
        assert json.loads(out)["suitability"] is None

    def test_bad_pairs_are_refused(self, data):
        is_refused(run("info", data / "lj", "--pairs", "nowhere"), "nowhere")

    def test_diagnostics_of_gradients_through_relaxations(self, data):
        code, out, err = run("info", data / "lj", "--relax", data / "initial.extxyz", "--steps", 12)
        assert code == 0, err
        assert "Gradient diagnostics (structures: 5; gd: step_size 0.05" in out
        assert out.rstrip().endswith("No alarm.")
        stiff = wide_lennard_jones(2.65)
        with torch.no_grad():
            stiff.epsilon *= 40
        save_potential(stiff, "stiff")
        code, out, err = run("info", "stiff", "--relax", data / "initial.extxyz", "--steps", 12)
        assert code == 0, err
        assert "the step size is above the stability limit" in out

    def test_their_json_and_structures_that_do_not_move(self, data):
        with torch.no_grad():
            still = relax(load_potential(data / "lj"), read(data / "initial.extxyz"), fmax=1e-3, steps=500).to_atoms()
        write("still.extxyz", still)
        files = ("still.extxyz", data / "initial.extxyz")
        code, out, err = run("info", data / "lj", "--relax", *files, "--steps", 12, "--json")
        assert code == 0, err
        found = json.loads(out)["gradients"]
        assert [row["frames"] for row in found["structures"]] == [0, *[12] * 5]
        assert all(row["growth"] is not None for row in found["structures"][1:])
        assert found["step_limit"] > 0.05
        assert json.loads(run("info", data / "lj", "--json")[1])["gradients"] is None

    def test_a_file_that_cannot_be_relaxed_is_refused(self, data):
        is_refused(run("info", data / "lj", "--relax", "nowhere.extxyz"), "nowhere.extxyz")


def test_a_stopped_evaluation_continues_with_what_is_missing(data, two):
    arguments = ("--potential", data / "better", "--against", data / "lj", "--json")
    real, added = Journal.add, []

    def stopping(self, index, end):
        if len(added) == 13:
            raise KeyboardInterrupt
        added.append(index)
        real(self, index, end)

    with mock.patch.object(Journal, "add", stopping):
        code, out, err = run("evaluate", data / "pairs", *arguments, "--out", "again")
    assert (code, out) == (130, "")
    assert "again --resume continues" in err
    with mock.patch.object(Journal, "add", lambda self, k, end: (added.append(k), real(self, k, end))):
        code, out, err = run("evaluate", "--out", "again", "--resume", "--json")
    assert code == 0, err
    # 13 ends before the stop, and only the 7 that are missing after it.
    assert len(added) == 13 + 7
    assert json.loads(out)["test"] == json.loads(two[1])["test"]
    assert not [p.name for p in Path("again").iterdir() if "part" in p.name]
