"""From pairs to a run folder, once and by folds; what it would cost."""

import dataclasses
import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.structures import cluster, rattled, silicon

from ase_bptt import RelaxationPair, Trainer, load_potential, relax
from ase_bptt.cli.messages import conclusion
from ase_bptt.drift.changes import FoldDriftReports
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.report.drift_report import drift_section
from ase_bptt.report.tables import comparison_text
from ase_bptt.steppers import GradientDescent
from ase_bptt.training.cost import CostLaw, Estimate
from ase_bptt.training.fine_tune import cross_validate, finetune
from ase_bptt.training.metrics import Progress
from ase_bptt.training.results import RunResults, read_rows, write_rows
from ase_bptt.utils import without_nan


def lennard_jones(sigma: float) -> LennardJones:
    return LennardJones(epsilon=0.3, sigma=sigma, rc=6.0, ro=4.5, smooth=True)


@pytest.fixture(scope="module")
def pairs() -> list[RelaxationPair]:
    torch.set_num_threads(1)
    found = []
    for k in range(6):
        start = cluster(seed=k)
        start.positions *= 2.5
        start = rattled(start, 0.1, k)
        with torch.no_grad():
            end = relax(lennard_jones(2.5), start, fmax=1e-3, steps=300).to_atoms()
        found.append(RelaxationPair(start, end, f"cluster {k}", f"kind {k // 2}"))
    return found


def maker(made: list, **settings):
    def make(folder) -> Trainer:
        made.append(folder)
        numbers = {"steps": 10, "batch_size": 1, "lr": 0.03, "loss": "delta_q", "progress": False} | settings
        return Trainer(lennard_jones(2.65), out=folder, **numbers)

    return make


@pytest.fixture(scope="module")
def validated(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    made: list = []
    return folder, made, cross_validate(maker(made), pairs, folder, folds=3, epochs=2, facts={"potential": "lj"})


class TestCrossValidation:
    def test_each_pair_is_measured_once_where_it_was_held_out(self, validated, pairs):
        folder, made, outcome = validated
        assert made == [*(folder / f"fold_{k}" for k in range(3)), folder / "all_pairs"]
        assert [row.id for row in outcome.after.rows] == [p.id for p in pairs]
        for k in range(3):
            part = RunResults.load(folder / f"fold_{k}")
            assert len({row.group for row in part.after.rows}) == 1
            by_id = {row.id: row for row in outcome.after.rows}
            assert all(by_id[row.id] == row for row in part.after.rows)

    def test_it_gains_on_the_pairs_held_out(self, validated):
        outcome = validated[2]
        assert outcome.after.mean < 0.7 * outcome.before.mean
        assert outcome.comparison.mean.high < 0
        assert outcome.todict()["folds"] == 3

    def test_it_ends_in_a_potential_trained_on_all_pairs(self, validated, pairs):
        folder, _, outcome = validated
        assert outcome.todict()["checkpoint"] == str(folder / "potential")
        assert not outcome.kept_as_it_was
        assert outcome.best_epoch == round(
            np.mean([RunResults.load(folder / f"fold_{k}").best_epoch for k in range(3)])
        )
        alone = maker([])(None).fit(pairs, epochs=outcome.best_epoch).potential
        assert load_potential(folder / "potential").sigma.item() == alone.sigma.item() != 2.65

    @pytest.mark.parametrize("folds", [None, 3])
    def test_a_potential_that_is_worse_on_what_was_held_out_is_not_handed_back(self, pairs, tmp_path, folds):
        """The untuned potential is right about the held-out structures, and the training pairs are of another one."""
        with torch.no_grad():
            ends = relax(lennard_jones(2.65), [p.initial for p in pairs], fmax=1e-3, steps=300).to_atoms()
        right = [dataclasses.replace(p, relaxed=end) for p, end in zip(pairs, ends, strict=True)]
        parts = [{"train": pairs[:2], "valid": pairs[2:4], "test": right[4:]}]
        make = maker([], terms=())
        if folds:
            data = [make(None).check(**part) for part in parts]
            found = cross_validate(make, right[4:], tmp_path, folds=data, epochs=2)
        else:
            found = finetune(make(tmp_path), parts[0], tmp_path, epochs=2, make=make)
            assert not (tmp_path / "measured").exists()
        assert found.rejected
        card = (tmp_path / "potential" / "model_card.md").read_text(encoding="utf-8")
        assert "fine-tuned" not in card.splitlines()[0]
        assert found.kept_as_it_was
        assert found.comparison.geometric_mean.value > 0
        assert RunResults.load(tmp_path).todict() == found.todict()
        assert found.todict()["kept_as_it_was"] is True
        assert found.todict()["warnings"] == [found.no_gain]
        assert "**these are the untuned weights**" in card
        assert "The potential was kept as it was" in (tmp_path / "report.html").read_text(encoding="utf-8")
        assert load_potential(tmp_path / "potential").sigma.item() == 2.65
        said = " ".join(conclusion(found).split())
        assert "Warning: The potential was kept as it was" in said
        assert "Kept: epoch" not in said
        assert found.drift_report is None or "of the tuned potential, which is not handed back, on" in said
        # What has changed in a potential that is not handed back is no reason to warn of it.
        drift = SimpleNamespace(warnings=lambda: ["softened"], drift=lambda: SimpleNamespace(n=0), folds=())
        assert "softened" not in conclusion(dataclasses.replace(found, drift_report=drift))
        assert "softened" in conclusion(dataclasses.replace(found, drift_report=drift, rejected=False))
        # Nor is an untuned potential compared with itself.
        paired = comparison_text(found.comparison)
        assert paired in conclusion(found)
        assert paired not in conclusion(dataclasses.replace(found, rejected=False, best_epoch=0, folds=None))

    def test_its_model_card_has_the_figures_of_the_folds(self, validated):
        folder, _, outcome = validated
        card = (folder / "potential" / "model_card.md").read_text(encoding="utf-8")
        found = load_potential(folder).metadata["held_out"]
        assert (found["n"], found["folds"], found["kept_as_it_was"]) == (6, 3, False)
        assert found["mean_after"] == outcome.after.mean
        assert f"mean {outcome.before.mean:.2f} before, {outcome.after.mean:.2f} after" in card
        assert "6 structures of 3 kinds that were not trained on" in card
        assert "cross-validation over 3 folds" in card
        assert "structures: 6 train;" in card
        assert "loss delta_q" in card
        one = (folder / "fold_0" / "potential" / "model_card.md").read_text(encoding="utf-8")
        assert "2 train, 2 valid, 2 test;" in one
        assert "cross-validation" not in one

    def test_its_folder_tells_all(self, validated):
        folder, _, outcome = validated
        assert {p.name for p in folder.iterdir()} >= {"results.json", "report.html", "table.csv", "before_after.png"}
        results = json.loads((folder / "results.json").read_text())
        assert results["test"]["n"] == 6
        assert results["comparison"]["groups"] == 3
        assert results["facts"]["potential"] == "lj"
        assert results["rows_after"][0]["delta_q"] == outcome.after.rows[0].delta_q

    def test_its_card_has_means_over_the_folds_and_the_worst(self, validated):
        folder, _, outcome = validated
        drifts = [RunResults.load(folder / f"fold_{k}").drift_report.drift() for k in range(3)]
        found = outcome.todict()["drift"]["all"]
        for name in ("force", "energy", "size"):
            assert found[name] == pytest.approx(np.mean([getattr(d, name) for d in drifts]), rel=1e-12)
        assert found["largest"] == max(d.largest for d in drifts)
        assert found["n"] == sum(d.n for d in drifts) > 3
        forces = [d.force for d in drifts]
        worst = int(np.argmax(forces))
        page = (folder / "report.html").read_text()
        assert f"{forces[worst]:.3f} (fold {worst})" in page
        assert json.loads((folder / "drift_report.json").read_text())["worst_fold"]["all"] == worst
        assert (folder / "drift_report.png").stat().st_size > 1000

    def test_a_hole_that_opens_in_one_fold_is_told_with_its_number(self, validated):
        folds = list(validated[2].drift_report.folds)
        (dimer,) = folds[1].before.dimers
        curve = folds[1].before.dimers[dimer]
        falling = dataclasses.replace(curve, energies=tuple(-40.0 if e > 5.0 else e for e in curve.energies))
        spoilt = dataclasses.replace(folds[1].after, dimers={dimer: falling})
        card = FoldDriftReports((folds[0], dataclasses.replace(folds[1], after=spoilt), folds[2]))
        (said,) = card.warnings()
        assert said.startswith(f"Fold 1: {dimer}: a short-range instability has appeared")
        assert f"Warning: {said}" in drift_section(card).sentences

    def test_a_finished_one_is_read_with_its_card_and_without_its_folds_none(self, validated, tmp_path):
        folder, _, outcome = validated
        assert RunResults.load(folder).todict() == outcome.todict()
        shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("fold_2"))
        assert RunResults.load(tmp_path / "copy").drift_report is None

    def test_what_each_fold_has_learnt_is_told(self, pairs, tmp_path):
        learning = maker([], learn="step_size", stepper=GradientDescent(0.05), steps=2)
        outcome = cross_validate(learning, pairs, tmp_path, folds=3, epochs=1)
        parts = [RunResults.load(tmp_path / f"fold_{k}").facts["learnt"] for k in range(3)]
        assert outcome.facts["learnt"] == f"fold 0: {parts[0]}; fold 1: {parts[1]}; fold 2: {parts[2]}"
        assert all(part.startswith("step_size 0.05 -> ") for part in parts)

    def test_finished_folds_are_read_and_a_stopped_one_goes_on(self, validated, pairs, tmp_path):
        whole = validated[2]
        made: list = []

        class Killed(BaseException):
            pass

        def dying(folder):
            trainer = maker(made)(folder)
            if folder.name == "fold_1":
                step, count = trainer.train_step, iter(range(100))

                def train_step(batch):
                    if next(count) == 2:
                        raise Killed
                    return step(batch)

                trainer.train_step = train_step
            return trainer

        with pytest.raises(Killed):
            cross_validate(dying, pairs, tmp_path, folds=3, epochs=2)
        assert [p.name for p in made] == ["fold_0", "fold_1"]
        again = cross_validate(maker(made), pairs, tmp_path, folds=3, epochs=2)
        assert [p.name for p in made] == ["fold_0", "fold_1", "fold_2", "all_pairs"]
        assert again.after == whole.after
        assert again.before == whole.before

    def test_folds_of_other_pairs_are_refused_by_folder(self, validated, pairs):
        folder = validated[0]
        moved = [dataclasses.replace(p, relaxed=rattled(p.relaxed, 0.01, 1)) for p in pairs]
        with pytest.raises(ValueError, match=r"fold_0 holds a fold of other pairs"):
            cross_validate(maker([]), moved, folder, folds=3, epochs=2)


@pytest.fixture(scope="module")
def refitted(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("refit")
    splits = {"train": pairs[:2], "valid": pairs[2:4], "test": pairs[4:]}
    return out, splits, finetune(maker([])(out), splits, out, epochs=2, make=maker([]))


class TestRefit:
    def test_the_potential_is_trained_once_more_on_all_pairs(self, refitted, pairs):
        out, splits, found = refitted
        alone = maker([])(None).fit(pairs, epochs=found.best_epoch).potential
        measured = maker([])(None).fit(splits["train"], splits["valid"], epochs=2).potential
        assert load_potential(out / "potential").sigma.item() == alone.sigma.item()
        assert load_potential(out / "measured").sigma.item() == measured.sigma.item() != alone.sigma.item()

    def test_the_figures_are_of_the_one_that_was_measured(self, refitted, pairs, tmp_path):
        out, splits, found = refitted
        whole = finetune(maker([])(tmp_path), splits, tmp_path, epochs=2)
        assert found.after == whole.after
        assert found.todict()["measured"] == str(out / "measured")
        assert found.todict()["on_all_pairs"] == len(pairs)
        assert whole.todict()["measured"] == whole.todict()["checkpoint"]
        assert RunResults.load(out).todict() == found.todict()

    def test_it_is_told(self, refitted):
        out, _, found = refitted
        said = " ".join(conclusion(found).split())
        assert f"{out / 'potential'} was trained on all 6 pairs, for {found.best_epoch} epochs." in said
        assert f"The figures are of the one before, in {out / 'measured'}" in said
        assert "trained on all 6 pairs" in (out / "report.html").read_text()
        card = (out / "potential" / "model_card.md").read_text(encoding="utf-8")
        assert "structures: 6 train;" in card
        assert "by the same training without these, before the last one on all pairs" in card
        assert "2 train, 2 valid, 2 test;" in (out / "measured" / "model_card.md").read_text(encoding="utf-8")

    def test_one_that_is_killed_in_it_ends_in_the_same_when_resumed(self, refitted, tmp_path):
        out, splits, whole = refitted

        class Killed(BaseException):
            pass

        def dying(folder):
            trainer = maker([])(folder)
            trainer.train_step = lambda batch: (_ for _ in ()).throw(Killed)
            return trainer

        with pytest.raises(Killed):
            finetune(maker([])(tmp_path), splits, tmp_path, epochs=2, make=dying)
        assert not (tmp_path / "results.json").exists()
        again = Trainer.resume(tmp_path, progress=False)
        found = finetune(again, splits, tmp_path, epochs=2, make=maker([]))
        assert found.after == whole.after
        ends = [load_potential(folder / "potential").sigma.item() for folder in (out, tmp_path)]
        assert ends[0] == ends[1]


@pytest.mark.parametrize(("valid", "said"), [(0.25, "valid 0.250 amu^1/2 Å  "), (float("nan"), "")])
def test_an_epoch_without_validation_says_nothing_of_it(valid, said, caplog):
    row = {"epoch": 2.0, "train_loss": 0.5, "valid_delta_q": valid, "skipped": 0.0, "seconds": 3.0}
    with caplog.at_level("INFO", "ase_bptt"), Progress(4, 1, bar=False) as progress:
        progress.epoch(row)
    assert caplog.messages == [f"epoch   2/4  train 0.500  {said}skipped 0  3 s"]


def test_a_run_that_dies_in_its_first_measurement_can_be_resumed(pairs, tmp_path, monkeypatch):
    splits = {"train": pairs[:2], "valid": pairs[2:4], "test": pairs[4:]}
    whole = finetune(maker([])(tmp_path / "whole"), splits, tmp_path / "whole", epochs=1)

    class Killed(BaseException):
        pass

    def dying(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("ase_bptt.training.fine_tune.evaluate", dying)
        with pytest.raises(Killed):
            finetune(maker([])(tmp_path / "run"), splits, tmp_path / "run", epochs=1)
    again = finetune(Trainer.resume(tmp_path / "run", progress=False), splits, tmp_path / "run", epochs=1)
    assert again.after == whole.after


@pytest.mark.parametrize("left", [["snapshot_before.json"], ["before.json"], []])
def test_a_trained_run_without_what_it_was_before_is_refused_by_file(pairs, tmp_path, left):
    trainer = maker([])(tmp_path)
    splits = {"train": pairs[:2], "valid": pairs[2:4], "test": pairs[4:]}
    finetune(trainer, splits, tmp_path, epochs=1)
    gone = [name for name in ("snapshot_before.json", "before.json") if name not in left]
    for name in gone:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"There is no .*{gone[0]} to compare with: only a run that ase-bptt started"):
        finetune(Trainer.resume(tmp_path, progress=False), splits, tmp_path, epochs=1)


def test_rows_are_kept_exactly_even_those_that_are_not_finite(validated, tmp_path):
    found = validated[2].after
    broken = dataclasses.replace(found.rows[0], delta_q=float("nan"), displacements=(float("inf"), 1 / 3))
    write_rows(tmp_path / "rows.json", found, dataclasses.replace(found, rows=(broken,)))
    first, second = read_rows(tmp_path / "rows.json")
    assert first == found
    assert np.isnan(second.rows[0].delta_q)
    assert second.rows[0].displacements == (float("inf"), 1 / 3)


def test_json_for_others_has_null_for_what_is_not_finite():
    found = without_nan({"a": float("nan"), "b": [1.0, float("inf")], "c": (float("-inf"), "x", True)})
    assert found == {"a": None, "b": [1.0, None], "c": [None, "x", True]}
    json.dumps(found, allow_nan=False)


class TestEstimate:
    def test_nothing_is_changed_by_it(self, pairs, tmp_path):
        trainer = maker([])(None)
        before = {k: v.clone() for k, v in trainer.potential.state_dict().items()}
        found = trainer.estimate(trainer.check(pairs[:2], pairs[2:4], pairs[4:]), epochs=3)
        assert all(torch.equal(v, before[k]) for k, v in trainer.potential.state_dict().items())
        assert all(p.grad is None for p in trainer.potential.parameters())
        assert found.seconds > 3 * found.seconds_per_epoch > 0
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 3, 3), (3, 1, 3, 2)])
    def test_an_epoch_takes_what_was_estimated_within_a_factor_of_two(self, sizes, monkeypatch):
        # Other jobs on the machine do not count.
        monkeypatch.setattr("ase_bptt.training.cost.time.perf_counter", time.process_time)
        ends = [silicon().repeat(n) for n in sizes]
        pairs = [RelaxationPair(rattled(end, 0.05, k), end, f"{k}", f"{k}") for k, end in enumerate(ends)]
        trainer = maker([], batch_size=2)(None)
        data = trainer.check(pairs)
        found = trainer.estimate(data, epochs=1)
        trainer.start(data, epochs=2)
        clock = time.process_time()
        trainer.run(data)
        measured = (time.process_time() - clock) / 2
        assert measured / 2 < found.seconds_per_epoch < 2 * measured

    @pytest.mark.parametrize(
        ("small", "large", "law"),
        [((10, 1.0), (110, 2.0), (0.9, 0.01)), ((10, 1.0), (12, 2.4), (0, 0.2)), ((10, 1.0), (100, 0.5), (0.5, 0)),
         ((10, 0.01), (100, 2.0), (0, 0.02))],
    )  # fmt: skip
    def test_the_law_goes_through_two_measurements_where_they_allow(self, small, large, law):
        found = CostLaw.through(small, large)
        assert (found.a_batch, found.an_edge) == pytest.approx(law)

    def test_more_epochs_take_longer_in_proportion(self):
        assert str(Estimate(90.0, 3 * 3600.0, 2**31)) == "about 3 h (90 s an epoch), 2.0 GiB of tensors at the peak"
        assert str(Estimate(1.26, 300.0, 2**22)) == "about 5 min (1.3 s an epoch), 4.0 MiB of tensors at the peak"
