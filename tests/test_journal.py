"""The journal of a relaxation of many: what was finished is never done again, and never mixed up."""

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from helpers.potentials import lennard_jones
from helpers.structures import argon, cluster

from ase_bptt import Status
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.throughput import Relaxed
from ase_bptt.throughput.journal import Ends, Journal, run_key


def sources() -> list[Atoms]:
    structures = [argon(1), cluster(), argon(2)]
    structures[0].info["name"] = "first"
    structures[1].set_constraint(FixAtoms([0]))
    structures[2].new_array("site", np.arange(4))
    return structures


def end_of(atoms: Atoms, k: int, status: Status = Status.CONVERGED) -> Relaxed:
    moved = atoms.copy()
    moved.positions += 0.123456789012345
    forces = np.full((len(atoms), 3), 0.1 * k)
    moved.calc = SinglePointCalculator(moved, energy=-1.5 * k, forces=forces)
    return Relaxed(moved, status, 7 + k)


def filled(path, structures) -> Journal:
    journal = Journal(path, "run")
    for k in (2, 0, 1):
        journal.add(k, end_of(structures[k], k, Status.OUT_OF_STEPS if k == 1 else Status.CONVERGED))
    return journal


@pytest.fixture
def kept(tmp_path):
    """What the journals in the folder hold."""
    every = []

    def read(structures, run="run"):
        every.append(Ends(tmp_path, run, structures))
        return every[-1]

    yield read
    for ends in every:
        ends.close()


def test_ends_come_back_exactly_with_all_that_their_structures_hold(tmp_path, kept):
    structures = sources()
    filled(tmp_path / "j.traj", structures)
    ends = kept(structures)
    assert sorted(ends.places) == [0, 1, 2]
    for k, end in enumerate(ends):
        np.testing.assert_array_equal(end.atoms.positions, structures[k].positions + 0.123456789012345)
        assert end.atoms.get_potential_energy() == -1.5 * k
        np.testing.assert_array_equal(
            end.atoms.get_forces(apply_constraint=False), np.full((len(end.atoms), 3), 0.1 * k)
        )
        assert end.nsteps == 7 + k
    assert ends[1].status is Status.OUT_OF_STEPS
    assert ends[0].atoms.info == {"name": "first"}
    assert len(ends[1].atoms.constraints) == 1
    np.testing.assert_array_equal(ends[2].atoms.arrays["site"], np.arange(4))


@pytest.mark.parametrize("missing", [1, 8, 40, 200])
def test_an_end_that_was_cut_off_is_done_again(tmp_path, kept, missing):
    structures = sources()
    journal = filled(tmp_path / "j.traj", structures)
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[:-missing])
    ends = kept(structures)
    assert set(ends.places) <= {0, 1, 2}
    assert 1 not in ends.places
    Journal(tmp_path / "of another process.traj", "run").add(1, end_of(structures[1], 1))
    ends.update()
    assert ends[1].nsteps == 8


def test_no_journal_is_an_empty_one(tmp_path, kept):
    assert not kept(sources()).places
    (tmp_path / "empty.traj").touch()
    assert not kept(sources()).places


def test_what_another_run_has_kept_is_not_taken(tmp_path, kept):
    structures = sources()
    filled(tmp_path / "j.traj", structures)
    argon().write(tmp_path / "of somebody else.traj")
    assert not kept(structures, "another").places
    assert len(kept(structures).places) == 3


def test_an_end_twice_in_the_journals_counts_once(tmp_path, kept):
    structures = sources()
    for name in ("a.traj", "b.traj"):
        filled(tmp_path / name, structures)
    assert len(kept(structures).places) == len(kept(structures)) == 3


def other_weights():
    return LennardJones(sigma=1.01, smooth=True, rc=2.4, ro=1.8), sources(), {"fmax": 0.05}


def other_structures():
    structures = sources()
    structures[1].positions[0, 0] += 1e-9
    return lennard_jones(), structures, {"fmax": 0.05}


def other_settings():
    return lennard_jones(), sources(), {"fmax": 0.02}


def other_constraints():
    structures = sources()
    structures[0].set_constraint(FixAtoms([1]))
    return lennard_jones(), structures, {"fmax": 0.05}


def other_masses():
    structures = sources()
    structures[0].set_masses([1.0] * 4)
    return lennard_jones(), structures, {"fmax": 0.05}


@pytest.mark.parametrize("other", [other_weights, other_structures, other_settings, other_constraints, other_masses])
def test_a_run_is_known_by_weights_structures_and_settings(other):
    key = run_key(lennard_jones(), sources(), {"fmax": 0.05})
    assert key == run_key(lennard_jones(), sources(), {"fmax": 0.05})
    assert key != run_key(*other())
