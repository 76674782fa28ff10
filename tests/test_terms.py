"""Further terms of the loss: zero where nothing changed, right gradients, less forgetting, the same when resumed."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from helpers.potentials import Narrow, wide_lennard_jones
from helpers.structures import rattled, wide_cluster
from helpers.training import labelled, pair_with_frames

from ase_bptt import RelaxationPair, datasets, read_pairs, relax
from ase_bptt.potentials.analytic import Morse
from ase_bptt.potentials.emt import EMT
from ase_bptt.terms import TERMS, add_gradients, make_term, regularizers
from ase_bptt.terms.labels import Labels
from ase_bptt.terms.probes import ENERGY, FORCE, KINDS, Targets, energies_and_forces, label_loss, make_probes
from ase_bptt.terms.regularizers import Distillation, WeightAnchor


def mismatch(potential, targets: Targets, **settings) -> torch.Tensor:
    return label_loss(targets, *energies_and_forces(potential, targets.structures), **settings)


@pytest.fixture(scope="module")
def pairs():
    return [pair_with_frames(k, wide_lennard_jones(), offset=7.0) for k in range(3)]


def every_term():
    return [
        WeightAnchor(0.01),
        Distillation(0.5, size=3, batch=3),
        Labels(0.5, per_pair=2),
        Labels(1.0, path=0.3, frames=4),
    ]


def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("term", every_term(), ids=["weight_anchor", "teacher", "reference", "path"])
class TestEveryTerm:
    def test_its_gradient_is_that_of_differences(self, term, pairs):
        potential = wide_lennard_jones(sigma=2.6)
        term.prepare(potential, pairs)
        with torch.no_grad():
            potential.sigma += 0.01
            potential.epsilon -= 0.02
        term.loss(potential, pairs, rng())
        found = torch.autograd.grad(copy.deepcopy(term).loss(potential, pairs, rng()), list(potential.parameters()))
        for weight, gradient in zip(potential.parameters(), found, strict=True):
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    weight += step
                fixed = copy.deepcopy(term)
                if isinstance(term, Labels):
                    # The energies of the elements follow the potential, and are not differentiated.
                    fixed._fitted = term._fitted
                values.append(fixed.loss(potential, pairs, rng()).item())
                with torch.no_grad():
                    weight -= step
            assert gradient.item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7)
            assert abs(gradient.item()) > 1e-4

    def test_a_resumed_run_finds_the_same_bit_for_bit(self, term, pairs, tmp_path):
        potential = wide_lennard_jones(sigma=2.6)
        term = make_term(term.todict())
        term.prepare(potential, pairs)
        torch.save(term.state(), tmp_path / "state.pt")
        (tmp_path / "settings.json").write_text(json.dumps(term.todict()))
        moved = wide_lennard_jones(sigma=2.7)
        again = make_term(json.loads((tmp_path / "settings.json").read_text()))
        again.load(torch.load(tmp_path / "state.pt", weights_only=True))
        again.prepare(moved, pairs)
        assert again.loss(moved, pairs, rng()).item() == term.loss(moved, pairs, rng()).item()
        assert again.todict() == term.todict()

    def test_its_gradient_is_added_times_its_weight(self, term, pairs):
        potential = wide_lennard_jones(sigma=2.6)
        term.prepare(potential, pairs)
        with torch.no_grad():
            potential.sigma += 0.02
        potential.sigma.grad = torch.tensor(5.0, dtype=torch.float64)
        found = add_gradients([term], potential, pairs, [0, 1])
        gradient = potential.sigma.grad.item() - 5.0
        term.weight *= 3
        potential.sigma.grad = None
        # The energies of the elements are those of the last step.
        thrice = add_gradients([term], potential, pairs, [0, 1])
        assert potential.sigma.grad.item() == pytest.approx(3 * gradient)
        assert thrice[term.name] == pytest.approx(3 * found[term.name])
        term.weight /= 3


@pytest.mark.parametrize("term", [WeightAnchor(), Distillation(size=3, batch=20)], ids=["weight_anchor", "teacher"])
def test_a_regularizer_is_zero_at_the_pretrained_weights_and_nowhere_else(term, pairs):
    potential = wide_lennard_jones()
    term.prepare(potential, pairs)
    assert term.loss(potential, pairs, rng()).item() == pytest.approx(0, abs=1e-20)
    with torch.no_grad():
        potential.sigma *= 1.02
    assert term.loss(potential, pairs, rng()).item() > 1e-5


def test_what_a_term_draws_does_not_depend_on_the_others(pairs):
    potential = wide_lennard_jones(sigma=2.6)
    terms = [Distillation(size=4, batch=2), Labels()]
    for term in terms:
        term.prepare(potential, pairs)
    with torch.no_grad():
        potential.sigma += 0.02
    both, alone = (add_gradients(some, potential, pairs, [0, 0, 0]) for some in (terms, terms[1:]))
    assert both["reference"] == alone["reference"]
    assert add_gradients(terms[:1], potential, pairs, [0, 0, 1]) != add_gradients(
        terms[:1], potential, pairs, [0, 0, 0]
    )


def test_the_weight_anchor_is_the_mean_squared_change_relative_to_each_tensors_size(pairs):
    potential = Morse()
    potential.epsilon.requires_grad_(False)
    anchor = WeightAnchor()
    anchor.prepare(potential, pairs)
    trained = [p for p in potential.parameters() if p.requires_grad]
    with torch.no_grad():
        trained[0] *= 1.1
        potential.epsilon *= 2
    assert anchor.loss(potential, pairs, rng()).item() == pytest.approx(100 / len(trained))


def test_the_weight_anchor_of_weights_that_started_at_zero_is_finite(pairs):
    potential = wide_lennard_jones()
    with torch.no_grad():
        potential.epsilon.zero_()
    anchor = WeightAnchor()
    anchor.prepare(potential, pairs)
    with torch.no_grad():
        potential.epsilon += 0.5
    assert anchor.loss(potential, pairs, rng()).item() == pytest.approx(1e4 * 0.25 / (2.5**2 / 2) / 2)


def test_a_weight_anchor_refuses_other_trained_weights_than_before(pairs):
    anchor = WeightAnchor()
    anchor.prepare(wide_lennard_jones(), pairs)
    again = WeightAnchor()
    again.load(anchor.state())
    frozen = wide_lennard_jones()
    frozen.sigma.requires_grad_(False)
    with pytest.raises(ValueError, match=r"other trained weights, such as sigma: start a new run"):
        again.prepare(frozen, pairs)


class TestMismatch:
    def test_it_is_hubers_function_in_its_units(self):
        potential = wide_lennard_jones()
        targets = Targets.of(potential, [wide_cluster(0), wide_cluster(1)])
        sizes = torch.tensor([6.0, 6.0], dtype=torch.float64)
        off = dataclasses.replace(targets, energies=targets.energies + 0.5 * ENERGY * sizes)
        assert mismatch(potential, off).item() == pytest.approx(0.125)
        far = dataclasses.replace(targets, forces=targets.forces + 3 * FORCE)
        assert mismatch(potential, far).item() == pytest.approx(2.5)
        assert mismatch(potential, dataclasses.replace(far, energies=far.energies + 9), energies=False).item() == (
            pytest.approx(2.5)
        )

    def test_fixed_atoms_do_not_count(self):
        potential = wide_lennard_jones()
        atoms = wide_cluster(0)
        atoms.set_constraint(FixAtoms([0, 1]))
        targets = Targets.of(potential, [atoms])
        targets.forces[:2] += 100.0
        assert mismatch(potential, targets).item() == pytest.approx(0, abs=1e-20)
        targets.forces[2:] += FORCE
        assert mismatch(potential, targets).item() == pytest.approx(0.5)


class TestProbes:
    def test_only_elements_that_are_known_and_every_kind(self, pairs):
        known = EMT().atomic_numbers
        pair = RelaxationPair(molecule("H2O"), molecule("H2O"), "water")
        probes = make_probes(EMT(), [pair], size=5)
        assert {p.kind for p in probes} == set(KINDS)
        assert [p.kind for p in probes] == sorted((p.kind for p in probes), key=KINDS.index)
        assert all({*p.atoms.numbers.tolist()} <= known for p in probes)
        assert max(sum(p.kind == kind for p in probes) for kind in KINDS) == 5

    def test_one_seed_gives_one_set_and_another_seed_another(self, pairs):
        one, two, other = (
            np.concatenate(
                [p.atoms.positions.ravel() for p in make_probes(wide_lennard_jones(), pairs, size=4, seed=s)]
            )
            for s in (1, 1, 2)
        )
        np.testing.assert_array_equal(one, two)
        assert one.shape != other.shape or not np.allclose(one, other)

    def test_structures_lie_between_the_ends_and_are_free(self, pairs):
        fixed = pairs[0].initial.copy()
        fixed.set_constraint(FixAtoms([0]))
        probes = make_probes(wide_lennard_jones(), [dataclasses.replace(pairs[0], initial=fixed)], size=8)
        near = [p.atoms for p in probes if p.kind == "structures"]
        assert len(near) == 8
        assert not any(a.constraints for a in near)
        length = np.linalg.norm(pairs[0].relaxed.positions - fixed.positions)
        assert all(np.linalg.norm(a.positions - fixed.positions) < length + 5 * 0.12 * np.sqrt(18) for a in near)

    def test_atoms_of_crystals_feel_forces(self):
        found = [p for p in make_probes(EMT(), size=20) if p.kind == "crystals"]
        targets = Targets.of(EMT(), [p.atoms for p in found])
        assert len(found) >= 8
        assert targets.structures.max(targets.forces.norm(dim=1)).min() > 0.01


class TestTeacher:
    def test_it_lowers_the_drift_in_a_training(self, pairs):
        def drift(terms) -> float:
            potential = wide_lennard_jones()
            for term in terms:
                term.prepare(potential, pairs)
            goal = Targets.of(potential, [wide_cluster(9)])
            goal.forces *= 1.5
            optimizer = torch.optim.Adam(potential.parameters(), lr=0.01)
            for step in range(15):
                optimizer.zero_grad()
                mismatch(potential, goal, energies=False).backward()
                add_gradients(terms, potential, pairs, [0, step])
                optimizer.step()
            atoms = [p.atoms for p in make_probes(potential, pairs, size=6, seed=5) if p.kind == "structures"]
            change = Targets.of(potential, atoms).forces - Targets.of(wide_lennard_jones(), atoms).forces
            return change.square().mean().sqrt().item()

        free, guarded, pulled = (drift(terms) for terms in ([], [Distillation(10.0, size=6)], [WeightAnchor(10.0)]))
        assert guarded < free / 3
        assert pulled < free / 3

    def test_it_is_the_mean_of_squares_in_its_units(self, pairs):
        potential, distillation = wide_lennard_jones(), Distillation(size=5, batch=100)
        distillation.prepare(potential, pairs)
        sizes = torch.tensor(distillation.targets.structures.counts, dtype=torch.float64)
        distillation.targets.energies += 2 * regularizers.ENERGY * sizes
        assert distillation.loss(potential, pairs, rng()).item() == pytest.approx(4)
        distillation.targets.forces[::2] += 3 * regularizers.FORCE
        share = len(distillation.targets.forces[::2]) / len(distillation.targets.forces)
        assert distillation.loss(potential, pairs, rng()).item() == pytest.approx(4 + 9 * share)

    def test_where_memory_runs_out_its_parts_have_the_same_value_and_gradients(self, pairs, caplog):
        distillation, found = Distillation(size=5, batch=9), []
        plain = wide_lennard_jones()
        distillation.prepare(plain, pairs)
        with torch.no_grad():
            plain.sigma *= 1.02
        for potential in (plain, Narrow(plain, most=24)):
            value = distillation.loss(potential, pairs, rng())
            gradients = torch.autograd.grad(value, [plain.sigma, plain.epsilon])
            found.append([value.item(), *(gradient.item() for gradient in gradients)])
        assert found[1] == pytest.approx(found[0], rel=1e-12)
        assert "continuing with half as many" in caplog.text

    def test_probes_that_the_potential_does_not_know_are_left_out(self, pairs):
        distillation = Distillation(size=10)
        distillation.prepare(wide_lennard_jones(), pairs)
        assert 10 < len(distillation.targets) < 30
        assert distillation.targets.forces.abs().max() < 30

    def test_kinds_can_be_left_out(self, pairs):
        distillation = Distillation(size=4, kinds=["crystals"])
        distillation.prepare(EMT(), pairs)
        assert len(distillation.targets) == 4
        assert bool(distillation.targets.structures.pbc.all())

    def test_one_kind_may_be_a_word(self):
        assert Distillation(kinds="crystals").todict() == Distillation(kinds=["crystals"]).todict()

    @pytest.mark.parametrize(
        ("kinds", "said"), [("crystal", "got crystal"), (["a", "b"], "got a, b"), ([], "got none")]
    )
    def test_unknown_kinds_are_refused(self, kinds, said):
        with pytest.raises(ValueError, match=rf"kinds of probes are structures, crystals, molecules; {said}"):
            Distillation(kinds=kinds)


class TestReference:
    def test_it_is_zero_for_the_potential_that_made_the_frames_whatever_its_zero_of_energy(self, pairs):
        term = Labels(per_pair=5)
        potential = wide_lennard_jones()
        term.prepare(potential, pairs)
        assert term.offsets[18] == pytest.approx(7.0, abs=1e-6)
        assert term.loss(potential, pairs, rng()).item() == pytest.approx(0, abs=1e-12)
        off = wide_lennard_jones(sigma=2.6)
        assert term.loss(off, pairs, rng()).item() > 0.01

    def test_energies_of_elements_are_distinguished(self):
        made = [
            labelled(a, EMT()) for a in (rattled(molecule("H2O")), rattled(molecule("CH4")), rattled(molecule("H2")))
        ]
        for atoms in made:
            atoms.calc.results["energy"] += 2.0 * list(atoms.symbols).count("O") - 1.0 * list(atoms.symbols).count("H")
        term = Labels()
        term.prepare(EMT(), [RelaxationPair(a, a, str(a.symbols)) for a in made])
        assert term.offsets == pytest.approx({1: -1.0, 6: 0.0, 8: 2.0}, abs=1e-9)

    def test_fitting_it_recovers_the_potential(self, pairs):
        potential, term = wide_lennard_jones(sigma=2.6, epsilon=0.25), Labels(per_pair=3)
        term.prepare(potential, pairs)
        optimizer = torch.optim.Adam(potential.parameters(), lr=0.01)
        for step in range(60):
            optimizer.zero_grad()
            add_gradients([term], potential, pairs, [step])
            optimizer.step()
        assert potential.sigma.item() == pytest.approx(2.5, abs=0.02)
        assert potential.epsilon.item() == pytest.approx(0.3, abs=0.03)

    def test_the_path_is_passed_by_the_potential_that_took_it(self, pairs):
        way = [wide_cluster(0)]
        for _ in range(4):
            with torch.no_grad():
                way.append(relax(wide_lennard_jones(), way[-1], stepper="gd", steps=3, fmax=1e-6).to_atoms())
        pair = dataclasses.replace(pairs[0], initial=way[0], relaxed=way[-1], frames=way)
        found = {}
        for sigma in (2.4, 2.5, 2.6, 2.8):
            potential = wide_lennard_jones(sigma=sigma)
            values = []
            for weight in (0.0, 0.5, 1.0):
                term = Labels(path=weight, legs=4, steps=3)
                term.prepare(potential, [pair])
                values.append(term.loss(potential, [pair], rng()).item())
            found[sigma] = values[2] - values[0]
            assert values[1] - values[0] == pytest.approx(found[sigma] / 2)
        assert found[2.5] == pytest.approx(0, abs=1e-6)
        assert 0.1 < found[2.6] < found[2.8]
        assert found[2.4] > 0.1

    def test_pairs_without_frames_use_their_ends_and_others_count_nothing(self, pairs):
        ends = dataclasses.replace(pairs[0], frames=())
        bare = dataclasses.replace(pairs[1], initial=wide_cluster(1), relaxed=wide_cluster(2), frames=())
        term, potential = Labels(), wide_lennard_jones(sigma=2.6)
        term.prepare(potential, [ends, bare])
        assert term.loss(potential, [ends], rng()).item() > 0
        assert term.loss(potential, [bare], rng()).item() == 0
        assert add_gradients([term], potential, [bare], [0]) == {"reference": 0}

    def test_results_of_other_positions_are_no_labels(self, pairs):
        """As where the ends of a relaxation share the calculator that took it."""
        start, end = pairs[0].initial.copy(), pairs[0].relaxed.copy()
        start.calc = end.calc = AseLennardJones(sigma=2.5)
        end.get_forces()
        pair = dataclasses.replace(pairs[0], initial=start, relaxed=end, frames=())
        one = dataclasses.replace(pair, initial=start.copy())
        term, alone, potential = Labels(per_pair=2), Labels(per_pair=2), wide_lennard_jones(sigma=2.6)
        for reference, given in ((term, pair), (alone, one)):
            reference.prepare(potential, [given])
        assert term.loss(potential, [pair], rng()).item() == alone.loss(potential, [one], rng()).item() > 0
        assert "forces" in end.calc.results

    @pytest.mark.parametrize("lost", ["energy", "forces"])
    def test_labels_that_are_not_finite_are_none(self, pairs, lost):
        wrong = labelled(wide_cluster(1), wide_lennard_jones())
        wrong.calc.results[lost] *= np.nan
        term, potential = Labels(per_pair=5), wide_lennard_jones()
        term.prepare(potential, [dataclasses.replace(pairs[0], frames=[*pairs[0].frames, wrong])])
        assert term.offsets[18] == pytest.approx(7.0, abs=1e-6)
        assert term.loss(potential, pairs[:1], rng()).item() == pytest.approx(0, abs=1e-12)

    def test_without_energies_forces_alone_will_do(self, pairs):
        frames = [a.copy() for a in pairs[0].frames]
        for bare, told in zip(frames, pairs[0].frames, strict=True):
            bare.calc = SinglePointCalculator(bare, forces=told.get_forces())
        pair, potential, found = dataclasses.replace(pairs[0], frames=frames), wide_lennard_jones(sigma=2.6), []
        for given in (pair, pairs[0]):
            term = Labels(energies=False)
            term.prepare(potential, [given])
            found.append(term.loss(potential, [given], rng()).item())
            assert term.offsets == {}
        assert found[0] == found[1] > 0
        with pytest.raises(ValueError, match="frame with energy and forces"):
            Labels().prepare(potential, [pair])

    def test_what_cannot_be_used_is_reported(self, pairs):
        bare = dataclasses.replace(pairs[1], initial=wide_cluster(1), relaxed=wide_cluster(2), frames=())
        with pytest.raises(ValueError, match=r"None of the training pairs has a frame with energy and forces"):
            Labels().prepare(wide_lennard_jones(), [bare])
        wrong = dataclasses.replace(pairs[0], frames=[molecule("H2O")])
        with pytest.raises(ValueError, match=r"pair 0: its frame 0 is OH2 and not Ar6"):
            Labels().prepare(wide_lennard_jones(), [wrong])
        with pytest.raises(ValueError, match=r"Two training pairs are called 'pair 0'"):
            Labels().prepare(wide_lennard_jones(), [pairs[0], dataclasses.replace(pairs[1], id="pair 0")])

    def test_only_so_many_frames_are_kept_the_ends_among_them(self, pairs):
        term = Labels(frames=2, per_pair=9, energies=False)
        term.prepare(wide_lennard_jones(sigma=2.6), pairs)
        ends = Targets.of(wide_lennard_jones(), [pairs[0].initial, pairs[0].relaxed])
        expected = mismatch(wide_lennard_jones(sigma=2.6), ends, energies=False).item()
        assert term.loss(wide_lennard_jones(sigma=2.6), pairs[:1], rng()).item() == pytest.approx(expected)


def test_files_of_frames_are_read_when_they_are_asked_for():
    pair = read_pairs(sorted(datasets.FOLDER.glob("*.extxyz"))[0])[0]
    assert len(pair.frames) == 12
    frames = list(pair.frames)
    np.testing.assert_array_equal(frames[0].positions, pair.initial.positions)
    assert all("forces" in a.calc.results for a in frames)
    assert pair.frames[0] is not frames[0]
    np.testing.assert_array_equal(pair.frames[-1].positions, frames[-1].positions)


@pytest.mark.parametrize(
    "settings",
    [{"name": "teacher", "batch": 2.5}, {"name": "teacher", "size": 0}, {"name": "reference", "frames": 1.5}],
)
def test_what_is_counted_must_be_whole(settings):
    with pytest.raises(ValueError, match="must be a whole number, at least 1, got"):
        make_term(settings)


@pytest.mark.parametrize("name", sorted(TERMS))
def test_a_weight_must_be_positive(name):
    with pytest.raises(ValueError, match=r"weight must be positive, got 0\."):
        make_term({"name": name, "weight": 0.0})


def test_an_unknown_term_is_refused_with_what_there_is():
    said = r"'weight_anchr' .did you mean 'weight_anchor'.*; there are weight_anchor, teacher, reference, zero_force\."
    for given in ({"name": "weight_anchr"}, "weight_anchr"):
        with pytest.raises(ValueError, match=said):
            make_term(given)
