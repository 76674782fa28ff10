"""ase_bptt.optimize beside ase.optimize: the same script, the same path, the same log."""

import inspect
import io
import json
import logging
import re

import ase.optimize
import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.io import read
from ase.mep import NEB
from ase.optimize.optimize import Optimizer, RestartError
from helpers.potentials import lennard_jones
from helpers.structures import argon, cluster

from ase_bptt import TorchCalculator, optimize, relax, steppers

NAMES = ("FIRE", "BFGS", "LBFGS", "QuasiNewton")


def lj():
    return LennardJones(rc=2.4, ro=1.8, smooth=True)


def memoryless():
    """A calculator whose numbers do not depend on what it has calculated before: it keeps no neighbours."""
    return TorchCalculator(lennard_jones(), skin=0.0)


def slab():
    atoms = fcc111("Cu", (2, 2, 2), vacuum=6.0)
    add_adsorbate(atoms, "Cu", 1.9, "fcc")
    atoms.rattle(0.08, seed=1)
    atoms.set_constraint(FixAtoms([0, 1, 2, 3]))
    atoms.calc = EMT()
    return atoms


def lj_cluster():
    atoms = cluster()
    atoms.calc = lj()
    return atoms


def morse_molecule():
    atoms = molecule("CH4")
    atoms.rattle(0.1, seed=2)
    atoms.calc = MorsePotential(r0=1.5, rho0=4.0, epsilon=2.0)
    return atoms


def cell():
    atoms = argon()
    atoms.set_cell(atoms.cell.array @ [[1.03, 0.02, 0], [0, 0.98, 0.01], [0, 0, 1.04]], scale_atoms=True)
    atoms.calc = memoryless()
    return FrechetCellFilter(atoms)


def band():
    last = cluster()
    last.positions[0] = [0.0, 1.2, 1.2]
    images = [cluster() if k < 3 else last.copy() for k in range(4)]
    for image in images:
        image.calc = lj()
    neb = NEB(images, k=5.0, method="improvedtangent")
    neb.interpolate()
    return neb


TARGETS = (slab, lj_cluster, morse_molecule, cell, band)


def path_of(optimizer, steps=50, fmax=1e-9):
    """Variables before each step and after the last."""
    return np.array([optimizer.optimizable.get_x() for _ in optimizer.irun(fmax=fmax, steps=steps)])


def timeless(log):
    return re.sub(r"\d\d:\d\d:\d\d", "", log.getvalue())


def both(name, make, steps=50, **arguments):
    """Path and log of ASE's class and of ours."""
    found = []
    for module in (ase.optimize, optimize):
        log = io.StringIO()
        path = path_of(getattr(module, name)(make(), logfile=log, **arguments), steps)
        found.append((path, timeless(log)))
    return found


@pytest.mark.parametrize("make", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_script_keeps_its_path_and_its_log(name, make):
    (expected, expected_log), (path, log) = both(name, make)
    assert np.ptp(expected, axis=0).max() > 0.05
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-10)
    assert log.splitlines() == expected_log.splitlines()


NUMBERS = [
    ("FIRE", {"dt": 0.05, "maxstep": 0.03, "dtmax": 0.2, "Nmin": 2, "finc": 1.3, "fdec": 0.4, "fa": 0.9, "a": 0.2}),
    ("FIRE", {"dt": 0.3, "maxstep": 0.5, "downhill_check": True}),
    ("BFGS", {"alpha": 20.0, "maxstep": 0.02}),
    ("LBFGS", {"alpha": 40.0, "maxstep": 0.02, "memory": 3, "damping": 0.8}),
    ("LBFGS", {"memory": 0}),
    ("QuasiNewton", {"alpha": 20.0, "maxstep": 0.02}),
]


@pytest.mark.parametrize(("name", "numbers"), NUMBERS)
def test_numbers_are_ases(name, numbers):
    (expected, _), (path, _) = both(name, lj_cluster, **numbers)
    (usual, _), _ = both(name, lj_cluster, steps=5)
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-10)
    assert abs(usual[1:6] - expected[1:6]).max() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_ases_in_their_order(name):
    def arguments(cls):
        return [(p.name, p.default) for p in inspect.signature(cls).parameters.values()]

    # ASE hides the signature of FIRE behind a decorator.
    expected = arguments(getattr(ase.optimize, name).__init__)[1:]
    assert arguments(getattr(optimize, name))[: len(expected) - 1] == expected[:-1]


@pytest.mark.parametrize("name", NAMES)
def test_ases_description_of_the_run_is_part_of_ours(name):
    described = []
    for module in (ase.optimize, optimize):
        run = getattr(module, name)(lj_cluster(), logfile=None, maxstep=0.1)
        run.run(fmax=0.01, steps=2)
        described.append(json.loads(json.dumps(run.todict())))
    assert described[0].items() <= described[1].items()


@pytest.mark.parametrize("name", NAMES)
def test_unknown_keywords_are_type_errors(name):
    with pytest.raises(TypeError, match="force_consistent"):
        getattr(optimize, name)(lj_cluster(), logfile=None, force_consistent=True)


class TestFire:
    def test_a_step_uphill_is_reported_as_by_ases(self):
        told = []
        for cls in (ase.optimize.FIRE, optimize.FIRE):
            calls = []
            note = lambda target, x, e, before, calls=calls: calls.append([*x, e, before])  # noqa: E731
            numbers = {"dt": 0.3, "maxstep": 0.5, "downhill_check": True, "position_reset_callback": note}
            cls(lj_cluster(), logfile=None, **numbers).run(fmax=1e-9, steps=30)
            told.append(calls)
        assert len(told[0]) > 1
        np.testing.assert_allclose(told[1], told[0], rtol=0, atol=1e-10)

    def test_the_old_name_of_maxstep_warns(self):
        with pytest.warns(FutureWarning, match="maxmove"):
            assert optimize.FIRE(lj_cluster(), logfile=None, maxmove=0.05).maxstep == 0.05

    def test_it_leaves_the_relaxation_that_relax_returns(self):
        atoms = argon()
        atoms.calc = TorchCalculator(lennard_jones())
        run = optimize.FIRE(atoms, logfile=None, dt=0.03)
        run.run(fmax=0.3, steps=10)
        expected = relax(atoms.calc.potential, argon(), stepper=steppers.FIRE(dt=0.03), fmax=0.3, steps=10)
        np.testing.assert_allclose(run.relaxation.positions.detach(), expected.positions.detach(), rtol=0, atol=1e-12)
        assert run.relaxation.positions.requires_grad

    def test_a_run_that_goes_back_leaves_none(self):
        atoms = argon()
        atoms.calc = TorchCalculator(lennard_jones())
        run = optimize.FIRE(atoms, logfile=None, downhill_check=True)
        run.run(fmax=0.0, steps=3)
        with pytest.raises(RuntimeError, match="downhill_check=True cannot be differentiated"):
            run.relaxation  # noqa: B018


class TestHessian:
    def test_a_first_hessian_of_ones_own_is_used_as_by_ases(self):
        given, paths, last = np.diag(np.linspace(30, 90, 18)), [], []
        for cls in (ase.optimize.BFGS, optimize.BFGS):
            run = cls(lj_cluster(), logfile=None)
            run.H0 = given.copy()
            paths.append(path_of(run, steps=12))
            last.append(run.H)
        np.testing.assert_allclose(paths[1], paths[0], rtol=0, atol=1e-10)
        np.testing.assert_allclose(last[1], last[0], rtol=1e-8, atol=1e-6)

    def test_there_is_none_before_the_first_step(self):
        run = optimize.BFGS(lj_cluster(), logfile=None, alpha=30.0)
        np.testing.assert_array_equal(run.H0, 30 * np.eye(18))
        assert not hasattr(run, "H")

    def test_a_line_search_in_lbfgs_is_refused(self):
        with pytest.raises(NotImplementedError, match=r"ase\.optimize\.LBFGSLineSearch"):
            optimize.LBFGS(lj_cluster(), use_line_search=True)


@pytest.mark.parametrize("name", ["BFGS", "LBFGS", "QuasiNewton"])
class TestReplay:
    @pytest.mark.skipif(not hasattr(Optimizer, "replay_trajectory"), reason="before 3.29, ASE's own fails or leaks")
    @pytest.mark.parametrize("what", ["file", "list"])
    def test_a_trajectory_is_learnt_from_as_by_ases(self, name, what):
        with getattr(ase.optimize, name)(lj_cluster(), logfile=None, trajectory="a.traj") as first:
            first.run(fmax=0.0, steps=6)
        source = "a.traj" if what == "file" else read("a.traj", ":")

        def replayed(module):
            atoms = read("a.traj")
            atoms.calc = lj()
            run = getattr(module, name)(atoms, logfile=None)
            run.replay_trajectory(source)
            return path_of(run, steps=10)

        expected, path = replayed(ase.optimize), replayed(optimize)
        np.testing.assert_allclose(path, expected, rtol=0, atol=1e-10)

    def test_it_is_no_fresh_start(self, name):
        # Otherwise the test above could not fail.
        run = getattr(optimize, name)(lj_cluster(), logfile=None, trajectory="a.traj")
        run.run(fmax=0.0, steps=6)
        paths = []
        for replays in (True, False):
            atoms = read("a.traj")
            atoms.calc = lj()
            run = getattr(optimize, name)(atoms, logfile=None)
            if replays:
                run.replay_trajectory("a.traj")
            paths.append(path_of(run, steps=2))
        assert abs(paths[0] - paths[1]).max() > 1e-6


def test_fire_learns_nothing_from_a_trajectory_and_says_so():
    with pytest.raises(TypeError, match="'fire' learns nothing from a trajectory"):
        optimize.FIRE(lj_cluster(), logfile=None).replay_trajectory([])


RESTARTED = [(name, {}) for name in NAMES] + [
    ("FIRE", {"dt": 0.3, "maxstep": 0.5, "downhill_check": True}),
    ("LBFGS", {"memory": 3}),
]


def plain(atoms):
    return atoms


@pytest.mark.parametrize("target", [plain, FrechetCellFilter])
@pytest.mark.parametrize(("name", "numbers"), RESTARTED)
class TestRestart:
    def optimizer(self, name, atoms, target, **arguments):
        atoms.calc = memoryless()
        return getattr(optimize, name)(target(atoms), logfile=None, **arguments)

    def test_its_path_is_the_uninterrupted_one(self, name, numbers, target):
        expected = path_of(self.optimizer(name, argon(), target, **numbers), steps=16)
        first = self.optimizer(name, argon(), target, restart="a.json", trajectory="a.traj", **numbers)
        path_of(first, steps=7)
        again = self.optimizer(name, read("a.traj"), target, restart="a.json", **numbers)
        np.testing.assert_allclose(path_of(again, steps=9), expected[7:], rtol=0, atol=1e-12)

    def test_without_its_file_the_path_is_another(self, name, numbers, target):
        # Otherwise the test above could not fail.
        expected = path_of(self.optimizer(name, argon(), target, **numbers), steps=9)
        first = self.optimizer(name, argon(), target, trajectory="a.traj", **numbers)
        path_of(first, steps=7)
        again = self.optimizer(name, read("a.traj"), target, **numbers)
        assert abs(path_of(again, steps=2) - expected[7:]).max() > 1e-6


@pytest.mark.parametrize("name", NAMES)
class TestRestartFile:
    def written(self, name):
        run = getattr(optimize, name)(lj_cluster(), logfile=None, restart="a.json")
        run.run(fmax=0.0, steps=2)
        with open("a.json") as file:
            return file.read()

    def test_one_of_another_structure_is_refused(self, name):
        self.written(name)
        with pytest.raises(RestartError, match=r"the restart file a\.json .*not (12|4)\): delete it"):
            getattr(optimize, name)(argon(), logfile=None, restart="a.json")

    @pytest.mark.parametrize("broken", [lambda text: text[:-20], lambda text: "{}", lambda text: "[1, 2]"])
    def test_one_that_is_broken_is_refused(self, name, broken):
        text = broken(self.written(name))
        with open("a.json", "w") as file:
            file.write(text)
        with pytest.raises(RestartError, match=r"the restart file a\.json .*: delete it"):
            getattr(optimize, name)(lj_cluster(), logfile=None, restart="a.json")

    def test_it_stays_whole_when_the_next_one_cannot_be_written(self, name, monkeypatch):
        text = self.written(name)
        monkeypatch.setattr("ase_bptt.optimize.restart.encode", lambda data: 1 / 0)
        run = getattr(optimize, name)(lj_cluster(), logfile=None, restart="a.json")
        with pytest.raises(ZeroDivisionError):
            run.run(fmax=0.0, steps=1)
        with open("a.json") as file:
            assert file.read() == text


class Broken(Calculator):
    """A well whose forces or energies are not finite after some evaluations."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, after, what):
        super().__init__()
        self.after, self.what = after, what

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.after -= 1
        x = atoms.positions - argon().get_center_of_mass()
        self.results = {"energy": (x**4).sum(), "forces": -4 * x**3}
        if self.after < 0:
            self.results[self.what] = self.results[self.what] * np.nan


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_forces_that_are_not_finite_stop_a_run_with_a_sentence(name, after, caplog):
    atoms = argon()
    atoms.calc = Broken(after, "forces")
    run = getattr(optimize, name)(atoms, logfile=None)
    with caplog.at_level(logging.WARNING, logger="ase_bptt"):
        assert not run.run(fmax=1e-6, steps=50)
    assert run.nsteps <= after + 1
    assert np.isfinite(atoms.positions).all()
    (message,) = [r.getMessage() for r in caplog.records]
    assert "The run stops" in message
    assert "forces are not finite" in message


def test_an_energy_that_is_not_finite_stops_a_line_search(caplog):
    atoms = argon()
    atoms.calc = Broken(2, "energy")
    assert not optimize.QuasiNewton(atoms, logfile=None).run(fmax=1e-6, steps=50)
    assert "The run stops" in caplog.text
    assert np.isfinite(atoms.positions).all()


@pytest.mark.parametrize("name", ["BFGS", "LBFGS", "QuasiNewton"])
def test_what_cannot_be_differentiated_leaves_no_relaxation_and_says_so(name):
    atoms = argon()
    atoms.calc = TorchCalculator(lennard_jones())
    run = getattr(optimize, name)(atoms, logfile=None)
    run.run(fmax=0.0, steps=2)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated: relax with FIRE or gradient descent"):
        run.relaxation  # noqa: B018


@pytest.mark.parametrize("name", ["BFGS", "LBFGS"])
def test_nothing_is_recorded_that_nobody_can_use(name):
    atoms = argon()
    atoms.calc = TorchCalculator(lennard_jones())
    run = getattr(optimize, name)(atoms, logfile=None, record=True)
    run.run(fmax=0.0, steps=3)
    assert run._recording.trajectory is None


class Valley(Calculator):
    """Constant forces: nothing to learn a curvature from."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, force):
        super().__init__()
        self.force = force

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        forces = np.full((len(atoms), 3), self.force)
        self.results = {"energy": -self.force * atoms.positions.sum(), "forces": forces}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("force", [0.0, 0.7])
@pytest.mark.parametrize("name", ["FIRE", "BFGS", "LBFGS"])
def test_constant_forces_move_steadily_and_none_not_at_all(name, force, n):
    atoms = Atoms("Ar" * n, positions=np.arange(3.0 * n).reshape(n, 3))
    atoms.calc = Valley(force)
    path = path_of(getattr(optimize, name)(atoms, logfile=None), steps=4, fmax=0.0)
    moves = np.diff(path, axis=0)
    assert np.isfinite(path).all()
    assert ((moves > 0) if force else (moves == 0)).all()
    if force and name != "FIRE":
        np.testing.assert_allclose(moves, force / 70)
