"""Zero force at the references: its value and gradient, and as a first stage of training."""

import dataclasses

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.constraints import FixAtoms
from helpers.potentials import wide_lennard_jones
from helpers.structures import constrained
from helpers.training import Scripted, interrupted, make_pairs, trainer, untuned

from ase_bptt import RelaxationPair, TorchCalculator, Trainer, load_potential
from ase_bptt.losses import TINY
from ase_bptt.terms.zero_force import STIFFNESS, zero_force


@pytest.fixture(scope="module")
def pairs():
    torch.set_num_threads(1)
    return make_pairs(0, 5)


def crystal(a=3.7, **given) -> RelaxationPair:
    atoms = bulk("Cu", a=a, cubic=True)
    atoms.positions[0] += 0.05
    return RelaxationPair(atoms, atoms, "Cu", **given)


def delta_q_of(loss) -> float:
    return float((loss.detach() + TINY**0.5) ** 2 - TINY)


class TestValue:
    def test_forces_count_as_the_displacement_that_they_cause(self):
        potential, pair = load_potential("emt"), crystal()
        atoms = pair.relaxed.copy()
        atoms.calc = TorchCalculator(potential)
        expected = np.sqrt((atoms.get_masses()[:, None] * (atoms.get_forces() / STIFFNESS) ** 2).sum())
        assert delta_q_of(zero_force(potential, [pair])[0]) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize(("pressure", "shift"), [(0.0, 0.0), (0.05, 0.05)])
    def test_stress_counts_where_the_cell_moves(self, pressure, shift):
        potential, pair = load_potential("emt"), crystal(cell="full", pressure=pressure)
        atoms = pair.relaxed.copy()
        atoms.calc = TorchCalculator(potential)
        n, volume = len(atoms), atoms.get_volume()
        virial = -volume * (atoms.get_stress(voigt=False) + shift * np.eye(3))
        rows = np.vstack([atoms.get_forces(), virial / (np.sqrt(n) * (volume / n) ** (1 / 3))])
        expected = np.sqrt(atoms.get_masses()[0] * (rows**2).sum()) / STIFFNESS
        assert delta_q_of(zero_force(potential, [pair])[0]) == pytest.approx(expected, rel=1e-9)

    def test_fixed_atoms_do_not_count(self):
        pair = crystal()
        fixed = constrained(pair.relaxed, FixAtoms([*range(4)]))
        assert zero_force(load_potential("emt"), [dataclasses.replace(pair, relaxed=fixed)]).item() == 0

    def test_value_and_gradient_are_zero_at_an_exact_match(self):
        potential, atoms = load_potential("emt"), bulk("Cu", cubic=True)
        loss = zero_force(potential, [RelaxationPair(atoms, atoms, "Cu")]).sum()
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert all(torch.isfinite(p.grad).all() for p in potential.parameters() if p.grad is not None)

    def test_gradient(self):
        potential, each = load_potential("emt"), [crystal(cell="full"), crystal(3.55)]
        s0, h = potential.s0, 1e-5
        (gradient,) = torch.autograd.grad(zero_force(potential, each).sum(), s0)
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                s0 += sign * h
            found.append(zero_force(potential, each).sum().item())
            with torch.no_grad():
                s0 -= sign * h
        assert gradient.sum().item() == pytest.approx((found[0] - found[1]) / (2 * h), rel=1e-6)


class TestFirstStage:
    def test_no_relaxation_is_run(self, pairs, monkeypatch):
        run = trainer(first="zero-force:2")
        monkeypatch.setattr(run.pair_loss, "relaxation", None)
        run.fit(pairs, epochs=2)
        assert abs(run.potential.sigma.item() - 2.5) < abs(untuned().sigma.item() - 2.5)

    def test_it_needs_relaxed_structures_alone(self, pairs):
        alone = [dataclasses.replace(p, initial=p.relaxed) for p in pairs]
        found = [trainer(first="zero-force:1").fit(given, epochs=1).potential.sigma.item() for given in (pairs, alone)]
        assert found[0] == found[1]

    def test_each_stage_has_its_own_decay(self, pairs):
        rates = [row["lr"] for row in trainer(first="zero-force:2").fit(pairs, epochs=4).history]
        assert rates[2] > 10 * rates[1]
        assert rates[3] < rates[2]

    @pytest.mark.parametrize(("script", "start"), [([3, 2, 4, 5], 1), ([1, 2, 4, 5], 0)], ids=["helped", "harmed"])
    def test_validation_decides_what_is_trained_on(self, pairs, script, start, monkeypatch):
        run = Scripted(untuned(), script=script, steps=3, first="zero-force:2", lr=0.02, progress=False, patience=1)
        started = []
        monkeypatch.setattr(run.updates, "start_stage", lambda: started.append(run.potential.sigma.item()))
        run.start(data := run.check(pairs[:3], pairs[3:]), epochs=3)
        run.run(data)
        assert started == [run.sigmas[start]]
        assert len(run.history) == 3  # patience does not end a first stage

    @pytest.mark.parametrize("step", [12, 21, 23])
    def test_a_resumed_run_is_that_without_a_stop(self, pairs, tmp_path, step):
        def make(out):
            return trainer(first="zero-force:2", out=out)

        interrupted(make, tmp_path, pairs[:3], pairs[3:], step=step, epochs=4)

    @pytest.mark.parametrize("given", ["forces", "zero-force:0", "zero-force:x", "zero-force:-1"])
    def test_other_stages_are_refused(self, given):
        with pytest.raises(ValueError, match="A first stage is 'zero-force'"):
            Trainer("emt", first=given)


def test_as_a_term(pairs):
    run = trainer(wide_lennard_jones(sigma=2.65), terms=["zero_force"])
    row = run.fit(pairs, epochs=1).history[0]
    assert row["term_zero_force"] > 0
