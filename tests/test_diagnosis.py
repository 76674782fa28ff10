"""Diagnoses of built cases: right already, a systematic error, wrong forces, a wrong path, no minimum."""

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixBondLengths
from helpers.potentials import needs_mace, tiny_mace
from helpers.structures import rattled, silicon

from ase_bptt import Potential, Prediction, RelaxationPair, delta_q, relax
from ase_bptt.diagnostics import Suitability, diagnose, spread
from ase_bptt.diagnostics.judgement import CLASSES, RETRAIN, RIGHT_ALREADY, UNLIKELY, YES, allowance, classify, judge
from ase_bptt.diagnostics.landscape import ForceError, force_error, minima, reference_forces, settling
from ase_bptt.evaluation import Row
from ase_bptt.evaluation.row import farthest
from ase_bptt.neighbors import NeighborList
from ase_bptt.potentials import as_potential
from ase_bptt.potentials.analytic import LennardJones, Morse
from ase_bptt.stability import largest_curvature
from ase_bptt.steppers import GradientDescent
from ase_bptt.structures import Structures

SIGMA = 2.5
"""Å: bonds as long, and with the depth below as soft, as the default steps are made for."""
SHAPES = {
    "pair": [[0, 0, 0], [1, 0, 0]],
    "triangle": [[0, 0, 0], [1, 0, 0], [0.5, 0.75**0.5, 0]],
    "tetrahedron": [[0, 0, 0], [0.5**0.5, 0.5**0.5, 0], [0.5**0.5, 0, 0.5**0.5], [0, 0.5**0.5, 0.5**0.5]],
    "octahedron": 0.5**0.5 * np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]),
}
"""Corners one bond apart."""


def model(scale: float = 1.0) -> LennardJones:
    return LennardJones(epsilon=0.2, sigma=scale * SIGMA, rc=6.0, ro=4.5, smooth=True)


def rattled_shape(name: str, seed: int) -> Atoms:
    corners = np.array(SHAPES[name])
    return rattled(Atoms("Ar" * len(corners), positions=1.12 * SIGMA * corners), 0.1, seed)


def labelled(atoms: Atoms) -> Atoms:
    """With the true forces, as read from a file."""
    potential, structures = model(), Structures.from_atoms(atoms)
    _, forces = potential.energy_and_forces(structures, NeighborList(potential.cutoff)(structures))
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=forces.numpy())
    return atoms


def true_pairs(n: int = 6, forces: bool = False) -> list[RelaxationPair]:
    """Relaxations of clusters by the model itself, a kind for each shape."""
    found = []
    for k in range(n):
        kind = list(SHAPES)[k % len(SHAPES)]
        start = rattled_shape(kind, k + 1)
        with torch.no_grad():
            end = relax(model(), start, fmax=1e-3, steps=1000).to_atoms()
        end.calc = None
        if forces:
            start, end = labelled(start), labelled(end)
        found.append(RelaxationPair(start, end, f"pair {k}", kind))
    return found


class Wells(Potential):
    """Two atoms; their distance has minima in x at 5 +- width Å, which differ by the tilt, and at zero in y and z."""

    family = "wells"
    cutoff = 1.0

    def __init__(self, width: float = 0.8, tilt: float = 0.0):
        super().__init__()
        self.width, self.tilt = width, tilt

    def forward(self, structures, edges):
        ends = structures.positions.reshape(-1, 2, 3)
        x, y, z = (ends[:, 1] - ends[:, 0]).unbind(1)
        x = (x - 5) / self.width
        return Prediction(0.3 * (x**2 - 1) ** 2 + self.tilt * x + STIFFNESS / 2 * (y**2 + z**2))


STIFFNESS = 2.0
"""eV/Å^2, across."""


def apart(x: float, y: float = 0.0) -> Atoms:
    """Two atoms whose distance is 5 + x Å in x, and y in y."""
    return Atoms("Ar2", positions=[[0, 0, 0], [5 + x, y, 0]], cell=[20, 20, 20], pbc=True)


def wells(*ends: tuple[float, float]) -> list[RelaxationPair]:
    return [RelaxationPair(apart(a), apart(b), f"{a} to {b}", f"kind {k}") for k, (a, b) in enumerate(ends)]


def quick_diagnosis(potential, pairs, **settings) -> Suitability:
    return diagnose(potential, pairs, **{"sample": 2, "rattles": 1} | settings)


class TestVerdict:
    @pytest.mark.parametrize("forces", [True, False])
    def test_what_made_the_pairs_is_right_already(self, forces):
        found = quick_diagnosis(model(), true_pairs(forces=forces))
        assert found.verdict == RIGHT_ALREADY
        assert set(found.classes) == {"right"}
        assert found.wrong_basins == 0
        assert "6 of 6" in found.judgement.reason

    @pytest.mark.parametrize("forces", [True, False])
    @pytest.mark.parametrize("scale", [0.95, 1.05])
    def test_a_systematic_error_can_be_mended(self, scale, forces):
        found = quick_diagnosis(model(scale), true_pairs(forces=forces))
        assert found.verdict == YES
        assert found.classes.count("shifted") >= 4
        assert "within reach" in found.judgement.reason

    @pytest.mark.parametrize("forces", [True, False])
    def test_forces_that_are_wrong_everywhere_come_first(self, forces):
        found = quick_diagnosis(model(1.6), true_pairs(4, forces=forces))
        assert found.verdict == RETRAIN
        assert ("cosine" in found.judgement.reason) is forces

    @needs_mace
    def test_random_weights_need_forces_first(self):
        pairs = []
        for k in range(2):
            start, end = silicon(k + 1), silicon(0, amplitude=0.0)
            start.calc = SinglePointCalculator(start, forces=5 * (end.positions - start.positions))
            pairs.append(RelaxationPair(start, end, str(k), str(k)))
        assert quick_diagnosis(as_potential(tiny_mace(seed=1)), pairs, sample=0).verdict == RETRAIN

    def test_a_path_into_another_minimum_can_be_taught(self):
        found = quick_diagnosis(Wells(), wells((0.1, -0.8), (0.2, -0.8), (-0.1, 0.8)))
        assert set(found.classes) == {"wrong path"}
        assert found.verdict == YES
        assert found.wrong_basins == 1

    def test_a_reference_without_a_minimum_is_out_of_reach(self):
        # From the reference, too, each atom moves by 0.35 Å to a minimum.
        found = quick_diagnosis(Wells(), wells((1.4, -0.1), (1.5, -0.1), (-1.5, -0.1)))
        assert set(found.classes) == {"no minimum"}
        assert found.verdict == UNLIKELY
        assert "for 3 of them the potential has no minimum" in found.judgement.reason

    def test_what_is_not_finite_has_failed_and_spoils_no_mean(self):
        pairs = true_pairs(5)
        broken = pairs[0].initial.copy()
        broken.positions[:] = 0.0
        pairs[0] = RelaxationPair(broken, pairs[0].relaxed, "broken", "kind 0")
        found = quick_diagnosis(model(1.05), pairs)
        assert found.classes[0] == "failed"
        assert found.classes.count("failed") == 1
        assert found.todict()["mean"] == pytest.approx(np.mean([r.delta_q for r in found.evaluation.rows[1:]]))
        assert "broken" in found.text()


def row(k: int, name: str, **changes) -> Row:
    """A row of the class."""
    found = {
        "id": f"s{k}", "group": f"g{k}", "unrelaxed": 3.0, "delta_q": 0.05 if name == "right" else 2.0, "rmsd": 0.1,
        "max_displacement": 0.01 if name == "right" else 0.2, "right_basin": name in ("right", "shifted"),
        "reference_moves": 0.7 if name == "no minimum" else 0.02, "residual_force": 0.1, "space_group": "",
        "reference_space_group": "", "status": "diverged" if name == "failed" else "converged", "nsteps": 9,
        "displacements": (0.1,),
    }  # fmt: skip
    return Row(**found | changes)


def far_pair(distance: float = 0.5) -> RelaxationPair:
    return RelaxationPair(
        Atoms("Ar2", positions=[[0, 0, 0], [3 + 2 * distance, 0, 0]]),
        Atoms("Ar2", positions=[[0, 0, 0], [3, 0, 0]]),
        "p",
    )


def judged(names: list[str], forces: ForceError | None = None, distance: float = 0.5, **changes):
    rows = [row(k, name, **changes) for k, name in enumerate(names)]
    pairs = [far_pair(distance)] * len(rows)
    classes = [classify(r, p) for r, p in zip(rows, pairs, strict=True)]
    assert classes == names
    return judge(rows, classes, pairs, forces)


def errors(cosine: float | None, error: float = 0.1, strong: int = 10) -> ForceError:
    return ForceError(20, 0.1, 0.2, strong, error if strong else None, 0.5 if strong else None, cosine)


class TestJudgement:
    @pytest.mark.parametrize(
        ("names", "verdict"),
        [
            (["right"] * 44, RIGHT_ALREADY),
            (["right"] * 43 + ["wrong path"], RIGHT_ALREADY),
            (["right"] * 41 + ["wrong path"] * 3, YES),
            (["right"] * 4 + ["wrong path"], RIGHT_ALREADY),
            (["right"] * 3 + ["wrong path"], YES),
            (["right"], RIGHT_ALREADY),
            (["shifted"], YES),
            (["right"] * 10 + ["shifted"] * 4 + ["no minimum"] * 20, UNLIKELY),
            (["right"] * 10 + ["shifted"] * 10 + ["no minimum"] * 20, YES),
            (["no minimum"] * 20, UNLIKELY),
            (["right"] * 10 + ["failed"] * 10, UNLIKELY),
            (["failed"] * 3, RETRAIN),
        ],
    )
    def test_from_where_structures_end(self, names, verdict):
        assert judged(names).verdict == verdict

    @pytest.mark.parametrize(
        ("forces", "verdict"),
        [
            (errors(0.9), YES),
            (errors(0.4), RETRAIN),
            (errors(0.9, error=0.6), RETRAIN),
            (errors(float("nan")), RETRAIN),
            (errors(None, strong=0), YES),
        ],
    )
    def test_forces_count_where_they_are_strong(self, forces, verdict):
        assert judged(["wrong path"] * 8, forces).verdict == verdict

    def test_forces_do_not_outweigh_relaxations_that_come_nearer(self):
        # Near the minimum a systematic shift of it can exceed the forces.
        found = judged(["shifted"] * 8, errors(0.4))
        assert found.verdict == YES
        assert any("cosine 0.40" in text for text in found.cautions)
        assert judged(["shifted"] * 8, errors(0.4), delta_q=4.0).verdict == RETRAIN

    def test_forces_do_not_outweigh_ends_that_are_right(self):
        found = judged(["right"] * 8, errors(-0.99))
        assert found.verdict == RIGHT_ALREADY
        assert any("sign" in text for text in found.cautions)

    def test_without_forces_most_must_be_left_and_end_farther(self):
        names = ["no minimum"] * 8
        assert judged(names, delta_q=4.0).verdict == RETRAIN
        assert judged(names, delta_q=2.0).verdict == UNLIKELY
        assert judged(names, errors(0.9), delta_q=4.0).verdict == UNLIKELY

    @pytest.mark.parametrize(
        ("found", "word"),
        [
            (judged(["shifted"] * 2), "rests on 2 pairs"),
            (judged(["shifted"]), "Kinds of structure: 1"),
            (judged(["right"] * 8 + ["shifted"] * 2), "few kinds (g8, g9)"),
            (judged(["right"] * 8, distance=0.01), "8 of 8 starts are within 0.05 Å"),
            (judged(["right"] * 8 + ["wrong path"] * 8), "summed Delta-Q is in other minima"),
            (judged(["shifted"] * 8, status="out of steps"), "8 of 8 relaxations have not converged"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_what_would_mislead_is_a_caution(self, found, word):
        assert any(word in text for text in found.cautions)

    def test_there_is_no_caution_without_cause(self):
        assert judged(["shifted"] * 8, errors(0.9)).cautions == ()

    @pytest.mark.parametrize(("residual", "allowed"), [(None, 0.05), (0.01, 0.05), (0.08, 0.08), (0.4, 0.1)])
    def test_a_reference_that_is_not_relaxed_allows_for_more(self, residual, allowed):
        pair = far_pair()
        if residual is not None:
            forces = [[residual, 0, 0], [-residual, 0, 0]]
            pair.relaxed.calc = SinglePointCalculator(pair.relaxed, forces=forces)
        assert allowance(pair) == pytest.approx(allowed)
        assert classify(row(0, "right", max_displacement=allowed - 0.001), pair) == "right"
        assert classify(row(0, "right", max_displacement=allowed + 0.001), pair) == "shifted"

    def test_a_basin_far_from_the_reference_is_not_the_references(self):
        assert classify(row(0, "shifted", reference_moves=0.4), far_pair()) == "no minimum"


class TestForces:
    def test_its_own_forces_have_no_error(self):
        found = force_error(model(), true_pairs(5, forces=True))
        assert (found.frames, found.strong) == (10, 5)
        assert found.error == pytest.approx(0, abs=1e-12)
        assert found.cosine == pytest.approx(1)

    def test_errors_are_means_over_components(self):
        atoms = rattled_shape("triangle", 1)
        own = reference_forces(labelled(atoms.copy()))
        atoms.calc = SinglePointCalculator(atoms, forces=np.ones((3, 3)))
        found = force_error(model(), [RelaxationPair(atoms, rattled_shape("triangle", 2), "a")])
        assert found.error == found.strong_error == pytest.approx(np.abs(own - 1).mean())
        assert found.reference == pytest.approx(1)
        assert found.cosine == pytest.approx(own.sum() / np.linalg.norm(own) / 3)

    def test_forces_at_relaxed_structures_have_no_direction(self):
        pairs = [RelaxationPair(p.initial.copy(), p.relaxed, p.id) for p in true_pairs(3, forces=True)]
        found = force_error(model(1.1), pairs)
        assert (found.frames, found.strong, found.cosine) == (3, 0, None)

    def test_none_without_labels(self):
        assert force_error(model(), true_pairs(2)) is None

    def test_forces_of_other_positions_do_not_count(self):
        atoms = labelled(rattled_shape("triangle", 1))
        assert reference_forces(atoms) is not None
        atoms.positions[0] += 0.1
        assert reference_forces(atoms) is None


class TestLandscape:
    @pytest.mark.parametrize(("tilt", "energies"), [(0.0, 1), (0.05, 2)])
    def test_two_minima_are_found_from_between(self, tilt, energies):
        (found,) = minima(Wells(0.3, tilt), wells((0.05, -0.3)), rattles=6, seed=0)
        assert (found.ends, found.energies, found.reference) == (2, energies, True)

    def test_the_references_minimum_can_be_missed(self):
        (found,) = minima(Wells(), wells((0.8, -0.8)), rattles=3, seed=0)
        assert (found.ends, found.reference) == (1, False)

    def test_a_molecule_that_is_rotated_is_at_the_same_minimum(self):
        assert [(m.ends, m.reference) for m in minima(model(), true_pairs(3), rattles=3, seed=0)] == [(1, True)] * 3

    def test_a_reference_that_is_left_has_no_minimum_to_be_met(self):
        (found,) = minima(Wells(), wells((0.8, -0.1)), rattles=1, seed=0)
        assert found.reference is None

    @pytest.mark.parametrize("step", [0.05, 0.1])
    def test_frames_are_counted_until_the_distance_has_settled(self, step):
        pair = RelaxationPair(apart(0.8, 0.3), apart(0.8), "a")
        # Both atoms give way, so that the distance falls by twice the step times the force.
        left = np.log(0.05 / delta_q(pair.initial, pair.relaxed)) / np.log(1 - 2 * step * STIFFNESS)
        (found,) = settling(Wells(), [pair], GradientDescent(step_size=step), fmax=1e-6)
        assert (found.frames, found.finished) == (np.ceil(left), True)

    def test_nothing_to_settle_takes_no_frame(self):
        assert settling(Wells(), wells((0.8, 0.8)), GradientDescent())[0].frames == 0

    def test_a_step_that_is_too_long_is_reported_to_diverge(self):
        found = settling(Wells(), wells((0.1, 0.8), (0.2, 0.8)), GradientDescent(step_size=5.0, maxstep=50.0))
        assert [(s.frames, s.finished) for s in found] == [(None, False)] * 2


@pytest.fixture(scope="module")
def found() -> Suitability:
    return diagnose(model(1.05), true_pairs(6, forces=True), sample=3, rattles=2)


class TestDiagnosis:
    def test_it_survives_json(self, found):
        loaded = json.loads(json.dumps(found.todict(), allow_nan=False))
        assert loaded["verdict"] == "yes"
        assert sum(loaded["classes"].values()) == len(loaded["rows"]) == loaded["n"] == 6
        assert loaded["kinds"] == 4
        assert [r["class"] for r in loaded["rows"]] == list(found.classes)
        assert len(loaded["sample"]) == len(loaded["minima"]) == len(loaded["curvatures"]) == 3

    def test_its_numbers_are_those_of_its_parts(self, found):
        sampled = [p for p in true_pairs(6) if p.id in found.sample]
        stiffest = max(largest_curvature(model(1.05), p.relaxed) for p in sampled)
        assert found.step_limit == pytest.approx(2 / stiffest, rel=1e-6)
        assert found.fire_frames == np.median([r.nsteps for r in found.evaluation.rows])
        assert found.frames == np.median([s.frames for s in found.settling])

    def test_the_text_begins_with_the_verdict_and_fits_the_screen(self, found):
        lines = found.text().splitlines()
        assert lines[0].endswith("yes")
        assert max(map(len, lines)) <= 80
        assert "ase-bptt train ... --folds 5" in found.text()
        assert all(name in found.text() for name in CLASSES)

    def test_the_same_seed_gives_the_same(self, found):
        again = diagnose(model(1.05), true_pairs(6, forces=True), sample=3, rattles=2)
        assert again.todict() == found.todict()

    def test_settings_are_advised_only_for_training(self, found):
        assert "--steps" in found.text()
        assert "--steps" not in quick_diagnosis(model(1.6), true_pairs(4)).text()

    def test_labels_may_be_missing(self):
        found = quick_diagnosis(model(1.05), true_pairs(3), sample=1)
        assert found.forces is found.todict()["forces"] is None
        assert "the files hold none" in found.text()

    def test_a_sample_and_rattling_can_be_left_out(self):
        found = diagnose(model(1.05), true_pairs(3), sample=0)
        assert found.frames is found.step_limit is None
        assert json.dumps(found.todict(), allow_nan=False)
        assert diagnose(model(1.05), true_pairs(1), rattles=0).minima == ()

    def test_a_step_beyond_the_bound_is_warned_of(self):
        found = quick_diagnosis(Wells(0.2), wells((0.1, 0.2)))
        assert found.step_limit < 0.05
        assert "! --step-size" in found.text()
        found = quick_diagnosis(Wells(), wells((0.1, 0.8)))
        assert found.step_limit > 0.05
        assert "! --step-size" not in found.text()

    def test_progress_is_reported_to_the_end(self):
        told = []
        diagnose(model(), true_pairs(3, forces=True), sample=2, rattles=1, progress=lambda *args: told.append(args))
        works = list(dict.fromkeys(what for _, _, what in told))
        assert len(works) == 5
        for work in works:
            done = [(d, n) for d, n, what in told if what == work]
            assert done == sorted(done)
            assert done[-1][0] == done[-1][1]

    def test_nothing_given_is_changed(self):
        potential, pairs = model().requires_grad_(), true_pairs(3, forces=True)
        before = [
            (p.initial.positions.copy(), p.relaxed.positions.copy(), p.initial.calc, p.relaxed.calc) for p in pairs
        ]
        weights = {k: v.clone() for k, v in potential.state_dict().items()}
        quick_diagnosis(potential, pairs)
        for (initial, relaxed, first, last), p in zip(before, pairs, strict=True):
            np.testing.assert_array_equal(initial, p.initial.positions)
            np.testing.assert_array_equal(relaxed, p.relaxed.positions)
            assert (p.initial.calc, p.relaxed.calc) == (first, last)
        assert all(p.grad is None and p.requires_grad for p in potential.parameters())
        assert all(torch.equal(v, potential.state_dict()[k]) for k, v in weights.items())

    def test_what_cannot_be_diagnosed_is_refused(self):
        with pytest.raises(ValueError, match="no pairs"):
            diagnose(model(), [])
        (pair,) = true_pairs(1)
        pair.initial.set_constraint(FixBondLengths([[0, 1]]))
        with pytest.raises(NotImplementedError, match="FixBondLengths"):
            diagnose(model(), [pair])


def test_a_sample_is_of_as_many_groups_as_there_are():
    pairs = [RelaxationPair(Atoms("H"), Atoms("H"), f"{group}{k}", group) for group in "abc" for k in range(5)]
    chosen = spread(pairs, 4, seed=0)
    assert {p.group for p in chosen} == set("abc")
    assert [p.id for p in chosen] == [p.id for p in spread(pairs, 4, seed=0)]
    assert any([p.id for p in spread(pairs, 4, seed=k)] != [p.id for p in chosen] for k in range(1, 4))
    assert len(spread(pairs, 40, seed=0)) == 15


@pytest.fixture(scope="module")
def crystals():
    """Relaxed with their cells, from strained ones."""
    teacher = Morse(epsilon=0.3, rho0=4.0, r0=2.55)
    found = []
    for k in range(3):
        start, strain = bulk("Cu", a=3.6), np.random.default_rng(k).uniform(-0.02, 0.02, (3, 3))
        start.set_cell(start.cell @ (np.eye(3) + strain + strain.T), scale_atoms=True)
        with torch.no_grad():
            end = relax(teacher, start, cell="full", fmax=1e-3).to_atoms()
        found.append(RelaxationPair(start, end, f"Cu {k}", f"kind {k}"))
    return found


class TestCells:
    """A potential that would have bonds 4 % longer, on crystals of one atom, in which the cell alone can be wrong."""

    def test_a_diagnosis_follows_the_cells(self, crystals):
        found = quick_diagnosis(Morse(epsilon=0.3, rho0=4.0, r0=2.65), crystals)
        assert found.classes == ("shifted",) * 3
        assert (found.verdict, found.first) == (YES, "zero-force")
        assert all(row.max_displacement < 1e-6 and row.reference_moves > 0.1 for row in found.evaluation.rows)
        assert "cells that moved (3)" in found.text()
        # No atom can move: frames until Delta-Q settles are those of the cell, and so are the minima and the curvature.
        assert all(s.frames for s in found.settling)
        assert [(m.ends, m.reference) for m in found.minima] == [(1, True)] * 2
        assert min(found.curvatures) > 1

    def test_a_cell_that_ends_at_the_reference_is_right(self, crystals):
        found = quick_diagnosis(Morse(epsilon=0.3, rho0=4.0, r0=2.55), crystals)
        assert found.classes == ("right",) * 3
        assert found.verdict == RIGHT_ALREADY


@pytest.mark.parametrize("height", [0.0, 30.0])
def test_a_slab_has_a_distance_whatever_lies_above_it(height):
    slab = Atoms("Cu", cell=[2.5, 2.5, height], pbc=[True, True, False])
    wider = slab.copy()
    wider.set_cell([2.6, 2.5, height], scale_atoms=True)
    assert np.isfinite(farthest(wider, slab))
    assert farthest(wider, slab) > 0 == farthest(slab, slab)
