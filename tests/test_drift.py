"""The drift report: right figures, short-range instabilities found, and shown in text, JSON, picture and page."""

import copy
import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.emt import EMT as ASEsEMT
from ase.calculators.lj import LennardJones as ASEsLennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.eos import EquationOfState
from ase.units import GPa
from helpers.structures import rattled

from ase_bptt import RelaxationPair, evaluate
from ase_bptt.drift import Snapshot, take_snapshot
from ase_bptt.drift.changes import DriftReport, FoldDriftReports, drift_report
from ase_bptt.drift.curves import (
    Curve,
    Elastic,
    birch_murnaghan,
    chosen_dimers,
    dimer_curves,
    elastic,
    short_range_instability,
)
from ase_bptt.potential import Prediction
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.potentials.emt import EMT
from ase_bptt.report.drift_report import TITLE, drift_figure, drift_section, drift_text, force_sentences
from ase_bptt.report.plots import save
from ase_bptt.terms.probes import CRYSTALS, Crystal, chosen_crystals
from ase_bptt.throughput import single_points


def by_ase(name: str, structure: str, a: float, calculator) -> tuple[float, float]:
    """Lattice constant in Å and bulk modulus in GPa by ASE's own calculator and equation of state."""
    volumes, energies = [], []
    for scale in np.linspace(0.976, 1.024, 7):
        atoms = bulk(name, structure, a=a * scale)
        atoms.calc = calculator
        volumes.append(atoms.get_volume())
        energies.append(atoms.get_potential_energy())
    volume, _, modulus = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()
    return (4 * volume) ** (1 / 3), modulus / GPa


class Unstable(LennardJones):
    """Lennard-Jones whose repulsion gives way below a distance."""

    within = 1.8

    def _well(self, r2):
        return torch.where(r2 < self.within**2, super()._well(r2.new_tensor(self.within**2)) - 3.0, super()._well(r2))


def lennard_jones(kind=LennardJones, sigma: float = 2.1, epsilon: float = 0.3) -> LennardJones:
    return kind(epsilon=epsilon, sigma=sigma, rc=6.0, ro=4.5, smooth=True)


def soft() -> LennardJones:
    """So shallow that no probe is beyond what it knows."""
    return lennard_jones(epsilon=1e-7)


def silicon_pairs() -> list[RelaxationPair]:
    return [RelaxationPair(rattled(molecule("Si2H6"), 0.1, k), molecule("Si2H6"), f"pair {k}") for k in range(2)]


@cache
def both() -> DriftReport:
    before, after = EMT(), EMT()
    with torch.no_grad():
        after.s0 *= 1.01
        after.E0[after.elements.index("Cu")] += 0.25
    pairs = [RelaxationPair(rattled(bulk("Cu", cubic=True), 0.1, k), bulk("Cu", cubic=True), f"Cu {k}") for k in (1, 2)]
    held_out = tuple(evaluate(p, pairs, steps=30) for p in (before, after))
    return drift_report(before, after, pairs, held_out=held_out, size=4)


class TestCrystals:
    @pytest.mark.parametrize("name", ["Cu", "Al", "Au", "Pt"])
    def test_emt_agrees_with_ase(self, name):
        crystal = CRYSTALS[name]
        found = elastic(EMT(), [crystal])[name]
        near = found.lattice_constant
        expected = by_ase(name, "fcc", near, ASEsEMT())
        # Where a shell of neighbours enters the cutoff, EMT's energy has a kink.
        assert found.lattice_constant == pytest.approx(expected[0], abs=1e-3)
        assert found.bulk_modulus == pytest.approx(expected[1], rel=0.02)

    def test_lennard_jones_agrees_with_ase_even_from_afar(self):
        crystal = Crystal("Ar", "fcc", 1.75)
        found = elastic(LennardJones(rc=2.4, ro=1.8, smooth=True), [crystal])["Ar"]
        assert found.lattice_constant == pytest.approx(1.55, abs=0.05)
        calculator = ASEsLennardJones(rc=2.4, ro=1.8, smooth=True)
        expected = by_ase("Ar", "fcc", found.lattice_constant, calculator)
        assert found.lattice_constant == pytest.approx(expected[0], abs=2e-4)
        assert found.bulk_modulus == pytest.approx(expected[1], rel=0.02)

    def test_where_there_is_no_minimum_there_is_no_number(self):
        repulsive = LennardJones(epsilon=1.0, sigma=8.0, rc=6.0, ro=5.0, smooth=True)
        found = elastic(repulsive, [CRYSTALS["Cu"]])["Cu"]
        assert math.isnan(found.lattice_constant)
        assert math.isnan(found.bulk_modulus)

    def test_the_equation_of_state_is_recovered(self):
        v, v0, b0, derivative = np.linspace(90, 110, 7), 101.0, 0.7, 4.6
        eta = (v0 / v) ** (2 / 3)
        e = -3 + 9 * v0 * b0 / 16 * ((eta - 1) ** 3 * derivative + (eta - 1) ** 2 * (6 - 4 * eta))
        assert birch_murnaghan(v, e) == pytest.approx((v0, b0), rel=1e-8)

    def test_ten_are_chosen_whose_elements_are_known(self):
        known = EMT().atomic_numbers
        assert {c.name for c in chosen_crystals(EMT())} >= {"Cu", "Al", "C", "Pt", "Au", "Ag", "Pd", "Ni", "NiAl"}
        assert all(c.elements <= known for c in chosen_crystals(EMT()))
        assert len(chosen_crystals(LennardJones())) == 10


class TestDimers:
    @pytest.mark.parametrize("inner", ["rises", "falls", "breaks"])
    def test_instabilities_are_found(self, inner):
        distances = tuple(np.linspace(1, 3, 21))
        energies = 5 * (np.array(distances) - 2.2) ** 2
        if inner == "falls":
            energies[:4] = energies[4] - np.arange(4, 0, -1)
        if inner == "breaks":
            energies[:3] = np.inf
        found = short_range_instability(Curve(distances, tuple(energies)))
        if inner == "falls":
            assert (found.distance, found.depth) == (pytest.approx(1.4), pytest.approx(4.0))
            assert found.barrier == pytest.approx(5 * 0.8**2)
        else:
            assert found is None

    def test_an_instability_deeper_than_the_minimum_is_seen_beside_the_curve_before(self):
        distances = tuple(np.linspace(1, 3, 21))
        energies = 5 * (np.array(distances) - 2.2) ** 2
        deep = np.where(np.array(distances) < 1.75, -3.0, energies)
        found = short_range_instability(Curve(distances, tuple(deep)), Curve(distances, tuple(energies)))
        assert found.distance == pytest.approx(1.8)
        assert found.depth == pytest.approx(3.8)

    def test_a_minimum_that_moved_is_no_instability(self):
        distances = tuple(np.linspace(1, 3, 21))
        before, after = (tuple(5 * (np.array(distances) - d) ** 2) for d in (2.2, 1.9))
        assert short_range_instability(Curve(distances, after), Curve(distances, before)) is None

    def test_a_ripple_and_a_curve_of_nothing_finite_are_no_instabilities(self):
        distances = tuple(np.linspace(1, 3, 21))
        energies = 5 * (np.array(distances) - 2.2) ** 2
        energies[2] = energies[3] - 0.05
        assert short_range_instability(Curve(distances, tuple(energies))) is None
        assert short_range_instability(Curve(distances, (math.inf,) * 21)) is None

    def test_curves_are_those_of_two_atoms(self):
        curve = dimer_curves(lennard_jones(), [(14, 8)])["Si-O"]
        near = np.array(curve.distances)[:20]
        assert near == pytest.approx(sorted(near))
        expected = 4 * 0.3 * ((2.1 / near) ** 12 - (2.1 / near) ** 6)
        assert np.array(curve.energies)[:20] == pytest.approx(expected)

    def test_the_elements_that_most_structures_hold_come_first(self):
        structures = [molecule("CH4"), molecule("H2O"), molecule("H2")]
        assert chosen_dimers(structures) == [(1, 1), (6, 6), (8, 8), (1, 6), (1, 8)]
        assert chosen_dimers(structures, most=3) == [(1, 1), (6, 6), (1, 6)]


class TestDriftReport:
    def test_nothing_has_changed_between_a_potential_and_itself(self):
        potential = soft()
        found = drift_report(potential, copy.deepcopy(potential), silicon_pairs(), size=3)
        assert found.drift().force == 0
        assert found.drift().n == 9
        assert found.drift().size > 0
        assert found.warnings() == []
        assert "no short-range instability has appeared" in " ".join(drift_text(found).split())

    def test_drift_is_the_root_mean_square_by_kind(self):
        before, after = soft(), soft()
        with torch.no_grad():
            after.epsilon *= 1.5
        found = drift_report(before, after, silicon_pairs(), size=3)
        for kind in ("structures", "crystals", "molecules", None):
            drift = found.drift(kind)
            rows = [a for a in found.before.probes if kind in (None, a.kind)]
            assert drift.n == len(rows)
            components = np.concatenate([np.ravel(a.forces) for a in rows])
            assert drift.size == pytest.approx(np.sqrt(np.mean(components**2)))
            assert drift.force == pytest.approx(drift.size / 2)
            energies = np.array([a.energy / len(a.forces) for a in rows])
            assert drift.energy == pytest.approx(np.sqrt(np.mean(energies**2)) / 2)
            lengths = [np.linalg.norm(f) for a in rows for f in a.forces]
            assert drift.largest == pytest.approx(max(lengths) / 2)

    def test_probes_that_the_first_does_not_know_do_not_count(self):
        found = drift_report(lennard_jones(), lennard_jones(sigma=2.11), silicon_pairs(), size=3)
        known = [a for a in found.before.probes if np.linalg.norm(a.forces, axis=1).max() < 30]
        assert 0 < found.drift().n == len(known) < 9
        assert found.drift().force < 1

    def test_lattice_constants_follow_the_radii(self):
        before, after = both().crystals["Al"]
        assert after.lattice_constant / before.lattice_constant == pytest.approx(1.01, abs=0.005)

    def test_a_new_instability_is_reported_and_one_that_was_there_is_not(self):
        unstable = lennard_jones(Unstable)
        opened = drift_report(lennard_jones(), unstable, silicon_pairs(), size=2)
        said = [w for w in opened.warnings() if w.startswith("Si-Si")]
        assert len(said) == 1
        assert "a short-range instability has appeared: below 1.8" in said[0]
        assert "Warning: Si-Si: a short-range instability has appeared" in " ".join(drift_text(opened).split())
        there = drift_report(unstable, copy.deepcopy(unstable), silicon_pairs(), size=2)
        assert there.warnings() == []
        assert "Unstable before already: Si-Si, H-Si." in " ".join(drift_text(there).split())
        wider = lennard_jones(Unstable)
        wider.within = 2.0
        assert any(
            "Si-Si: a short-range instability has grown" in w
            for w in drift_report(unstable, wider, silicon_pairs(), size=2).warnings()
        )

    def test_probes_and_crystals_that_are_lost_are_reported(self):
        class Broken(LennardJones):
            def forward(self, structures, edges):
                return Prediction(super().forward(structures, edges).energy * torch.nan)

        found = drift_report(lennard_jones(), lennard_jones(Broken), silicon_pairs(), size=2)
        said = " ".join(found.warnings())
        assert "On 2 of 6 probes energies or forces are no longer finite." in said
        assert "the crystal no longer has a minimum of the energy" in said
        json.dumps(found.to_json(), allow_nan=False)
        assert drift_text(found)
        assert drift_figure(found).axes

    def test_text_is_at_most_80_columns_wide_and_complete(self):
        text = drift_text(both())
        assert max(map(len, text.splitlines())) <= 80
        for said in ("rattled structures", "molecules", "Pt", "Cu-Cu", "Held out, Delta-Q in amu^1/2 Å over"):
            assert said in text

    def test_json_is_finite_and_whole(self, tmp_path):
        both().write(tmp_path / "drift_report.json")
        found = json.loads((tmp_path / "drift_report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
        assert set(found) == {"drift", "crystals", "dimers", "force_error", "held_out", "warnings"}
        assert found["drift"]["all"]["n"] == both().drift().n
        assert found["drift"]["all"]["force"] == both().drift().force
        assert found["crystals"]["Cu"]["lattice_constant"][0] == pytest.approx(3.59, abs=0.02)
        assert found["held_out"]["mean"] == [e.mean for e in both().held_out]
        assert len(found["dimers"]["Cu-Cu"]["before"]) == len(found["dimers"]["Cu-Cu"]["distances"])

    def test_picture_and_part_of_the_page_can_be_made(self, tmp_path):
        save(drift_figure(both()), tmp_path / "drift_report.png")
        assert (tmp_path / "drift_report.png").stat().st_size > 10_000
        section = drift_section(both())
        assert section.name == TITLE
        assert [len(table.rows) for table in section.tables] == [4, len(both().crystals)]
        (picture,) = section.pictures
        assert "molecules" in picture.alt

    def test_bulk_moduli_that_changed_by_more_than_a_fifth_are_one_warning(self):
        sides = [
            Snapshot((), {"Si": Elastic(5.4, si), "Cu": Elastic(3.6, 140.0), "Ge": Elastic(5.7, ge)}, {})
            for si, ge in ((100.0, 75.0), (64.0, 94.0))
        ]
        (said,) = DriftReport(*sides).warnings()
        assert "more than a fifth: Si by -36 % (from 100 to 64 GPa), Ge by +25 % (from 75 to 94 GPa). Where" in said

    @pytest.mark.parametrize(
        ("errors", "turned", "explained"),
        [
            ((0.2, 0.3), False, [True]),
            ((0.3, 0.2), False, [False]),
            ((0.2, 0.3), True, [False]),
            ((None, None), True, []),
        ],
    )
    def test_a_rise_of_the_force_error_beside_better_structures_is_explained(self, errors, turned, explained):
        found = both()
        ends = sorted(found.held_out, key=lambda e: e.geometric_mean, reverse=not turned)
        sides = (replace(side, force_error=e) for side, e in zip((found.before, found.after), errors, strict=True))
        report = DriftReport(*sides, held_out=tuple(ends))
        for said in (force_sentences(report), force_sentences(FoldDriftReports((report, report)))):
            assert [("It rises although the structures are better" in sentence) for sentence in said] == explained
        assert not [warning for warning in report.warnings() if "force" in warning.lower()]

    def test_forces_are_compared_on_the_frames_of_the_pairs(self):
        start = rattled(bulk("Cu", cubic=True), 0.1, 1)
        frames = [start.copy() for _ in range(3)]
        for k, frame in enumerate(frames[:2]):
            frame.calc = SinglePointCalculator(frame, energy=0.0, forces=np.full((4, 3), float(k)))
        pair = RelaxationPair(start, bulk("Cu", cubic=True), "Cu", frames=frames)
        forces = single_points(EMT(), [start])
        (forces,) = [f.numpy() for _, _, f in forces]
        expected = (np.abs(forces).mean() + np.abs(forces - 1.0).mean()) / 2
        assert take_snapshot(EMT(), [pair], size=1).force_error == pytest.approx(expected)
        assert take_snapshot(EMT(), silicon_pairs()[:0], size=1).force_error is None

    def test_a_snapshot_is_kept_exactly(self, tmp_path):
        found = take_snapshot(EMT(), size=2)
        found.write(tmp_path / "snapshot.json")
        again = Snapshot.read(tmp_path / "snapshot.json")
        assert again == found
        assert DriftReport(again, found).drift().force == 0

    def test_only_snapshots_of_the_same_probes_can_be_compared(self):
        with pytest.raises(
            ValueError, match=r"of the same probes can be compared: take both with the same pairs, size and seed"
        ):
            DriftReport(take_snapshot(EMT(), size=1), take_snapshot(EMT(), size=2))


def test_folds_report_their_lattice_constants_on_average_and_at_worst():
    tuned = both()
    kept = DriftReport(tuned.before, tuned.before)
    section = drift_section(FoldDriftReports((kept, tuned)))
    changes = {n: a.lattice_constant / b.lattice_constant - 1 for n, (b, a) in tuned.crystals.items()}
    worst = max(changes, key=lambda name: abs(changes[name]))
    mean = np.mean([*map(abs, changes.values()), *[0.0] * len(changes)])
    assert (
        f"Lattice constants have changed by {100 * mean:.2f} % on average, and most by {100 * changes[worst]:+.2f} % "
        f"({worst}, fold 1)."
    ) in section.sentences
    assert section.name == TITLE
    assert {row[4].text for row in section.tables[0].rows} == {f"{d.force:.3f} (fold 1)" for d in tuned.drifts.values()}
