"""What objects print: a line for each structure at most, whatever tensors they hold."""

import numpy as np
import pytest
import torch
from ase.constraints import FixAtoms
from helpers.potentials import lennard_jones
from helpers.structures import argon, cluster

from ase_bptt import RelaxationPair, Status, Structures, evaluate, relax


@pytest.mark.parametrize("adjoint", ["replay", "full", "guided:3"])
@pytest.mark.parametrize("n", [1, 3, 20, 21, 200])
def test_a_relaxation_prints_a_line_for_each_structure(n, adjoint):
    relaxation = relax(lennard_jones(), [cluster() for _ in range(n)], steps=2, adjoint=adjoint)
    lines = str(relaxation).splitlines()
    assert len(lines) == min(n, 20)
    assert all(len(line) < 100 for line in lines)
    assert lines[0].startswith(f"Relaxation[0]: Ar{len(cluster())}, ")
    assert (lines[-1] == f"Relaxation: and {n - 19} others") == (n > 20)


def test_its_numbers_are_those_of_the_end():
    atoms = cluster()
    atoms.set_constraint(FixAtoms([0]))
    relaxation = relax(lennard_jones(), atoms, steps=300)
    assert relaxation.status == (Status.CONVERGED,)
    energy, fmax = relaxation.energies.item(), relaxation.fmax.item()
    expected = f"converged after {int(relaxation.nsteps)} frames, energy {energy:.4f} eV, fmax {fmax:.4f} eV/Å"
    assert repr(relaxation) == f"Relaxation: {atoms.get_chemical_formula()}, {expected}"
    with torch.no_grad():  # a gradient is not needed, and weights that have changed do not matter
        for weight in relaxation.trajectory.map.potential.parameters():
            weight.mul_(1.1)
    assert repr(relaxation[0]).endswith(expected)


def test_a_run_that_diverged_prints_a_line_too():
    atoms = argon()
    atoms.positions[0] = np.nan
    assert "diverged after 0 frames, energy " in str(relax(lennard_jones(), atoms, steps=3))


def test_others_take_one_line():
    potential, members = lennard_jones(), [argon(), cluster(), argon(1), argon(2)]
    relaxation = relax(potential, members, steps=2)
    pair = RelaxationPair(members[1], members[1], "a", "b", frames=[members[1]] * 50)
    n = sum(map(len, members))
    for found, text in (
        (relaxation.start, f", ...; 4 in all, {n} atoms, float64 on cpu)"),
        (Structures.from_atoms(members[0]), f"Structures(Ar{len(members[0])}; 1 in all, "),
        (relaxation.trajectory, "Trajectory(4 in all, 2 frames at most, kept)"),
        (relaxation.trajectory.ends[0], "out of steps after 2 frames"),
        (pair, f"RelaxationPair('a', {members[1].symbols}, group 'b')"),
        (evaluate(potential, [pair], steps=2), "Evaluation(1 in all, Delta-Q "),
    ):
        assert text in str(found)
        assert len(str(found).splitlines()) == 1
        assert len(str(found)) < 120
