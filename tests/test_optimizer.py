"""BPTTOptimizer: what ASE asks of an Optimizer, and the Relaxation that a run leaves."""

import gc
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian, FixCom, FixedLine
from ase.filters import FrechetCellFilter, StrainFilter, UnitCellFilter
from ase.io import Trajectory, read
from ase.mep import NEB
from ase.optimize.optimize import RestartError
from helpers.potentials import lennard_jones, needs_mace, tiny_mace
from helpers.structures import argon, cluster, skewed

from ase_bptt import BPTTOptimizer, Relaxation, Status, TorchCalculator, optimize, relax
from ase_bptt.steppers import FIRE, GradientDescent

STEPPERS = {"fire": {"dt": 0.03, "dtmax": 0.06}, "gd": {"step_size": 0.002, "momentum": 0.4}}
NUMBERS = STEPPERS | {"bfgs": {"alpha": 200.0}, "lbfgs": {"alpha": 200.0, "memory": 6}}
"""STEPPERS are those that a gradient can be taken through."""


def with_calculator(atoms, potential=None):
    atoms.calc = TorchCalculator(potential or lennard_jones())
    return atoms


def optimizer(atoms=None, stepper="fire", **arguments):
    atoms = with_calculator(argon()) if atoms is None else atoms
    return BPTTOptimizer(atoms, stepper=stepper, **({"logfile": None} | NUMBERS[stepper] | arguments))


class TestRun:
    @pytest.mark.parametrize("stepper", NUMBERS)
    def test_it_ends_below_fmax_and_says_so(self, stepper):
        opt = optimizer(stepper=stepper)
        assert bool(opt.run(fmax=0.05, steps=200)) is True
        assert np.linalg.norm(opt.atoms.get_forces(), axis=1).max() < 0.05
        assert 0 < opt.nsteps < 200
        assert opt.converged()

    def test_too_few_steps_are_not_converged(self):
        opt = optimizer()
        assert bool(opt.run(fmax=1e-6, steps=3)) is False
        assert opt.nsteps == 3

    def test_a_second_run_continues(self):
        opt = optimizer()
        opt.run(fmax=0.0, steps=5)
        opt.run(fmax=0.0, steps=5)
        assert opt.nsteps == opt.max_steps == opt.get_number_of_steps() == 10

    @pytest.mark.parametrize("steps", [0, 1, 4])
    def test_irun_yields_before_the_first_step_and_after_each(self, steps):
        assert len(list(optimizer().irun(fmax=0.0, steps=steps))) == steps + 1

    def test_no_steps_move_nothing(self):
        opt = optimizer()
        opt.run(fmax=0.0, steps=0)
        assert np.array_equal(opt.atoms.positions, argon().positions)

    def test_a_step_costs_one_evaluation(self, monkeypatch):
        calls, calculate = [], TorchCalculator.calculate
        counted = lambda *args: (calls.append(1), calculate(*args))  # noqa: E731
        monkeypatch.setattr(TorchCalculator, "calculate", counted)
        optimizer().run(fmax=0.0, steps=5)
        assert len(calls) == 6

    def test_observers_are_called_at_their_intervals(self):
        opt, each, every_third = optimizer(), [], []
        opt.attach(lambda: each.append(opt.nsteps))
        opt.attach(lambda: every_third.append(opt.nsteps), interval=3)
        opt.run(fmax=0.0, steps=7)
        assert each == list(range(8))
        assert every_third == [0, 3, 6]

    def test_the_potential_is_left_alone(self):
        potential = lennard_jones()
        potential.sigma.requires_grad_(False)
        optimizer(with_calculator(argon(), potential)).run(steps=3)
        assert [p.requires_grad for p in (potential.epsilon, potential.sigma)] == [True, False]
        assert potential.epsilon.grad is None


class TestArguments:
    def test_fields_of_the_stepper_go_to_it(self):
        opt = BPTTOptimizer(argon(), logfile=None, dt=0.02, Nmin=3, maxstep=0.1)
        assert (opt.stepper.dt, opt.stepper.Nmin, opt.stepper.maxstep, opt.maxstep) == (0.02, 3, 0.1, 0.1)

    def test_the_first_arguments_are_in_ases_order(self):
        log = io.StringIO()
        opt = BPTTOptimizer(with_calculator(argon()), "a.json", log, "a.traj", False, 0.1)
        opt.run(steps=1)
        assert "BPTTOptimizer:" in log.getvalue()
        assert opt.maxstep == 0.1
        assert len(read("a.traj", ":")) == 2

    @pytest.mark.parametrize("name", ["alpha", "force_consistent", "step_size"])
    def test_unknown_keywords_are_type_errors(self, name):
        with pytest.raises(TypeError, match=name):
            BPTTOptimizer(argon(), logfile=None, **{name: 1.0})

    def test_numbers_beside_a_stepper_object_are_type_errors(self):
        with pytest.raises(TypeError, match="dt"):
            BPTTOptimizer(argon(), logfile=None, stepper=FIRE(), dt=0.1)
        with pytest.raises(TypeError, match="maxstep"):
            BPTTOptimizer(argon(), logfile=None, maxstep=0.1, stepper=FIRE())

    def test_the_full_tape_is_refused(self):
        with pytest.raises(TypeError, match="keeps no tape: take adjoint='replay'"):
            BPTTOptimizer(argon(), adjoint="full")

    def test_unknown_steppers_are_named(self):
        with pytest.raises(ValueError, match="no stepper 'newton'; there are gd, fire"):
            BPTTOptimizer(argon(), stepper="newton")

    @pytest.mark.parametrize(("stepper", "numbers"), [("gd", {"step_size": 1.0}), ("bfgs", {"alpha": 1.0})])
    def test_no_atom_moves_farther_than_maxstep(self, stepper, numbers):
        opt = BPTTOptimizer(with_calculator(argon()), stepper=stepper, maxstep=0.03, logfile=None, **numbers)
        opt.run(fmax=0.0, steps=1)
        before = opt.atoms.positions.copy()
        opt.maxstep = 0.01
        opt.run(fmax=0.0, steps=1)
        steps = [np.linalg.norm(x, axis=1).max() for x in (before - argon().positions, opt.atoms.positions - before)]
        assert steps == pytest.approx([0.03, 0.01])

    def test_forces_given_to_a_step_are_taken_with_ases_warning(self):
        opt = optimizer(stepper="gd")
        with pytest.warns(UserWarning, match="do not pass forces"):
            opt.step(np.ones((4, 3)))
        np.testing.assert_allclose(opt.atoms.positions - argon().positions, 0.002)


class TestFiles:
    def test_the_log_has_ases_format(self):
        log = io.StringIO()
        opt = optimizer(logfile=log)
        opt.run(fmax=0.0, steps=2)
        header, *lines = log.getvalue().splitlines()
        assert header == f"{'':13}  {'Step':>4} {'Time':>8} {'Energy':>15}  {'fmax':>12}"
        assert [line.split()[:2] for line in lines] == [["BPTTOptimizer:", str(k)] for k in range(3)]
        fmax = np.linalg.norm(opt.atoms.get_forces(), axis=1).max()
        assert float(lines[-1].split()[3]) == pytest.approx(opt.atoms.get_potential_energy(), abs=1e-6)
        assert float(lines[-1].split()[4]) == pytest.approx(fmax, abs=1e-6)

    def test_no_log_prints_nothing(self, capsys):
        optimizer(logfile=None).run(steps=2)
        assert capsys.readouterr() == ("", "")

    def test_a_dash_and_the_default_print(self, capsys):
        optimizer(logfile="-").run(steps=2)
        dashed = capsys.readouterr().out
        BPTTOptimizer(with_calculator(argon()), **STEPPERS["fire"]).run(steps=2)
        default = capsys.readouterr().out
        assert dashed.count("BPTTOptimizer:") == default.count("BPTTOptimizer:") == 3

    @pytest.mark.parametrize("stepper", NUMBERS)
    def test_the_trajectory_says_how_it_was_made(self, stepper):
        optimizer(stepper=stepper, trajectory="a.traj").run(fmax=0.01, steps=3)
        with Trajectory("a.traj") as trajectory:
            assert len(trajectory) == 4
            described = json.loads(json.dumps(trajectory.description))
            assert trajectory[-1].get_forces().shape == (4, 3)
        assert described["type"] == "optimization"
        assert described["optimizer"] == "BPTTOptimizer"
        assert described["fmax"] == 0.01
        assert described["stepper"]["name"] == stepper
        assert NUMBERS[stepper].items() <= described["stepper"].items()

    def test_numbers_that_are_parameters_go_into_the_trajectory_too(self):
        stepper = GradientDescent(torch.nn.Parameter(torch.tensor(0.25)))
        opt = BPTTOptimizer(with_calculator(argon()), stepper=stepper, trajectory="a.traj", logfile=None)
        opt.run(fmax=0.0, steps=1)
        with Trajectory("a.traj") as trajectory:
            assert trajectory.description["stepper"]["step_size"] == 0.25

    def test_a_trajectory_can_be_appended_to(self):
        optimizer(trajectory="a.traj").run(fmax=0.0, steps=3)
        atoms = with_calculator(read("a.traj"))
        optimizer(atoms, trajectory="a.traj", append_trajectory=True).run(fmax=0.0, steps=3)
        assert len(read("a.traj", ":")) == 4 + 3


def uninterrupted(make, stepper, steps, **arguments):
    opt = optimizer(make(), stepper, **arguments)
    return np.array([opt.atoms.positions.copy() for _ in opt.irun(fmax=0.0, steps=steps)])


INTERRUPTED = {"fire": 12, "gd": 12, "bfgs": 4, "lbfgs": 4}
"""After how many steps: those of BFGS have arrived by the twelfth, and every path from there is the same."""


@pytest.mark.parametrize("stepper", NUMBERS)
@pytest.mark.parametrize("make", [argon, cluster])
class TestRestart:
    def test_its_path_is_the_uninterrupted_one_bit_for_bit(self, make, stepper):
        expected = uninterrupted(lambda: with_calculator(make()), stepper, 30)
        optimizer(with_calculator(make()), stepper, restart="a.json", trajectory="a.traj").run(
            0.0, steps=INTERRUPTED[stepper]
        )
        again = lambda: with_calculator(read("a.traj"))  # noqa: E731
        found = uninterrupted(again, stepper, 30 - INTERRUPTED[stepper], restart="a.json")
        assert np.array_equal(found, expected[INTERRUPTED[stepper] :])

    def test_without_its_file_the_path_is_another(self, make, stepper):
        # Otherwise the test above could not fail.
        expected = uninterrupted(lambda: with_calculator(make()), stepper, 30)
        optimizer(with_calculator(make()), stepper, trajectory="a.traj").run(0.0, steps=INTERRUPTED[stepper])
        found = uninterrupted(lambda: with_calculator(read("a.traj")), stepper, 30 - INTERRUPTED[stepper])
        assert abs(found - expected[INTERRUPTED[stepper] :]).max() > 1e-6


FILTERS = {
    "frechet": FrechetCellFilter,
    "frechet under pressure": lambda atoms: FrechetCellFilter(atoms, mask=[1, 1, 0, 0, 0, 1], scalar_pressure=0.05),
    "unit cell": UnitCellFilter,
    "strain": StrainFilter,
    "strain along two axes": lambda atoms: StrainFilter(atoms, mask=[1, 0, 1, 0, 1, 0]),
}


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("name", ["FIRE", "BFGS", "LBFGS", "QuasiNewton"])
def test_a_restart_on_a_cell_filter_keeps_what_strain_is_measured_from(name, kind):
    def run(atoms, steps, **arguments):
        # A line search computes a geometry again after a restart, and another neighbour list could round otherwise.
        atoms.calc = TorchCalculator(lennard_jones(), skin=0.0)
        numbers = {"dt": 0.02} if name == "FIRE" else {}
        getattr(optimize, name)(FILTERS[kind](atoms), logfile=None, **numbers, **arguments).run(fmax=0.0, steps=steps)

    whole, first = argon(), argon()
    run(whole, 6)
    run(first, 3, restart="a.json")
    again = first.copy()
    assert abs(whole.cell.array - again.cell.array).max() > 1e-4
    run(again, 3, restart="a.json")
    assert abs(whole.cell.array - argon().cell.array).max() > 1e-3
    np.testing.assert_allclose(again.cell.array, whole.cell.array, rtol=0, atol=1e-10)
    np.testing.assert_allclose(again.positions, whole.positions, rtol=0, atol=1e-10)


def test_the_restart_file_of_another_filter_is_refused():
    optimizer(StrainFilter(with_calculator(argon())), restart="a.json").run(fmax=0.0, steps=2)
    with pytest.raises(RestartError, match="Could not decode the restart file"):
        optimizer(FrechetCellFilter(with_calculator(argon())), restart="a.json")


def mixed(make):
    atoms = make()
    atoms.symbols[::2] = "Ne"
    return with_calculator(atoms)


SIZES = [{"Ne": 0.003, "Ar": 0.001}, [0.003] * 6 + [0.001]]


@pytest.mark.parametrize("make", [argon, cluster])
@pytest.mark.parametrize("sizes", SIZES, ids=["element", "frame"])
def test_a_restart_with_several_step_sizes_takes_the_uninterrupted_path(make, sizes):
    numbers = {"step_size": sizes, "momentum": 0.4}
    expected = uninterrupted(lambda: mixed(make), "gd", 20, **numbers)
    optimizer(mixed(make), "gd", restart="a.json", trajectory="a.traj", **numbers).run(0.0, steps=5)
    with Trajectory("a.traj") as trajectory:
        assert trajectory.description["stepper"]["step_size"] == sizes
    again = lambda: with_calculator(read("a.traj"))  # noqa: E731
    found = uninterrupted(again, "gd", 15, restart="a.json", **numbers)
    assert np.array_equal(found, expected[5:])


@pytest.mark.parametrize("sizes", SIZES, ids=["element", "frame"])
def test_several_step_sizes_are_learnt_through_a_run(sizes):
    stepper = GradientDescent(sizes, momentum=0.4).learn()
    opt = BPTTOptimizer(mixed(cluster), stepper=stepper, logfile=None)
    opt.run(fmax=0.0, steps=12)
    tape = relax(lennard_jones(), mixed(cluster), stepper=stepper, fmax=0.0, steps=12)
    found, expected = (
        torch.autograd.grad(r.positions.pow(3).sum(), list(stepper.parameters())) for r in (opt.relaxation, tape)
    )
    assert all(g.abs() > 0 for g in expected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_a_step_size_for_each_element_is_refused_where_rows_are_not_atoms():
    band = NEB([with_calculator(cluster()) for _ in range(3)], method="improvedtangent")
    for target in (FrechetCellFilter(with_calculator(argon())), band, Booth()):
        opt = optimizer(target, "gd", step_size={"Ar": 0.002})
        with pytest.raises(ValueError, match="A step size for each element moves atoms only"):
            opt.run(fmax=0.01, steps=3)
    optimizer(FrechetCellFilter(with_calculator(argon())), "gd", step_size=[0.002, 0.001]).run(fmax=0.01, steps=3)


def saved(**changes):
    """A restart file of a run on argon, with some entries replaced."""
    optimizer(restart="good.json").run(fmax=0.0, steps=2)
    return json.dumps(json.loads(Path("good.json").read_text()) | changes)


BROKEN = {
    "no json": lambda: "hello world\n",
    "empty": lambda: "",
    "cut": lambda: saved()[:-20],
    "a list": lambda: "[1, 2]",
    "nothing in it": lambda: "{}",
    "another stepper's": lambda: saved(stepper="gd"),
    "a list of nothing": lambda: saved(atoms=[]),
    "lacks a number": lambda: saved(structures={"dt": [0.1]}),
    "words for numbers": lambda: saved(atoms={"velocities": "fast"}),
    "another structure's": lambda: saved(atoms={"velocities": [[0.0, 0.0, 0.0]] * 5}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_bad_restart_file_is_refused_with_a_sentence(what):
    Path("a.json").write_text(BROKEN[what]())
    with pytest.raises(RestartError, match=r"Could not decode the restart file a\.json .*: delete it"):
        optimizer(restart="a.json")


def test_a_bad_restart_file_is_refused_without_any_calculator():
    Path("a.json").write_text("hello")
    with pytest.raises(RestartError, match="Could not decode"):
        BPTTOptimizer(Atoms(), restart="a.json")


def test_the_stepper_that_a_restart_file_belongs_to_is_named():
    Path("a.json").write_text(saved(stepper="gd"))
    with pytest.raises(RestartError, match="belongs to the stepper 'gd', not 'fire'"):
        optimizer(restart="a.json")


class Broken(Calculator):
    """Forces that are not finite after some evaluations."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, after):
        super().__init__()
        self.after = after

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.after -= 1
        forces = np.full((len(atoms), 3), 0.1 if self.after >= 0 else np.nan)
        self.results = {"energy": 0.0, "forces": forces}


@pytest.mark.parametrize("after", [0, 3])
def test_forces_that_are_not_finite_stop_the_run_with_a_sentence(after, caplog):
    atoms = argon()
    atoms.calc = Broken(after)
    opt = optimizer(atoms)
    with caplog.at_level(logging.WARNING, logger="ase_bptt"):
        assert bool(opt.run(fmax=0.01, steps=50)) is False
    assert opt.nsteps == after + 1
    assert np.isfinite(atoms.positions).all()
    (message,) = [r.getMessage() for r in caplog.records]
    assert "forces are not finite" in message


def test_it_relaxes_cells_through_a_filter():
    atoms = with_calculator(argon())
    atoms.set_cell(atoms.cell * 1.02, scale_atoms=True)
    opt = optimizer(FrechetCellFilter(atoms), dt=0.02)
    assert opt.run(fmax=0.01, steps=300)
    np.testing.assert_allclose(atoms.get_stress(), 0, atol=0.01)
    np.testing.assert_allclose(opt.relaxation.cells[0].detach(), atoms.cell, rtol=0, atol=1e-12)


def test_it_relaxes_a_band():
    first, last = cluster(), cluster()
    last.positions[0] = [0.0, 1.2, 1.2]
    images = [with_calculator(first.copy() if k < 4 else last.copy()) for k in range(5)]
    band = NEB(images, k=5.0, method="improvedtangent")
    band.interpolate()
    before = np.linalg.norm(band.get_forces(), axis=1).max()
    ends = images[0].positions.copy(), images[-1].positions.copy()
    opt = optimizer(band, dt=0.01, dtmax=0.03)
    opt.run(fmax=0.5, steps=100)
    assert np.linalg.norm(band.get_forces(), axis=1).max() < before / 10
    assert np.array_equal(images[0].positions, ends[0])
    assert np.array_equal(images[-1].positions, ends[1])
    with pytest.raises(RuntimeError, match="moves a NEB"):
        opt.relaxation  # noqa: B018


class Booth:
    """Two variables that are no atoms."""

    def __init__(self):
        self.x = np.array([1.0, 2.0])

    def __ase_optimizable__(self):
        return self

    def get_x(self):
        return self.x.copy()

    def set_x(self, x):
        self.x = x

    def get_gradient(self):
        x, y = self.x
        return np.array([10 * x + 8 * y - 34, 8 * x + 10 * y - 38])

    def get_value(self):
        x, y = self.x
        return (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2

    def ndofs(self):
        return 2

    def gradient_norm(self, gradient):
        return np.linalg.norm(gradient)

    def converged(self, gradient, fmax):
        return self.gradient_norm(gradient) < fmax

    def iterimages(self):
        return iter([])


@pytest.mark.parametrize("stepper", NUMBERS)
def test_it_minimises_functions_of_two_variables(stepper):
    function = Booth()
    assert BPTTOptimizer(function, stepper=stepper, logfile=None).run(fmax=1e-6, steps=2000)
    np.testing.assert_allclose(function.x, [1, 3], atol=1e-5)


def mace_potential():
    from ase_bptt.potentials.mace import MACE

    return MACE(tiny_mace(elements=(14,), atomic_inter_scale=20.0, max_ell=1)).requires_grad_()


def gradients(relaxation, stepper):
    potential = relaxation.trajectory.map.potential
    loss = relaxation.positions.pow(3).sum() + relaxation.energies.sum()
    inputs = [*potential.parameters(), *stepper.parameters()]
    return torch.autograd.grad(loss, inputs, allow_unused=True)


@pytest.mark.parametrize("stepper", STEPPERS)
@pytest.mark.parametrize(
    ("potential", "make"),
    [
        pytest.param(lennard_jones, argon, id="lj-crystal"),
        pytest.param(lennard_jones, cluster, id="lj-cluster"),
        pytest.param(mace_potential, skewed, id="mace", marks=needs_mace),
    ],
)
def test_the_relaxation_of_a_run_is_what_relax_returns(potential, make, stepper):
    potential = potential()
    name = {"fire": "dt", "gd": "step_size"}[stepper]
    cls = {"fire": FIRE, "gd": GradientDescent}[stepper]
    numbers = STEPPERS[stepper] | {name: torch.nn.Parameter(torch.tensor(STEPPERS[stepper][name]).double())}
    stepper = cls(**numbers)
    opt = BPTTOptimizer(with_calculator(make(), potential), stepper=stepper, logfile=None)
    opt.run(fmax=0.3, steps=15)
    ase, ours = opt.relaxation, relax(potential, make(), stepper=stepper, fmax=0.3, steps=15)
    assert isinstance(ase, Relaxation)
    assert ase.nsteps.tolist() == ours.nsteps.tolist() == [opt.nsteps]
    assert ase.status == ours.status
    torch.testing.assert_close(ase.positions, ours.positions, rtol=0, atol=1e-12)
    torch.testing.assert_close(ase.energies, ours.energies, rtol=0, atol=1e-11)
    torch.testing.assert_close(ase.fmax, ours.fmax, rtol=0, atol=1e-8)
    pairs = list(zip(gradients(ase, stepper), gradients(ours, stepper), strict=True))
    assert sum(a is not None for a, _ in pairs) > 2
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


class TestRelaxation:
    def test_two_runs_in_a_row_are_one(self):
        once, twice = optimizer(), optimizer()
        once.run(fmax=0.0, steps=10)
        twice.run(fmax=0.0, steps=4)
        twice.run(fmax=0.0, steps=6)
        assert twice.relaxation.nsteps.tolist() == [10]
        found = [gradients(opt.relaxation, opt.stepper) for opt in (once, twice)]
        torch.testing.assert_close(*found, rtol=0, atol=0)

    def change_positions(self, opt):
        opt.atoms.rattle(0.01, seed=3)

    def change_cell(self, opt):
        opt.atoms.set_cell(opt.atoms.cell * 1.01)

    def change_weights(self, opt):
        with torch.no_grad():
            opt.atoms.calc.potential.sigma *= 1.01

    def change_potential(self, opt):
        opt.atoms.calc = TorchCalculator(lennard_jones(smooth=False))

    def change_numbers(self, opt):
        opt.maxstep = 0.01

    def change_masses(self, opt):
        opt.atoms.set_masses([1.0, 1.0, 1.0, 250.0])

    def change_boundaries(self, opt):
        opt.atoms.pbc = (True, True, False)

    def change_constraints(self, opt):
        opt.atoms.set_constraint(FixAtoms([0]))

    CHANGES = ("positions", "cell", "weights", "potential", "numbers", "masses", "boundaries", "constraints")

    @pytest.mark.parametrize("what", CHANGES)
    def test_it_starts_again_where_something_was_changed_between_two_runs(self, what):
        opt = optimizer()
        opt.run(fmax=0.0, steps=4)
        getattr(self, f"change_{what}")(opt)
        start = opt.atoms.copy()
        opt.run(fmax=0.0, steps=3)
        relaxation = opt.relaxation
        assert relaxation.nsteps.tolist() == [3]
        np.testing.assert_array_equal(relaxation.start.positions.detach(), start.positions)
        np.testing.assert_array_equal(relaxation.start.cells[0], start.cell)
        gradients(relaxation, opt.stepper)

    IN_PLACE = {
        "index": (lambda: FixAtoms([0]), lambda c: c.index.__setitem__(0, 2)),
        "another index": (lambda: FixAtoms([0]), lambda c: setattr(c, "index", np.array([0, 1]))),
        "mask": (lambda: FixCartesian([1], [True, False, False]), lambda c: c.mask.__setitem__(1, True)),
        "direction": (lambda: FixedLine([1], [1, 0, 0]), lambda c: setattr(c, "dir", np.array([0.0, 1.0, 0.0]))),
        "nothing": (lambda: FixAtoms([0]), lambda c: None),
    }

    @pytest.mark.parametrize("what", IN_PLACE)
    def test_a_constraint_that_is_changed_in_place_counts_as_changed(self, what):
        make, change = self.IN_PLACE[what]
        atoms = argon()
        atoms.set_constraint(make())
        opt = optimizer(with_calculator(atoms))
        opt.run(fmax=0.0, steps=4)
        change(atoms.constraints[0])
        opt.run(fmax=0.0, steps=3)
        assert opt.relaxation.nsteps.tolist() == [7 if what == "nothing" else 3]

    def test_the_same_constraint_put_on_again_changes_nothing(self):
        atoms = argon()
        atoms.set_constraint(FixAtoms([0]))
        opt = optimizer(with_calculator(atoms))
        opt.run(fmax=0.0, steps=4)
        atoms.set_constraint(FixAtoms([0]))
        opt.run(fmax=0.0, steps=3)
        assert opt.relaxation.nsteps.tolist() == [7]

    @pytest.mark.parametrize("masses", [None, [1.0, 1.0, 1.0, 250.0]], ids=["kept", "changed"])
    def test_its_gradient_is_that_of_the_frames_with_the_masses_that_they_had(self, masses):
        """By relax from where the record begins."""
        atoms = argon()
        atoms.set_constraint(FixCom())
        opt = optimizer(with_calculator(atoms), "gd", momentum=0.0)
        begin = atoms.copy()
        opt.run(fmax=0.0, steps=3)
        if masses:
            atoms.set_masses(masses)
            begin = atoms.copy()
        opt.run(fmax=0.0, steps=3)
        potential = lennard_jones()
        steps = 3 if masses else 6
        expected = relax(potential, begin, stepper=opt.stepper, fmax=0.0, steps=steps)
        np.testing.assert_allclose(opt.relaxation.positions.detach(), expected.positions.detach(), atol=1e-12)
        found, right = (gradients(relaxation, opt.stepper) for relaxation in (opt.relaxation, expected))
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("what", CHANGES)
    def test_it_is_refused_after_somebody_changed_something(self, what):
        opt = optimizer()
        opt.run(fmax=0.0, steps=4)
        getattr(self, f"change_{what}")(opt)
        with pytest.raises(RuntimeError, match=r"changed after (the last step|this relaxation)"):
            opt.relaxation  # noqa: B018

    def test_its_status_is_that_of_the_run(self):
        opt = optimizer()
        opt.run(fmax=1e-3, steps=2)
        assert opt.relaxation.status == (Status.OUT_OF_STEPS,)
        opt.run(fmax=1e-3, steps=200)
        assert opt.relaxation.status == (Status.CONVERGED,)

    def test_it_gives_the_atoms_back(self):
        opt = optimizer()
        opt.atoms.info["name"] = "A1"
        opt.run(fmax=0.0, steps=3)
        atoms = opt.relaxation.to_atoms()
        assert atoms is not opt.atoms
        assert atoms.info == {"name": "A1"}
        assert np.array_equal(atoms.positions, opt.atoms.positions)
        assert np.array_equal(atoms.get_forces(), opt.atoms.get_forces())

    def test_it_costs_no_evaluation(self, monkeypatch):
        opt = optimizer()
        opt.run(fmax=0.0, steps=3)
        monkeypatch.setattr(TorchCalculator, "calculate", None)
        assert opt.relaxation.positions.requires_grad

    def test_without_record_memory_stays_flat_and_it_is_refused(self):
        opt = optimizer(record=False)
        opt.run(fmax=0.0, steps=5)
        assert opt._recording.trajectory is None
        with pytest.raises(RuntimeError, match="run it with record=True"):
            opt.relaxation  # noqa: B018

    def test_a_thousand_steps_leave_no_tensor_behind(self):
        opt = optimizer(record=False)

        def tensors() -> int:
            gc.collect()
            return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

        opt.run(fmax=0.0, steps=20)
        before = tensors()
        opt.run(fmax=0.0, steps=1000)
        assert opt.nsteps == 1020
        assert tensors() <= before

    def test_a_record_is_48_bytes_an_atom_and_step(self):
        opt = optimizer()
        opt.run(fmax=0.0, steps=50)
        frames = opt.relaxation.trajectory.frames
        assert len(frames) == 50
        stored = [t for positions, state in frames for t in (positions, *state.atoms.values())]
        assert sum(t.untyped_storage().nbytes() for t in stored) == 48 * 4 * 50
        assert not any(t.requires_grad for t in stored)

    def test_before_any_step_it_is_refused(self):
        opt = optimizer()
        opt.run(fmax=1e9)
        with pytest.raises(RuntimeError, match="recorded no step"):
            opt.relaxation  # noqa: B018

    def test_constraints_are_refused_by_name(self):
        atoms = with_calculator(argon())
        atoms.set_constraint(FixBondLengths([[0, 1]]))
        opt = optimizer(atoms)
        opt.run(fmax=0.0, steps=5)
        assert not np.array_equal(atoms.positions, argon().positions)
        with pytest.raises(NotImplementedError, match="constraints FixBondLengths cannot be differentiated; FixAtoms"):
            opt.relaxation  # noqa: B018

    def test_other_calculators_are_refused_by_name(self):
        atoms = argon()
        atoms.calc = AseLennardJones(rc=2.4)
        opt = optimizer(atoms)
        opt.run(fmax=0.0, steps=3)
        with pytest.raises(RuntimeError, match="moves a Atoms with LennardJones"):
            opt.relaxation  # noqa: B018

    def test_a_float32_potential_has_one_too(self):
        opt = optimizer(with_calculator(argon(), lennard_jones().to(torch.float32)))
        opt.run(fmax=0.0, steps=10)
        exact = optimizer()
        exact.run(fmax=0.0, steps=10)
        for a, b in zip(*(gradients(o.relaxation, o.stepper) for o in (opt, exact)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, check_dtype=False)


def test_steps_to_nowhere_end_the_run_with_a_sentence(caplog):
    class Nowhere(GradientDescent):
        def step(self, positions, forces, state, batch):
            return positions * float("nan"), state

    atoms = argon()
    atoms.calc = TorchCalculator(lennard_jones())
    optimizer = BPTTOptimizer(atoms, logfile=None, stepper=Nowhere())
    assert not optimizer.run(fmax=1e-9, steps=5)
    assert "The run stops" in caplog.text
    assert np.isfinite(atoms.positions).all()


@pytest.mark.parametrize("stepper", ["fire", "bfgs"])
def test_a_run_without_a_restart_file_lists_no_state(monkeypatch, stepper):
    listed = "ase_bptt.optimize.bptt_optimizer.state_to_json"
    monkeypatch.setattr(listed, lambda state: pytest.fail("the state was listed"))
    optimizer(stepper=stepper).run(fmax=0.0, steps=3)
