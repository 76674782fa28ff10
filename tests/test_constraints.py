"""ASE's constraints on the device: the same two maps, the same paths, and gradients through them."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.constraints import (
    FixAtoms,
    FixBondLengths,
    FixCartesian,
    FixCom,
    FixedLine,
    FixedPlane,
    FixScaled,
    FixSubsetCom,
    FixSymmetry,
    Hookean,
)
from ase.optimize import FIRE as AseFIRE
from helpers.gradients import check_gradient, gradient, loss_and_decisions, mass_weighted_distance, nearby_positions
from helpers.potentials import lennard_jones
from helpers.structures import argon, cluster, constrained, rattled, skewed

from ase_bptt import (
    BPTTOptimizer,
    RelaxationPair,
    Status,
    Structures,
    TorchCalculator,
    delta_q,
    max_displacement,
    relax,
    rmsd,
)
from ase_bptt.constraints import KNOWN
from ase_bptt.steppers import FIRE, GradientDescent
from ase_bptt.throughput import relax_all
from ase_bptt.training.training_data import VariedStarts


def symmetric() -> Atoms:
    """A body-centred cell of which two atoms were moved apart along the diagonal: fewer symmetries, but some."""
    atoms = bulk("Ar", "fcc", a=1.65, cubic=True)
    atoms.positions[1:] += 0.05 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    return atoms


CASES = {
    "atoms": lambda: constrained(argon(), FixAtoms([0, 2])),
    "axes": lambda: constrained(argon(), FixCartesian([1, 3], [True, False, True])),
    "scaled": lambda: constrained(skewed(), FixScaled([0], [True, False, True])),
    "line": lambda: constrained(cluster(), FixedLine([0, 4], [1, 2, -1])),
    "plane": lambda: constrained(cluster(), FixedPlane([0, 1, 5], [0.3, 0, 1])),
    "com": lambda: constrained(mixed(), FixCom()),
    "subset": lambda: constrained(mixed(), FixSubsetCom([0, 1, 4])),
    "symmetry": lambda: constrained(symmetric(), FixSymmetry),
    "several": lambda: constrained(
        mixed(), FixAtoms([0]), FixedLine([1], [1, 1, 0]), FixCom(), FixCartesian([2], [1, 0, 0])
    ),
    "all": lambda: constrained(argon(), FixAtoms([0, 1, 2, 3])),
    "none": argon,
}
every_case = pytest.mark.parametrize("name", CASES)


def mixed() -> Atoms:
    """Atoms of different masses."""
    atoms = cluster()
    atoms.set_masses([1.0, 2.0, 5.0, 7.0, 11.0, 13.0])
    return atoms


def fire() -> FIRE:
    return FIRE(dt=0.03, dtmax=0.06)


@every_case
def test_both_maps_are_ases_own(name):
    atoms = CASES[name]()
    structures = Structures.from_atoms(atoms)
    rng = np.random.default_rng(0)
    forces, steps = rng.normal(size=(2, len(atoms), 3))
    expected = forces.copy()
    for constraint in atoms.constraints:
        constraint.adjust_forces(atoms, expected)
    np.testing.assert_allclose(structures.project_forces(torch.tensor(forces)), expected, atol=1e-13)
    twin = atoms.copy()
    twin.set_positions(atoms.positions + steps)
    found = atoms.positions + structures.project_steps(torch.tensor(steps)).numpy()
    np.testing.assert_allclose(found, twin.positions, atol=1e-12)


def test_a_batch_has_the_maps_of_its_members():
    atoms = [make() for make in CASES.values()]
    x = torch.randn(sum(map(len, atoms)), 3, dtype=torch.float64)
    whole = Structures.from_atoms(atoms)
    single = [Structures.from_atoms(a) for a in atoms]
    for project in ("project_forces", "project_steps"):
        parts = [getattr(s, project)(part) for s, part in zip(single, x.split(whole.counts), strict=True)]
        torch.testing.assert_close(getattr(whole, project)(x), torch.cat(parts), rtol=0, atol=1e-14)
    some = [7, 2, 5]
    chosen, rows = whole.select(some), whole.atoms_of(some)
    torch.testing.assert_close(chosen.project_steps(x[rows]), torch.cat([
        single[k].project_steps(x.split(whole.counts)[k]) for k in some
    ]))  # fmt: skip


@every_case
def test_a_run_takes_ases_path(name):
    start = CASES[name]()
    twin = start.copy()
    twin.calc = AseLennardJones(smooth=True, rc=2.4, ro=1.8)
    with AseFIRE(twin, logfile=None, dt=0.03, dtmax=0.06, downhill_check=False) as optimizer:
        optimizer.run(fmax=0.01, steps=60)
    found = relax(lennard_jones(), start, stepper=fire(), fmax=0.01, steps=60)
    end = found.to_atoms()
    np.testing.assert_allclose(end.positions, twin.positions, atol=1e-9)
    assert int(found.nsteps[0]) == optimizer.nsteps
    assert found.fmax.item() == pytest.approx(np.linalg.norm(twin.get_forces(), axis=1).max(), abs=1e-8)
    # The forces that are kept are those of the potential: ASE applies constraints when it is asked.
    np.testing.assert_allclose(end.get_forces(), twin.get_forces(), atol=1e-8)
    free = twin.get_forces(apply_constraint=False)
    np.testing.assert_allclose(end.get_forces(apply_constraint=False), free, atol=1e-8)


def test_members_of_a_batch_take_the_paths_they_take_alone():
    starts = [make() for make in CASES.values()]
    together = relax(lennard_jones(), starts, stepper=fire(), fmax=0.05, steps=40)
    for k, start in enumerate(starts):
        alone = relax(lennard_jones(), start, stepper=fire(), fmax=0.05, steps=40)
        assert together.status[k] is alone.status[0]
        np.testing.assert_allclose(together[k].to_atoms().positions, alone.to_atoms().positions, atol=1e-10)


def test_forces_on_fixed_atoms_do_not_count():
    atoms = constrained(argon(), FixAtoms([0, 1, 2, 3]))
    found = relax(lennard_jones(), atoms, fmax=1e-6)
    assert found.status[0] is Status.CONVERGED
    assert int(found.nsteps[0]) == 0
    assert found.forces.abs().max() > 0.1


HOLDING = {
    "atoms": (FixAtoms([0, 2]), [[0], [2]]),
    "axes": (FixCartesian([1, 3], [True, False, True]), [[1, 1, 3, 3], [0, 2, 0, 2]]),
    "every atom": (FixAtoms([0, 1, 2, 3]), [[0, 1, 2, 3]]),
}


@pytest.mark.parametrize("name", HOLDING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("away", [0.123456789, 1000.123456789])
def test_what_does_not_move_comes_back_bit_for_bit(name, dtype, away):
    constraint, held = HOLDING[name]
    start = constrained(argon(), constraint)
    start.positions += away
    potential, still = lennard_jones().to(dtype), tuple(held)
    twin = start.copy()
    twin.calc = TorchCalculator(potential)
    with BPTTOptimizer(twin, logfile=None, stepper=fire()) as optimizer:
        optimizer.run(fmax=1e-9, steps=4)
    (_, queued), *_ = relax_all(potential, [start], stepper=fire(), fmax=1e-9, steps=4)
    found = relax(potential, start, stepper=fire(), fmax=1e-9, steps=4)
    ends = [found.to_atoms(), found[0].to_atoms(), queued.atoms]
    if optimizer.nsteps:
        ends.append(optimizer.relaxation.to_atoms())
    for end in [twin, *ends]:
        np.testing.assert_array_equal(end.positions[still], start.positions[still])
        np.testing.assert_allclose(end.positions, twin.positions, atol=1e-3 if dtype is torch.float32 else 1e-9)
    np.testing.assert_array_equal(ends[-1].positions, twin.positions)
    for adjoint in ("replay", "full", "guided:2", "implicit"):
        unmoved = relax(potential, [start, start], steps=0, adjoint=adjoint).to_atoms()
        np.testing.assert_array_equal([atoms.positions for atoms in unmoved], [start.positions] * 2)


GRADIENT_CASES = ["atoms", "scaled", "line", "com", "subset", "symmetry", "several"]


class TestGradients:
    @pytest.mark.parametrize("name", GRADIENT_CASES)
    @pytest.mark.parametrize("adjoint", ["full", "replay"])
    @pytest.mark.parametrize("stepper", [lambda: GradientDescent(0.004, momentum=0.5), fire], ids=["gd", "fire"])
    def test_gradients_agree_with_finite_differences(self, name, adjoint, stepper):
        potential = lennard_jones().requires_grad_()
        structures = Structures.from_atoms([CASES[name](), cluster(seed=4)])
        structures.positions.requires_grad_()
        reference = nearby_positions(structures)
        settings = {"stepper": stepper(), "fmax": 1e-6, "steps": 12}
        inputs = [structures.positions, *potential.parameters()]

        def evaluate():
            return loss_and_decisions(potential, structures, reference, adjoint=adjoint, **settings)

        loss, *usual = evaluate()
        check_gradient(evaluate, usual, inputs, gradient(inputs, loss), h=1e-5)

    @pytest.mark.parametrize("name", GRADIENT_CASES)
    def test_replay_is_the_tape(self, name):
        found = []
        for adjoint in ("full", "replay"):
            potential = lennard_jones().requires_grad_()
            structures = Structures.from_atoms([argon(2), CASES[name](), cluster(seed=4)])
            structures.positions.requires_grad_()
            relaxation = relax(potential, structures, stepper=fire(), adjoint=adjoint, fmax=0.3, steps=20)
            loss = mass_weighted_distance(relaxation, nearby_positions(structures))
            found.append(gradient([structures.positions, *potential.parameters()], loss))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    def test_fixed_atoms_pass_their_gradient_on_unchanged_but_for_their_neighbours(self):
        structures = Structures.from_atoms(CASES["all"]())
        structures.positions.requires_grad_()
        potential = lennard_jones().requires_grad_()
        relaxation = relax(potential, structures, fmax=-1.0, steps=5)
        weights = torch.randn_like(structures.positions)
        (found,) = torch.autograd.grad((relaxation.positions * weights).sum(), structures.positions)
        torch.testing.assert_close(found, weights)


class TestOptimizer:
    @every_case
    def test_a_run_under_ase_is_the_run_on_the_device_and_so_is_its_gradient(self, name):
        potential = lennard_jones().requires_grad_()
        start = CASES[name]()
        atoms = start.copy()
        atoms.calc = TorchCalculator(potential)
        optimizer = BPTTOptimizer(atoms, logfile=None, stepper=fire())
        optimizer.run(fmax=0.01, steps=30)
        if not optimizer.nsteps:
            return
        found = optimizer.relaxation
        expected = relax(potential, start, stepper=fire(), fmax=0.01, steps=30)
        np.testing.assert_allclose(found.positions.detach(), expected.positions.detach(), atol=1e-11)
        assert found.status == expected.status
        assert found.fmax.item() == pytest.approx(expected.fmax.item(), abs=1e-9)
        weights = torch.randn_like(found.positions)
        for a, b in zip(*(
            torch.autograd.grad((end.positions * weights).sum(), list(potential.parameters()))
            for end in (found, expected)
        ), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)

    def test_constraints_that_were_changed_since_are_noticed(self):
        atoms = constrained(argon(), FixAtoms([0]))
        atoms.calc = TorchCalculator(lennard_jones())
        optimizer = BPTTOptimizer(atoms, logfile=None, stepper=fire())
        optimizer.run(fmax=0.0, steps=3)
        atoms.set_constraint(FixAtoms([1]))
        with pytest.raises(RuntimeError, match="were changed"):
            optimizer.relaxation  # noqa: B018


class TestLosses:
    def test_fixed_atoms_do_not_count(self):
        reference = argon(2)
        start = constrained(argon(), FixAtoms([0, 1]))
        d = start.positions - reference.positions
        d -= np.round(d / 1.6) * 1.6
        free, masses = d[2:], start.get_masses()[2:]
        assert delta_q(start, reference) == pytest.approx(np.sqrt((masses[:, None] * free**2).sum()))
        assert rmsd(start, reference) == pytest.approx(np.sqrt((free**2).sum(1).mean()))
        assert max_displacement(start, reference) == pytest.approx(np.sqrt((free**2).sum(1)).max())

    @pytest.mark.parametrize(
        ("constraint", "passes"),
        [
            (FixAtoms([0]), [0, 0, 0]),
            (FixCartesian([0], [True, False, False]), [0, 1, 1]),
            (FixedPlane([0, 1, 2, 3, 4, 5], [0, 0, 1]), [1, 1, 0]),
            (FixedLine([2], [0, 1, 0]), [0, 1, 0]),
            (FixCom(), [0, 0, 0]),
            (FixAtoms([]), [1, 1, 1]),
        ],
        ids=lambda x: type(x).__name__ if not isinstance(x, list) else "",
    )
    def test_only_the_drift_that_constraints_allow_is_left_out(self, constraint, passes):
        start = constrained(cluster(), constraint)
        for axis, free in enumerate(passes):
            moved = start.copy()
            moved.set_constraint()
            moved.positions[:, axis] += 0.3
            assert (delta_q(start, moved) < 1e-6) == bool(free)

    def test_constraints_of_the_reference_count_where_the_other_has_none(self):
        moved = constrained(cluster(), FixAtoms([0]))
        moved.positions += 0.3
        assert delta_q(cluster(), moved) > 1
        assert delta_q(cluster(), moved, align=True) > 1

    def test_all_atoms_fixed_is_no_distance(self):
        start = CASES["all"]()
        assert delta_q(start, argon(2)) == 0
        assert rmsd(start, argon(2)) == 0

    def test_gradients_of_fixed_atoms_are_zero(self):
        structures = Structures.from_atoms(constrained(cluster(), FixAtoms([0, 1])))
        structures.positions.requires_grad_()
        (found,) = torch.autograd.grad(delta_q(structures, cluster(seed=3)).sum(), structures.positions)
        assert (found[:2] == 0).all()
        assert (found[2:] != 0).all()


def test_training_starts_keep_to_the_constraints():
    start = constrained(argon(), FixAtoms([0, 1]))
    (varied,) = VariedStarts([RelaxationPair(start, argon(2), "a", "g")], 1.0, 0.1, [0])
    np.testing.assert_array_equal(varied.initial.positions[:2], start.positions[:2])
    assert (varied.initial.positions[2:] != start.positions[2:]).all()


@pytest.mark.parametrize("constraint", [FixBondLengths([[0, 1]]), Hookean(0, 1, rt=1.0, k=1.0)])
def test_others_are_refused_by_name_with_those_that_are_known(constraint):
    atoms = constrained(cluster(), FixAtoms([3]), constraint)
    with pytest.raises(NotImplementedError, match=rf"constraints {type(constraint).__name__}, .*FixSymmetry"):
        relax(lennard_jones(), [argon(), atoms])


def test_every_known_one_is_tried_here():
    tried = {type(c).__name__ for make in CASES.values() for c in make().constraints}
    assert tried == set(KNOWN)


def water() -> Atoms:
    """Three atoms of two masses."""
    return Atoms("ArNeNe", positions=[[0, 0, 0], [1.1, 0.1, 0], [-0.3, 1.0, 0.2]])


class TestWhatIsConstrainedStays:
    """After 60 frames of a run that moves everything else."""

    def relaxed(self, atoms: Atoms) -> Atoms:
        found = relax(lennard_jones(), atoms, stepper=fire(), fmax=1e-9, steps=60)
        end = found.to_atoms()
        assert np.abs(end.positions - atoms.positions).max() > 0.01
        return end

    def test_fixed_atoms_to_the_last_bit(self):
        slab = rattled(fcc111("Ar", (2, 2, 3), a=1.6, vacuum=4.0), 0.05)
        slab.set_constraint(FixAtoms(mask=slab.get_tags() == 3))
        bottom = slab.get_tags() == 3
        np.testing.assert_array_equal(self.relaxed(slab).positions[bottom], slab.positions[bottom])

    def test_fixed_coordinates_to_the_last_bit(self):
        atoms = constrained(argon(), FixCartesian([0, 2], [True, False, True]))
        np.testing.assert_array_equal(
            self.relaxed(atoms).positions[[0, 2]][:, [0, 2]], atoms.positions[[0, 2]][:, [0, 2]]
        )

    def test_the_centre_of_mass(self):
        atoms = constrained(water(), FixCom())
        moved = self.relaxed(atoms).get_center_of_mass() - atoms.get_center_of_mass()
        assert np.abs(moved).max() < 1e-12

    def test_the_symmetry(self):
        atoms = constrained(symmetric(), FixSymmetry)
        end = self.relaxed(atoms)
        constraint = atoms.constraints[0]
        step = end.positions - atoms.positions
        averaged = step.copy()
        constraint.adjust_forces(end, averaged)
        assert np.abs(averaged - step).max() < 1e-10
        assert len(constraint.rotations) > 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: constrained(rattled(fcc111("Ar", (1, 1, 3), a=1.6, vacuum=4.0), 0.05), FixAtoms([0])),
        lambda: constrained(symmetric(), FixSymmetry),
        lambda: constrained(water(), FixCom()),
    ],
    ids=["slab", "crystal", "molecule"],
)
@pytest.mark.parametrize("adjoint", ["full", "replay"])
def test_finite_differences_of_a_slab_a_crystal_and_a_molecule(make, adjoint):
    potential = lennard_jones().requires_grad_()
    structures = Structures.from_atoms(make())
    structures.positions.requires_grad_()
    reference = nearby_positions(structures)
    inputs = [structures.positions, *potential.parameters()]

    def evaluate():
        return loss_and_decisions(
            potential, structures, reference, adjoint=adjoint, stepper=fire(), fmax=1e-6, steps=15
        )

    loss, *usual = evaluate()
    check_gradient(evaluate, usual, inputs, gradient(inputs, loss), h=1e-5)
