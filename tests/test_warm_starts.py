"""Warm starts: shorter ways to the same minima, a look at the beginning now and then, and the same when resumed."""

import csv
import dataclasses
import logging

import numpy as np
import pytest
import torch
from ase import Atoms
from helpers.training import Killed, contents, killed_in, make_pairs, same, trainer

from ase_bptt import RelaxationPair, Trainer
from ase_bptt.adjoints import Guided
from ase_bptt.potentials.analytic import DoubleWell
from ase_bptt.steppers import GradientDescent
from ase_bptt.training import pair_loss

STILL = {"interpolate": 0.0, "rattle": 0.0}


@pytest.fixture(scope="module")
def pairs():
    torch.set_num_threads(1)
    return make_pairs(0, 4)


def warm(every=2, adjoint="implicit", **changes):
    return trainer(**{"adjoint": adjoint, "warm_start_every": every, "stepper": None, "steps": None} | changes)


def watched(run, monkeypatch) -> list:
    """Collects (epoch, relaxation) of each batch that the run relaxes."""
    seen = []
    real = pair_loss.relax

    def relax(*arguments, **settings):
        found = real(*arguments, **settings)
        seen.append((run.epoch, found))
        return found

    monkeypatch.setattr(pair_loss, "relax", relax)
    return seen


class TestStarts:
    def test_ways_are_shorter_but_for_the_cold_epochs(self, pairs, monkeypatch):
        run = warm(every=3, lr=0.004)
        seen = watched(run, monkeypatch)
        run.fit(pairs, epochs=5)
        frames = [sum(found.nsteps.sum().item() for epoch, found in seen if epoch == k) for k in range(5)]
        assert max(frames[1], frames[2], frames[4]) < 0.7 * min(frames[0], frames[3])

    def test_cold_epochs_begin_at_the_initial_structures_and_others_at_the_ends(self, pairs, monkeypatch):
        run = warm(every=2, interpolate=0.5, rattle=0.1)
        seen, ends = watched(run, monkeypatch), []
        validate = run.validate

        def note(valid):
            ends.append(dict(run.pair_loss.warm.ends))
            return validate(valid)

        run.validate = note
        run.fit(pairs, epochs=4)
        initial = {p.id: torch.from_numpy(p.initial.positions) for p in pairs}
        for epoch in range(4):
            starts = torch.cat([found.start.positions for k, found in seen if k == epoch]).split(6)
            expected = ends[epoch] if epoch % 2 else initial
            assert {tuple(x.flatten().tolist()) for x in starts} == {
                tuple(x.flatten().tolist()) for x in expected.values()
            }

    def test_of_guided_only_the_end_is_warm(self, pairs, monkeypatch):
        run = warm(adjoint=Guided(3), batch_size=4)
        seen = watched(run, monkeypatch)
        run.backward(pairs)
        run.pair_loss.backward(pairs, 1)
        initial = torch.cat([torch.from_numpy(p.initial.positions) for p in pairs])
        ends = torch.cat([run.pair_loss.warm.ends[p.id] for p in pairs])
        cold, warmer = (found for _, found in seen)
        np.testing.assert_array_equal(cold.start.positions, initial)
        np.testing.assert_array_equal(cold.early.start.positions, initial)
        np.testing.assert_array_equal(warmer.early.start.positions, initial)
        np.testing.assert_allclose(warmer.start.positions, ends, atol=0.01)
        assert (warmer.nsteps.sum(), warmer.early.nsteps.sum()) == (0, 12)

    def test_a_pair_that_did_not_converge_starts_cold_the_next_time(self, pairs, monkeypatch):
        run = warm(every=9, batch_size=4)
        run.pair_loss.backward(pairs, 0)
        assert len(run.pair_loss.warm.ends) == 4
        with torch.no_grad():
            run.potential.sigma += 0.05
        run.pair_loss.steps = 1
        run.pair_loss.backward(pairs, 1)
        assert run.pair_loss.counts()["unsolved"] == 4
        seen = watched(run, monkeypatch)
        run.pair_loss.backward(pairs, 2)
        np.testing.assert_array_equal(seen[0][1].start.positions, np.concatenate([p.initial.positions for p in pairs]))


class Well(DoubleWell):
    """One that can be saved."""

    def config(self):
        return {"height": self.height.item()}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


class Raised(Trainer):
    """After its first epoch the bump is there, which sends the path from the initial structure to the other well."""

    def validate(self, valid):
        if self.epoch == 1:
            with torch.no_grad():
                self.potential.height.fill_(0.3)
        return super().validate(valid)


def test_another_basin_is_noticed_at_the_next_cold_start_and_told_once(tmp_path, caplog):
    initial, relaxed = (Atoms("Ar2", positions=[[0, 0, 0], [0, 0, z]]) for z in (3.02, 2.5))
    run = Raised(
        Well(), adjoint="implicit", warm_start_every=2, stepper=GradientDescent(0.004), steps=1000, progress=False,
        out=tmp_path / "run", **STILL,
    )  # fmt: skip
    run.fit([RelaxationPair(initial, relaxed, "dimer", "dimer")], epochs=5)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [float(row["elsewhere"]) for row in rows] == [0, 0, 1, 0, 0]
    losses = [float(row["train_loss"]) for row in rows]
    assert min(losses[:2]) > 10 * max(losses[2:])
    told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1
    assert told[0].startswith("dimer: from its initial structure it now relaxes to another basin")


class TestResuming:
    @pytest.mark.parametrize("adjoint", ["implicit", "guided:3"])
    @pytest.mark.parametrize("step", [4, 8])
    def test_a_run_that_goes_on_is_warm(self, pairs, tmp_path, adjoint, step):
        whole = warm(3, adjoint, out=tmp_path / "whole").fit(pairs[:3], pairs[3:], epochs=4)
        with pytest.raises(Killed):
            killed_in(warm(3, adjoint, out=tmp_path / "run"), step).fit(pairs[:3], pairs[3:], epochs=4)
        resumed = Trainer.resume(tmp_path / "run", progress=False)
        assert set(resumed.pair_loss.warm.ends) == {p.id for p in pairs[:3]}
        resumed.fit(pairs[:3], pairs[3:], epochs=4)
        assert same(contents(resumed, tmp_path / "run"), contents(whole, tmp_path / "whole"))
        ends = [torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["warm_ends"] for n in ("run", "whole")]
        assert same(*ends)


@pytest.mark.parametrize("adjoint", ["replay", "full", "truncated:3"])
def test_warm_starts_need_a_minimum_to_start_at(adjoint):
    with pytest.raises(ValueError, match=rf"not '{adjoint.split(':')[0]}': take 'implicit', 'guided' or 'one-step'\.$"):
        warm(adjoint=adjoint, stepper="gd", steps=5)


def test_pairs_must_have_names_of_their_own(pairs):
    twice = [dataclasses.replace(p, id="a pair") for p in pairs[:2]]
    with pytest.raises(ValueError, match="Two training pairs are called 'a pair'"):
        warm().check(twice)


def test_epochs_between_cold_starts_are_not_negative():
    with pytest.raises(ValueError, match=r"warm_start_every must be positive, got -1\."):
        warm(-1)
