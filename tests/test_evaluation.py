"""Evaluations against relaxations by ASE, and the right basin where there are two."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.optimize import BFGS
from ase.optimize import FIRE as AseFIRE
from helpers.potentials import lennard_jones
from helpers.structures import argon, cluster, rattled

from ase_bptt import RelaxationPair, Status, delta_q
from ase_bptt.evaluation import BASIN_RULE, Evaluation, Row, evaluate
from ase_bptt.losses import max_displacement, rmsd
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.steppers import FIRE

SETTINGS = {"fmax": 0.02, "steps": 200}


def fire() -> FIRE:
    """Steps that suit wells as narrow as those of Lennard-Jones with sigma 1."""
    return FIRE(dt=0.03, dtmax=0.06)


def pair(initial: Atoms, relaxed: Atoms, id: str = "a", group: str = "g") -> RelaxationPair:
    return RelaxationPair(initial, relaxed, id, group)


def by_ase(atoms: Atoms, optimizer, **settings) -> tuple[Atoms, int]:
    atoms = atoms.copy()
    atoms.calc = AseLennardJones(smooth=True, rc=2.4, ro=1.8)
    with optimizer(atoms, logfile=None, **settings) as run:
        assert run.run(**SETTINGS)
        return atoms, run.nsteps


@pytest.mark.parametrize("make", [argon, cluster])
@pytest.mark.parametrize(
    ("stepper", "optimizer", "settings"),
    [(fire, AseFIRE, {"dt": 0.03, "dtmax": 0.06, "downhill_check": False}), (lambda: "bfgs", BFGS, {})],
    ids=["fire", "bfgs"],
)
def test_numbers_agree_with_a_relaxation_by_ase(make, stepper, optimizer, settings):
    reference = make(seed=5)
    end, nsteps = by_ase(make(), optimizer, **settings)
    (row,) = evaluate(lennard_jones(), [pair(make(), reference)], stepper=stepper(), **SETTINGS).rows
    assert (row.id, row.group, row.status) == ("a", "g", "converged")
    assert row.nsteps == nsteps
    # An isolated cluster is rotated onto its reference; a crystal is not.
    assert row.delta_q == pytest.approx(delta_q(end, reference, align=True), rel=1e-6)
    assert row.rmsd == pytest.approx(rmsd(end, reference, align=True), rel=1e-6)
    assert row.max_displacement == pytest.approx(max_displacement(end, reference, align=True), rel=1e-6)


def trap(x: float) -> Atoms:
    """An atom on the line between two that are 3 Å apart: it has a minimum near each of them."""
    return Atoms("XeArXe", positions=[[0, 0, 0], [x, 0, 0], [3.0, 0, 0]], masses=[1e9, 40, 1e9])


class FixedXenon(LennardJones):
    """Lennard-Jones without forces on the xenon atoms: the outer atoms stay."""

    def forward(self, structures, edges):
        free = (structures.numbers != 54)[:, None]
        positions = structures.positions
        return super().forward(structures.replace(positions=torch.where(free, positions, positions.detach())), edges)


class TestRightBasin:
    potential = FixedXenon(rc=6.0)

    @pytest.mark.parametrize("stepper", ["fire", "bfgs"])
    @pytest.mark.parametrize(
        ("initial", "relaxed", "right"), [(1.3, 1.0, True), (1.7, 2.0, True), (1.3, 2.0, False), (1.7, 1.0, False)]
    )
    def test_it_is_right_where_both_ends_meet(self, initial, relaxed, right, stepper):
        stepper = stepper if stepper == "bfgs" else fire()
        found = evaluate(self.potential, [pair(trap(initial), trap(relaxed))], stepper=stepper, **SETTINGS)
        assert found.rows[0].status == "converged"
        assert found.rows[0].right_basin is right
        assert found.basins == float(right)

    def test_it_is_the_models_own_minimum_that_counts_and_not_the_distance_to_the_reference(self):
        # The reference lies 0.3 Å from any minimum of this potential, but in the basin of the start.
        (row,) = evaluate(self.potential, [pair(trap(1.2), trap(1.4))], stepper=fire(), **SETTINGS).rows
        assert row.max_displacement > 0.15
        assert row.right_basin

    def test_the_rule_is_given_with_its_distance(self):
        assert "0.1 Å" in BASIN_RULE


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_do_not_matter(batch_size):
    pairs = [pair(argon(k), argon(k + 10), str(k)) for k in range(3)]
    found = evaluate(lennard_jones(), pairs, stepper=fire(), batch_size=batch_size, **SETTINGS)
    alone = [evaluate(lennard_jones(), [p], stepper=fire(), **SETTINGS).rows[0] for p in pairs]
    for row, single in zip(found.rows, alone, strict=True):
        a, b = dataclasses.asdict(row), dataclasses.asdict(single)
        assert a.pop("delta_q") == pytest.approx(b.pop("delta_q"))
        assert a.pop("rmsd") == pytest.approx(b.pop("rmsd"))
        assert a.pop("max_displacement") == pytest.approx(b.pop("max_displacement"))
        for name in ("reference_moves", "residual_force", "displacements"):
            assert a.pop(name) == pytest.approx(b.pop(name))
        assert a == b


@pytest.mark.parametrize("stepper", ["fire", "bfgs"])
def test_too_few_steps_are_reported(stepper):
    near = rattled(by_ase(argon(), BFGS)[0], 0.005)
    found = evaluate(lennard_jones(), [pair(near, argon(3))], stepper=stepper, fmax=1e-9, steps=2)
    assert (found.rows[0].status, found.rows[0].nsteps) == (Status.OUT_OF_STEPS.value, 2)


def test_the_structures_given_are_left_as_they_are():
    initial, relaxed = argon(), argon(3)
    for stepper in (fire(), "bfgs"):
        evaluate(lennard_jones(), [pair(initial, relaxed)], stepper=stepper, **SETTINGS)
    np.testing.assert_array_equal(initial.positions, argon().positions)
    np.testing.assert_array_equal(relaxed.positions, argon(3).positions)
    assert initial.calc is relaxed.calc is None


def test_nothing_of_the_weights_is_touched():
    potential = lennard_jones().requires_grad_()
    evaluate(potential, [pair(argon(), argon(3))], steps=3)
    assert all(p.grad is None for p in potential.parameters())
    assert all(p.requires_grad for p in potential.parameters())


def test_unrelaxed_is_the_distance_of_the_starts():
    pairs = [pair(rattled(argon(), 0.1, k), argon()) for k in range(3)]
    found = evaluate(lennard_jones(), pairs, stepper=fire(), **SETTINGS)
    starts = [delta_q(p.initial, p.relaxed) for p in pairs]
    assert [row.unrelaxed for row in found.rows] == starts
    assert found.mean_unrelaxed == pytest.approx(np.mean(starts))


def test_the_force_at_the_reference_is_the_potentials_own():
    reference = argon(3)
    (row,) = evaluate(lennard_jones(), [pair(argon(), reference)], stepper=fire(), **SETTINGS).rows
    reference.calc = AseLennardJones(smooth=True, rc=2.4, ro=1.8)
    assert row.residual_force == pytest.approx(np.linalg.norm(reference.get_forces(), axis=1).max())


def test_a_reference_at_a_minimum_does_not_move():
    end, _ = by_ase(argon(), AseFIRE, dt=0.03, dtmax=0.06, downhill_check=False)
    pairs = [pair(argon(), end), pair(argon(), argon(3))]
    still, moved = evaluate(lennard_jones(), pairs, stepper=fire(), **SETTINGS).rows
    assert still.reference_moves == 0
    assert moved.reference_moves > 0.05


def test_the_space_group_of_end_and_reference_is_reported():
    settings = {"stepper": FIRE(dt=0.03, dtmax=0.06), "fmax": 1e-3, "steps": 300}
    perfect, vacancy = bulk("Ar", "fcc", a=1.6, cubic=True), argon(3)
    pairs = [pair(argon(), perfect), pair(argon(), vacancy), pair(cluster(), cluster(seed=2))]
    kept, lost, molecule = evaluate(lennard_jones(), pairs, **settings).rows
    assert (kept.space_group, kept.reference_space_group, kept.symmetry_kept) == ("Fm-3m (225)", "Fm-3m (225)", True)
    assert (lost.reference_space_group, lost.symmetry_kept) == ("P1 (1)", False)
    assert (molecule.space_group, molecule.symmetry_kept) == ("", True)


def test_displacements_are_those_of_each_atom():
    (row,) = evaluate(lennard_jones(), [pair(argon(), argon(3))], stepper=fire(), **SETTINGS).rows
    d = np.array(row.displacements)
    assert d.shape == (4,)
    assert d.max() == pytest.approx(row.max_displacement)
    assert np.sqrt((d**2).mean()) == pytest.approx(row.rmsd)


def test_the_ends_are_kept_in_order():
    pairs = [pair(argon(), argon(3), "a"), pair(cluster(), cluster(seed=2), "b")]
    found = evaluate(lennard_jones(), pairs, stepper=fire(), **SETTINGS)
    assert [len(atoms) for atoms in found.ends] == [4, 6]
    for row, atoms, p in zip(found.rows, found.ends, pairs, strict=True):
        assert delta_q(atoms, p.relaxed, align=True) == pytest.approx(row.delta_q)


def row(id: str, group: str, delta_q: float) -> Row:
    return Row(
        id=id, group=group, unrelaxed=7.0, delta_q=delta_q, rmsd=delta_q / 5, max_displacement=delta_q / 2,
        right_basin=delta_q < 2, reference_moves=0.02, residual_force=0.1, space_group="P1 (1)",
        reference_space_group="P1 (1)" if delta_q < 5 else "Fd-3m (227)", status="converged", nsteps=3,
        displacements=(0.1, delta_q / 2),
    )  # fmt: skip


class TestSummary:
    found = Evaluation(tuple(row(str(k), "gh"[k > 1], q) for k, q in enumerate([1, 2, 6.0])))

    def test_mean_median_and_share_of_basins(self):
        assert self.found.mean == pytest.approx(3)
        assert self.found.median == 2
        assert self.found.basins == pytest.approx(1 / 3)

    def test_it_survives_json(self):
        loaded = json.loads(json.dumps(self.found.todict(), allow_nan=False))
        assert {k: loaded[k] for k in loaded if k != "rows"} == {
            "n": 3, "kinds": 2, "mean": 3, "median": 2, "mean_unrelaxed": 7, "basins": pytest.approx(1 / 3),
            "symmetry_kept": pytest.approx(2 / 3), "closer_than_start": 1.0, "quartiles": list(self.found.quartiles),
            "geometric_mean": pytest.approx(self.found.geometric_mean),
        }  # fmt: skip
        assert Evaluation.from_rows(loaded["rows"]) == self.found

    def test_groups_have_summaries_of_their_own(self):
        groups = self.found.by_group()
        assert {name: (len(e.rows), e.mean) for name, e in groups.items()} == {"g": (2, 1.5), "h": (1, 6)}

    def test_an_evaluation_survives_json(self):
        found = evaluate(lennard_jones(), [pair(argon(), argon(3))], stepper=fire(), **SETTINGS)
        assert json.loads(json.dumps(found.todict(), allow_nan=False)) == found.todict()
