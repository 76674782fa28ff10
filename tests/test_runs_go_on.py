"""ASE runs that continue, are changed in between or started again, and what their relaxations are then."""

import numpy as np
import pytest
import torch
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from helpers.gradients import gradient
from helpers.potentials import lennard_jones
from helpers.structures import argon, cluster

from ase_bptt import BPTTOptimizer, TorchCalculator, as_relaxation
from ase_bptt.steppers import GradientDescent


def with_potential(atoms):
    atoms.calc = TorchCalculator(lennard_jones().requires_grad_())
    return atoms


def gradients(relaxation, atoms):
    """Of a distance within the structure, by the weights."""
    x = relaxation.positions
    return torch.stack(gradient(list(atoms.calc.potential.parameters()), (x[0] - x[2]).norm() + (x[1] - x[3]).norm()))


def test_a_relaxation_stays_what_it_was_when_the_run_continues():
    found = []
    for again in (0, 3):
        atoms = with_potential(cluster())
        optimizer = BPTTOptimizer(atoms, logfile=None, dt=0.03)
        optimizer.run(fmax=0, steps=2)
        first = optimizer.relaxation
        if again:
            optimizer.run(fmax=0, steps=again)
            assert optimizer.relaxation.nsteps.tolist() == [2 + again]
        found.append((first.nsteps.tolist(), gradients(first, atoms)))
    assert found[0][0] == found[1][0] == [2]
    assert torch.equal(found[0][1], found[1][1])


def test_the_minimum_is_that_of_the_atoms_whatever_constraints_the_start_had():
    atoms = with_potential(cluster())
    begun = atoms.copy()
    atoms.set_constraint(FixAtoms([0, 1]))
    BFGS(atoms, logfile=None).run(fmax=1e-4)
    with_start, without = as_relaxation(atoms, initial=begun), as_relaxation(atoms)
    assert np.array_equal(with_start.start.positions.detach().numpy(), begun.positions)
    assert torch.equal(gradients(with_start, atoms), gradients(without, atoms))


def test_a_start_in_another_cell_is_refused():
    atoms = with_potential(argon())
    begun = atoms.copy()
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-3)
    with pytest.raises(ValueError, match="do not hold the same atoms in the same order and cell"):
        as_relaxation(atoms, initial=begun)


def test_atoms_that_were_changed_between_two_runs_end_in_their_own_cell():
    atoms = with_potential(argon())
    optimizer = BPTTOptimizer(atoms, logfile=None, stepper="bfgs", adjoint="implicit")
    optimizer.run(fmax=1e-3)
    atoms.set_cell(atoms.cell.array * 1.02, scale_atoms=True)
    optimizer.run(fmax=1e-3)
    assert np.array_equal(optimizer.relaxation.start.cells[0].numpy(), atoms.cell.array)


def test_an_automatic_step_size_continues_from_a_restart_file():
    ends = []
    for steps in ([6], [2, 4]):
        atoms = with_potential(argon())
        for k, n in enumerate(steps):
            restart = f"{len(steps)}.json"
            optimizer = BPTTOptimizer(atoms, restart=restart, logfile=None, stepper=GradientDescent("auto"))
            optimizer.run(fmax=0, steps=n)
            assert optimizer.stepper.step_size > 0, k
        ends.append(atoms.positions)
    assert np.array_equal(*ends)


def test_an_automatic_step_is_refused_where_a_filter_moves():
    with pytest.raises(ValueError, match="asks the potential of Atoms"):
        BPTTOptimizer(FrechetCellFilter(with_potential(argon())), stepper="gd", step_size="auto")
