"""Steppers whose numbers are trained beside the weights, and step sizes that are found before the first epoch."""

import csv
import json

import pytest
import torch
from helpers.training import SETTINGS, Scripted, interrupted, make_pairs, trainer, untuned

from ase_bptt import Trainer, relax
from ase_bptt.stability import stability_limit
from ase_bptt.steppers import FIRE, GradientDescent
from ase_bptt.training.fine_tune import finetune


@pytest.fixture(scope="module")
def pairs():
    torch.set_num_threads(1)
    return make_pairs(0, 5)


class TestLearning:
    @pytest.mark.parametrize(
        ("stepper", "learn", "numbers"),
        [
            (lambda: GradientDescent(0.03, momentum=0.3), ["step_size", "momentum"], ["step_size", "momentum"]),
            (lambda: GradientDescent({"Ar": 0.03, "Kr": 0.02}), ["step_size"], ["step_size[Ar]"]),
            (lambda: GradientDescent([0.03, 0.02, 0.01]), ["step_size"], ["step_size[0]", "step_size[2]"]),
            (lambda: FIRE(dt=0.2), ["dt", "a"], ["dt", "a"]),
        ],
        ids=["gd", "gd-elements", "gd-frames", "fire"],
    )
    def test_numbers_of_the_stepper_move_and_go_on_bit_for_bit(self, pairs, tmp_path, stepper, learn, numbers):
        def make(out):
            return trainer(stepper=stepper(), learn=learn, out=out)

        whole, _ = interrupted(make, tmp_path, pairs, step=5, epochs=2)
        assert whole.record.initial_hyperparameters == stepper().hyperparameters()
        rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
        now = whole.stepper.hyperparameters()
        for name in numbers:
            assert now[name] != whole.record.initial_hyperparameters[name]
            assert float(rows[-1][name]) == now[name]
            assert now[name] == pytest.approx(whole.record.initial_hyperparameters[name], rel=0.1)

    def test_the_stepper_that_is_given_stays_for_the_next_training(self, pairs):
        given = GradientDescent(0.03)
        runs = [trainer(stepper=given, learn="step_size").fit(pairs[:2], epochs=1) for _ in range(2)]
        assert [run.record.initial_hyperparameters["step_size"] for run in runs] == pytest.approx([0.03, 0.03])
        assert (
            runs[0].stepper.hyperparameters()
            == runs[1].stepper.hyperparameters()
            != runs[0].record.initial_hyperparameters
        )
        assert given.todict() == GradientDescent(0.03).todict()
        assert not list(given.parameters())

    @pytest.mark.parametrize(("script", "best"), [([3.0, 2.0, 1.0, 2.5], 2), ([1.0, 2.0, 2.0, 2.5], 0)])
    @pytest.mark.filterwarnings("ignore::ase_bptt.training.state.NoGain")
    def test_they_end_where_they_were_in_the_best_epoch_as_the_weights_do(self, pairs, tmp_path, script, best):
        seen = []

        class Watched(Scripted):
            def validate(self, valid):
                seen.append(self.stepper.step_size.item())
                return super().validate(valid)

        settings = SETTINGS | {"stepper": GradientDescent(0.03), "learn": "step_size", "out": tmp_path / "run"}
        run = Watched(untuned(), script=script, **settings).fit(pairs[:4], pairs[4:], epochs=3)
        again = Trainer.resume(tmp_path / "run", progress=False).fit(pairs[:4], pairs[4:], epochs=3)
        assert len(set(seen)) == 4
        assert run.stepper.step_size.item() == again.stepper.step_size.item() == seen[best]
        assert run.potential.sigma.item() == again.potential.sigma.item() == run.sigmas[best]

    @pytest.mark.parametrize("rate", [1.0, -1.0])
    def test_they_stay_in_their_ranges(self, pairs, rate):
        run = trainer(
            untuned().requires_grad_(False), stepper=GradientDescent(0.03, momentum=0.5), learn=["momentum"],
            optimizer=lambda p: torch.optim.SGD(p, lr=1e6, maximize=rate < 0),
        )  # fmt: skip
        run.train_step(pairs[:2])
        assert run.stepper.hyperparameters()["momentum"] in (0.0, 0.999)

    def test_an_optimizer_of_ones_own_gets_groups_with_their_rates(self, pairs, tmp_path):
        seen = []

        def factory(groups):
            seen.append([(g["name"], g.get("lr")) for g in groups])
            return torch.optim.Adam(groups, lr=0.01)

        def make(out):
            return trainer(stepper=GradientDescent(0.03), learn="step_size", optimizer=factory, out=out)

        interrupted(make, tmp_path, pairs, step=4, epochs=2, optimizer=factory)
        assert seen[0] == [("weights", None), ("stepper.step_size", pytest.approx(3e-4))]

    def test_the_page_and_the_results_say_how_far_they_moved(self, pairs, tmp_path):
        run = trainer(stepper=GradientDescent(0.03), learn=["step_size"], out=tmp_path)
        outcome = finetune(run, {"train": pairs[:2], "valid": pairs[2:3], "test": pairs[3:]}, tmp_path, epochs=1)
        said = f"step_size 0.03 -> {run.stepper.step_size.item():.4g}"
        assert outcome.facts["learnt"] == said
        assert json.loads((tmp_path / "results.json").read_text())["facts"]["learnt"] == said
        assert said.replace(">", "&gt;") in (tmp_path / "report.html").read_text()

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            (
                {"adjoint": "implicit", "steps": None},
                "'implicit' has no gradient for the hyperparameters",
            ),
            ({"stepper": GradientDescent("auto")}, "give it a number in Å^2/eV to learn it"),
        ],
        ids=["implicit", "auto"],
    )
    def test_what_could_not_be_learnt_is_refused(self, changes, said):
        with pytest.raises(ValueError, match=said.replace("^", r"\^")):
            trainer(learn=["step_size"], **changes)


class TestAutomaticStepSize:
    def test_it_is_found_before_the_first_epoch_and_kept(self, pairs, tmp_path):
        def make(out):
            return trainer(stepper=GradientDescent("auto", momentum=0.2), learn=["momentum"], out=out)

        begun = make(tmp_path / "begun")
        begun.start(begun.check(pairs), epochs=2)
        found = begun.stepper.todict()["step_size"]
        assert found == pytest.approx(stability_limit(untuned(), [p.relaxed for p in pairs]) / 2)
        assert json.loads((tmp_path / "begun" / "settings.json").read_text())["stepper"]["step_size"] == found
        whole, resumed = interrupted(make, tmp_path, pairs, step=5, epochs=2)
        assert (
            whole.stepper.step_size
            == resumed.stepper.step_size
            == resumed.record.initial_hyperparameters["step_size"]
            == found
        )
        assert whole.stepper.momentum.item() != 0.2

    def test_a_batch_relaxes_with_it(self, pairs):
        starts = [p.relaxed for p in pairs]
        found = relax(untuned(), starts, stepper=GradientDescent("auto"), steps=40, fmax=0.01)
        number = stability_limit(untuned(), starts) / 2
        expected = relax(untuned(), starts, stepper=GradientDescent(number), steps=40, fmax=0.01)
        assert torch.equal(found.positions, expected.positions)
        assert {status.value for status in found.status} == {"converged"}
