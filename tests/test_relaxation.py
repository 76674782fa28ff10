"""relax: what it returns, what it refuses, and the symmetries of physics."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from ase import Atoms
from helpers.potentials import lennard_jones, needs_mace, tiny_mace
from helpers.structures import argon, cluster, silicon, skewed

from ase_bptt import Relaxation, Status, Structures, relax
from ase_bptt.cells import CELLS
from ase_bptt.iterated_map import Checkpointing
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.relaxation import Loop
from ase_bptt.steppers import FIRE, GradientDescent
from ase_bptt.throughput import relax_all


def mace_potential():
    from ase_bptt.potentials.mace import MACE

    return MACE(tiny_mace(elements=(14,), atomic_inter_scale=20.0, max_ell=1))


LJ = (lennard_jones, argon)
MACE = pytest.param(mace_potential, skewed, marks=needs_mace, id="mace")
POTENTIALS = [pytest.param(*LJ, id="lj-crystal"), pytest.param(lennard_jones, cluster, id="lj-cluster"), MACE]


def fire():
    return FIRE(dt=0.03, dtmax=0.06)


@pytest.mark.parametrize(("potential", "make"), POTENTIALS)
def test_the_energy_goes_down_and_the_forces_vanish(potential, make):
    potential, start = potential(), relax(potential(), make(), steps=0)
    relaxation = relax(potential, make(), fmax=0.05, steps=150)
    assert relaxation.status == (Status.CONVERGED,)
    assert relaxation.energies[0] < start.energies[0] - 0.01
    assert relaxation.fmax[0] < 0.05 < start.fmax[0]
    assert relaxation.nsteps.dtype is torch.int64
    assert 0 < relaxation.nsteps[0] < 150


def test_lennard_jones_dimer_ends_at_its_known_minimum():
    atoms = Atoms("Ar2", positions=[[0, 0, 0], [1.3, 0, 0]])
    relaxation = relax(LennardJones(rc=50.0), atoms, stepper=fire(), fmax=1e-8, steps=500)
    assert (relaxation.positions[1] - relaxation.positions[0]).norm().item() == pytest.approx(2 ** (1 / 6))
    assert relaxation.energies.item() == pytest.approx(-1.0)
    # Its two atoms never moved together.
    np.testing.assert_allclose(relaxation.positions.detach().mean(0), [0.65, 0, 0], atol=1e-12)


def test_it_stops_strictly_below_fmax_and_no_frame_later():
    forces = [relax(lennard_jones(), argon(), fmax=0.0, steps=t).fmax.item() for t in range(6)]
    first = next(t for t, f in enumerate(forces) if f <= forces[4])
    stopped = relax(lennard_jones(), argon(), fmax=forces[first] * (1 + 1e-9), steps=20)
    assert stopped.nsteps.tolist() == [first]
    assert relax(lennard_jones(), argon(), fmax=forces[first], steps=20).nsteps[0] > first


def test_no_steps_at_all_is_the_identity():
    relaxation = relax(lennard_jones(), argon(), steps=0)
    assert relaxation.status == (Status.OUT_OF_STEPS,)
    assert "give it more steps" in relaxation.status[0].sentence
    np.testing.assert_array_equal(relaxation.positions.detach(), argon().positions)


@pytest.mark.parametrize("stepper", [GradientDescent(10.0, maxstep=1e3), GradientDescent(0.5)])
def test_a_step_size_that_is_too_large_is_called_diverged(stepper):
    squeezed = Atoms("Ar2", positions=[[0, 0, 0], [1.4, 0, 0]])
    relaxation = relax(lennard_jones(), [argon(), squeezed], stepper=stepper, fmax=0.01, steps=5)
    assert relaxation.status[0] is Status.DIVERGED
    assert "step size is too large" in relaxation.status[0].sentence


def test_every_status_has_a_sentence():
    assert all(status.sentence.endswith(".") for status in Status)
    assert len({status.sentence for status in Status}) == len(Status)


@pytest.mark.parametrize(("potential", "make"), POTENTIALS)
def test_a_batch_ends_where_its_members_end_alone(potential, make):
    potential, members = potential(), [make(), make(seed=7), make(seed=9)]
    together = relax(potential, members, stepper=fire(), fmax=0.3, steps=40)
    for k, atoms in enumerate(members):
        alone = relax(potential, atoms, stepper=fire(), fmax=0.3, steps=40)
        assert together.nsteps[k] == alone.nsteps[0]
        assert together.status[k] is alone.status[0]
        torch.testing.assert_close(together[k].positions, alone.positions, rtol=0, atol=1e-10)
        torch.testing.assert_close(together[k].forces, alone.forces, rtol=0, atol=1e-8)
        torch.testing.assert_close(together.energies[k : k + 1], alone.energies, rtol=0, atol=1e-10)
        torch.testing.assert_close(together.fmax[k : k + 1], alone.fmax, rtol=0, atol=1e-8)


def test_one_structure_of_a_batch_is_attached_to_the_same_run():
    structures = Structures.from_atoms([argon(), cluster()])
    structures.positions.requires_grad_()
    relaxation = relax(lennard_jones(), structures, stepper=fire(), steps=10)
    last = relaxation[-1]
    assert isinstance(last, Relaxation)
    assert len(last) == 1
    assert last.status == relaxation.status[1:]
    assert last.nsteps.tolist() == relaxation.nsteps.tolist()[1:]
    assert last.energies.item() == pytest.approx(relaxation.energies[1].item(), abs=1e-12)
    last.energies.sum().backward()
    gradient = structures.positions.grad
    assert not gradient[:4].any()
    assert gradient[4:].abs().max() > 0
    with pytest.raises(IndexError):
        relaxation[2]


def test_energies_and_fmax_are_attached_to_what_the_positions_are():
    potential = lennard_jones().requires_grad_()
    relaxation = relax(potential, argon(), stepper=fire(), fmax=0.0, steps=12)
    h, derivative = 1e-6, torch.autograd.grad(relaxation.energies.sum() + relaxation.fmax.sum(), potential.sigma)
    found = []
    for step in (-2, -1, 1, 2):
        other = LennardJones(sigma=1 + step * h, rc=2.4, ro=1.8, smooth=True)
        with torch.no_grad():
            moved = relax(other, argon(), stepper=fire(), fmax=0.0, steps=12)
        found.append((moved.energies.sum() + moved.fmax.sum()).item())
    difference = (found[0] - 8 * found[1] + 8 * found[2] - found[3]) / (12 * h)
    assert derivative[0].item() == pytest.approx(difference, rel=1e-6)


def test_nothing_is_attached_without_gradients():
    potential = lennard_jones().requires_grad_()
    with torch.no_grad():
        relaxation = relax(potential, argon(), steps=5)
    frozen = relax(potential.requires_grad_(False), argon(), steps=5)
    for r in (relaxation, frozen):
        assert not any(value.requires_grad for value in (r.positions, r.energies, r.fmax))
        assert r.trajectory.frames == []
    assert torch.equal(relaxation.positions, frozen.positions)


@pytest.mark.parametrize("adjoint", ["full", "replay"])
def test_an_adjoint_does_not_change_where_it_ends(adjoint):
    potential = lennard_jones().requires_grad_()
    attached = relax(potential, [argon(), cluster()], steps=20, adjoint=adjoint)
    with torch.no_grad():
        detached = relax(potential, [argon(), cluster()], steps=20, adjoint=adjoint)
    assert attached.positions.requires_grad
    assert torch.equal(attached.positions, detached.positions)
    torch.testing.assert_close(attached.energies, detached.energies, rtol=0, atol=1e-12)


class TestAtoms:
    def dressed(self):
        atoms = argon()
        atoms.info["name"] = "A1"
        atoms.set_array("charge", np.arange(4.0))
        atoms.set_tags([1, 2, 3, 4])
        return atoms

    def test_one_for_one_and_a_list_for_a_list(self):
        for given, found in [
            (argon(), Atoms),
            ([argon()], list),
            ([argon(), cluster()], list),
            (Structures.from_atoms([argon()]), list),
        ]:
            assert type(relax(lennard_jones(), given, steps=2).to_atoms()) is found

    def test_they_keep_all_that_they_were_given_with(self):
        given = self.dressed()
        relaxed = relax(lennard_jones(), given, steps=5).to_atoms()
        assert relaxed is not given
        assert relaxed.info == {"name": "A1"}
        assert relaxed.arrays["charge"].tolist() == [0, 1, 2, 3]
        assert relaxed.get_tags().tolist() == [1, 2, 3, 4]
        assert np.array_equal(relaxed.cell, given.cell)
        assert relaxed.pbc.all()

    def test_those_that_were_given_are_left_alone(self):
        given = self.dressed()
        relax(lennard_jones(), given, steps=5)
        assert given == self.dressed()
        assert given.calc is None

    def test_they_carry_the_results_of_the_last_frame(self):
        relaxation = relax(lennard_jones().requires_grad_(), [argon(), cluster()], steps=5)
        for k, atoms in enumerate(relaxation.to_atoms()):
            again = relax(lennard_jones(), atoms, steps=0)
            assert atoms.get_potential_energy() == pytest.approx(relaxation.energies[k].item(), abs=1e-12)
            assert atoms.get_potential_energy() == pytest.approx(again.energies.item(), abs=1e-12)
            np.testing.assert_allclose(atoms.get_forces(), again.forces, atol=1e-10)

    def test_one_of_a_batch_gives_one(self):
        relaxation = relax(lennard_jones(), [self.dressed(), cluster()], steps=5)
        assert relaxation[0].to_atoms().info == {"name": "A1"}
        assert isinstance(relaxation[1].to_atoms(), Atoms)

    def test_structures_give_plain_atoms(self):
        atoms = relax(lennard_jones(), Structures.from_atoms([argon()]), steps=5).to_atoms()[0]
        assert atoms.get_chemical_formula() == "Ar4"
        assert np.array_equal(atoms.cell, argon().cell)
        np.testing.assert_allclose(atoms.get_masses(), argon().get_masses())


def test_elements_that_the_potential_does_not_know_are_refused_by_name():
    potential = lennard_jones()
    potential.atomic_numbers = frozenset({18})
    with pytest.raises(NotImplementedError, match=r"no parameters for Si; it knows Ar"):
        relax(potential, [argon(), silicon()])


class TestOneOfAListThatCannotBeRelaxed:
    """It is named by its place, before any is relaxed."""

    BAD: ClassVar = {
        "element": (lambda: silicon(), {}, r"no parameters for Si; it knows Ar"),
        "cell": (lambda: Atoms("Ar", cell=[[3, 0, 0], [6, 0, 0], [0, 0, 3]], pbc=True), {}, "linearly dependent"),
        "collapsed": (lambda: Atoms("Ar", cell=[0.1, 0.1, 0.1], pbc=True), {}, "check its cell and its units"),
        "no cell": (lambda: Atoms("Ar2", positions=np.eye(3)[:2] * 3), CELLS["full"], "has no cell to relax"),
    }

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("by", ["relax", "relax_all"])
    def test_is_named(self, by, bad):
        make, cell, said = self.BAD[bad]
        potential, structures = lennard_jones(), [argon(), argon(), make(), argon()]
        potential.atomic_numbers = frozenset({18})
        run = {
            "relax": lambda: relax(potential, structures, cell=cell or "fixed"),
            "relax_all": lambda: next(relax_all(potential, structures, cells=[cell] * 4 if cell else None)),
        }
        with pytest.raises((ValueError, NotImplementedError), match=rf"^Structure 2\b.*{said}"):
            run[by]()

    @pytest.mark.parametrize("structures", [[None], [argon(), "Ar.xyz"]], ids=["none", "name"])
    def test_what_is_no_structure_is_told(self, structures):
        with pytest.raises(TypeError, match=r"A structure is an Atoms object, and not (None|'Ar.xyz')"):
            relax(lennard_jones(), structures)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="at least one Atoms object"):
        relax(lennard_jones(), [])


def rotation(degrees=35, axis=(1, 2, 3)):
    """Rows of the identity, turned: x @ rotation() turns rows of positions."""
    turn = Atoms("H3", positions=np.eye(3))
    turn.rotate(degrees, axis)
    return turn.positions


def relaxed_and_gradient(potential, atoms, target, stepper):
    """Where it ends, and the gradient of the squared distance to a target."""
    structures = Structures.from_atoms(atoms)
    structures.positions.requires_grad_()
    relaxation = relax(potential, structures, stepper=stepper, fmax=0.0, steps=15)
    loss = (relaxation.positions - torch.from_numpy(target)).square().sum()
    weights = [p for p in potential.parameters() if p.requires_grad]
    inputs = [structures.positions, *weights]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    to_weights = [g.numpy() for g in gradients[1:] if g is not None]
    return relaxation.positions.detach().numpy(), gradients[0].numpy(), to_weights


@pytest.mark.parametrize("stepper", [fire(), GradientDescent(0.002, momentum=0.5)], ids=["fire", "gd"])
@pytest.mark.parametrize(("potential", "make"), POTENTIALS)
class TestSymmetry:
    def check(self, potential, make, stepper, moved, target, expect):
        """`moved` and `target` are moved by the same operation; `expect` moves positions and gradients."""
        before = relaxed_and_gradient(potential, make(), make(seed=21).positions, stepper)
        after = relaxed_and_gradient(potential, moved, target, stepper)
        positions, gradient = expect(before[0], before[1])
        assert abs(before[1]).max() > 0.01
        np.testing.assert_allclose(after[0], positions, rtol=0, atol=1e-9)
        np.testing.assert_allclose(after[1], gradient, rtol=0, atol=1e-7)
        assert len(before[2]) > 1
        for a, b in zip(after[2], before[2], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7)

    def test_translation(self, potential, make, stepper):
        moved, shift = make(), np.array([0.3, -17.0, 5.1])
        moved.translate(shift)
        target = make(seed=21).positions + shift
        self.check(potential().requires_grad_(), make, stepper, moved, target, lambda x, g: (x + shift, g))

    def test_rotation(self, potential, make, stepper):
        moved, turn = make(), rotation()
        moved.set_cell(moved.cell.array @ turn)
        moved.positions = moved.positions @ turn
        target = make(seed=21).positions @ turn
        potential = potential().requires_grad_()
        self.check(potential, make, stepper, moved, target, lambda x, g: (x @ turn, g @ turn))

    def test_permutation(self, potential, make, stepper):
        order = np.arange(len(make()))[::-1]
        target = make(seed=21).positions[order]
        potential = potential().requires_grad_()
        self.check(potential, make, stepper, make()[order], target, lambda x, g: (x[order], g[order]))


def test_wrapping_atoms_into_the_cell_moves_them_by_whole_cells_only():
    atoms = argon()
    outside = atoms.copy()
    outside.positions[1] += 3 * atoms.cell[0] - atoms.cell[2]
    inner, outer = (relax(lennard_jones(), a, stepper=fire(), steps=20).to_atoms() for a in (atoms, outside))
    difference = outer.positions - inner.positions
    np.testing.assert_allclose(difference, outside.positions - atoms.positions, atol=1e-9)


@needs_mace
def test_a_native_module_relaxes_as_it_is():
    model = tiny_mace(elements=(14,))
    relaxation = relax(model, silicon(), steps=2)
    assert relaxation.positions.requires_grad
    assert relaxation.positions.dtype is torch.float64


def test_a_float32_potential_relaxes_in_float32():
    relaxation = relax(lennard_jones().to(torch.float32), argon(), steps=5)
    assert relaxation.positions.dtype is torch.float32
    relaxation.positions.sum().backward()
    assert relaxation.to_atoms().get_forces().dtype == np.float64


def test_a_position_that_is_not_a_number_is_not_converged():
    broken = argon()
    broken.positions[0, 0] = float("nan")
    run = relax(lennard_jones(), [broken, argon()], fmax=0.5, steps=3)
    assert run.status[0] is Status.DIVERGED
    assert run.status[1] is not Status.DIVERGED


def test_structures_in_another_precision_are_computed_in_the_potentials():
    start = Structures.from_atoms(argon())
    start.positions.requires_grad_()
    run = relax(lennard_jones().float(), start, steps=3)
    assert run.positions.dtype is torch.float32
    run.positions.square().sum().backward()
    assert start.positions.grad.dtype is torch.float64
    assert start.positions.grad.abs().max() > 0


def test_a_loop_continues_where_it_paused_and_keeps_a_trajectory_from_its_start_alone():
    potential, settings = lennard_jones(), {"fmax": 1e-3, "steps": 30}
    whole = Loop(potential, "fire", Structures.from_atoms([cluster(), cluster(seed=2)]), **settings).run()
    loop = Loop(potential, "fire", Structures.from_atoms([cluster(), cluster(seed=2)]), **settings)
    paused = loop.run(frames=4)
    assert paused.nsteps == [4, 4]
    with pytest.raises(ValueError, match="kept from its start"):
        loop.run(checkpointing=Checkpointing())
    assert torch.equal(loop.run().final, whole.final)
