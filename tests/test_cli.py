"""The shell: what it prints where, what it writes, and what it refuses."""

import csv
import json
import os
import re
import socket
import subprocess
import sys
import warnings
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from ase.constraints import FixBondLengths
from ase.io import read, write
from helpers.potentials import needs_mace
from helpers.shell import QUICK, drawn, is_refused, run, write_relaxations
from matplotlib.image import imread

import ase_bptt
from ase_bptt import TorchCalculator, load_potential
from ase_bptt.datasets import pbesol_crystals, si_defects
from ase_bptt.evaluation import evaluate

KEYS = {
    "n",
    "kinds",
    "mean_unrelaxed",
    "mean_before",
    "mean_after",
    "median_before",
    "median_after",
    "basins_before",
    "basins_after",
    "volume_error_before",
    "volume_error_after",
    "geometric_before",
    "geometric_after",
    "improved",
    "median_improvement",
    "interval",
}
RESULT = {
    "test", "test_bfgs", "comparison", "drift", "warnings", "checkpoint", "run", "folds", "epochs", "best_epoch",
    "seconds", "kept_as_it_was", "measured", "on_all_pairs",
}  # fmt: skip
FILES = {
    "settings.json", "metrics.csv", "checkpoint.pt", "checkpoint.previous.pt", "potential", "results.json",
    "table.csv", "before_after.png", "by_group.png", "displacements.png", "learning_curve.png", "before.json",
    "after.json", "report.html", "command.json", "snapshot_before.json", "snapshot_after.json", "drift_report.json",
    "drift_report.png",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # Fixtures of a module begin before those of a test.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of relaxations, the same as two files, and a potential that wants tuning."""
    folder = tmp_path_factory.mktemp("data")
    write_relaxations(folder)
    return folder


def train(data, *arguments, quick=QUICK):
    return run("train", data / "pairs", "--potential", data / "lj", "--out", "run", *quick, *arguments)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo on few pairs, without a network."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    every = {p.id: p for p in si_defects()}
    few = {"train": ["P_s_00", "Al_s_02"], "valid": ["crystal_00"], "test": ["S_s_24", "Ge_s_21"]}

    def no_network(*args, **kwargs):
        raise AssertionError("the demo went to the network")

    with (
        mock.patch("ase_bptt.cli.si_defects", lambda split, fold: [every[k] for k in few[split]]),
        mock.patch("ase_bptt.training.fine_tune.evaluate", partial(evaluate, steps=20)),
        mock.patch.object(socket.socket, "connect", no_network),
        mock.patch.object(socket, "getaddrinfo", no_network),
    ):
        result = run("demo", *QUICK, "--json", "--out", folder)
    return folder, result


class TestDemoOfCrystals:
    def test_volumes_of_cells_that_were_held_out_are_measured_before_and_after(self, tmp_path):
        few, every = {"train": [0, 1], "valid": [2], "test": [3]}, pbesol_crystals()
        with (
            mock.patch("ase_bptt.cli.pbesol_crystals", lambda split, fold: [every[k] for k in few[split]]),
            mock.patch("ase_bptt.training.fine_tune.evaluate", partial(evaluate, steps=5)),
            mock.patch("matplotlib.figure.Figure.savefig", drawn),
        ):
            code, out, err = run("demo", "--crystals", "--potential", "morse", "--epochs", "2", "--first",
                                 "zero-force:1", "--steps", "2", "--out", tmp_path / "run")  # fmt: skip
        assert code == 0, err
        assert "cells that moved (1): mean absolute volume error" in out
        assert "median strain" in out
        assert (tmp_path / "run" / "potential" / "model.json").is_file()
        settings = json.loads((tmp_path / "run" / "settings.json").read_text())
        assert (settings["first"], settings["terms"]) == ("zero-force:1", [])

    def test_without_chgnet_its_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "chgnet.model", None)
        is_refused(run("demo", "--crystals", "--out", tmp_path / "run"), 'pip install "ase_bptt[chgnet]"')


@needs_mace
class TestDemo:
    def test_standard_output_is_json_alone_with_the_keys_promised(self, demo):
        folder, (code, out, err) = demo
        assert code == 0, err
        found = json.loads(out)
        assert set(found) == RESULT
        assert set(found["test"]) == KEYS
        assert set(found["test_bfgs"]) == KEYS
        assert (found["test"]["n"], found["test"]["kinds"]) == (2, 2)
        of_cells = [found["test"].pop(f"volume_error_{when}") for when in ("before", "after")]
        assert of_cells == [None, None]  # no cell moves
        assert all(np.isfinite(x).all() for x in found["test"].values())
        assert (found["checkpoint"], found["run"], found["epochs"]) == (str(folder / "potential"), str(folder), 1)

    def test_the_run_folder_is_complete(self, demo):
        folder, _ = demo
        assert {p.name for p in folder.iterdir()} == FILES
        assert {p.name for p in (folder / "potential").iterdir()} == {
            "model.json",
            "weights.pt",
            "mace.model",
            "model_card.md",
        }
        for name in (p for p in FILES if p.endswith(".png")):
            assert imread(folder / name).std() > 0.01

    def test_the_numbers_are_those_of_the_saved_potential(self, demo):
        folder, (_, out, _) = demo
        every = {p.id: p for p in si_defects()}
        found = evaluate(load_potential(folder), [every["S_s_24"], every["Ge_s_21"]], steps=20)
        # Where the tuned potential is worse the untuned one is handed back.
        said = json.loads(out)
        which = "mean_before" if said["kept_as_it_was"] else "mean_after"
        assert said["test"][which] == pytest.approx(found.mean, abs=1e-4)
        assert load_potential(folder).dtype is torch.float32

    def test_mace_reads_the_native_file_and_agrees(self, demo):
        from ase_bptt.potentials import require

        folder, _ = demo
        calculators = require("mace.calculators", extra="mace")
        atoms = next(p.initial for p in si_defects() if p.id == "V_01")
        twin = atoms.copy()
        # Both in float64, so that only the model can differ.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            native = str(folder / "potential" / "mace.model")
            twin.calc = calculators.MACECalculator(native, device="cpu", default_dtype="float64")
        atoms.calc = TorchCalculator(folder, dtype="float64")
        assert atoms.get_potential_energy() == pytest.approx(twin.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(atoms.get_forces(), twin.get_forces(), atol=1e-6)
        np.testing.assert_allclose(atoms.get_stress(), twin.get_stress(), atol=1e-6)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["--epochs", 3, "--steps", 10, "--lr", 0.03, "--batch-size", 1, "--seed", 1, "--loss", "delta_q"]
    return folder, run("train", data / "pairs", "--potential", data / "lj", *arguments, "--out", folder)


class TestTrain:
    def test_it_learns_and_says_so_in_a_table(self, trained):
        folder, (code, out, err) = trained
        assert code == 0, err
        results = json.loads((folder / "results.json").read_text())
        for test in (results["test"], results["test_bfgs"]):
            assert test["mean_after"] < 0.7 * test["mean_before"]
        assert abs(load_potential(folder).sigma.item() - 2.5) < 0.1
        assert re.search(r"^cluster \d ", out, re.MULTILINE)
        assert "% lower" in out
        assert "relaxed by BFGS instead" in out
        assert "right basin: the relaxation from the initial structure" in out
        assert str(folder / "potential") in out

    def test_the_table_file_has_a_row_for_each_test_structure(self, trained):
        folder, _ = trained
        rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
        results = json.loads((folder / "results.json").read_text())
        assert [row["id"] for row in rows] == [row["id"] for row in results["rows_after"]]
        for row, before, after in zip(rows, results["rows_before"], results["rows_after"], strict=True):
            assert float(row["delta_q_before"]) == before["delta_q"]
            assert float(row["delta_q_after"]) == after["delta_q"]
            assert row["status_after"] == after["status"]

    def test_the_run_folder_is_complete(self, trained):
        assert {p.name for p in trained[0].iterdir()} == FILES | {"measured", "all_pairs"}
        settings = json.loads((trained[0] / "settings.json").read_text())
        assert (settings["lr"], settings["steps"], settings["batch_size"], settings["seed"]) == (0.03, 10, 1, 1)

    def test_two_files_do_as_well(self, data):
        files = (data / "initial.extxyz", data / "relaxed.extxyz")
        code, out, err = run("train", *files, "--potential", data / "lj", "--out", "run", "--json", *QUICK)
        assert code == 0, err
        found = json.loads(out)
        assert found["test"]["kinds"] == 1
        assert any(warning.startswith("Too few kinds of structure") for warning in found["warnings"])

    def test_folders_group_where_files_have_no_info(self, data, tmp_path):
        for k, path in enumerate(sorted((data / "pairs").iterdir())):
            frames = read(path, ":")
            for atoms in frames:
                atoms.info.clear()
            place = tmp_path / "runs" / f"kind {k % 3}" / f"{k}"
            place.mkdir(parents=True)
            write(place / "relax.traj", frames)
        arguments = ("--potential", data / "lj", "--out", "run", "--group", "folder", *QUICK)
        code, _, err = run("train", "runs", *arguments)
        assert code == 0, err
        tested = {row["group"] for row in json.loads(open_text("run/results.json"))["rows_after"]}
        assert tested <= {"kind 0", "kind 1", "kind 2"}
        # Our own output is no reference: the same folder reads the same again.
        assert run("train", ".", *arguments, "--overwrite", "--dry-run")[0] == 2
        assert run("evaluate", "runs", "--potential", data / "lj", "--out", "runs/evaluation", "--json")[0] == 0
        code, out, _ = run("evaluate", "runs", "--potential", data / "lj", "--dry-run", "--json")
        assert (code, json.loads(out)["n"]) == (0, 5)

    def test_a_key_of_the_info_groups(self, data):
        code, out, _ = train(data, "--group", "kind", "--json")
        assert code == 0
        tested = {row["group"] for row in json.loads(open_text("run/results.json"))["rows_after"]}
        assert len(tested) == json.loads(out)["test"]["kinds"] == 1
        assert tested <= {"kind 0", "kind 1", "kind 2"}

    @pytest.mark.parametrize("stepper", ["gd", "fire"])
    @pytest.mark.parametrize("adjoint", ["full", "replay"])
    def test_steppers_and_adjoints_are_taken_by_name(self, data, stepper, adjoint):
        code, _, err = train(data, "--stepper", stepper, "--adjoint", adjoint, "--loss", "rmsd", "--dtype", "float64")
        assert code == 0, err
        settings = json.loads(open_text("run/settings.json"))
        assert (settings["stepper"]["name"], settings["adjoint"]["name"]) == (stepper, adjoint)
        assert settings["loss"] == "rmsd"

    @needs_mace
    def test_the_embedded_potential_by_its_name(self, tmp_path):
        pairs = {p.id: p for p in si_defects()}
        (tmp_path / "pairs").mkdir()
        for name in ("crystal_00", "P_s_00", "Ge_s_21"):
            write(tmp_path / "pairs" / f"{name}.extxyz", [pairs[name].initial, pairs[name].relaxed])
        with mock.patch("ase_bptt.training.fine_tune.evaluate", partial(evaluate, steps=5)):
            code, _, err = run("train", "pairs", "--potential", "mace-si", "--epochs", 1, "--steps", 1)
        assert code == 0, err
        assert json.loads(open_text("ase-bptt-run/settings.json"))["family"] == "mace"

    @pytest.mark.parametrize("folds", [[], ["--folds", "3"]], ids=["one", "folds"])
    def test_few_files_are_told_that_their_test_tells_nothing(self, data, folds):
        code, _, err = run("train", data / "pairs", "--potential", data / "lj", "--dry-run", *folds)
        assert code == 0, err
        assert "Too few kinds of structure to tell anything about others: of " in err

    def test_bad_pairs_are_left_out_if_asked_to(self, data, tmp_path, caplog):
        folder = tmp_path / "pairs"
        folder.mkdir()
        for path in (data / "pairs").iterdir():
            (folder / path.name).write_text(path.read_text())
        (folder / "bad.extxyz").write_text("nothing")
        arguments = ("train", folder, "--potential", data / "lj", "--out", "run", *QUICK)
        is_refused(run(*arguments), "bad.extxyz")
        assert run(*arguments, "--skip-invalid")[0] == 0
        assert "Left out" in caplog.text


def open_text(path: str) -> str:
    with open(path) as file:
        return file.read()


class TestRunFolder:
    def test_a_folder_that_is_there_is_not_touched_unless_asked(self, data, tmp_path):
        assert train(data)[0] == 0
        (tmp_path / "run" / "mine.txt").write_text("keep")
        is_refused(train(data), "run is there already", "--overwrite", "--resume", "--out")
        assert (tmp_path / "run" / "mine.txt").exists()
        results = (tmp_path / "run" / "results.json").stat().st_ino
        assert train(data, "--overwrite")[0] == 0
        assert (tmp_path / "run" / "results.json").stat().st_ino != results
        assert (tmp_path / "run" / "mine.txt").read_text() == "keep"

    @pytest.mark.parametrize("marker", ["settings.json", "command.json"])
    def test_a_folder_with_files_named_like_ours_is_not_ours(self, data, tmp_path, marker):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / marker).write_text("{}")
        is_refused(train(data, "--overwrite"), "not one of our run folders")
        assert (tmp_path / "run" / marker).read_text() == "{}"

    def test_a_run_of_another_command_is_not_replaced(self, data):
        assert train(data)[0] == 0
        again = run("evaluate", data / "pairs", "--potential", data / "lj", "--out", "run", "--overwrite")
        is_refused(again, "holds a run of ase-bptt train", "another --out")
        assert load_potential("run").family == "lj"

    def test_what_is_used_is_not_deleted(self, data):
        assert train(data)[0] == 0
        arguments = ("train", data / "pairs", "--potential", "run", "--out", "run", "--overwrite", *QUICK)
        is_refused(run(*arguments), "run lies in run", "another --out")
        assert load_potential("run").family == "lj"

    def test_a_complete_run_is_reported_again(self, data):
        code, out, _ = train(data, "--json")
        again, said, err = train(data, "--resume", "--json")
        assert (code, again) == (0, 0), err
        assert json.loads(said) == json.loads(out)

    def test_a_folder_that_is_not_ours_is_never_deleted(self, data, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").write_text("years")
        is_refused(train(data, "--overwrite"), "not one of our run folders")
        assert (tmp_path / "run" / "thesis.tex").read_text() == "years"

    def test_an_empty_folder_is_used(self, data, tmp_path):
        (tmp_path / "run").mkdir()
        assert train(data)[0] == 0

    def test_a_file_in_its_place_is_refused(self, data, tmp_path):
        (tmp_path / "run").write_text("a file")
        is_refused(train(data), "run")

    def test_what_cannot_be_trained_on_does_not_delete_the_last_run(self, data, tmp_path):
        assert train(data)[0] == 0
        spoilt = tmp_path / "spoilt"
        spoilt.mkdir()
        for path in sorted((data / "pairs").iterdir()):
            frames = read(path, index=":")
            frames[0].set_constraint(FixBondLengths([[0, 1]]))
            write(spoilt / f"{path.stem}.traj", frames)
        result = run("train", spoilt, "--potential", data / "lj", "--out", "run", "--overwrite", *QUICK)
        is_refused(result, "cluster", "FixBondLengths")
        assert (tmp_path / "run" / "results.json").exists()


class TestResume:
    def test_it_continues_and_ends_as_an_uninterrupted_run(self, data, tmp_path):
        more = ["--epochs", 2, "--steps", 3, "--batch-size", 1, "--lr", 0.02]
        assert train(data, "--json", quick=more)[0] == 0
        (tmp_path / "run").rename(tmp_path / "whole")

        class Killed(BaseException):
            pass

        real, calls = ase_bptt.Trainer.train_step, iter(range(100))

        def dying(self, pairs):
            if next(calls) == 3:
                raise Killed
            return real(self, pairs)

        with mock.patch.object(ase_bptt.Trainer, "train_step", dying), pytest.raises(Killed):
            train(data, quick=more)
        assert len(open_text("run/metrics.csv").splitlines()) == 3  # the names, epoch 0 and epoch 1
        code, out, err = train(data, "--resume", "--json", quick=more)
        assert code == 0, err
        whole = json.loads(open_text("whole/results.json"))
        assert json.loads(out)["test"] == whole["test"]
        assert load_potential("run").sigma.item() == load_potential("whole").sigma.item()

    @pytest.mark.parametrize("folds", [[], ["--folds", "3"]], ids=["one", "folds"])
    def test_pairs_that_are_named_by_relative_paths_go_on_without_naming_them(self, data, tmp_path, folds):
        for k, path in enumerate(sorted((data / "pairs").iterdir())):
            frames = read(path, ":")
            for atoms in frames:
                atoms.info.clear()
            (tmp_path / "runs" / f"{k}").mkdir(parents=True)
            write(tmp_path / "runs" / f"{k}" / "relax.traj", frames)
        real, calls = ase_bptt.Trainer.train_step, iter(range(100))

        def stopping(self, pairs):
            if next(calls) == 1:
                raise KeyboardInterrupt
            return real(self, pairs)

        arguments = ("--potential", data / "lj", "--out", "run", "--epochs", 2, "--steps", 2, "--batch-size", 1, *folds)
        with mock.patch.object(ase_bptt.Trainer, "train_step", stopping):
            assert run("train", "runs", *arguments)[0] == 130
        code, out, err = run("train", "--out", "run", "--resume", "--json")
        assert code == 0, err
        assert json.loads(out)["test"]["n"] > 0

    def test_other_epochs_are_refused(self, data):
        assert train(data)[0] == 0
        is_refused(train(data, "--resume", quick=["--epochs", 5]), "--epochs 1, not 5", "leave the flag out")

    def test_nothing_to_resume_is_refused(self, data):
        is_refused(train(data, "--resume"), "run", "holds no run that can be resumed")


class TestRefusing:
    def test_a_missing_folder(self, data):
        is_refused(run("train", "nowhere", "--potential", data / "lj"), "There is no file or folder nowhere.")

    def test_an_unknown_potential_with_those_there_are(self, data):
        is_refused(run("train", data / "pairs", "--potential", "gold"), "'gold'", "mace-si", "chgnet")

    def test_a_pickle_without_trust_with_the_flag_that_allows_it(self, data, tmp_path):
        torch.save({"any": "code"}, tmp_path / "native.model")
        is_refused(run("train", data / "pairs", "--potential", "native.model"), "--trust")

    def test_three_files(self, data):
        is_refused(
            run("train", "a", "b", "c", "--potential", data / "lj"), "one file or folder of relaxations, or two files"
        )

    def test_too_few_kinds(self, data, tmp_path):
        result = run("train", data / "pairs" / "0.extxyz", "--potential", data / "lj")
        is_refused(result, "training, validation and test need one each")
        assert not list(tmp_path.iterdir())

    def test_an_unknown_key_with_those_there_are(self, data):
        is_refused(train(data, "--group", "colour"), "'colour'", "kind")

    @pytest.mark.parametrize(
        ("flags", "texts"),
        [
            (["--epochs", "0"], ["--epochs", "at least 1"]),
            (["--steps", "-3"], ["--steps", "at least 1"]),
            (["--batch-size", "two"], ["--batch-size"]),
            (["--stepper", "newton"], ["newton", "fire"]),
            (["--adjoint", "magic"], ["magic", "replay"]),
            (["--dtype", "float16"], ["float16", "float32"]),
            (["--loss", "energy"], ["energy", "delta_q", "rmsd"]),
            (["--device", "abacus"], ["abacus"]),
            (["--lr", "-1"], ["--lr", "positive", "-1"]),
        ],
        ids=lambda x: "".join(x) if x[0].startswith("--") else "",
    )
    def test_flags_that_make_no_sense(self, data, tmp_path, flags, texts):
        code, out, err = train(data, *flags)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        assert all(text in err for text in texts)
        assert not (tmp_path / "run").exists()

    def test_an_interrupt_says_how_to_go_on(self, data):
        with mock.patch("ase_bptt.cli.train.finetune", side_effect=KeyboardInterrupt):
            code, out, err = train(data, "--json")
        assert (code, out) == (130, "")
        assert "Nothing was trained yet" in err
        assert "--overwrite" in err

    def test_no_command_at_all_is_a_matter_of_usage(self):
        code, out, err = run()
        assert (code, out) == (2, "")
        assert "usage" in err


@needs_mace
def test_the_demo_as_it_is_by_default(tmp_path):
    code, out, err = run("demo", "--dry-run", "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert out.startswith("mace-si, fine-tuned through 10 frames of gd, gradient by replay, 6 epochs\n")


def test_help_shows_examples_and_defaults():
    code, out, _ = run("--help")
    assert code == 0
    assert "ase-bptt demo" in out
    code, out, _ = run("train", "--help")
    assert code == 0
    out = " ".join(out.split())
    assert "(default: 4)" in out
    assert "(default: 6, after those of --first)" in out


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["relax"], ["evaluate"], ["info"]], ids=" ".join)
@pytest.mark.parametrize("columns", ["80", "200"])
def test_help_reads_well_at_80_columns(monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith(" ".join(["usage: ase-bptt", *command]))
    assert "None" not in out
    assert "%(" not in out


def test_version_is_that_of_the_package():
    assert run("--version")[1].strip() == f"ase_bptt {ase_bptt.__version__}"


def test_in_a_shell_json_is_all_of_standard_output_and_progress_goes_elsewhere(data, tmp_path):
    arguments = ["train", data / "pairs", "--potential", data / "lj", "--out", "run", "--json", *QUICK]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "ase_bptt", *map(str, arguments)],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test"]["n"] > 0
    assert "epoch   1/1" in done.stderr
    assert "Traceback" not in done.stderr


class TestDryRun:
    def test_it_says_what_it_would_do_and_writes_nothing(self, data, tmp_path):
        code, out, err = train(data, "--dry-run")
        assert code == 0, err
        assert "nothing was written" in out
        assert not (tmp_path / "run").exists()

    def test_it_refuses_what_a_run_would_refuse(self, data):
        is_refused(train(data, "--dry-run", "--stepper", "fire", "--step-size", "0.5"), "--stepper gd")


def test_a_resumed_run_compares_with_the_untuned_potential_it_began_with(data, tmp_path):
    assert train(data, quick=["--epochs", "2", "--steps", "2"])[0] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    code, out, err = run("train", data / "pairs", "--out", "run", "--epochs", "2", "--resume", "--json")
    assert code == 0, err
    assert json.loads(out)["test"]["mean_before"] == results["test"]["mean_before"]
