"""Choices for a whole training, in the shell and in Python: adjoints, warm starts, learnt steppers, terms, weights."""

import csv
import json
import re
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from ase.io import read, write
from helpers.potentials import built_once, needs_mace, quick_mace
from helpers.shell import is_refused, run, write_relaxations

from ase_bptt import Trainer, load_potential, read_pairs, save_potential
from ase_bptt.drift import take_snapshot
from ase_bptt.evaluation import evaluate
from ase_bptt.pairs.groups import unwarned_split
from ase_bptt.steppers import GradientDescent
from ase_bptt.terms import Distillation, Labels
from ase_bptt.training.fine_tune import finetune
from ase_bptt.tuning import layers, low_rank, prepare

QUICK = ["--epochs", "2", "--lr", "0.02"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Relaxations of clusters, and a potential that wants tuning."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("data")
    write_relaxations(folder)
    return folder


def train(data, *arguments, potential="lj"):
    return run("train", data / "pairs", "--potential", data / potential, "--out", "run", *QUICK, *arguments)


def run_folder() -> tuple[dict, list[dict]]:
    """The settings of the run, and its rows of metrics.csv."""
    settings = json.loads(Path("run/settings.json").read_text())
    return settings, list(csv.DictReader(Path("run/metrics.csv").read_text().splitlines()))


def trained(data, *arguments, **how) -> tuple[str, dict, list[dict]]:
    """What a run says, its settings, and its rows of metrics.csv."""
    code, out, err = train(data, *arguments, **how)
    assert code == 0, err
    return (out, *run_folder())


def tuned(data, *, potential=None, **settings):
    """The results of the same run in Python, with settings that the shell has no flags for."""
    trainer = Trainer(potential or load_potential(data / "lj"), lr=0.02, out="run", progress=False, **settings)
    return finetune(trainer, unwarned_split(read_pairs(data / "pairs")), Path("run"), epochs=2)


def facts() -> dict:
    return json.loads(Path("run/results.json").read_text())["facts"]


class TestChoices:
    def test_implicit_and_a_teacher(self, data):
        out, settings, rows = trained(data, "--adjoint", "implicit", "--teacher", "0.1")
        assert (settings["adjoint"]["name"], settings["warm_start_every"], settings["stepper"]["name"]) == (
            "implicit",
            0,
            "bfgs",
        )
        assert [(term["name"], term["weight"]) for term in settings["terms"]] == [("teacher", 0.1), ("reference", 1.0)]
        assert {"unsolved", "term_teacher"} <= set(rows[0])
        assert float(rows[2]["train_loss"]) < float(rows[1]["train_loss"])
        assert "fine-tuned at minima, after 300 frames of bfgs at most, gradient by implicit, 2 epochs" in out
        assert facts()["loss"].startswith("root_delta_q + 0.1 teacher + 1 reference, gradient by Implicit(")

    def test_warm_starts(self, data):
        tuned(data, adjoint="implicit", warm_start_every=2, terms=[Distillation(0.1), Labels(required=False)])
        settings, rows = run_folder()
        assert settings["warm_start_every"] == 2
        assert {"unsolved", "elsewhere", "term_teacher"} <= set(rows[0])
        assert facts() == {}

    def test_guided_in_the_shell(self, data):
        out, *_ = trained(data, "--adjoint", "guided:5")
        assert "after 300 frames of gd and bfgs at most, gradient by guided:5" in out

    def test_guided_with_a_learnt_step_size(self, data):
        potential = load_potential(data / "lj")
        assert prepare(potential, freeze=["epsilon"]) == "trains 1 of 2 weights"
        results = tuned(data, potential=potential, adjoint="guided:5", learn=["step_size"])
        settings, rows = run_folder()
        assert (settings["adjoint"]["first"], settings["learn"]) == (5, ["step_size"])
        kept = float(rows[results.best_epoch]["step_size"]) if results.best_epoch else 0.05
        assert facts()["learnt"] == f"step_size 0.05 -> {kept:.4g}"
        assert float(rows[-1]["step_size"]) != 0.05

    def test_a_step_size_that_is_found(self, data):
        out, settings, _ = trained(data, "--step-size", "auto", "--steps", "3")
        found = settings["stepper"]["step_size"]
        assert 0.001 < found < 0.1
        assert facts()["step size"].startswith(f"{found:.4g} Å^2/eV")
        assert "fine-tuned through 3 frames of gd, gradient by replay, 2 epochs\ntrains all 2 weights\n" in out

    def test_the_end_says_what_else_has_changed_and_where_more_is(self, data):
        out, *_ = trained(data, "--steps", "2")
        drift = json.loads(Path("run/results.json").read_text())["drift"]["all"]
        said = " ".join(out.split())
        assert (
            f"Drift on {drift['n']} structures that were not trained on (root mean square): forces changed by "
            f"{drift['force']:.3f} eV/Å (their size was {drift['size']:.3f} eV/Å), energies by "
            f"{1000 * drift['energy']:.1f} meV/atom."
        ) in said
        assert "Drift report: run/drift_report.png and run/drift_report.json." in said
        assert max(map(len, out[out.index("Drift on") :].splitlines()[:-1])) <= 80
        assert {"drift_report.png", "drift_report.json"} <= {p.name for p in Path("run").iterdir()}

    @needs_mace
    def test_low_rank_updates_of_the_last_layer(self, data):
        before = quick_mace(10, 18, 36, 54)
        save_potential(before, data / "mace")
        quick = {"evaluate": partial(evaluate, steps=3), "take_snapshot": partial(take_snapshot, size=2)}
        # Three steps of a random potential are no measure of it.
        kept = mock.patch("ase_bptt.evaluation.compare.Comparison.harmful", False)
        with built_once(), kept, mock.patch.multiple("ase_bptt.training.fine_tune", **quick):
            potential = load_potential(data / "mace")
            said = prepare(potential, last=1, lora=2)
            tuned(data, potential=potential, steps=2, terms=())
        assert re.search(r"trains [\d,]+ parameters of low-rank updates of [\d,]+ weights \(LoRA, rank 2\)", said)
        after = load_potential("run")
        assert not low_rank.has(after)
        both = zip(before.named_parameters(), after.parameters(), strict=True)
        changed = {name for (name, a), b in both if not torch.equal(a, b)}
        assert {name.endswith("weight") for name in changed} == {True}
        assert changed < set(layers(before)[-1])


class TestRefusing:
    @pytest.mark.parametrize(
        ("flags", "texts"),
        [
            (["--adjoint", "replay", "--stepper", "bfgs"], ["--stepper bfgs", "--adjoint implicit"]),
            (["--stepper", "fire", "--step-size", "0.1"], ["--step-size", "--stepper gd"]),
        ],
        ids=lambda x: " ".join(x) if x[0].startswith("--") else "",
    )
    def test_what_does_not_go_together(self, data, tmp_path, flags, texts):
        is_refused(train(data, *flags), *texts)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("settings", "texts"),
        [
            ({"warm_start_every": 2}, "Warm starts .*not 'replay'"),
            ({"adjoint": "implicit", "learn": ["step_size"], "stepper": "gd"}, "'implicit' has no gradient"),
            ({"stepper": GradientDescent("auto"), "learn": ["step_size"]}, "step_size='auto' .*to learn it"),
            ({"learn": ["colour"]}, "step_size.*colour"),
        ],
        ids=str,
    )
    def test_the_same_in_python(self, data, tmp_path, settings, texts):
        with pytest.raises(ValueError, match=texts):
            tuned(data, **settings)
        assert not (tmp_path / "run").exists()


def test_a_reference_term_without_energies_and_forces_leaves_no_folder(data, tmp_path):
    for file in (data / "pairs").iterdir():
        write(tmp_path / file.name, [atoms.copy() for atoms in read(file, ":")])
    refused = run("train", tmp_path, "--potential", data / "lj", "--out", tmp_path / "run", "--reference", "1")
    is_refused(refused, "None of the training pairs has a frame with energy and forces")
    assert not (tmp_path / "run").exists()


def test_a_warm_run_goes_on(data, tmp_path):
    settings = {"adjoint": "implicit", "warm_start_every": 3, "batch_size": 1}
    whole = tuned(data, **settings)
    (tmp_path / "run").rename(tmp_path / "whole")
    real, calls = Trainer.train_step, iter(range(100))

    def stopping(self, pairs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(self, pairs)

    with mock.patch.object(Trainer, "train_step", stopping), pytest.raises(KeyboardInterrupt):
        tuned(data, **settings)
    splits = unwarned_split(read_pairs(data / "pairs"))
    resumed = finetune(Trainer.resume("run", progress=False), splits, Path("run"), epochs=2)
    assert resumed.todict()["test"] == whole.todict()["test"]
    assert load_potential("run").sigma.item() == load_potential("whole").sigma.item()


def test_a_dry_run_of_implicit_gives_an_estimate(data, tmp_path):
    code, out, err = train(data, "--adjoint", "implicit", "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["estimate"]["seconds"] > 0
    assert not (tmp_path / "run").exists()


def test_overwriting_leaves_nothing_of_the_last_run(data, tmp_path):
    flags = ["--steps", "2", "--adjoint", "implicit", "--teacher", "0.1"]
    assert train(data, *flags)[0] == 0
    with mock.patch("ase_bptt.cli.train.finetune", side_effect=KeyboardInterrupt):
        assert train(data, *flags, "--overwrite")[0] == 130
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["command.json"]
