"""Fine-tuning: it learns, keeps the best, says what goes wrong, and repeats bit for bit when it is resumed."""

import csv
import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms, FixBondLengths
from helpers.potentials import needs_mace, tiny_mace
from helpers.training import (
    SETTINGS,
    Exploding,
    Killed,
    Scripted,
    contents,
    killed_in,
    make_pairs,
    same,
    trainer,
    untuned,
    with_xenon,
    without_times,
)
from torch import nn

from ase_bptt import RelaxationPair, Trainer, load_potential
from ase_bptt.losses import rmsd
from ase_bptt.pairs import fingerprint
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.steppers import GradientDescent
from ase_bptt.training import checkpoint
from ase_bptt.training.state import NoGain
from ase_bptt.training.training_data import VariedStarts

EPOCHS = 3


@pytest.fixture(scope="module")
def pairs():
    return {"train": make_pairs(0, 5), "valid": make_pairs(5, 2), "test": make_pairs(7, 3)}


class TestLearning:
    def test_it_recovers_the_potential_that_made_the_pairs(self, pairs):
        tuned = trainer(steps=15)
        before = tuned.evaluate(pairs["test"]).mean
        tuned.fit(pairs["train"], pairs["valid"], epochs=8)
        assert tuned.evaluate(pairs["test"]).mean < 0.1 * before
        assert tuned.potential.sigma.item() == pytest.approx(2.5, abs=0.02)
        losses = [row["train_loss"] for row in tuned.history]
        assert losses[-1] < 0.5 * losses[0]
        assert len(losses) == 8

    def test_the_potential_is_trained_in_place(self, pairs):
        potential = untuned()
        trainer(potential).fit(pairs["train"], epochs=1)
        assert potential.sigma.item() != 2.65

    @pytest.mark.parametrize(
        "factory",
        [
            lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.5),
            lambda p: torch.optim.Adam([{"params": [q], "lr": 0.01 * (k + 1)} for k, q in enumerate(p)]),
            lambda p: torch.optim.RMSprop(p, lr=0.01),
        ],
        ids=["sgd", "adam-groups", "rmsprop"],
    )
    def test_any_optimizer_trains(self, pairs, factory):
        run = trainer(optimizer=factory).fit(pairs["train"], epochs=2)
        assert run.history[1]["train_loss"] < run.history[0]["train_loss"]

    @pytest.mark.parametrize("loss", ["rmsd", "squared_delta_q", lambda run, reference: rmsd(run, reference) ** 2])
    def test_any_loss_trains(self, pairs, loss):
        run = trainer(loss=loss).fit(pairs["train"], epochs=2)
        assert run.history[1]["train_loss"] < run.history[0]["train_loss"]

    def test_replay_and_the_full_tape_train_alike(self, pairs):
        runs = [trainer(adjoint=name).fit(pairs["train"], epochs=1) for name in ("replay", "full")]
        assert runs[0].potential.sigma.item() == pytest.approx(runs[1].potential.sigma.item(), abs=1e-9)

    def test_weights_that_are_frozen_stay(self, pairs):
        potential = untuned()
        potential.epsilon.requires_grad_(False)
        trainer(potential).fit(pairs["train"], epochs=1)
        assert potential.epsilon.item() == 0.3
        assert potential.sigma.item() != 2.65

    def test_a_step_size_can_be_learnt(self, pairs):
        step_size = nn.Parameter(torch.tensor(0.03, dtype=torch.float64))
        trainer(stepper=GradientDescent(step_size)).fit(pairs["train"], epochs=1)
        assert step_size.item() != 0.03

    def test_the_rates_fall_to_zero_by_half_a_cosine_from_their_own_starts(self, pairs):
        rates = []

        class Spy(torch.optim.SGD):
            def step(self, closure=None):
                rates.append([group["lr"] for group in self.param_groups])

        trainer(optimizer=lambda p: Spy([{"params": [q], "lr": k + 1.0} for k, q in enumerate(p)])).fit(
            pairs["train"], epochs=2
        )
        expected = [0.5 * (1 + np.cos(np.pi * k / 6)) for k in range(6)]
        np.testing.assert_allclose(rates, [[x, 2 * x] for x in expected], atol=1e-12)

    @pytest.mark.parametrize("clip", [1e-3, 1e3])
    def test_gradients_are_clipped_to_a_norm(self, pairs, clip):
        run = trainer(clip=clip)
        _, norm = run.train_step(pairs["train"][:2])
        left = torch.stack([p.grad.norm() for p in run.potential.parameters()]).norm()
        assert left.item() == pytest.approx(min(norm, clip), rel=1e-3)
        assert 1e-3 < norm < 1e3

    def test_one_seed_gives_one_run_and_another_seed_another(self, pairs):
        one, two, other = (trainer(seed=s).fit(pairs["train"], epochs=1) for s in (1, 1, 2))
        assert same(one.potential.state_dict(), two.potential.state_dict())
        assert not same(one.potential.state_dict(), other.potential.state_dict())


class TestStarts:
    def test_without_noise_and_way_they_are_the_initial_structures(self, pairs):
        for varied, pair in zip(VariedStarts(pairs["train"], 0.0, 0.0, [0]), pairs["train"], strict=True):
            np.testing.assert_array_equal(varied.initial.positions, pair.initial.positions)
            assert (varied.relaxed, varied.id, varied.group) == (pair.relaxed, pair.id, pair.group)

    def test_the_way_leads_to_the_reference_through_the_nearest_images(self):
        relaxed = Atoms("Si2", positions=[[0, 0, 0], [2, 0, 0]], cell=[5, 5, 5], pbc=True)
        initial = relaxed.copy()
        initial.positions[1] = [2.4 - 5, 0, 0]
        (varied,) = VariedStarts([RelaxationPair(initial, relaxed, "a")] * 1, 1.0, 0.0, [0])
        bond = varied.initial.get_distance(0, 1, mic=True)
        assert 2.0 < bond < 2.4

    def test_the_pairs_given_are_left_as_they_are(self, pairs):
        before = fingerprint(pairs["train"])
        trainer(interpolate=1.0, rattle=0.1).fit(pairs["train"], epochs=1)
        assert fingerprint(pairs["train"]) == before

    def test_noise_has_the_width_asked_for(self, pairs):
        varied = VariedStarts(pairs["train"] * 40, 0.0, 0.03, [0])
        moves = [v.initial.positions - p.initial.positions for v, p in zip(varied, pairs["train"] * 40, strict=True)]
        assert np.concatenate(moves).std() == pytest.approx(0.03, rel=0.05)


class TestChoosing:
    @pytest.mark.parametrize(("script", "warns"), [([1.0, 2.0, 2.0], True), ([3.0, 2.0, 2.0], False)])
    def test_it_warns_where_no_epoch_was_better(self, pairs, script, warns):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.scripted(script).fit(pairs["train"], pairs["valid"], epochs=2)
        assert [w.category for w in said] == [NoGain] * warns
        assert not warns or "With the best, epoch 1, they end 172% farther off" in str(said[0].message)  # exp(1) - 1

    @pytest.mark.parametrize(("script", "tuned"), [([1.0, 2.0, 2.0], False), ([3.0, 2.0, 2.0], True)])
    @pytest.mark.filterwarnings("ignore::ase_bptt.training.state.NoGain")
    def test_the_card_of_what_was_kept_as_it_was_says_so(self, pairs, tmp_path, script, tuned):
        run = self.scripted(script, out=tmp_path / "run").fit(pairs["train"], pairs["valid"], epochs=2)
        run.save(tmp_path / "saved")
        again = trainer(load_potential(tmp_path / "saved"), out=tmp_path / "again").fit(pairs["train"], epochs=1)
        assert again.potential.metadata["base"].get("kept_as_it_was", False) is not tuned
        for folder in ("saved", "run/potential"):
            card = (tmp_path / folder / "model_card.md").read_text(encoding="utf-8")
            assert card.splitlines()[0].endswith("fine-tuned") is tuned
            assert ("**these are the untuned weights**" in card) is not tuned
        card = (tmp_path / "again" / "potential" / "model_card.md").read_text(encoding="utf-8")
        assert card.splitlines()[0].endswith("fine-tuned")
        assert ("fine-tuned 2 times in a row" in card) is tuned

    def scripted(self, script, **changes):
        return Scripted(untuned(), script=script, **SETTINGS | changes)

    @pytest.mark.parametrize(
        ("script", "best"),
        [
            ([3.0, 2.0, 1.0, 2.5], 2),
            ([3.0, 2.0, 2.0, 2.5], 2),
            ([1.0, 2.0, 2.0, 2.5], 0),
            ([np.nan, 2.0, np.nan, 3.0], 1),
            ([[3.0, 3.0, 3.0], [1.0, 2.0, 1.5], [0.8, 2.3, 1.6], [1.1, 2.1, 1.6]], 2),  # as good, then clearly worse
            ([[3.0, 3.0, 3.0], [1.1, 2.1, 1.6], [1.0, 2.0, 1.5], [1.0, 2.3, 1.3]], 3),  # better, then as good
            ([[1.0, 2.0, 1.5], [0.8, 2.3, 1.6], [1.1, 2.1, 1.6], [0.8, 2.3, 1.5]], 0),  # none better than untuned
        ],
    )
    @pytest.mark.filterwarnings("ignore::ase_bptt.training.state.NoGain")
    def test_it_ends_in_its_best_state_on_validation(self, pairs, tmp_path, script, best):
        run = self.scripted(script, out=tmp_path / "run").fit(pairs["train"], pairs["valid"], epochs=3)
        assert run.potential.sigma.item() == run.sigmas[best]
        assert len({*run.sigmas}) == 4
        assert load_potential(tmp_path / "run").sigma.item() == run.sigmas[best]

    def test_without_validation_it_ends_in_its_last_state(self, pairs, tmp_path):
        run = trainer(out=tmp_path / "run", patience=1).fit(pairs["train"], epochs=3)
        assert len(run.history) == 3
        last = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
        assert same(last["potential"], dict(run.potential.state_dict()))

    @pytest.mark.parametrize(
        ("script", "patience", "epochs"),
        [
            ([3.0, 4.0, 2.0, 3.0, 3.0, 1.0], 1, 1),
            ([3.0, 4.0, 2.0, 3.0, 3.0, 1.0], 2, 4),
            ([3.0, 3.0, 3.0, 3.0, 3.0, 3.0], 2, 2),
            ([3.0, 4.0, 2.0, 3.0, 3.0, 1.0], None, 5),
            ([3.0, 4.0, np.nan, np.nan, 3.0, 1.0], 3, 3),
        ],
    )
    @pytest.mark.filterwarnings("ignore::ase_bptt.training.state.NoGain")
    def test_it_stops_after_so_many_epochs_without_a_better_validation(self, pairs, script, patience, epochs):
        run = self.scripted(script, patience=patience).fit(pairs["train"], pairs["valid"], epochs=5)
        assert len(run.history) == epochs


class TestDiverging:
    def exploding(self, fault):
        potential = Exploding(**untuned().config())
        potential.fault = fault
        return potential

    @pytest.mark.parametrize("fault", [float("nan"), float("inf"), 1e4], ids=["nan", "inf", "too-stiff"])
    @pytest.mark.parametrize("adjoint", ["replay", "full"])
    def test_a_diverging_pair_is_named_and_counted_and_the_others_train(self, pairs, caplog, fault, adjoint):
        good = pairs["train"][:3]
        run = trainer(self.exploding(fault), batch_size=4, adjoint=adjoint, interpolate=0.0, rattle=0.0)
        run.fit([*good, with_xenon(pairs["train"][3])], epochs=1)
        assert run.history[0]["skipped"] == 1
        warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert "the bad pair" in warnings[0]
        assert "step size is too large" in warnings[0]
        alone = trainer(batch_size=4, adjoint=adjoint, interpolate=0.0, rattle=0.0).fit(good, epochs=1)
        assert run.potential.sigma.item() == pytest.approx(alone.potential.sigma.item(), abs=1e-9)
        assert run.potential.sigma.item() != 2.65

    def test_a_batch_of_diverging_pairs_leaves_the_weights_alone(self, pairs):
        run = trainer(self.exploding(float("nan")))
        run.fit([with_xenon(p) for p in pairs["train"][:2]], epochs=1)
        assert run.potential.sigma.item() == 2.65
        assert run.history[0]["skipped"] == 2
        assert np.isnan(run.history[0]["train_loss"])

    def test_a_gradient_that_is_not_finite_does_not_touch_the_weights(self, pairs, caplog):
        def loss(relaxation, reference):
            found = rmsd(relaxation, reference)
            return found + (found - found.detach()).abs().sqrt()

        run = trainer(loss=loss)
        run.fit(pairs["train"], epochs=1)
        assert (run.potential.sigma.item(), run.potential.epsilon.item()) == (2.65, 0.3)
        assert run.history[0]["skipped"] == 5
        assert "their gradient is not finite" in caplog.text
        assert all(p.id in caplog.text for p in pairs["train"])


@pytest.mark.parametrize("adjoint", ["replay", "full"])
def test_a_batch_that_does_not_fit_is_computed_in_parts_and_its_gradient_stays(pairs, adjoint):
    def gradients(memory):
        run = trainer(batch_size=8, adjoint=adjoint, memory=memory)
        sizes = []
        relaxed = run.pair_loss.relaxation
        run.pair_loss.relaxation = lambda some, epoch: sizes.append(len(some)) or relaxed(some, epoch)
        losses = run.backward(pairs["train"])
        return torch.stack([p.grad for p in run.potential.parameters()]), losses, sizes

    whole, losses, [n] = gradients(None)
    parts, again, sizes = gradients(2e-5)
    assert n == len(pairs["train"])
    measured, computed = sizes[:5], sizes[5:]
    assert max(measured) == 2
    assert sum(computed) == n
    assert len(computed) > 1
    assert again == pytest.approx(losses, abs=1e-12)
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-10)


class Heavy(LennardJones):
    atomic_numbers = frozenset({18})


class TestRefusing:
    def test_no_pairs(self):
        with pytest.raises(ValueError, match="no pairs to train on"):
            trainer().fit([], epochs=1)

    def test_a_group_on_both_sides(self, pairs):
        with pytest.raises(ValueError, match="Training and validation share the group group 1: split by group"):
            trainer().fit(pairs["train"], [*pairs["valid"], pairs["train"][1]], epochs=1)

    @pytest.mark.parametrize("side", ["train", "valid"])
    @pytest.mark.parametrize("end", ["initial", "relaxed"])
    def test_constraints_by_pair_and_name(self, pairs, side, end, tmp_path):
        bad = pairs["test"][0]
        atoms = getattr(bad, end).copy()
        atoms.set_constraint([FixAtoms([3]), FixBondLengths([[0, 1]])])
        chosen = pairs | {side: [*pairs[side], dataclasses.replace(bad, **{end: atoms})]}
        run = trainer(out=tmp_path / "run")
        with pytest.raises(NotImplementedError, match=r"pair 7: the constraints FixBondLengths .*: remove them"):
            run.fit(chosen["train"], chosen["valid"], epochs=1)
        assert run.epoch == 0
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("side", ["train", "valid"])
    def test_unknown_elements_by_pair_and_symbol(self, pairs, side):
        chosen = pairs | {side: [*pairs[side], with_xenon(pairs["test"][0])]}
        run = trainer(Heavy(**untuned().config()))
        with pytest.raises(NotImplementedError, match=r"the bad pair: .* no parameters for Xe; it knows Ar\."):
            run.fit(chosen["train"], chosen["valid"], epochs=1)
        assert run.potential.sigma.item() == 2.65

    def test_a_potential_without_anything_to_train(self):
        with pytest.raises(ValueError, match="Nothing can be trained"):
            trainer(untuned().requires_grad_(False))

    def test_other_pairs_or_epochs_after_a_resume(self, pairs, tmp_path):
        trainer(out=tmp_path / "run").fit(pairs["train"], pairs["valid"], epochs=2)
        for train, valid, epochs in (
            (pairs["train"][:-1], pairs["valid"], 2),
            (pairs["train"], pairs["valid"][:-1], 2),
            (pairs["train"], pairs["valid"], 3),
        ):
            with pytest.raises(ValueError, match="started with other pairs or epochs"):
                Trainer.resume(tmp_path / "run").fit(train, valid, epochs=epochs)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "garbage": lambda path: path.write_bytes(b'{"half":'),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "missing": Path.unlink,
    "flipped": flip_a_bit,
}


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.part.*"))


@pytest.fixture(scope="module")
def whole(pairs, tmp_path_factory):
    """A run that nothing interrupts."""
    return trainer(out=tmp_path_factory.mktemp("whole")).fit(pairs["train"], pairs["valid"], epochs=EPOCHS)


class TestResuming:
    # 5 pairs in batches of 2 are 3 steps an epoch.
    @pytest.mark.parametrize("step", [1, 2, 4, 6, 8, 9])
    def test_a_run_killed_in_any_epoch_ends_as_one_that_was_not(self, pairs, whole, tmp_path, step):
        arguments = (pairs["train"], pairs["valid"])
        with pytest.raises(Killed):
            killed_in(trainer(out=tmp_path / "run"), step).fit(*arguments, epochs=EPOCHS)
        torch.manual_seed(99)
        resumed = Trainer.resume(tmp_path / "run", progress=False)
        assert resumed.epoch == (step - 1) // 3
        resumed.fit(*arguments, epochs=EPOCHS)
        assert same(contents(resumed, tmp_path / "run"), contents(whole, whole.out))
        assert same(without_times(resumed.history), without_times(whole.history))
        assert whole.potential.sigma.item() != 2.65

    def test_a_run_killed_twice_does(self, pairs, whole, tmp_path):
        arguments = (pairs["train"], pairs["valid"])
        for run, step in ((trainer(out=tmp_path / "run"), 5), (None, 4)):
            with pytest.raises(Killed):
                killed_in(run or Trainer.resume(tmp_path / "run"), step).fit(*arguments, epochs=EPOCHS)
        resumed = Trainer.resume(tmp_path / "run").fit(*arguments, epochs=EPOCHS)
        assert same(contents(resumed, tmp_path / "run"), contents(whole, whole.out))

    def test_a_complete_run_has_nothing_left_to_do(self, pairs, tmp_path):
        whole = trainer(out=tmp_path / "run").fit(pairs["train"], pairs["valid"], epochs=2)
        again = Trainer.resume(tmp_path / "run").fit(pairs["train"], pairs["valid"], epochs=2)
        assert same(dict(again.potential.state_dict()), dict(whole.potential.state_dict()))
        assert again.history == whole.history

    @pytest.mark.parametrize(
        "changes",
        [
            {
                "loss": "rmsd",
                "adjoint": "full",
                "fmax": 0.03,
                "clip": 0.1,
                "interpolate": 0.2,
                "rattle": 0.05,
                "patience": 7,
            },
            {"stepper": "fire"},
            {"stepper": GradientDescent(0.03, anneal=0.9, momentum=0.2, maxstep=0.1)},
            {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)},
        ],
        ids=["numbers", "fire", "gd", "own-rates"],
    )
    def test_settings_are_taken_up_again(self, pairs, tmp_path, changes):
        whole = trainer(out=tmp_path / "whole", **changes).fit(pairs["train"], epochs=2)
        with pytest.raises(Killed):
            killed_in(trainer(out=tmp_path / "run", **changes), 4).fit(pairs["train"], epochs=2)
        resumed = Trainer.resume(tmp_path / "run").fit(pairs["train"], epochs=2)
        assert same(contents(resumed, tmp_path / "run"), contents(whole, tmp_path / "whole"))

    def test_frozen_weights_and_learnt_step_sizes_are_taken_up_again(self, pairs, tmp_path):
        def make(out):
            potential = untuned()
            potential.epsilon.requires_grad_(False)
            step_size = nn.Parameter(torch.tensor(0.03, dtype=torch.float64))
            return trainer(potential, stepper=GradientDescent(step_size), out=out)

        whole = make(tmp_path / "whole").fit(pairs["train"], epochs=2)
        with pytest.raises(Killed):
            killed_in(make(tmp_path / "run"), 5).fit(pairs["train"], epochs=2)
        resumed = Trainer.resume(tmp_path / "run").fit(pairs["train"], epochs=2)
        assert same(contents(resumed, tmp_path / "run"), contents(whole, tmp_path / "whole"))
        assert same(dict(resumed.stepper.state_dict()), dict(whole.stepper.state_dict()))
        assert resumed.potential.epsilon.item() == 0.3

    def test_own_optimizers_and_losses_must_be_given_again(self, pairs, tmp_path):
        def own(relaxation, reference):
            return rmsd(relaxation, reference)

        def sgd(parameters):
            return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

        given = {"loss": own, "optimizer": sgd}
        whole = trainer(out=tmp_path / "whole", **given).fit(pairs["train"], epochs=2)
        with pytest.raises(Killed):
            killed_in(trainer(out=tmp_path / "run", **given), 4).fit(pairs["train"], epochs=2)
        with pytest.raises(ValueError, match="used its own loss 'own': give it"):
            Trainer.resume(tmp_path / "run", optimizer=sgd)
        with pytest.raises(ValueError, match="used SGD: give its factory"):
            Trainer.resume(tmp_path / "run", loss=own)
        resumed = Trainer.resume(tmp_path / "run", **given).fit(pairs["train"], epochs=2)
        assert same(contents(resumed, tmp_path / "run"), contents(whole, tmp_path / "whole"))

    @pytest.mark.parametrize("kind", ["garbage", "empty", "cut", "missing"])
    @pytest.mark.parametrize("names", [["settings.json"], ["checkpoint.pt", "checkpoint.previous.pt"]], ids=len)
    def test_a_damaged_run_is_refused_with_one_sentence(self, pairs, tmp_path, kind, names):
        trainer(out=tmp_path / "run").fit(pairs["train"], epochs=1)
        for name in names:
            DAMAGE[kind](tmp_path / "run" / name)
        with pytest.raises(ValueError, match="run holds no run that can be resumed") as error:
            Trainer.resume(tmp_path / "run")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("kind", ["cut", "missing", "flipped"])
    @pytest.mark.parametrize("step", [1, 5, 9])
    def test_where_the_checkpoint_is_damaged_the_one_before_it_is_used(
        self, pairs, whole, tmp_path, caplog, kind, step
    ):
        """The folder agrees with it at once, and the run ends as one that nothing happened to."""
        arguments, run = (pairs["train"], pairs["valid"]), tmp_path / "run"
        with pytest.raises(Killed):
            killed_in(trainer(out=run), step).fit(*arguments, epochs=EPOCHS)
        before = torch.load(run / "checkpoint.previous.pt", weights_only=True)
        DAMAGE[kind](run / "checkpoint.pt")
        caplog.clear()  # of the run that was killed, where another test has set the level
        with caplog.at_level(logging.WARNING, logger="ase_bptt"):
            resumed = Trainer.resume(run)
        (said,) = caplog.messages
        assert said.startswith(f"{run / 'checkpoint.pt'} cannot be read (")
        assert said.endswith(f"continues from {run / 'checkpoint.previous.pt'}, after epoch {before['epoch']}.")
        assert resumed.epoch == before["epoch"] == max(0, (step - 1) // 3 - 1)
        assert len((run / "metrics.csv").read_text().splitlines()) == 1 + before["epoch"] + bool(before["untuned"])
        best = before["best"]["potential"] if before["best"] else before["potential"]
        assert same(dict(load_potential(run).state_dict()), dict(best))
        resumed.fit(*arguments, epochs=EPOCHS)
        assert same(contents(resumed, run), contents(whole, whole.out))

    def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(self, pairs, whole, tmp_path):
        arguments, run = (pairs["train"], pairs["valid"]), tmp_path / "run"
        with pytest.raises(Killed):
            killed_in(trainer(out=run), 8).fit(*arguments, epochs=EPOCHS)
        (run / "checkpoint.pt").write_bytes(b"garbage")
        resumed, real = Trainer.resume(run), os.replace

        def dying(source, target):
            if Path(target).name == "checkpoint.pt":
                raise Killed
            real(source, target)

        with mock.patch("os.replace", dying), pytest.raises(Killed):
            resumed.fit(*arguments, epochs=EPOCHS)
        again = Trainer.resume(run)
        assert again.epoch == 1
        assert same(contents(again.fit(*arguments, epochs=EPOCHS), run), contents(whole, whole.out))

    def test_a_flipped_bit_changes_no_state_unnoticed(self, pairs, tmp_path):
        trainer(out=tmp_path).fit(pairs["train"], epochs=2)
        path, noticed = tmp_path / "checkpoint.pt", 0
        content = path.read_bytes()
        last, before = (torch.load(tmp_path / name, weights_only=True) for name in (path, "checkpoint.previous.pt"))
        assert (last["epoch"], before["epoch"]) == (2, 1)
        for place in range(7, len(content), len(content) // 100):
            damaged = bytearray(content)
            damaged[place] ^= 4
            path.write_bytes(damaged)
            _, state, rewound = checkpoint.read(tmp_path)
            assert same(state.to_dict(), before if rewound else last), place
            noticed += rewound
        assert noticed > 80

    def test_a_run_that_begins_does_not_fall_back_on_another_of_the_same_folder(self, pairs, tmp_path):
        trainer(out=tmp_path).fit(pairs["train"], epochs=2)
        again = trainer(out=tmp_path)
        again.start(again.check(pairs["train"]), epochs=2)
        (tmp_path / "checkpoint.pt").write_bytes(b"garbage")
        with pytest.raises(ValueError, match="holds no run that can be resumed"):
            Trainer.resume(tmp_path)

    def test_the_one_before_is_copied_where_there_are_no_links(self, pairs, tmp_path):
        with mock.patch("os.link", side_effect=PermissionError("Operation not permitted")):
            trainer(out=tmp_path).fit(pairs["train"], epochs=2)
        (tmp_path / "checkpoint.pt").unlink()
        assert Trainer.resume(tmp_path).epoch == 1

    @pytest.mark.parametrize(
        ("file", "name"),
        [("settings.json", "warm_start_every"), ("settings.json", "terms"), ("checkpoint.pt", "best_epoch")],
    )
    def test_a_run_of_an_older_release_is_refused_with_one_sentence(self, pairs, tmp_path, file, name):
        trainer(out=tmp_path / "run").fit(pairs["train"], epochs=1)
        path = tmp_path / "run" / file
        plain = path.suffix == ".json"
        kept = json.loads(path.read_text()) if plain else torch.load(path, weights_only=True)
        del kept[name]
        path.write_text(json.dumps(kept)) if plain else torch.save(kept, path)
        with pytest.raises(
            ValueError, match=f"run was started by an older release, which kept no '{name}', .*: start ag"
        ):
            Trainer.resume(tmp_path / "run")

    def test_a_folder_that_is_not_there_is_refused_with_one_sentence(self, tmp_path):
        with pytest.raises(ValueError, match=r"nowhere holds no run that can be resumed .*\.$"):
            Trainer.resume(tmp_path / "nowhere")

    @pytest.mark.parametrize("name", ["checkpoint.pt", "weights.pt"])
    def test_a_kill_while_a_file_is_written_leaves_the_old_one_whole(self, pairs, whole, tmp_path, name):
        arguments = (pairs["train"], pairs["valid"])
        real, writes = torch.save, iter(range(100))

        def half(value, path, *args, **kwargs):
            if name in str(path) and next(writes) == 1:
                Path(path).write_bytes(b"half")
                raise Killed
            real(value, path, *args, **kwargs)

        with mock.patch("torch.save", half), pytest.raises(Killed):
            trainer(out=tmp_path / "run").fit(*arguments, epochs=EPOCHS)
        assert not leftovers(tmp_path)
        resumed = Trainer.resume(tmp_path / "run").fit(*arguments, epochs=EPOCHS)
        assert same(contents(resumed, tmp_path / "run"), contents(whole, whole.out))


class TestFiles:
    @pytest.fixture
    def run(self, pairs, tmp_path):
        return trainer(out=tmp_path / "run").fit(pairs["train"], pairs["valid"], epochs=2)

    def test_metrics_have_a_row_for_each_epoch(self, run):
        rows = list(csv.DictReader((run.out / "metrics.csv").read_text().splitlines()))
        assert list(rows[0]) == [
            "epoch", "train_loss", "gradient_norm", "skipped", "lr", "valid_score", "valid_delta_q", "seconds"
        ]  # fmt: skip
        assert [{k: float(v) for k, v in row.items()} for row in rows[1:]] == run.history
        untuned = {k: float(v) for k, v in rows[0].items() if v != "nan"}
        assert untuned == run.record.untuned | {"epoch": 0.0}
        assert [row["epoch"] for row in run.history] == [1, 2]
        assert all(row["seconds"] > 0 and row["skipped"] == 0 for row in run.history)

    def test_settings_say_what_was_run(self, run):
        settings = json.loads((run.out / "settings.json").read_text())
        assert settings == run.settings()
        assert {k: settings[k] for k in ("lr", "steps", "batch_size", "seed", "epochs", "loss", "family")} == {
            "lr": 0.02, "steps": 6, "batch_size": 2, "seed": 4, "epochs": 2, "loss": "delta_q", "family": "lj"
        }  # fmt: skip
        assert settings["stepper"]["name"] == "gd"

    def test_nothing_in_the_folder_needs_unpickling(self, run):
        assert {p.name for p in run.out.iterdir()} == {
            "settings.json", "metrics.csv", "checkpoint.pt", "checkpoint.previous.pt", "potential"
        }  # fmt: skip
        for path in run.out.rglob("*.pt"):
            torch.load(path, weights_only=True)

    def test_nothing_is_written_without_a_folder(self, pairs, tmp_path):
        trainer().fit(pairs["train"], epochs=1)
        assert not list(tmp_path.iterdir())

    @needs_mace
    def test_save_writes_our_format_and_the_native_file(self, tmp_path):

        from ase_bptt.potentials.mace import MACE

        potential = MACE(tiny_mace(elements=(14,), max_ell=1))
        Trainer(potential).save(tmp_path / "tuned")
        assert {p.name for p in (tmp_path / "tuned").iterdir()} == {
            "model.json",
            "weights.pt",
            "mace.model",
            "model_card.md",
        }
        assert same(dict(load_potential(tmp_path / "tuned").state_dict()), dict(potential.state_dict()))


class TestProgress:
    def test_lines_are_logged_where_there_is_no_terminal(self, pairs, caplog):
        with caplog.at_level(logging.INFO, "ase_bptt"):
            trainer(progress=None).fit(pairs["train"], pairs["valid"], epochs=2)
        lines = [r.message for r in caplog.records if r.message.startswith("epoch")]
        assert len(lines) == 3
        assert re.fullmatch(r"epoch   0/2  untuned  valid \d\.\d{3} amu\^1/2 Å", lines[0])
        assert "epoch   2/2" in lines[2]
        assert "skipped 0" in lines[2]

    def test_a_bar_shows_pairs_and_time_left_and_never_on_standard_output(self, pairs, capsys):
        trainer(progress=True).fit(pairs["train"], pairs["valid"], epochs=2)
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "/10" in shown.err
        assert "epoch   2/2" in shown.err


SIGKILL = """
import os, signal, sys, warnings
from pathlib import Path
import torch
from ase_bptt import Trainer, load_potential
from ase_bptt.datasets import si_defects
from ase_bptt.potentials import require
warnings.simplefilter("ignore")
require("mace.modules", extra="mace")
torch.set_num_threads(1)
pairs = {p.id: p for p in si_defects()}
train, valid = [pairs[k] for k in ("V_00", "P_s_00", "Al_s_02")], [pairs["crystal_00"]]

def train_in(out, *, resume=False, die_in_step=None, die_in_save=None):
    # A process of its own; what is shared are imports, and nothing has run before.
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if resume:
        trainer = Trainer.resume(out, progress=False)
    else:
        potential = load_potential("mace-si", dtype="float64")
        trainer = Trainer(potential, steps=3, batch_size=2, lr=1e-3, seed=3, out=out, progress=False)
    step, save, counts = trainer.optimizer.step, torch.save, {"step": 0, "save": 0}
    def dying_step():
        counts["step"] += 1
        if counts["step"] == die_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        step()
    def dying_save(value, path):
        counts["save"] += "checkpoint" in str(path)
        if counts["save"] == die_in_save:
            Path(path).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, path)
    trainer.optimizer.step, torch.save = dying_step, dying_save
    trainer.fit(train, valid, epochs=2)
    save({"weights": trainer.potential.state_dict(), "optimizer": trainer.optimizer.state_dict(),
          "history": trainer.history}, out + ".pt")
    os._exit(0)

assert train_in("whole") == 0
for name, death in {"first": {"die_in_step": 2}, "second": {"die_in_step": 4}, "save": {"die_in_save": 4}}.items():
    assert train_in(name, **death) == -signal.SIGKILL
    assert not Path(name + ".pt").exists()
    print(name, torch.load(Path(name) / "checkpoint.pt")["epoch"])
    assert train_in(name, resume=True) == 0
"""


@needs_mace
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_mace_killed_with_sigkill_in_any_epoch_and_resumed_ends_bit_for_bit_the_same(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SIGKILL], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["first", "0", "second", "1", "save", "1"]
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    untouched = load_potential("mace-si", dtype="float64").state_dict()
    assert not same(whole["weights"], untouched)
    for name in ("first", "second", "save"):
        resumed = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert same(resumed["weights"], whole["weights"])
        assert same(resumed["optimizer"], whole["optimizer"])
        assert same(without_times(resumed["history"]), without_times(whole["history"]))
    assert not leftovers(tmp_path)
