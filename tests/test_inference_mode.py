"""Forces are gradients that exist: true under torch's inference mode, refused where a potential cuts the graph."""

import numpy as np
import pytest
import torch
from helpers.gradients import batch, gradient, sum_of_distances
from helpers.potentials import lennard_jones, needs_chgnet, needs_mace, quick_mace, tiny_chgnet, wide_lennard_jones
from helpers.structures import pentamer, silicon, vacancy

from ase_bptt import BPTTOptimizer, Potential, Prediction, Status, TorchCalculator, load_potential, relax
from ase_bptt.adjoints import FullTape, Guided, Implicit, Replay, Truncated
from ase_bptt.neighbors import NeighborList
from ase_bptt.potentials.direct import Direct
from ase_bptt.potentials.emt import EMT
from ase_bptt.throughput import relax_all

POTENTIALS = [
    pytest.param(lennard_jones, vacancy, id="lj"),
    pytest.param(lambda: quick_mace(14), silicon, id="mace", marks=needs_mace),
    pytest.param(tiny_chgnet, silicon, id="chgnet", marks=needs_chgnet),
    pytest.param(Direct, silicon, id="direct"),
]
every = pytest.mark.parametrize(("make", "atoms"), POTENTIALS)


def asked(potential, atoms, names=("energy", "forces")):
    atoms = atoms.copy()
    atoms.calc = TorchCalculator(potential)
    return [np.asarray(atoms.calc.get_property(name, atoms)) for name in names]


@every
def test_a_calculator_gives_the_forces_of_outside(make, atoms):
    potential = make()
    names = ["energy", "forces", *["stress"] * potential.conservative, *potential.atomic_properties]
    expected = asked(potential, atoms(), names)
    with torch.inference_mode():
        found = asked(potential, atoms(), names)
    assert np.abs(expected[1]).max() > 0
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@every
def test_what_was_made_inside_serves_outside_and_the_other_way_round(make, atoms):
    potential, moved = make(), atoms()
    moved.rattle(0.05, seed=3)
    expected, expected_moved = asked(potential, atoms())[1], asked(potential, moved)[1]
    with torch.inference_mode():
        inside = atoms()
        inside.calc = TorchCalculator(potential)
        np.testing.assert_array_equal(inside.get_forces(), expected)
    inside.positions = moved.positions
    np.testing.assert_allclose(inside.get_forces(), expected_moved, rtol=1e-9, atol=1e-12)
    with torch.inference_mode():
        inside.positions = atoms().positions
        np.testing.assert_allclose(inside.get_forces(), expected, rtol=1e-9, atol=1e-12)


@every
@pytest.mark.parametrize("create_graph", [False, True])
def test_tensors_of_inference_mode_are_taken(make, atoms, create_graph):
    potential = make()
    structures = potential.batch(atoms())
    expected = potential.energy_and_forces(structures, NeighborList(potential.cutoff)(structures))
    with torch.inference_mode():
        theirs = potential.batch(atoms())
        edges = NeighborList(potential.cutoff)(theirs)
        if potential.conservative or not create_graph:
            found = potential.energy_and_forces(theirs, edges, create_graph=create_graph)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-9, atol=1e-12)
    found = potential.energy_and_forces(theirs, edges)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_relaxations_go_where_they_go_outside():
    potential, starts = lennard_jones(), [vacancy(), pentamer()]
    with torch.no_grad():
        expected = relax(potential, starts, steps=30, fmax=1e-3)
    with torch.inference_mode():
        found = relax(potential, starts, steps=30, fmax=1e-3)
        many = dict(relax_all(potential, starts, stepper="fire", steps=30, fmax=1e-3))
    assert expected.nsteps.min() > 3
    assert found.nsteps.tolist() == expected.nsteps.tolist() == [many[k].nsteps for k in range(2)]
    torch.testing.assert_close(found.positions, expected.positions, rtol=0, atol=0)
    assert not found.positions.requires_grad


@pytest.mark.parametrize("stepper", ["fire", "bfgs"])
def test_an_optimizer_run_inside_has_a_gradient_outside(stepper):
    runs = []
    for mode in (torch.enable_grad(), torch.inference_mode()):
        atoms = pentamer()
        atoms.calc = TorchCalculator(lennard_jones().requires_grad_())
        adjoint = "implicit" if stepper == "bfgs" else "replay"
        optimizer = BPTTOptimizer(atoms, logfile=None, stepper=stepper, adjoint=adjoint)
        with mode:
            assert optimizer.run(fmax=5e-3, steps=300)
        relaxation = optimizer.relaxation
        assert relaxation.status == (Status.CONVERGED,)
        weights = list(atoms.calc.potential.parameters())
        runs.append((optimizer.nsteps, gradient(weights, relaxation.positions.square().sum())))
    assert runs[0][0] == runs[1][0] > 3
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=0, atol=0)
    assert all(g != 0 for g in runs[0][1])


ADJOINTS = [FullTape(), Replay(), Replay(differences=True), Truncated(4), Implicit(), Guided(3)]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_a_backward_pass_inside_is_that_of_outside(adjoint):
    potential = lennard_jones().requires_grad_()
    structures = batch(pentamer(), vacancy())
    steps = 500 if adjoint.needs_minimum else 8
    weights = [*potential.parameters(), structures.positions]
    loss = sum_of_distances(relax(potential, structures, steps=steps, adjoint=adjoint).positions, structures)
    expected = gradient(weights, loss)
    loss = sum_of_distances(relax(potential, structures, steps=steps, adjoint=adjoint).positions, structures)
    with torch.inference_mode():
        found = gradient(weights, loss)
    assert expected[0] != 0
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=0)


def test_loading_inside_gives_weights_that_train_outside():
    with torch.inference_mode():
        potential = load_potential("morse")
    relax(potential, pentamer(), steps=3).positions.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite() for p in potential.parameters())
    with torch.inference_mode():
        module = lennard_jones()
    with pytest.raises(ValueError, match=r"The weights of this LennardJones were made under torch.inference_mode\(\)"):
        load_potential(module)


class Cut(Potential):
    """Half a spring to the origin, whose energy has a graph to what is named alone."""

    family = "cut"
    cutoff = 3.0

    def __init__(self, path):
        super().__init__()
        self.path, self.stiffness = path, torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, structures, edges):
        x = structures.positions if self.path == "positions" else structures.positions.detach()
        k = self.stiffness if self.path == "weights" else self.stiffness.detach()
        energy = structures.sum(k * x.square().sum(1) / 2)
        return Prediction(torch.from_numpy(energy.detach().numpy()) if self.path == "nothing" else energy)


@pytest.mark.parametrize("to", ["nothing", "weights"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_potential_that_cuts_the_graph_is_refused(to, requires_grad):
    potential, refused = (
        Cut(to).requires_grad_(requires_grad),
        pytest.raises(RuntimeError, match="this cut potential has no"),
    )
    atoms = pentamer()
    atoms.calc = TorchCalculator(potential)
    with refused:
        atoms.get_forces()
    with refused:
        BPTTOptimizer(atoms, logfile=None).run()
    for mode in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with refused, mode:
            relax(potential, atoms)


def test_a_graph_that_exists_is_believed():
    potential = Cut("positions")
    np.testing.assert_allclose(asked(potential, pentamer())[1], -pentamer().positions, rtol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lennard_jones, wide_lennard_jones, EMT, lambda: load_potential("morse"), Direct,
        pytest.param(lambda: quick_mace(14, 29), marks=needs_mace), pytest.param(tiny_chgnet, marks=needs_chgnet),
    ],
)  # fmt: skip
def test_an_atom_alone_has_no_force_by_a_gradient_that_exists(make):
    alone = silicon()[:1]
    alone.numbers[:] = 29
    alone.cell = [40, 40, 40]
    for pbc in (True, False):
        alone.pbc = pbc
        energy, forces = asked(make(), alone)
        assert np.isfinite(energy)
        np.testing.assert_array_equal(forces, np.zeros((1, 3)))
