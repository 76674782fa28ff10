"""Cells that move: in lockstep with ASE's FrechetCellFilter, gradients against differences, and what is refused."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian, FixedLine, FixedPlane, FixScaled, FixSymmetry
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.optimize import BFGS, FIRE, LBFGS
from ase.spacegroup.symmetrize import check_symmetry
from helpers.gradients import check_gradient, gradient, recorded_decisions
from helpers.potentials import lennard_jones, needs_mace, stiff_mace
from helpers.shell import run

from ase_bptt import (
    RelaxationPair,
    Status,
    Structures,
    TorchCalculator,
    Trainer,
    adjoints,
    delta_q,
    evaluate,
    load_potential,
    relax,
    steppers,
)
from ase_bptt.cells import CellFreedom, freedoms
from ase_bptt.cells.strained import Strained
from ase_bptt.evaluation import Evaluation
from ase_bptt.losses import cell_strain, lattice_error, root_delta_q, volume_error
from ase_bptt.neighbors import NeighborList
from ase_bptt.pairs import InvalidPair
from ase_bptt.pairs.calculations import Run
from ase_bptt.pairs.cell_changes import warn_of_moves
from ase_bptt.pairs.cells_of_runs import freedom_of
from ase_bptt.potentials.analytic import Morse
from ase_bptt.potentials.direct import Direct
from ase_bptt.potentials.emt import EMT
from ase_bptt.report.tables import table
from ase_bptt.stability import resolve_step_size
from ase_bptt.terms.labels import Labels
from ase_bptt.throughput import relax_all
from ase_bptt.throughput.memory import peak_bytes


def strained(atoms: Atoms, seed: int = 0, strain: float = 0.03, rattle: float = 0.05) -> Atoms:
    """Another cell, and atoms off their sites."""
    rng, atoms = np.random.default_rng(seed), atoms.copy()
    change = rng.uniform(-strain, strain, (3, 3))
    atoms.set_cell(atoms.cell @ (np.eye(3) + (change + change.T) / 2), scale_atoms=True)
    atoms.positions += rng.normal(0, rattle, atoms.positions.shape)
    return atoms


CRYSTALS = {
    "cubic": lambda: strained(bulk("Cu", cubic=True)),
    "one atom": lambda: strained(bulk("Cu")),
    "hexagonal": lambda: strained(bulk("Cu", "hcp", a=2.55, c=4.2)),
    "triclinic": lambda: strained(bulk("Cu").repeat((3, 2, 1)), strain=0.06),
    "16 atoms": lambda: strained(bulk("Cu").repeat((4, 2, 2)), strain=0.06),
}
CHOICES = {
    "full": ({}, {}),
    "hydrostatic": ({"cell": "hydrostatic"}, {"hydrostatic_strain": True}),
    "constant volume": ({"cell": "constant-volume"}, {"constant_volume": True}),
    "mask": ({"cell": [1, 1, 0, 0, 0, 1]}, {"mask": [1, 1, 0, 0, 0, 1]}),
    "axis": ({"cell": np.diag([0, 0, 1])}, {"mask": [0, 0, 1, 0, 0, 0]}),
    "pressure": ({"pressure": 0.05}, {"scalar_pressure": 0.05}),
    "mask and pressure": ({"cell": [1, 1, 0, 0, 0, 1], "pressure": 0.05},
                          {"mask": [1, 1, 0, 0, 0, 1], "scalar_pressure": 0.05}),
}  # fmt: skip
OPTIMIZERS = {"fire": (FIRE, 1e-9), "bfgs": (BFGS, 1e-7), "lbfgs": (LBFGS, 1e-7)}


def in_argon(atoms: Atoms) -> Atoms:
    """The same crystal of argon atoms, in the units of `lennard_jones`."""
    atoms.symbols[:] = "Ar"
    atoms.set_cell(atoms.cell * 1.6 / 3.61, scale_atoms=True)
    return atoms


@pytest.mark.parametrize("stepper", OPTIMIZERS)
@pytest.mark.parametrize(
    ("crystal", "choice"), [("one atom", "full"), ("cubic", "constant volume"), ("16 atoms", "mask and pressure")]
)
def test_a_hundred_frames_of_lennard_jones_are_those_of_frechet_cell_filter(crystal, choice, stepper):
    ours, theirs = CHOICES[choice]
    optimizer, tolerance = OPTIMIZERS[stepper]
    atoms, hyperparameters = in_argon(CRYSTALS[crystal]()), {} if stepper == "fire" else {"alpha": 500.0}
    moved = atoms.copy()
    moved.calc = TorchCalculator(lennard_jones())
    driver = optimizer(FrechetCellFilter(moved, **theirs), logfile=None, **hyperparameters)
    driver.run(fmax=1e-6, steps=100)
    with torch.no_grad():
        relaxation = relax(lennard_jones(), atoms, **{"cell": "full"} | ours, fmax=1e-6, steps=100,
                           stepper=steppers.make_stepper(stepper, **hyperparameters))  # fmt: skip
    assert relaxation.nsteps.tolist() == [driver.nsteps]
    assert np.abs(moved.cell - atoms.cell).max() > 1e-3
    assert np.abs(relaxation.positions.numpy() - moved.positions).max() < tolerance
    assert np.abs(relaxation.cells[0].numpy() - moved.cell).max() < tolerance


@pytest.mark.parametrize("stepper", OPTIMIZERS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("crystal", ["hexagonal", "triclinic"])
def test_frames_are_those_of_frechet_cell_filter(crystal, choice, stepper):
    ours, theirs = CHOICES[choice]
    optimizer, tolerance = OPTIMIZERS[stepper]
    atoms = CRYSTALS[crystal]()
    moved = atoms.copy()
    moved.calc = TorchCalculator("emt")
    driver = optimizer(FrechetCellFilter(moved, **theirs), logfile=None)
    driver.run(fmax=1e-6, steps=40)
    with torch.no_grad():
        relaxation = relax("emt", atoms, **{"cell": "full"} | ours, stepper=stepper, fmax=1e-6, steps=40)
    assert relaxation.nsteps.tolist() == [driver.nsteps]
    found = relaxation.to_atoms()
    assert np.abs(found.positions - moved.positions).max() < tolerance
    assert np.abs(found.cell - moved.cell).max() < tolerance
    assert found.get_potential_energy() == pytest.approx(moved.get_potential_energy(), abs=1e-9)
    assert np.abs(found.get_forces() - moved.get_forces()).max() < 1e-7
    assert np.abs(found.get_stress() - moved.get_stress()).max() < 1e-8


def test_structures_of_a_batch_move_as_they_do_alone():
    batch = [CRYSTALS["cubic"](), molecule("N2"), CRYSTALS["one atom"](), CRYSTALS["hexagonal"]()]
    cells, pressures = ["full", "fixed", "hydrostatic", "fixed"], [0.0, 0.0, 0.02, 0.0]
    with torch.no_grad():
        together = relax("emt", batch, cell=cells, pressure=pressures, fmax=1e-3, steps=60)
        alone = [relax("emt", a, cell=c, pressure=p, fmax=1e-3, steps=60) for a, c, p in zip(batch, cells, pressures)]
    assert together.nsteps.tolist() == [int(r.nsteps) for r in alone]
    assert together.moved_cells == [True, False, True, False]
    for k, one in enumerate(alone):
        assert torch.allclose(together[k].positions, one.positions, atol=1e-10)
        assert torch.allclose(together[k].cells, one.cells, atol=1e-10)
        assert together[k].fmax.item() == pytest.approx(one.fmax.item(), abs=1e-8)
    assert torch.equal(together.cells[3], torch.from_numpy(batch[3].cell.array))


# Gradients ------------------------------------------------------------------------------------


def argon() -> Atoms:
    return strained(bulk("Ar", a=1.6).repeat((2, 1, 1)), seed=1)


SYSTEMS = {
    "emt": (lambda: EMT().double().requires_grad_(), lambda: strained(bulk("Cu").repeat((2, 1, 1))), 0.01, 0.1),
    "lj": (lambda: lennard_jones().requires_grad_(), argon, 1e-3, 0.03),
    "morse": (lambda: Morse(rho0=4.0), lambda: strained(bulk("N", "sc", a=1.3).repeat((2, 1, 1))), 1e-3, 0.05),
    "mace": (stiff_mace, lambda: strained(bulk("Si"), seed=2), 0.01, 0.1),
}
NAMES = ["full", "hydrostatic", "constant-volume", [1, 1, 0, 0, 0, 1]]
EVERY = [
    *(("lj", stepper, adjoint, cell) for stepper in ("gd", "fire") for adjoint in ("full", "replay") for cell in NAMES),
    *(("lj", "fire", adjoint, "full") for adjoint in ("truncated:99", "replay:differences")),
    *(("emt", "fire", "replay", cell) for cell in ("full", "constant-volume")),
    *(("morse", "gd", adjoint, "hydrostatic") for adjoint in ("replay", "replay:differences")),
    pytest.param("mace", "gd", "replay", "full", marks=needs_mace),
    pytest.param("mace", "fire", "full", NAMES[3], marks=needs_mace),
]


def ends(relaxation) -> torch.Tensor:
    """A number that depends on all of where a relaxation ended, but not on its orientation."""
    c, x = relaxation.cells, relaxation.positions
    metric = c @ c.mT
    weights = torch.linspace(-1, 1.5, metric.numel()).to(metric).view_as(metric)
    return (metric * weights).sum() + (x[1:] - x[:-1]).square().sum() + torch.linalg.det(c).sum()


@pytest.mark.parametrize(("system", "stepper", "adjoint", "cell"), EVERY, ids=str)
def test_gradients_agree_with_differences_of_the_whole_relaxation(system, stepper, adjoint, cell):
    make, structure, step_size, dt = SYSTEMS[system]
    potential = make()
    rule = steppers.GradientDescent(step_size, momentum=0.5) if stepper == "gd" else steppers.FIRE(dt=dt)
    start = Structures.from_atoms([structure()])
    inputs = {name: getattr(start, name).clone().requires_grad_() for name in ("positions", "cells")}
    pressure = torch.tensor([0.02], dtype=torch.float64, requires_grad=True)

    def evaluate():
        with recorded_decisions() as trace:
            relaxation = relax(potential, start.replace(**inputs), stepper=rule, steps=6, fmax=1e-3, cell=cell,
                               adjoint=adjoint, pressure=pressure)  # fmt: skip
        return ends(relaxation), relaxation.nsteps.tolist(), trace

    loss, *usual = evaluate()
    weights = list(potential.parameters())
    every = [*inputs.values(), pressure]
    to = gradient([*every, *weights], loss)
    check_gradient(evaluate, usual, every, to[:3], h=1e-4, directions=2)
    check_gradient(evaluate, usual, weights, to[3:], h=1e-4 if system == "mace" else 1e-5, directions=1)


@pytest.mark.parametrize("adjoint", ["replay", "full"])
@pytest.mark.parametrize("cell", ["full", [1, 1, 0, 0, 0, 1]], ids=str)
def test_gradients_agree_with_differences_where_a_relaxation_stops_early(adjoint, cell):
    potential, start = lennard_jones().requires_grad_(), Structures.from_atoms([argon()])
    cells = start.cells.clone().requires_grad_()

    def evaluate():
        with recorded_decisions() as trace:
            relaxation = relax(potential, start.replace(cells=cells), stepper=steppers.FIRE(dt=0.03), steps=30,
                               fmax=3.0, cell=cell, adjoint=adjoint, pressure=0.02)  # fmt: skip
        return ends(relaxation), relaxation.nsteps.tolist(), trace

    loss, *usual = evaluate()
    assert 0 < usual[0][0] < 30
    every = [cells, *potential.parameters()]
    check_gradient(evaluate, usual, every, gradient(every, loss), h=1e-5, directions=2)


MASK = (1, 1, 0, 0, 0, 1)
MINIMA = {
    "lj": SYSTEMS["lj"][:2],
    # At a constant volume a cubic crystal has nothing to relax.
    "lj, hexagonal": (SYSTEMS["lj"][0], lambda: strained(bulk("Ar", "hcp", a=1.13, c=1.85), seed=1)),
    "emt": (SYSTEMS["emt"][0], CRYSTALS["hexagonal"]),
    "mace": (lambda: load_potential("mace-si", dtype="float64").requires_grad_(),
             lambda: strained(bulk("Si", a=5.5), seed=2)),
}  # fmt: skip
"""Not `stiff_mace`: the lowest curvatures of its minimum are 0.005 eV/Å^2 and the highest 24, and weights that change
by 1e-6 send the path from its start elsewhere, or on for more than 500 frames."""
EXACT = adjoints.Implicit(tolerance=1e-10, fmax=1e-9)


@cache
def relaxed(system: str, cell) -> tuple[Atoms, torch.Tensor]:
    """Where a crystal of `MINIMA` ends under a pressure, and that pressure."""
    (make, structure), pressure = MINIMA[system], torch.tensor(0.02, dtype=torch.float64)
    with torch.no_grad():
        found = relax(make(), structure(), stepper="bfgs", steps=500, fmax=1e-9, cell=cell, pressure=pressure)
    assert found.status == (Status.CONVERGED,)
    return found.to_atoms(), pressure


def at_minimum(system: str, cell, near: bool):
    """What a minimum depends on, weights and pressure apart, and a function that relaxes from there, or from afar.

    From afar BFGS knows the curvatures when it arrives, and ends far below fmax: differences need that.
    """
    potential, (atoms, pressure) = MINIMA[system][0](), relaxed(system, cell)
    atoms, pressure = atoms if near else MINIMA[system][1](), pressure.clone().requires_grad_()
    groups = [list(potential.parameters())] + [[pressure]] * (cell != "constant-volume")

    def run(**how):
        return relax(potential, atoms, **{"stepper": "bfgs", "steps": 500, "cell": cell, "pressure": pressure} | how)

    return groups, run


AT_MINIMA = [
    *(("lj", cell) for cell in ("full", "hydrostatic", MASK)), ("lj, hexagonal", "constant-volume"),
    ("emt", "full"), ("emt", MASK), pytest.param("mace", "full", marks=needs_mace),
]  # fmt: skip


@pytest.mark.parametrize(("system", "cell"), AT_MINIMA, ids=str)
def test_implicit_gradients_agree_with_differences_of_the_minimum(system, cell):
    groups, run = at_minimum(system, cell, near=False)

    def evaluate():
        relaxation = run(adjoint=EXACT)
        assert relaxation.status == (Status.CONVERGED,)
        return ends(relaxation), None

    loss, *usual = evaluate()
    found = iter(gradient([x for inputs in groups for x in inputs], loss))
    for inputs in groups[:1] if system == "mace" else groups:  # each relaxation of MACE takes seconds
        check_gradient(evaluate, usual, inputs, [next(found) for _ in inputs], h=1e-4, directions=1, tolerance=1e-5)


@pytest.mark.parametrize(
    ("system", "cell"),
    [
        ("lj", "hydrostatic"), ("lj", MASK), ("lj, hexagonal", "constant-volume"), ("emt", "hydrostatic"),
        ("emt", MASK), pytest.param("mace", "hydrostatic", marks=needs_mace),
    ],
    ids=str,
)  # fmt: skip
def test_a_minimum_depends_on_what_is_not_relaxed_of_the_initial_cell(system, cell):
    make, structure = MINIMA[system]
    potential, start = make(), Structures.from_atoms([structure()])
    cells = start.cells.clone().requires_grad_()

    def evaluate():
        relaxation = relax(potential, start.replace(cells=cells), stepper="bfgs", steps=500, cell=cell, adjoint=EXACT)
        assert relaxation.status == (Status.CONVERGED,)
        return ends(relaxation), None

    loss, *usual = evaluate()
    check_gradient(evaluate, usual, [cells], gradient([cells], loss), h=1e-4, directions=1, tolerance=1e-5)


@pytest.mark.parametrize("system", ["lj", "emt"])
def test_a_minimum_in_full_does_not_depend_on_the_initial_cell(system):
    make, structure = MINIMA[system]
    start = Structures.from_atoms([structure()])
    start.cells.requires_grad_()
    relaxation = relax(make(), start, stepper="bfgs", steps=500, cell="full", adjoint=EXACT)
    assert gradient([start.cells], ends(relaxation))[0].abs().max() < 1e-8


@pytest.mark.parametrize(("system", "cell"), AT_MINIMA, ids=str)
def test_one_step_is_the_gradient_of_one_frame_of_gradient_descent_from_the_minimum(system, cell):
    """Approximate as it is, it is exactly that, in the rows that gradient descent moves."""
    groups, run = at_minimum(system, cell, near=True)
    rule = {"stepper": steppers.GradientDescent(0.003)}
    relaxation = run(adjoint=adjoints.OneStep(fmax=1e-7, step_size=0.003), **rule)
    assert relaxation.nsteps.tolist() == [0]
    found = iter(gradient([x for inputs in groups for x in inputs], ends(relaxation)))
    for inputs in groups:
        check_gradient(lambda: (ends(run(fmax=0.0, **rule | {"steps": 1})),), [], inputs, [next(found) for _ in inputs],
                       h=1e-4, directions=1)  # fmt: skip


def test_replay_and_implicit_agree_where_both_are_exact():
    potential, found = lennard_jones().requires_grad_(), []
    for adjoint, stepper in (("replay", "fire"), (adjoints.Implicit(tolerance=1e-9), "bfgs")):
        relaxation = relax(potential, argon(), stepper=stepper, cell="full", fmax=1e-8, steps=600, adjoint=adjoint)
        found.append(gradient(list(potential.parameters()), ends(relaxation)))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("system", "cell"), [("lj", "full"), ("lj", MASK), ("emt", "full")], ids=str)
def test_guided_gradients_agree_with_differences_at_both_ends(system, cell):
    make, structure, _, dt = SYSTEMS[system]
    potential, start, rule = make(), Structures.from_atoms([structure()]), steppers.FIRE(dt=dt)
    inputs = {name: getattr(start, name).clone().requires_grad_() for name in ("positions", "cells")}
    pressure = torch.tensor([0.02], dtype=torch.float64, requires_grad=True)
    weights = list(potential.parameters())

    def run(**how):
        return relax(potential, start.replace(**inputs), stepper=rule, cell=cell, pressure=pressure, **how)

    def early():
        with recorded_decisions() as trace:
            relaxation = run(steps=3, fmax=EXACT.fmax)
        return ends(relaxation), relaxation.nsteps.tolist(), trace

    def late():
        relaxation = run(steps=500, adjoint=adjoints.Guided(3, solve=EXACT))
        assert relaxation.status == (Status.CONVERGED,)
        return ends(relaxation), None

    guided = run(steps=500, adjoint=adjoints.Guided(3, solve=EXACT))
    assert guided.early.nsteps.tolist() == [3]
    every = [*inputs.values(), pressure]
    to = gradient([*every, *weights], ends(guided.early))
    to_end = gradient([pressure, *weights], ends(guided))
    check_gradient(early, list(early()[1:]), every, to[:3], h=1e-4, directions=2)
    check_gradient(early, list(early()[1:]), weights, to[3:], h=1e-5, directions=1)
    for some, analytic in (([pressure], to_end[:1]), (weights, to_end[1:])):
        check_gradient(late, [None], some, analytic, h=1e-4, directions=1, tolerance=1e-5)


# Step size -------------------------------------------------------------------------------------


def test_the_automatic_step_size_counts_the_rows_of_cells_as_they_are_moved():
    """A crystal of one atom has no other rows that are stiff; the same number by relax_all, the Trainer and relax."""
    potential, atoms, free = lennard_jones(), strained(bulk("Ar", a=1.56)), CellFreedom.of("full")
    rows = Strained.of(Structures.from_atoms([atoms]), [free], balanced=True)
    h, columns = 1e-4, []
    for k in range(rows.positions.numel()):
        step = torch.zeros(rows.positions.numel(), dtype=torch.float64)
        step[k] = h
        there = [rows.replace(positions=rows.positions + sign * step.view(-1, 3)) for sign in (1, -1)]
        ahead, behind = (
            potential.energy_and_forces(r, NeighborList(potential.cutoff)(r.placed()))[1].ravel() for r in there
        )
        columns.append((behind - ahead) / (2 * h))
    hessian = torch.stack(columns)
    expected = 1 / torch.linalg.eigvalsh((hessian + hessian.T) / 2)[-1].item()
    auto = steppers.GradientDescent("auto")
    found = resolve_step_size(auto, potential, [atoms], [free]).step_size
    assert found == pytest.approx(expected, rel=1e-3)
    assert found < resolve_step_size(auto, potential, [atoms]).step_size / 2
    pair = RelaxationPair(atoms, atoms, "Ar", "Ar", cell="full")
    trainer = Trainer(potential, stepper=auto, terms=(), progress=False)
    trainer.start(trainer.check([pair]), epochs=1)
    assert trainer.stepper.step_size == pytest.approx(found)
    [(_, end)] = relax_all(potential, [atoms], stepper=auto, cells=[free], fmax=0.05, steps=100)
    one = relax(potential, atoms, stepper=auto, cell="full", fmax=0.05, steps=100)
    assert end.status is one.status[0] is Status.CONVERGED
    np.testing.assert_allclose(end.atoms.cell, one.cells[0].detach(), atol=1e-12)


def test_a_cell_that_keeps_its_symmetry_may_change_by_more_than_ase_allows_in_one_step():
    """FixSymmetry.adjust_cell refuses a quarter: the end of a relaxation has the symmetry already."""
    atoms = bulk("Ar", a=2.1)
    atoms.set_constraint(FixSymmetry(atoms))
    free = CellFreedom.of("full")
    [(_, end)] = relax_all(lennard_jones(), [atoms], cells=[free], fmax=0.05, steps=100)
    found = relax(lennard_jones(), atoms, cell="full", fmax=0.05, steps=100).to_atoms()
    for cell in (end.atoms.cell, found.cell):
        assert np.linalg.det(cell / 2.1) < 0.75**3 / 4


def test_memory_is_planned_by_a_frame_in_which_the_cells_move(monkeypatch):
    measured = []

    def one_frame(potential, structures, **settings):
        measured.append([cell.name for cell in settings["cell"]])
        return relax(potential, structures, **settings)

    monkeypatch.setattr("ase_bptt.throughput.relax", one_frame)
    free = [CellFreedom.of("full"), CellFreedom.of("fixed")]
    assert len(dict(relax_all(lennard_jones(), [argon(), argon()], cells=free, steps=2, memory=1.0))) == 2
    assert measured
    assert {name for names in measured for name in names} == {"full", "fixed"}


def test_a_long_run_of_cells_takes_no_more_memory_than_a_short_one():
    free = [CellFreedom.of(name, 0.02) for name in ("full", "hydrostatic")]
    short, long = (
        peak_bytes(lambda n=n: list(relax_all(lennard_jones(), [argon(), argon()], cells=free, fmax=0, steps=n)))[1]
        for n in (10, 60)
    )
    assert long < 1.1 * short


def test_a_frame_of_replay_keeps_its_rows_alone():
    """Some 100 bytes of a row, for position, velocity, force and the stepper's numbers; a graph would be thousands."""

    def run(steps: int) -> None:
        potential = lennard_jones().requires_grad_()
        ends(relax(potential, argon(), cell="full", stepper=steppers.FIRE(dt=0.01), fmax=0, steps=steps)).backward()

    short, long = (peak_bytes(lambda n=n: run(n))[1] for n in (10, 60))
    assert long - short < 50 * 5 * 120


# Degrees of freedom ---------------------------------------------------------------------------


def test_a_slab_moves_along_its_periodic_directions_alone():
    slab = fcc111("Cu", (1, 1, 3), a=3.8, vacuum=6.0)
    slab.rattle(0.02, seed=0)
    relaxation = relax("emt", slab, cell="full", fmax=1e-3, steps=300)
    change = relaxation.cells[0].detach().numpy() - slab.cell.array
    assert relaxation.status == (Status.CONVERGED,)
    assert np.abs(change[:2, :2]).max() > 0.01
    assert np.abs(change[2]).max() < 1e-12
    assert np.abs(change[:, 2]).max() < 1e-12


def test_symmetry_is_kept_by_the_cell_too():
    atoms = bulk("Cu", "hcp", a=2.6, c=4.0)
    number = check_symmetry(atoms).number
    atoms.set_constraint(FixSymmetry(atoms))
    moved = atoms.copy()
    moved.calc = TorchCalculator("emt")
    FIRE(FrechetCellFilter(moved), logfile=None).run(fmax=1e-3, steps=50)
    relaxation = relax("emt", atoms, cell="full", stepper="fire", fmax=1e-3, steps=50)
    assert check_symmetry(relaxation.to_atoms()).number == number
    assert np.abs(relaxation.cells[0].detach().numpy() - moved.cell.array).max() < 1e-6


def test_fixed_atoms_keep_their_fractional_coordinates():
    atoms = CRYSTALS["cubic"]()
    atoms.set_constraint(FixAtoms([0, 2]))
    moved = atoms.copy()
    moved.calc = TorchCalculator("emt")
    FIRE(FrechetCellFilter(moved), logfile=None).run(fmax=1e-6, steps=40)
    found = relax("emt", atoms, cell="full", fmax=1e-6, steps=40).to_atoms()
    assert np.abs(found.positions - moved.positions).max() < 1e-9
    kept = found.get_scaled_positions(wrap=False) - atoms.get_scaled_positions(wrap=False)
    assert np.abs(kept[[0, 2]]).max() < 1e-12


ALONG_Z = {"cell": [0, 0, 1, 0, 0, 0]}, {"mask": [0, 0, 1, 0, 0, 0]}
HYDROSTATIC = CHOICES["hydrostatic"]
CONSTRAINED = {
    "lattice directions": (FixScaled([0, 2], [True, False, True]), HYDROSTATIC),
    "all lattice directions": (FixScaled([1]), CHOICES["pressure"]),
    "all Cartesian directions": (FixCartesian([0, 2]), CHOICES["full"]),
    "Cartesian directions": (FixCartesian([0, 2], [True, False, True]), HYDROSTATIC),
    "Cartesian directions and an axis": (FixCartesian([1], [False, False, True]), ALONG_Z),
    "line": (FixedLine([1], [1, 1, 0]), HYDROSTATIC),
    "plane": (FixedPlane([1, 3], [0, 1, 1]), HYDROSTATIC),
    "plane and an axis": (FixedPlane([1, 3], [0, 0, 1]), ALONG_Z),
}


@pytest.mark.parametrize("name", CONSTRAINED)
def test_constraints_are_those_of_frechet_cell_filter(name):
    constraint, (ours, theirs) = CONSTRAINED[name]
    atoms = CRYSTALS["triclinic"]()
    atoms.set_constraint(constraint)
    moved = atoms.copy()
    moved.calc = TorchCalculator("emt")
    FIRE(FrechetCellFilter(moved, **theirs), logfile=None).run(fmax=1e-6, steps=40)
    found = relax("emt", atoms, **{"cell": "full"} | ours, stepper="fire", fmax=1e-6, steps=40).to_atoms()
    assert np.abs(moved.cell - atoms.cell).max() > 1e-3
    assert np.abs(found.positions - moved.positions).max() < 1e-9
    assert np.abs(found.cell - moved.cell).max() < 1e-9


@pytest.mark.parametrize(
    ("constraint", "cell"),
    [
        (FixCartesian([0], [True, False, False]), "full"), (FixedLine([0], [1, 1, 0]), [1, 1, 0, 0, 0, 1]),
        (FixedPlane([0], [1, 0, 1]), [0, 0, 1, 0, 0, 0]), (FixCartesian([0], [True, False, False]), "constant-volume"),
    ],
)  # fmt: skip
def test_directions_that_the_cell_would_turn_are_refused(constraint, cell):
    name = type(constraint).__name__
    with pytest.raises(NotImplementedError, match=f"{name}, whose directions this cell would turn"):
        relax(lennard_jones(), with_constraint(constraint), steps=1, cell=cell)


SELECTIVE = {"F T T": [True, False, False], "F F T": [True, True, False], "T T F": [False, False, True]}


@pytest.mark.parametrize("flags", SELECTIVE)
def test_selective_dynamics_keep_fractional_coordinates_and_end_where_the_energy_is_lowest(flags):
    """ASE's run on the filter keeps them, too, but takes forces along other directions and ends higher."""
    atoms, fixed = CRYSTALS["triclinic"](), np.array(SELECTIVE[flags])
    atoms.set_constraint([FixScaled([0, 2], fixed), FixAtoms([1])])
    moved = atoms.copy()
    moved.calc = TorchCalculator("emt")
    FIRE(FrechetCellFilter(moved), logfile=None).run(fmax=1e-3, steps=100)
    with torch.no_grad():
        found = relax("emt", atoms, cell="full", stepper="bfgs", fmax=1e-5, steps=300).to_atoms()
    kept = found.get_scaled_positions(wrap=False) - atoms.get_scaled_positions(wrap=False)
    assert np.abs(kept[[0, 2]][:, fixed]).max() < 1e-12
    assert np.abs(kept[1]).max() < 1e-12
    assert np.abs(kept[[0, 2]][:, ~fixed]).max() > 1e-3
    found.calc = TorchCalculator("emt")
    along = found.get_forces(apply_constraint=False) @ found.cell.array.T / found.cell.lengths()
    assert np.abs(along[[0, 2]][:, ~fixed]).max() < 3e-5
    assert np.abs(along[3:]).max() < 3e-5
    assert np.abs(found.get_stress()).max() < 1e-5
    assert found.get_potential_energy() < moved.get_potential_energy() - 1e-4


@pytest.mark.parametrize("adjoint", ["replay", "full", "implicit"])
def test_gradients_through_selective_dynamics_agree_with_differences(adjoint):
    potential, atoms = lennard_jones().requires_grad_(), argon().repeat((1, 2, 1))
    atoms.set_constraint(FixScaled([0, 1], [True, False, False]))
    start = Structures.from_atoms([atoms])
    positions = start.positions.clone().requires_grad_()
    exact = adjoint == "implicit"
    if exact:
        rule = {"stepper": "bfgs", "steps": 300, "adjoint": adjoints.Implicit(tolerance=1e-9, fmax=1e-9)}
    else:
        rule = {"stepper": steppers.FIRE(dt=0.03), "steps": 6, "fmax": 1e-3, "adjoint": adjoint}

    def evaluate():
        with recorded_decisions() as trace:
            relaxation = relax(potential, start.replace(positions=positions), cell="full", **rule)
        assert not exact or relaxation.status == (Status.CONVERGED,)
        return ends(relaxation), None if exact else trace

    loss, *usual = evaluate()
    weights = list(potential.parameters())
    to = gradient([positions, *weights], loss)
    if not exact:
        check_gradient(evaluate, usual, [positions], to[:1], h=1e-4, directions=2)
    check_gradient(evaluate, usual, weights, to[1:], h=1e-4, tolerance=1e-5 if exact else 1e-6)


def test_the_gradient_to_a_cell_whose_vectors_fix_directions_is_refused():
    atoms = argon()
    atoms.set_constraint(FixScaled([0], [True, False, False]))
    start = Structures.from_atoms([atoms])
    with pytest.raises(NotImplementedError, match="FixScaled, whose directions are those of its initial cell"):
        relax(lennard_jones(), start.replace(cells=start.cells.requires_grad_()), steps=1, cell="full")


def test_a_collapsing_cell_stops_alone():
    far = bulk("Ar", a=1.6)
    far.set_cell(far.cell * 0.4, scale_atoms=True)
    potential, wild = lennard_jones().requires_grad_(), steppers.GradientDescent(1e-3, maxstep=10.0)
    weights = list(potential.parameters())
    how = {"cell": "full", "stepper": wild, "steps": 20}
    together, alone = (relax(potential, atoms, **how) for atoms in ([far, argon()], [argon()]))
    assert together.status == (Status.DIVERGED, alone.status[0])
    assert alone.status[0] is not Status.DIVERGED
    assert np.abs(alone.cells[0].detach().numpy() - argon().cell).max() > 1e-3
    assert torch.allclose(together[1].positions, alone.positions, rtol=0, atol=1e-12)
    assert torch.allclose(together[1].cells, alone.cells, rtol=0, atol=1e-12)
    expected = gradient(weights, ends(alone))
    assert all(g.abs() > 1e-3 for g in expected)
    torch.testing.assert_close(gradient(weights, ends(together[1])), expected, rtol=1e-9, atol=1e-10)


BAD = {
    "unknown name": (lambda: argon(), {"cell": "variable"}, ValueError, "There is no cell 'variable'"),
    "mask of another shape": (lambda: argon(), {"cell": [1, 1, 1, 0]}, ValueError, "six numbers in the order xx"),
    "rows of another number": (lambda: argon(), {"cell": [[1, 0], [0, 1]]}, ValueError, "six numbers in the order xx"),
    "mask as an array": (lambda: argon(), {"cell": np.ones((2, 3))}, ValueError, "six numbers in the order xx"),
    "another word": (lambda: argon(), {"cell": "volume"}, ValueError, "did you mean 'hydrostatic'"),
    "mask across a wire": (lambda: wire(), {"cell": [1, 0, 0, 0, 0, 0]}, ValueError, "that its mask mixes with others"),
    "mask of other numbers": (lambda: argon(), {"cell": [0.5, 1, 1, 0, 0, 0]}, ValueError, "holds ones and zeros"),
    "lone shear": (lambda: argon(), {"cell": [0, 0, 0, 0, 0, 1]}, NotImplementedError, "a shear without the two axes"),
    "molecule": (lambda: molecule("H2O"), {"cell": "full"}, ValueError, "H2O is periodic along no direction"),
    "pressure at a fixed cell": (lambda: argon(), {"pressure": 0.1}, ValueError, "does nothing to a cell that is"),
    "pressure that is no number": (lambda: argon(), {"cell": "full", "pressure": np.nan}, ValueError, "finite number"),
    "pressure in words": (lambda: argon(), {"cell": "full", "pressure": "10 GPa"}, ValueError, "got '10 GPa'"),
    "one of several cells": (lambda: [argon(), argon()], {"cell": ["full", "ful"]}, ValueError,
                             "Structure 1: There is no cell 'ful'"),
    "pressure at one of several": (lambda: [argon(), argon()], {"cell": ["full", "fixed"], "pressure": [0.1, 0.1]},
                                   ValueError, "Structure 1: A pressure of 0.1 eV/Å.3 .16.02.* does nothing"),
    "collapsed cell": (lambda: bulk("Ar", a=0.1), {"cell": "full"}, ValueError, "less than 0.01 Å.3 for each"),
    "pressure on a slab": (lambda: fcc111("Cu", (1, 1, 2), vacuum=5.0), {"cell": "full", "pressure": 0.1}, ValueError,
                           "periodic along 2 of 3 directions"),
    "singular cell": (lambda: Atoms("Ar", cell=[[1, 0, 0], [2, 0, 0], [0, 0, 3]], pbc=True), {"cell": "full"},
                      ValueError, "linearly dependent"),
    "zero volume": (lambda: Atoms("Ar", pbc=True), {"cell": "full"}, ValueError, "length zero"),
    "constraint": (lambda: with_constraint(FixCartesian(0, [1, 0, 0])), {"cell": "full"}, NotImplementedError,
                   "FixCartesian"),
    "too few cells": (lambda: argon(), {"cell": ["full", "full"]}, ValueError, "2 cells for 1 structures"),
}  # fmt: skip


def wire() -> Atoms:
    """Periodic along a diagonal of x and y."""
    atoms = bulk("Cu", cubic=True)
    atoms.rotate(45, "z", rotate_cell=True)
    atoms.pbc = (True, False, False)
    return atoms


def with_constraint(constraint) -> Atoms:
    atoms = argon()
    atoms.set_constraint(constraint)
    return atoms


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_relaxed_is_refused_in_one_sentence(name):
    make, arguments, error, sentence = BAD[name]
    potential = lennard_jones()
    with pytest.raises(error, match=sentence) as found:
        relax(potential, make(), steps=1, **arguments)
    assert "\n" not in str(found.value)


def test_forces_without_a_stress_relax_no_cell():
    with pytest.raises(NotImplementedError, match="predicted directly, and it has no stress"):
        relax(Direct(cutoff=3.0), argon(), cell="full")


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"mask": [1, 1, 0]}, ValueError, "six numbers in the order xx"),
        ({"mask": [0, 0, 0, 0, 0, 1]}, NotImplementedError, "a shear without the two axes"),
        ({"mask": [1, 1, 0, 0, 0, 0], "constant_volume": True}, NotImplementedError, "strains leave the mask"),
        ({"mask": [1, 0, 0, 0, 0, 0], "hydrostatic": True}, NotImplementedError, "strains leave the mask"),
        ({"pressure": np.nan}, ValueError, "finite number of eV/Å.3"),
    ],
)
def test_a_freedom_that_cannot_be_is_refused(given, error, sentence):
    with pytest.raises(error, match=sentence):
        CellFreedom(moves=True, **given)


def test_freedoms_are_json():
    found = freedoms(["full", [1, 1, 0, 0, 0, 1], "fixed"], 0.01, 3)
    assert [f.name for f in found] == ["full", "mask", "fixed"]
    assert [f.pressure for f in found] == [0.01, 0.01, 0.0]
    assert [CellFreedom(**json.loads(json.dumps(f.todict()))) for f in found] == found


# Neighbours and rows --------------------------------------------------------------------------


@pytest.mark.parametrize("strain", [0.0, 1e-3, 5e-3, 0.03])
def test_the_skin_holds_while_a_cell_deforms(strain):
    rng, neighbors, atoms = np.random.default_rng(0), NeighborList(3.0, skin=0.6), bulk("Si").repeat(2)
    for _ in range(20):
        change = rng.uniform(-strain, strain, (3, 3))
        atoms.set_cell(atoms.cell @ (np.eye(3) + change), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
        now = Structures.from_atoms(atoms)
        fresh = NeighborList(3.0, skin=0.0)(now)
        found = neighbors(now)
        assert torch.equal(torch.column_stack((found.i, found.j)), torch.column_stack((fresh.i, fresh.j)))
        assert torch.equal(found.shifts, fresh.shifts)
    assert neighbors.builds < 20 or strain > 0.01
    assert neighbors.builds > 1 or strain <= 1e-3


def test_rows_describe_the_structures():
    batch = Structures.from_atoms([argon(), molecule("N2"), bulk("Ar")])
    rows = Strained.of(batch, freedoms(["full", "fixed", "hydrostatic"], 0.0, 3))
    assert rows.counts == (5, 2, 4)
    assert torch.equal(rows.placed().positions, batch.positions)
    assert torch.equal(rows.placed().cells, batch.cells)
    part = rows.select([2, 0])
    assert part.counts == (4, 5)
    assert part.placed().counts == (1, 2)
    assert torch.equal(part.joined(rows.select([1])).placed().numbers, batch.select([2, 0, 1]).numbers)


# Measures -------------------------------------------------------------------------------------


def test_a_turned_cell_is_no_strain_and_fractions_count_in_the_reference():
    a = argon()
    b = a.copy()
    b.rotate(30, "z", rotate_cell=True)
    assert cell_strain(a, b) == pytest.approx(0, abs=1e-12)
    assert delta_q(b, a) == pytest.approx(0, abs=1e-9)
    c = a.copy()
    c.set_cell(a.cell * 1.01, scale_atoms=True)
    assert delta_q(c, a) == pytest.approx(0, abs=1e-9)
    assert volume_error(c, a) == pytest.approx(1.01**3 - 1)
    assert cell_strain(c, a) == pytest.approx(np.sqrt(3) * (1.01**2 - 1) / 2)
    assert np.allclose(lattice_error(c, a)[:3], 0.01 * a.cell.lengths())
    assert np.allclose(lattice_error(c, a)[3:], 0, atol=1e-9)


def test_a_match_has_no_gradient_and_no_nan():
    atoms = argon()
    start = Structures.from_atoms(atoms)
    cells = start.cells.clone().requires_grad_()
    for loss in (root_delta_q, cell_strain):
        (found,) = torch.autograd.grad(loss(start.replace(cells=cells), atoms).sum(), cells, allow_unused=True)
        assert found is None or not found.any()


def test_a_crystal_whose_atoms_keep_their_fractions_is_no_copy_of_its_start(caplog):
    warn_of_moves(bulk("Cu"), bulk("Cu", a=3.5), "Cu")
    assert not caplog.records
    warn_of_moves(bulk("Cu"), bulk("Cu"), "Cu")
    assert "its relaxed structure is its initial one" in caplog.text


def test_the_loss_weighs_a_strain_as_the_displacement_it_causes():
    a = bulk("Cu", cubic=True)
    b = a.copy()
    b.set_cell(a.cell * 1.02, scale_atoms=True)
    n, length, mass = 4, (a.get_volume() / 4) ** (1 / 3), a.get_masses().mean()
    expected = np.sqrt(n * mass) * length * cell_strain(b, a)
    assert delta_q(b, a, cell_weight=1.0) == pytest.approx(expected)


def test_emt_at_rest_stays():
    atoms = bulk("Cu", a=EMT_LATTICE)
    relaxation = relax(EMT(), atoms, cell="full", fmax=0.01)
    assert relaxation.nsteps.tolist() == [0]
    assert "converged" in repr(relaxation)


EMT_LATTICE = 3.5899


# Pairs, training and the shell -----------------------------------------------------------------


def crystal_pairs(n: int = 4) -> list[RelaxationPair]:
    """Strained crystals of copper, and what another potential would have them: 3 % shorter."""
    relaxed = bulk("Cu", a=EMT_LATTICE * 0.97)
    return [RelaxationPair(strained(relaxed, seed=k), relaxed, f"Cu {k}", f"group {k}") for k in range(n)]


@pytest.mark.parametrize("adjoint", ["replay", "implicit", "guided:3"])
def test_training_on_structures_alone_mends_the_volume(adjoint):
    potential = Morse(r0=2.6, rho0=4.0)
    pairs = [RelaxationPair(strained(bulk("Cu", a=3.6), seed=k), bulk("Cu", a=3.5), f"Cu {k}") for k in range(2)]
    before = evaluate(potential, pairs)
    trainer = Trainer(potential, adjoint=adjoint, terms=(), lr=0.01, batch_size=2, progress=False)
    trainer.fit(pairs, epochs=6)
    after = evaluate(trainer.potential, pairs)
    assert after.volume_error < before.volume_error
    assert after.mean < before.mean
    assert all(row.cell_strain is not None for row in after.rows)
    assert "cells that moved (2): mean absolute volume error" in table(before, after)


def test_stress_labels_are_the_forces_on_the_rows_of_a_cell():
    teacher, frames = TorchCalculator("emt"), [strained(bulk("Cu"), seed=k) for k in range(3)]
    for atoms in frames:
        atoms.calc = teacher
        results = {name: teacher.get_property(name, atoms) for name in ("energy", "forces", "stress")}
        atoms.calc = SinglePointCalculator(atoms, **results)
    pair = RelaxationPair(frames[0], frames[-1], "Cu", frames=frames)
    assert pair.freedom.name == "full"
    labels = Labels(energies=False, per_pair=3)
    labels.prepare(teacher.potential, [pair])
    assert labels.loss(teacher.potential, [pair], np.random.default_rng(0)).item() == pytest.approx(0, abs=1e-12)
    other = Morse(rho0=4.0)
    labels.prepare(other, [pair])
    loss = labels.loss(other, [pair], np.random.default_rng(0))
    # A crystal of one atom has no forces: what is matched is the stress alone.
    assert loss.item() > 0
    loss.backward()
    assert all(p.grad is not None for p in other.parameters())


def test_fixed_and_moving_pairs_are_evaluated_apart():
    still = molecule("N2")
    pairs = [*crystal_pairs(1), RelaxationPair(still, still.copy(), "N2", "N2")]
    found = evaluate(load_potential("emt"), pairs)
    assert [row.volume_error is None for row in found.rows] == [False, True]
    assert found.volume_error == pytest.approx(abs(found.rows[0].volume_error))
    assert Evaluation.from_rows(json.loads(json.dumps(found.todict()))["rows"]) == found


@pytest.mark.parametrize(
    ("flags", "moved"), [((), False), (("--cell", "full", "--pressure", "1"), True), (("--cell", "0,0,1,0,0,0"), True)]
)
def test_the_shell_relaxes_cells(tmp_path, flags, moved):
    atoms = strained(bulk("Cu", cubic=True))
    write(tmp_path / "a.extxyz", atoms)
    out = tmp_path / "out.extxyz"
    code, _, said = run("relax", str(tmp_path / "a.extxyz"), "--potential", "emt", *flags, "--out", str(out))
    assert code == 0, said
    found = read(out)
    change = np.abs(found.cell - atoms.cell)
    assert (change.max() > 0.01) == moved
    if "0,0,1,0,0,0" in flags:
        gradient = np.linalg.solve(atoms.cell, found.cell)
        assert np.abs(gradient - np.diag([1, 1, gradient[2, 2]])).max() < 1e-7
    if "1" in flags:
        assert found.get_stress()[:3] / units.GPa == pytest.approx(-np.ones(3), abs=1.0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cell", "shape"], "no cell 'shape'"),
        (
            ["--cell", "0.5,1,1,0,0,0"],
            "six ones and zeros with commas between, for xx,yy,zz,yz,xz,xy, as 1,1,0,0,0,1; got '0.5,1",
        ),
        (["--cell", "0,0,0,0,0,1"], "a shear without the two axes"),
        (["--pressure", "much"], "number of GPa"),
    ],
)
def test_the_shell_refuses_cells_that_it_does_not_know(tmp_path, flags, said):
    write(tmp_path / "a.extxyz", bulk("Cu"))
    code, _, err = run("relax", str(tmp_path / "a.extxyz"), "--potential", "emt", *flags)
    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    ("tags", "name", "pressure", "fractions"),
    [
        *(({"ISIF": isif}, "fixed", 0.0, False) for isif in ("0", "1", "2")),
        ({"ISIF": "2", "PSTRESS": "20.0"}, "fixed", 0.0, False),
        ({"ISIF": "3", "PSTRESS": "20.0"}, "full", 2 * units.GPa, False),
        ({"ISIF": "4"}, "constant-volume", 0.0, False),
        ({"ISIF": "5"}, "constant-volume", 0.0, True),
        ({"ISIF": "6", "PSTRESS": "20.0"}, "full", 2 * units.GPa, True),
        ({"ISIF": "7"}, "hydrostatic", 0.0, True),
        ({"ISIF": "8", "PSTRESS": "20.0"}, "hydrostatic", 2 * units.GPa, False),
    ],
)
def test_what_vasp_relaxed_comes_from_its_settings(tmp_path, tags, name, pressure, fractions):
    atoms = bulk("Cu")
    found = freedom_of([atoms], tmp_path / "OUTCAR", Run(tags=tags))
    assert (found.name, found.pressure) == (name, pytest.approx(pressure))
    assert bool(atoms.constraints) == fractions


@pytest.mark.parametrize(("free", "name"), [("all", "full"), ("'volume'", "hydrostatic"), ("z", "mask")])
def test_what_pw_relaxed_comes_from_its_settings(tmp_path, free, name):
    tags = {"calculation": "vc-relax", "cell_dofree": free, "press": "5.0"}
    found = freedom_of([bulk("Cu")], tmp_path / "relax.out", Run(code="pw.x", tags=tags))
    assert (found.name, found.pressure) == (name, pytest.approx(0.5 * units.GPa))
    with pytest.raises(InvalidPair, match="cell_dofree = 'ibrav'"):
        freedom_of([bulk("Cu")], tmp_path / "relax.out", Run(code="pw.x", tags=tags | {"cell_dofree": "ibrav"}))
