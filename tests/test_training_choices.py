"""Training by every adjoint, with rates for patterns of weights, low-rank updates and further terms of the loss."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.potentials import built_once, needs_mace, quick_mace, wide_lennard_jones
from helpers.structures import rattled, silicon
from helpers.training import (
    Exploding,
    interrupted,
    make_pairs,
    pair_with_frames,
    same,
    trainer,
    untuned,
    with_xenon,
    without_times,
)

from ase_bptt import RelaxationPair, Trainer, load_potential, relax
from ase_bptt.adjoints import Guided, Implicit, OneStep, Replay
from ase_bptt.losses import delta_q
from ase_bptt.neighbors import NeighborList
from ase_bptt.report.drift_report import drift_text
from ase_bptt.steppers import GradientDescent
from ase_bptt.structures import Structures
from ase_bptt.terms.labels import Labels
from ase_bptt.terms.regularizers import Distillation, WeightAnchor
from ase_bptt.training.fine_tune import finetune
from ase_bptt.training.results import RunResults
from ase_bptt.tuning import low_rank

TIGHT = Implicit(fmax=1e-6, tolerance=1e-8)
TO_THE_END = {"stepper": None, "steps": None}


@pytest.fixture(scope="module")
def pairs():
    torch.set_num_threads(1)
    return make_pairs(0, 5)


@pytest.fixture(scope="module")
def labelled():
    torch.set_num_threads(1)
    return [pair_with_frames(k, wide_lennard_jones(), 3.0) for k in range(5)]


def gradients(run) -> list[float]:
    return [p.grad.item() for p in run.potential.parameters()]


def by_hand(run, pairs, starts, stepper, adjoint, steps) -> list[float]:
    """The gradient of the mean loss of a batch, by `relax` alone."""
    relaxation = relax(run.potential, starts, stepper=stepper, adjoint=adjoint, steps=steps, fmax=run.relaxation.fmax)
    loss = delta_q(relaxation, Structures.from_atoms([p.relaxed for p in pairs])).mean()
    return [g.item() for g in torch.autograd.grad(loss, list(run.potential.parameters()))]


class TestAdjoints:
    @pytest.mark.parametrize(
        ("adjoint", "changes"),
        [
            ("full", {}),
            ("replay:3", {}),
            ("truncated:4", {}),
            ("guided:6", {"steps": None}),
            ("guided:6", {"steps": None, "warm_start_every": 2}),
            ("implicit", TO_THE_END),
            ("implicit", TO_THE_END | {"warm_start_every": 2}),
            ("one-step", TO_THE_END),
            ("one-step", TO_THE_END | {"warm_start_every": 2}),
        ],
    )
    def test_every_adjoint_trains(self, pairs, adjoint, changes):
        run = trainer(adjoint=adjoint, **changes).fit(pairs, epochs=5)
        # From the same starts: those of two epochs differ by more than what is learnt between them.
        before, after = (
            np.mean(trainer(potential, adjoint=adjoint, **changes).backward(pairs))
            for potential in (untuned(), run.potential)
        )
        assert after < 0.7 * before
        assert 2.4 < run.potential.sigma.item() < 2.6
        assert all(row["skipped"] == 0 and row.get("unsolved", 0) == 0 for row in run.history)

    @pytest.mark.parametrize(
        ("adjoint", "stepper", "steps"),
        [(Replay(), GradientDescent(0.05), 6), (Implicit(), "bfgs", 300), (OneStep(), "fire", 300)],
        ids=["replay", "implicit", "one-step"],
    )
    def test_a_batch_has_the_gradient_that_relax_gives(self, pairs, adjoint, stepper, steps):
        run = trainer(adjoint=adjoint, stepper=stepper, steps=steps)
        run.backward(pairs[:2])
        found = by_hand(run, pairs[:2], [p.initial for p in pairs[:2]], stepper, adjoint, steps)
        assert gradients(run) == pytest.approx(found, rel=1e-12)

    @pytest.mark.parametrize("weight", [0.5, 3.0])
    @pytest.mark.parametrize("warm", [0, 2])
    def test_guided_adds_the_loss_after_the_first_frames_times_its_weight(self, pairs, weight, warm):
        run = trainer(adjoint=Guided(4, weight=weight, solve=TIGHT), steps=300, warm_start_every=warm)
        for epoch in (0, 1):
            run.pair_loss.backward(pairs[:2], epoch)
            found = gradients(run)
            run.optimizer.zero_grad()
        starts = [p.initial for p in pairs[:2]]
        end = by_hand(run, pairs[:2], starts, "bfgs", TIGHT, 300)
        early = by_hand(run, pairs[:2], starts, run.stepper, Replay(), 4)
        assert found == pytest.approx([a + weight * b for a, b in zip(end, early, strict=True)], rel=1e-4)
        assert max(map(abs, early)) > 0.05 * max(map(abs, end))

    def test_an_estimate_leaves_no_trace_in_the_counts(self, pairs):
        run = trainer(adjoint="implicit", stepper=None, steps=2)
        run.estimate(run.check(pairs[:3], pairs[3:4], pairs[4:]), epochs=1)
        assert run.fit(pairs[:3], epochs=1).history[0]["unsolved"] == 3


class TestWeights:
    def test_rates_of_patterns_are_taken_up_again(self, pairs, tmp_path):
        def make(out):
            return trainer(rates={"sig*": 0.1}, out=out)

        run = make(None)
        run.train_step(pairs[:2])
        # A first step of Adam is as long as its rate.
        assert abs(run.potential.sigma.item() - 2.65) == pytest.approx(0.002, rel=1e-3)
        assert abs(run.potential.epsilon.item() - 0.3) == pytest.approx(0.02, rel=1e-3)
        interrupted(make, tmp_path, pairs, step=4, epochs=2)

    @needs_mace
    def test_low_rank_updates_go_on_and_are_saved_as_plain_weights(self, tmp_path):
        def make(out):
            potential = quick_mace(14)
            low_rank.add(potential, 2)
            return trainer(potential, steps=2, rates={"*readouts*": 2.0}, out=out)

        made = [RelaxationPair(silicon(k), rattled(silicon(k), 0.1, k), f"{k}", f"{k}") for k in range(2)]
        with built_once():
            _, resumed = interrupted(make, tmp_path, made, step=2, epochs=2)
        assert low_rank.has(resumed.potential)
        assert low_rank.settings(resumed.potential)["rank"] == 2
        folder = tmp_path / "run" / "potential"
        saved = [load_potential(folder), load_potential(folder / "mace.model", trust=True)]
        structures = Structures.from_atoms(silicon(5), dtype=torch.float64)
        energies = [
            p.energy_and_forces(structures, NeighborList(p.cutoff)(structures))[0].item()
            for p in (resumed.potential, *saved)
        ]
        assert not any(low_rank.has(p) for p in saved)
        np.testing.assert_allclose(energies, energies[0], rtol=1e-10)


class Nudge(WeightAnchor):
    """A term of one's own."""

    name = "nudge"


class Flat:
    """A term of one's own that looks at no pairs and wants nothing kept."""

    name, weight = "flat", 0.1

    def prepare(self, potential, pairs):
        pass

    def loss(self, potential, pairs, rng):
        return torch.ones((), dtype=potential.dtype)

    def state(self):
        return {}

    def todict(self):
        return {"name": self.name}


class TestTerms:
    @staticmethod
    def make(out=None):
        return trainer(terms=[WeightAnchor(1.0), Distillation(0.3, size=3), Labels(0.3, path=0.5)], out=out)

    def test_they_go_on_bit_for_bit(self, labelled, tmp_path):
        whole, resumed = interrupted(self.make, tmp_path, labelled[:3], labelled[3:], step=4, epochs=3)
        assert same(*([term.state() for term in run.terms] for run in (whole, resumed)))
        assert same(without_times(whole.history), without_times(resumed.history))
        assert all(whole.history[-1][f"term_{name}"] > 0 for name in ("weight_anchor", "teacher", "reference"))

    def test_the_page_says_what_else_has_changed(self, labelled, tmp_path):
        splits = {"train": labelled[:2], "valid": labelled[2:3], "test": labelled[3:4]}
        outcome = finetune(self.make(tmp_path), splits, tmp_path, epochs=1)
        assert "What else has changed" in (tmp_path / "report.html").read_text()
        assert drift_text(RunResults.load(tmp_path).drift_report) == drift_text(outcome.drift_report)

    def test_each_term_has_its_column_even_where_no_step_was_taken(self, pairs):
        potential = Exploding(**untuned().config())
        potential.fault = float("nan")
        run = trainer(potential, terms=[WeightAnchor()]).fit([with_xenon(p) for p in pairs[:2]], epochs=1)
        assert np.isnan(run.history[0]["term_weight_anchor"])

    def test_objects_serve_several_trainings_each_with_its_own_beginning(self, pairs):
        given = [WeightAnchor(), Distillation(size=3, batch=20)]
        for sigma in (2.6, 2.7):
            run = trainer(untuned(), terms=given)
            with torch.no_grad():
                run.potential.sigma.fill_(sigma)
            run.start(run.check(pairs[:2]), epochs=1)
            losses = [term.loss(run.potential, pairs[:2], np.random.default_rng(0)).item() for term in run.terms]
            assert losses == pytest.approx([0.0, 0.0], abs=1e-20)
            run.fit(pairs[:2], epochs=1)

    def test_two_of_one_name_are_refused(self):
        with pytest.raises(ValueError, match="Two terms of the loss have one name"):
            trainer(terms=[WeightAnchor(), {"name": "weight_anchor", "weight": 2.0}])

    @pytest.mark.parametrize("terms", ["weight_anchor", ["weight_anchor"], [{"name": "weight_anchor"}]])
    def test_by_name_they_have_weight_1(self, pairs, terms):
        run = trainer(terms=terms).fit(pairs[:2], epochs=1)
        assert [(term.name, term.weight) for term in run.terms] == [("weight_anchor", 1.0)]
        assert "term_weight_anchor" in run.history[0]

    def test_pairs_that_a_term_cannot_use_are_refused_before_there_is_a_folder(self, pairs, tmp_path):
        run = trainer(terms=["reference"], out=tmp_path / "run")
        # A copy of a structure has no energy and forces.
        pairs = [dataclasses.replace(p, relaxed=p.relaxed.copy()) for p in pairs]
        for refusing in (run.check, run.fit):
            with pytest.raises(ValueError, match="None of the training pairs has a frame with energy and forces"):
                refusing(pairs)
        assert not (tmp_path / "run").exists()

    def test_frames_are_read_once_however_often_pairs_are_checked(self, labelled):
        reads = []

        class File(list):
            def __iter__(self):
                reads.append(len(self))
                return super().__iter__()

        pairs = [dataclasses.replace(p, frames=File(p.frames)) for p in labelled[:2]]
        run = trainer(terms=["reference"])
        run.start(run.check(pairs), epochs=1)
        before = len(reads)
        run.fit(pairs, epochs=1)
        assert before == len(reads) == 2

    def test_a_term_of_ones_own_need_not_check_pairs(self, pairs):
        assert trainer(terms=[Flat()]).fit(pairs[:2], epochs=1).history[0]["term_flat"] == pytest.approx(0.1)

    def test_terms_of_ones_own_must_be_given_again(self, pairs, tmp_path):
        def make(out):
            return trainer(terms=[Nudge(0.1)], out=out)

        interrupted(make, tmp_path, pairs, step=4, epochs=2, terms=[Nudge(0.1)])
        with pytest.raises(ValueError, match="used its own term 'nudge': give all terms"):
            Trainer.resume(tmp_path / "run")
        with pytest.raises(ValueError, match="had the terms nudge: give those to resume"):
            Trainer.resume(tmp_path / "run", terms=[])
