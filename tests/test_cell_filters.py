"""Runs on ASE's FrechetCellFilter: they leave the Relaxation that `relax` returns, and other filters none."""

import doctest
from pathlib import Path

import ase.optimize
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.constraints import FixAtoms, FixCartesian, FixCom, FixScaled, FixSymmetry
from ase.filters import ExpCellFilter, Filter, FrechetCellFilter, StrainFilter, UnitCellFilter
from helpers.gradients import check_gradient, gradient, recorded_decisions
from helpers.potentials import lennard_jones, needs_chgnet, needs_mace
from helpers.structures import argon, rattled

from ase_bptt import BPTTOptimizer, Status, TorchCalculator, adjoints, as_relaxation, load_potential, optimize, relax
from ase_bptt.cells import CellFreedom
from ase_bptt.cells.strained import Strained
from ase_bptt.neighbors import NeighborList
from ase_bptt.optimize.cell_filters import logarithm
from ase_bptt.steppers import BFGS, FIRE

CHANGE = np.array([[0.03, 0.01, -0.01], [0.01, -0.02, 0.02], [-0.01, 0.02, 0.015]])
CHOICES = {
    "full": ({"cell": "full"}, {}),
    "hydrostatic": ({"cell": "hydrostatic"}, {"hydrostatic_strain": True}),
    "constant volume": ({"cell": "constant-volume"}, {"constant_volume": True}),
    "mask": ({"cell": [1, 1, 0, 0, 0, 1]}, {"mask": [1, 1, 0, 0, 0, 1]}),
    "axes at constant volume": (
        {"cell": CellFreedom(moves=True, constant_volume=True, mask=np.eye(3, dtype=bool))},
        {"mask": [1, 1, 1, 0, 0, 0], "constant_volume": True},
    ),
    "pressure": ({"cell": "full", "pressure": 0.05}, {"scalar_pressure": 0.05}),
}


def crystal(strained: bool = True) -> Atoms:
    atoms = argon()
    if strained:
        atoms.set_cell(atoms.cell @ (np.eye(3) + CHANGE), scale_atoms=True)
    return atoms


def with_calculator(atoms: Atoms, potential=None, **arguments) -> Atoms:
    atoms.calc = TorchCalculator(potential or lennard_jones(), **arguments)
    return atoms


def run_of(target, steps=6, fmax=1e-3, **arguments) -> BPTTOptimizer:
    run = BPTTOptimizer(target, logfile=None, **{"stepper": FIRE(dt=0.03)} | arguments)
    run.run(fmax=fmax, steps=steps)
    return run


def ends(relaxation) -> torch.Tensor:
    """A number that depends on all of where a relaxation ended, but not on its orientation."""
    metric, x = relaxation.cells @ relaxation.cells.mT, relaxation.positions
    weights = torch.linspace(-1, 1.5, metric.numel()).to(metric).view_as(metric)
    return (metric * weights).sum() + (x[1:] - x[:-1]).square().sum()


def gradients(relaxation) -> list[torch.Tensor]:
    start, potential = relaxation.start, relaxation.trajectory.map.potential
    inputs = [x for x in (start.positions, start.cells) if x.requires_grad]
    return gradient([*inputs, *potential.parameters()], ends(relaxation) + relaxation.energies.sum())


@pytest.mark.parametrize("choice", CHOICES)
def test_a_run_leaves_the_relaxation_that_relax_returns(choice):
    ours, theirs = CHOICES[choice]
    atoms, potential = crystal(), lennard_jones()
    found = run_of(FrechetCellFilter(with_calculator(atoms, potential), **theirs)).relaxation
    start = potential.batch(crystal())
    start = start.replace(positions=start.positions.requires_grad_(), cells=start.cells.requires_grad_())
    expected = relax(potential, start, stepper=FIRE(dt=0.03), fmax=1e-3, steps=6, **ours)
    assert found.nsteps.tolist() == expected.nsteps.tolist() == [6]
    assert found.status == expected.status
    np.testing.assert_array_equal(found.start.cells[0].detach(), crystal().cell)
    np.testing.assert_allclose(found.cells[0].detach(), atoms.cell, rtol=0, atol=1e-13)
    for name in ("positions", "cells", "forces", "energies", "fmax"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradients(found), gradients(expected), rtol=1e-8, atol=1e-9)


def hexagonal() -> Atoms:
    return bulk("Ar", "hcp", a=1.16, c=1.8)


CONSTRAINED = {
    "FixAtoms": (crystal, lambda atoms: FixAtoms([0, 2])),
    "FixCom": (crystal, lambda atoms: FixCom()),
    "FixCartesian": (crystal, lambda atoms: FixCartesian([0, 2])),
    "FixSymmetry": (hexagonal, FixSymmetry),
}


@pytest.mark.parametrize("name", CONSTRAINED)
def test_constraints_act_as_in_relax(name):
    make, constraint = CONSTRAINED[name]
    atoms, potential = make(), lennard_jones()
    atoms.set_constraint(constraint(atoms))
    first = atoms.copy()
    found = run_of(FrechetCellFilter(with_calculator(atoms, potential))).relaxation
    expected = relax(potential, first, stepper=FIRE(dt=0.03), fmax=1e-3, steps=6, cell="full")
    assert found.nsteps.tolist() == expected.nsteps.tolist() == [6]
    torch.testing.assert_close(found.positions, expected.positions, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.cells, expected.cells, rtol=0, atol=1e-9)
    weights = list(potential.parameters())
    torch.testing.assert_close(gradient(weights, ends(found)), gradient(weights, ends(expected)), rtol=1e-7, atol=1e-9)


def test_gradients_arrive_at_the_start_and_add_up():
    run = run_of(FrechetCellFilter(with_calculator(crystal())))
    relaxation = run.relaxation
    ends(relaxation).backward()
    once = [relaxation.start.positions.grad.clone(), relaxation.start.cells.grad.clone()]
    assert all(g.abs().sum() > 0 for g in once)
    ends(run.relaxation).backward()
    for now, before in zip((relaxation.start.positions.grad, relaxation.start.cells.grad), once, strict=True):
        torch.testing.assert_close(now, 2 * before)


@pytest.mark.parametrize("reference", ["the cell itself", "another cell"])
def test_gradients_agree_with_differences_of_the_whole_run(reference):
    """From a cell in which the filter was made, which is its reference then, and from one that it was moved to."""
    potential, first = lennard_jones(), crystal()
    cell = FrechetCellFilter(with_calculator(crystal(strained=False))).orig_cell.copy()
    inputs = [torch.from_numpy(first.positions.copy()), torch.from_numpy(first.cell.array.copy())]

    def run():
        atoms = with_calculator(Atoms("Ar4", positions=inputs[0].numpy(), cell=inputs[1].numpy(), pbc=True), potential)
        target = FrechetCellFilter(atoms)
        if reference == "another cell":
            target.orig_cell = cell
        return run_of(target).relaxation

    def evaluate():
        with recorded_decisions() as trace:
            relaxation = run()
        return ends(relaxation), relaxation.nsteps.tolist(), trace

    _, *usual = evaluate()
    relaxation = run()
    found = gradient([relaxation.start.positions, relaxation.start.cells], ends(relaxation))
    check_gradient(evaluate, usual, inputs, found, h=1e-5, directions=2)


def test_two_runs_through_one_filter_are_chained_by_their_starts():
    """The weights' gradient through both is that of the second, and that of the first into which its start's goes."""
    potential = lennard_jones()

    def both():
        target = FrechetCellFilter(with_calculator(crystal(), potential))
        return [run_of(target, steps=3).relaxation for _ in range(2)], target

    (first, second), target = both()
    np.testing.assert_allclose(second.start.cells.detach(), first.cells.detach(), rtol=0, atol=1e-13)
    assert np.abs(target.orig_cell - second.start.cells[0].detach().numpy()).max() > 1e-4
    weights = list(potential.parameters())
    *there, a, b = gradient([second.start.positions, second.start.cells, *weights], ends(second))
    rest = gradient(weights, (first.positions * there[0]).sum() + (first.cells * there[1]).sum())
    found = [a + rest[0], b + rest[1]]

    def evaluate():
        with recorded_decisions() as trace:
            (_, relaxation), _ = both()
        return ends(relaxation), trace

    _, usual = evaluate()
    check_gradient(evaluate, [usual], weights, found, h=1e-5, directions=2)


def test_a_second_run_continues_the_record():
    target = FrechetCellFilter(with_calculator(crystal()))
    run = run_of(target, steps=2)
    run.run(fmax=1e-3, steps=4)
    once = run_of(FrechetCellFilter(with_calculator(crystal())))
    assert run.relaxation.nsteps.tolist() == [6]
    torch.testing.assert_close(gradients(run.relaxation), gradients(once.relaxation), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda target: setattr(target, "scalar_pressure", 0.01),
        lambda target: setattr(target, "hydrostatic_strain", True),
        lambda target: target.atoms.set_cell(target.atoms.cell * 1.001, scale_atoms=True),
        lambda target: target.atoms.set_constraint(FixAtoms([0])),
    ],
    ids=["pressure", "freedom", "cell", "constraint"],
)
def test_what_is_changed_between_runs_begins_another_record(change):
    target = FrechetCellFilter(with_calculator(crystal()))
    run = run_of(target, steps=2)
    change(target)
    with pytest.raises(RuntimeError, match="changed after the last step"):
        run.relaxation  # noqa: B018
    run.run(fmax=1e-3, steps=3)
    assert run.relaxation.nsteps.tolist() == [3]


def test_a_record_leaves_the_path_as_it_is():
    found = []
    for record in (True, False):
        atoms = with_calculator(crystal())
        run_of(FrechetCellFilter(atoms), record=record, steps=10)
        found.append(atoms)
    assert np.array_equal(found[0].positions, found[1].positions)
    assert np.array_equal(found[0].cell, found[1].cell)


@pytest.mark.parametrize("choice", ["full", "constant volume", "mask", "pressure"])
def test_minima_have_their_implicit_gradient(choice):
    ours, theirs = CHOICES[choice]
    solve, potential = adjoints.Implicit(tolerance=1e-9, fmax=1e-6), lennard_jones()
    target = FrechetCellFilter(with_calculator(crystal(), potential), **theirs)
    stepper = BFGS(alpha=200.0)
    run = run_of(target, steps=200, fmax=1e-7, stepper=stepper, adjoint=solve)
    start = potential.batch(crystal())
    start = start.replace(positions=start.positions.requires_grad_(), cells=start.cells.requires_grad_())
    expected = relax(potential, start, adjoint=solve, stepper=stepper, fmax=1e-7, steps=200, **ours)
    found = run.relaxation
    assert found.status == expected.status == (Status.CONVERGED,)
    right = gradients(expected)
    torch.testing.assert_close(gradients(found), right, rtol=1e-4, atol=1e-5)
    # Without a start the gradient of the weights is the same.
    alone = gradients(as_relaxation(target, adjoint=solve))
    torch.testing.assert_close(alone[2:], right[2:], rtol=1e-4, atol=1e-5)


def test_a_restart_keeps_the_path_and_records_from_there():
    def run(atoms, steps):
        target = FrechetCellFilter(with_calculator(atoms, skin=0.0))
        return run_of(target, steps=steps, restart="a.json")

    whole, atoms = with_calculator(crystal(), skin=0.0), crystal()
    run_of(FrechetCellFilter(whole), steps=6)
    run(atoms, 3)
    middle = atoms.copy()
    relaxation = run(middle.copy(), 3).relaxation
    assert relaxation.nsteps.tolist() == [3]
    np.testing.assert_array_equal(relaxation.start.cells[0].detach(), middle.cell)
    np.testing.assert_allclose(relaxation.cells[0].detach(), whole.cell, rtol=0, atol=1e-10)
    assert all(g.abs().sum() > 0 for g in gradients(relaxation))


def test_a_potential_in_single_precision_has_one_too():
    exact = run_of(FrechetCellFilter(with_calculator(crystal()))).relaxation
    single = run_of(FrechetCellFilter(with_calculator(crystal(), lennard_jones().to(torch.float32)))).relaxation
    found = [g.double() for g in gradients(single)]
    torch.testing.assert_close(found, gradients(exact), rtol=1e-3, atol=1e-3)


def test_the_optimizers_of_ase_by_name_leave_one_too():
    run = optimize.FIRE(FrechetCellFilter(with_calculator(crystal())), logfile=None, dt=0.03)
    run.run(fmax=1e-3, steps=3)
    assert run.relaxation.cells.requires_grad
    assert run.relaxation.moved_cells == [True]


SILICON = {
    "cubic": lambda: bulk("Si", a=5.6),
    "hexagonal": lambda: crystal_of("Si4", 3.85, 6.3, [1 / 16, 9 / 16, 7 / 16, 15 / 16]),
    "triclinic": lambda: bulk("Si", a=5.6).repeat((2, 1, 1)),
}
FAMILIES = {"mace-si": needs_mace, "chgnet": needs_chgnet}
CHOICES_OF_FAMILIES = CHOICES | {
    "mask and pressure": (CHOICES["mask"][0] | {"pressure": 0.05}, CHOICES["mask"][1] | {"scalar_pressure": 0.05})
}
LOCKSTEP = [
    ("mace-si", "FIRE", "full", "triclinic", 100), ("mace-si", "FIRE", "mask and pressure", "hexagonal", 40),
    ("mace-si", "FIRE", "hydrostatic", "cubic", 40), ("mace-si", "BFGS", "full", "hexagonal", 100),
    ("mace-si", "BFGS", "constant volume", "cubic", 100), ("mace-si", "BFGS", "mask and pressure", "triclinic", 30),
    ("mace-si", "LBFGS", "constant volume", "hexagonal", 100), ("mace-si", "LBFGS", "hydrostatic", "cubic", 100),
    ("mace-si", "LBFGS", "mask and pressure", "cubic", 100), ("chgnet", "FIRE", "full", "cubic", 20),
    ("chgnet", "BFGS", "full", "cubic", 20),
]  # fmt: skip


def crystal_of(symbols: str, a: float, c: float, heights) -> Atoms:
    """A hexagonal diamond: pairs above one another in the two places of a close-packed layer."""
    places = [[1 / 3, 2 / 3], [2 / 3, 1 / 3]] * 2
    return Atoms(symbols, cell=[a, a, c, 90, 90, 120], pbc=True,
                 scaled_positions=[[*place, z] for place, z in zip(places, heights, strict=True)])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "stepper", "choice", "made", "steps"), [pytest.param(*case, marks=FAMILIES[case[0]]) for case in LOCKSTEP]
)
def test_families_relax_cells_in_lockstep_with_ase(name, stepper, choice, made, steps):
    (ours, theirs), potential = CHOICES_OF_FAMILIES[choice], load_potential(name, dtype="float64")
    atoms = rattled(SILICON[made]() if name == "mace-si" else bulk("MgO", "rocksalt", a=4.3), 0.05)
    atoms.set_cell(atoms.cell @ (np.eye(3) + CHANGE), scale_atoms=True)
    moved = with_calculator(atoms.copy(), potential)
    driver = getattr(ase.optimize, stepper)(FrechetCellFilter(moved, **theirs), logfile=None)
    driver.run(fmax=1e-6, steps=steps)
    with torch.no_grad():
        relaxation = relax(potential, atoms, stepper=stepper.lower(), fmax=1e-6, steps=steps, **ours)
    assert relaxation.nsteps.tolist() == [driver.nsteps]
    assert np.abs(moved.cell - atoms.cell).max() > 0.04
    tolerance = 1e-9 if stepper == "FIRE" else 1e-7
    assert np.abs(relaxation.positions.numpy() - moved.positions).max() < tolerance
    assert np.abs(relaxation.cells[0].numpy() - moved.cell).max() < tolerance


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in FAMILIES.items()])
def test_families_put_no_torque_on_a_cell(name):
    """Their energies do not change when a structure turns: dE/dF is symmetric, as ASE makes it."""
    atoms = bulk("Si", a=5.6) if name == "mace-si" else bulk("MgO", "rocksalt", a=4.3)
    potential, atoms = load_potential(name, dtype="float64"), rattled(atoms, 0.05)
    atoms.set_cell(atoms.cell @ (np.eye(3) + CHANGE), scale_atoms=True)
    rows = Strained.of(potential.batch(atoms), [CellFreedom.of("full")])
    _, forces = potential.energy_and_forces(rows, NeighborList(potential.cutoff)(rows))
    assert (forces[-3:] - forces[-3:].T).abs().max() < 1e-12 < forces[-3:].abs().max()


# What is refused ------------------------------------------------------------------------------


def slab() -> Atoms:
    atoms = fcc111("Ar", (1, 1, 2), a=1.6, vacuum=3.0)
    atoms.pbc = (True, True, False)
    return atoms


def with_constraint(constraint) -> Atoms:
    atoms = crystal()
    atoms.set_constraint(constraint)
    return atoms


def exponential(atoms):
    with pytest.warns(DeprecationWarning, match="FrechetCellFilter"):
        return ExpCellFilter(atoms)


def pulled(atoms):
    """A filter whose cell something has changed in what its mask fixes."""
    target = FrechetCellFilter(atoms, mask=[1, 1, 0, 0, 0, 1])
    atoms.set_cell(atoms.cell * 1.01, scale_atoms=True)
    return target


REFUSED = {
    "unit cell": (crystal, UnitCellFilter, RuntimeError, "moves a UnitCellFilter with TorchCalculator"),
    "strain": (crystal, StrainFilter, RuntimeError, "moves a StrainFilter"),
    "exponential": (crystal, exponential, RuntimeError, "moves a ExpCellFilter"),
    "subset": (crystal, lambda atoms: Filter(atoms, indices=[0, 1]), RuntimeError, "moves a Filter"),
    "lone shear": (crystal, lambda atoms: FrechetCellFilter(atoms, mask=[0, 0, 0, 0, 0, 1]), NotImplementedError,
                   "relaxes a shear without the two axes"),
    "weights in the mask": (crystal, lambda atoms: FrechetCellFilter(atoms, mask=[0.5, 1, 1, 1, 1, 1]), ValueError,
                            "holds ones and zeros"),
    "two axes at constant volume": (crystal, lambda atoms: FrechetCellFilter(atoms, mask=[1, 1, 0, 0, 0, 1],
                                    constant_volume=True), NotImplementedError, "strains leave the mask"),
    "slab": (slab, FrechetCellFilter, ValueError, "periodic along 2 of 3 directions, and this FrechetCellFilter"),
    "factor": (crystal, lambda atoms: FrechetCellFilter(atoms, exp_cell_factor=1.0), NotImplementedError,
               "exp_cell_factor of this FrechetCellFilter is 1 for 4 atoms"),
    "constraint": (lambda: with_constraint(FixCartesian(0, [1, 0, 0])), FrechetCellFilter, NotImplementedError,
                   "FixCartesian"),
    "selective dynamics": (lambda: with_constraint(FixScaled(0, [1, 0, 0])), FrechetCellFilter, NotImplementedError,
                           "FixScaled, whose forces in ASE do not follow"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_others_run_as_ases_own_and_are_refused_by_name(what):
    make, wrap, error, sentence = REFUSED[what]
    atoms = with_calculator(make())
    before = atoms.positions.copy()
    run = run_of(wrap(atoms), steps=2)
    assert np.abs(atoms.positions - before).max() > 0
    with pytest.raises(error, match=sentence) as found:
        run.relaxation  # noqa: B018
    assert "\n" not in str(found.value)


def test_a_cell_that_the_mask_sets_back_is_refused():
    target = pulled(with_calculator(crystal()))
    run = run_of(target, adjoint=adjoints.Implicit(fmax=1e3), steps=2)
    with pytest.raises(ValueError, match="has changed in what the mask of its FrechetCellFilter fixes"):
        run.relaxation  # noqa: B018
    # The frames after the first have nothing to set back.
    assert run_of(pulled(with_calculator(crystal())), steps=4).relaxation.nsteps.tolist() == [3]


@pytest.mark.parametrize("choice", ["factor", "slab along its directions"])
def test_what_differs_only_in_the_path_has_an_implicit_gradient(choice):
    if choice == "factor":
        target = FrechetCellFilter(with_calculator(crystal()), exp_cell_factor=8.0)
    else:
        target = FrechetCellFilter(with_calculator(slab()), mask=[1, 1, 0, 0, 0, 1])
    run = run_of(target, steps=400, fmax=1e-3, stepper="bfgs", alpha=200.0, adjoint="implicit")
    assert all(g.isfinite().all() for g in gradients(run.relaxation))


def test_the_logarithm_undoes_the_exponential_with_its_derivative():
    strain = torch.from_numpy(3 * CHANGE + np.array([[0, 0.1, 0], [-0.1, 0, 0], [0, 0.05, 0]])).requires_grad_()
    weights = torch.linspace(-1, 2, 9, dtype=torch.float64).view(3, 3)
    found = logarithm(torch.matrix_exp(strain))
    torch.testing.assert_close(found, strain)
    (derivative,) = torch.autograd.grad((found * weights).sum(), strain)
    torch.testing.assert_close(derivative, weights)


def test_the_examples_of_the_documentation_run():
    page = Path(__file__).parents[1] / "docs" / "cells.rst"
    test = doctest.DocTestParser().get_doctest(page.read_text(encoding="utf-8"), {}, page.name, str(page), 0)
    report: list[str] = []
    assert doctest.DocTestRunner().run(test, out=report.append).failed == 0, "".join(report)
