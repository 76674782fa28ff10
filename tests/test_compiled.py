"""Relaxing with compiled forces: the same ends, few compilations, and relaxations that go on where compiling fails."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import read
from helpers.potentials import needs_chgnet, needs_mace, tiny_chgnet, tiny_mace
from helpers.shell import run, write_relaxations

from ase_bptt import Prediction, load_potential, relax, search_minima
from ase_bptt.cells import CellFreedom
from ase_bptt.iterated_map import IteratedMap
from ase_bptt.neighbors import NeighborList
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.potentials.direct import Direct
from ase_bptt.relaxation import rows_of
from ase_bptt.steppers import FIRE
from ase_bptt.throughput import compilation, relax_all
from ase_bptt.throughput.compilation import compiled


class Counted:
    """torch.compile's "eager" backend, counted."""

    def __init__(self):
        self.n = 0

    def __call__(self, graph, inputs):
        self.n += 1
        return graph.forward


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Compile at the third call."""
    monkeypatch.setattr(compilation, "FIRST", 3)


def lj(cls=LennardJones):
    return cls(sigma=3.4, epsilon=0.0104, rc=9.0, smooth=True, ro=8.0)


def crystals(n: int = 12) -> list[Atoms]:
    """Of 4 to 16 atoms."""
    found = [bulk("Ar", a=5.3, cubic=True).repeat((1 + k % 4 // 2, 1 + k % 2, 1)) for k in range(n)]
    for k, atoms in enumerate(found):
        atoms.rattle(0.1, seed=k)
    return found


def ends_of(potential, structures, **how):
    ends = dict(relax_all(potential, structures, fmax=1e-3, steps=15, batch_size=4, **how))
    return [ends[k] for k in range(len(structures))]


def forces_of(potential):
    return vars(potential)["energy_and_forces"]


def evaluated(potential, structures, cell="fixed", pressure=0.0):
    """Energies and forces of a batch, with rows of cells where they move."""
    batch = potential.batch(structures)
    if cell != "fixed":
        freedom = CellFreedom.of(cell, pressure)
        batch = rows_of(batch, [freedom] * len(batch), IteratedMap(potential, FIRE()))
    return potential.energy_and_forces(batch, NeighborList(potential.cutoff)(batch))


@pytest.mark.parametrize(("cell", "pressure"), [("fixed", 0.0), ("full", 0.0), ("full", 0.01), ("hydrostatic", 0.01)])
def test_same_ends_with_refilling(cell, pressure, monkeypatch):
    backend, potential = Counted(), lj()
    made = compiled(potential, backend)
    cells = [CellFreedom.of(cell, pressure)] * 12
    expected = ends_of(potential, crystals(), cells=cells)
    found = ends_of(made, crystals(), cells=cells)
    for a, b in zip(found, expected, strict=True):
        assert (a.status, a.nsteps) == (b.status, b.nsteps)
        assert a.atoms.positions == pytest.approx(b.atoms.positions, abs=1e-10)
        assert a.atoms.cell.array == pytest.approx(b.atoms.cell.array, abs=1e-10)
        for name, value in b.atoms.calc.results.items():
            assert a.atoms.calc.results[name] == pytest.approx(value, abs=1e-10)
    forces = forces_of(made)
    assert forces.n_compiled > forces.n_calls / 2
    assert 1 <= backend.n == forces.compilations <= 3


def test_no_recompilation_in_the_steady_state():
    backend = Counted()
    made = compiled(lj(), backend)
    ends_of(made, crystals(16))
    before = backend.n
    for _ in range(2):
        ends_of(made, crystals(16))
    assert backend.n == before <= compilation.MOST


FAMILIES = [
    pytest.param(lambda: load_potential(tiny_mace()), id="mace", marks=needs_mace),
    pytest.param(tiny_chgnet, id="chgnet", marks=needs_chgnet),
]


@pytest.mark.parametrize("make", FAMILIES)
def test_families(make):
    potential = make().double()
    made = compiled(potential, Counted())
    silicon = [bulk("Si", cubic=True) for _ in range(3)]
    for k, atoms in enumerate(silicon):
        atoms.rattle(0.05, seed=k)
    for some in (*3 * [silicon], silicon[1:] + silicon[:1]):
        for value, right in zip(evaluated(made, some), evaluated(potential, some), strict=True):
            assert value.numpy() == pytest.approx(right.numpy(), abs=1e-10)
    assert forces_of(made).n_compiled >= 2


@needs_chgnet
def test_a_structure_without_angles_is_computed_uncompiled(caplog):
    potential = tiny_chgnet()
    made = compiled(potential, Counted())
    far = Atoms("Si2", [[0, 0, 0], [4.0, 0, 0]], cell=[20, 20, 20], pbc=True)
    for _ in range(4):
        evaluated(made, [bulk("Si"), far])
    assert forces_of(made).n_compiled == 0
    assert not caplog.records


def test_weights_that_change_are_seen():
    potential = lj()
    made = compiled(potential, Counted())
    for _ in range(4):
        before, _ = evaluated(made, crystals(3))
    with torch.no_grad():
        potential.epsilon.mul_(2.0)
    after, _ = evaluated(made, crystals(3))
    assert after.numpy() == pytest.approx(2 * before.numpy())
    assert compiled(potential, forces_of(made)._backend) is made
    potential.epsilon = torch.nn.Parameter(potential.epsilon.detach().clone())
    assert compiled(potential, forces_of(made)._backend) is not made


def test_nothing_is_kept_alive():
    potential = lj()
    made = compiled(potential, Counted())
    evaluated(made, crystals(2))
    gone = weakref.ref(potential)
    del potential
    gc.collect()
    assert gone() is None


def test_gradients_are_those_without():
    potential = lj()
    made = compiled(potential, Counted())
    for _ in range(4):
        evaluated(made, crystals(2))
    relax(made, crystals(2), steps=3).energies.sum().backward()
    found, potential.epsilon.grad = potential.epsilon.grad, None
    relax(potential, crystals(2), steps=3).energies.sum().backward()
    assert found == potential.epsilon.grad


class LooksAtValues(LennardJones):
    def forward(self, structures, edges):
        assert structures.positions.sum().item() < 1e9
        return super().forward(structures, edges)


class LooksAtCounts(LennardJones):
    def forward(self, structures, edges):
        found = super().forward(structures, edges)
        return Prediction(found.energy + found.energy.new_tensor(structures.counts))


class Remembers(LennardJones):
    """A number of the first batch is a constant of the compiled code."""

    def forward(self, structures, edges):
        found = super().forward(structures, edges)
        return Prediction(found.energy * (1.0 + 1e-3 * len(torch.unique(structures.numbers))))


def no_compiler(graph, inputs):
    raise RuntimeError("No working C++ compiler found")


@pytest.mark.parametrize(
    ("potential", "backend", "why"),
    [
        (
            lj(LooksAtValues),
            Counted(),
            "compiling has failed (RuntimeError: It appears that you're trying to",
        ),
        (
            lj(LooksAtCounts),
            Counted(),
            "compiling has failed (ValueError: could not determine the shape of",
        ),
        (lj(), no_compiler, "compiling has failed (RuntimeError: No working C++ compiler found)"),
        (Direct(), Counted(), "they are predicted directly, by no gradient"),
    ],
)
def test_goes_on_uncompiled_with_one_warning(potential, backend, why, caplog):
    made = compiled(potential, backend)
    found, expected = (ends_of(each, crystals(6)) for each in (made, potential))
    for a, b in zip(found, expected, strict=True):
        assert (a.atoms.positions == b.atoms.positions).all()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "ase_bptt" in r.name]
    assert warning.startswith(f"The forces of this {potential.family} potential are computed uncompiled, in more time,")
    assert why in warning


def test_wrong_numbers_are_not_used(caplog):
    def off(graph, inputs):
        return lambda *given: (graph(*given)[0] + 1e-6, *graph(*given)[1:])

    potential = lj()
    made = compiled(potential, off)
    for _ in range(5):
        energy, _ = evaluated(made, crystals(3))
    assert (energy == evaluated(potential, crystals(3))[0]).all()
    assert "compiled energies are off by 1.0e-06, of which 1e-08 is allowed" in caplog.text
    assert forces_of(made).n_compiled == 1


def test_constants_of_the_first_batch_are_noticed(caplog):
    potential = lj(Remembers)
    made = compiled(potential, Counted())
    mixed = crystals(3)
    mixed[0].numbers[0] = 36
    for _ in range(4):
        evaluated(made, crystals(3))
    for _ in range(5):
        energy, _ = evaluated(made, mixed)
    assert (energy == evaluated(potential, mixed)[0]).all()
    assert "compiled energies are off by" in caplog.text


def test_memory_that_runs_out_is_not_a_failure_to_compile(monkeypatch):
    def full(*args, **how):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(compilation, "_traced", full)
    made = compiled(lj(), Counted())
    for _ in range(2):
        evaluated(made, crystals(3))
    with pytest.raises(torch.OutOfMemoryError):
        evaluated(made, crystals(3))
    assert not forces_of(made)._given_up


def test_diverging_structures_leave_the_others_alone():
    structures = crystals(6)
    structures[2].positions[0] = structures[2].positions[1] + 1e-3
    potential = lj()
    found, expected = (ends_of(each, structures) for each in (compiled(potential, Counted()), potential))
    for a, b in zip(found, expected, strict=True):
        assert a.status == b.status
        assert a.atoms.positions == pytest.approx(b.atoms.positions, abs=1e-8, nan_ok=True)


def test_threads():
    potential = lj()
    expected = [end.atoms.positions for end in ends_of(potential, crystals())]
    made, found = compiled(potential, Counted()), {}

    def run(k):
        found[k] = [end.atoms.positions for end in ends_of(made, crystals())]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for positions in found.values():
        for a, b in zip(positions, expected, strict=True):
            assert a == pytest.approx(b, abs=1e-10)


def test_nothing_of_the_process_is_changed():
    def state():
        return torch._dynamo.config.get_config_copy(), torch.get_default_dtype(), torch.is_grad_enabled()

    before = state()
    made = compiled(lj(), Counted())
    with torch.inference_mode():
        for _ in range(4):
            evaluated(made, crystals(3))
    assert forces_of(made).n_compiled == 2
    assert state() == before


def test_keywords(monkeypatch):
    made = []
    monkeypatch.setattr("ase_bptt.throughput.compiled", lambda p: made.append(compiled(p, Counted())) or made[-1])
    potential = load_potential("emt")
    molecules = [molecule("N2"), molecule("CO")]
    for compile in (False, True):
        ends = dict(relax_all(potential, molecules, compile=compile))
        assert all(np.isfinite(ends[k].atoms.positions).all() for k in range(2))
    search_minima(potential, molecules[0], n=2, compile=True)
    assert len(made) == 2


def test_in_the_shell(tmp_path, monkeypatch):
    """With what follows from the arguments, and the same ends."""
    write_relaxations(tmp_path)
    asked = []
    monkeypatch.setattr("ase_bptt.throughput.compiled", lambda p: asked.append(p) or compiled(p, Counted()))
    how = ["--potential", tmp_path / "lj", "--steps", 5]
    ends = []
    for k, flag in enumerate(([], ["--compile"])):
        code, _, said = run("relax", tmp_path / "initial.extxyz", *how, *flag, "--out", tmp_path / f"{k}.extxyz")
        assert code == 3, said
        ends.append(np.concatenate([atoms.positions for atoms in read(tmp_path / f"{k}.extxyz", ":")]))
        assert len(asked) == k
    assert ends[1] == pytest.approx(ends[0], abs=1e-7)
    assert run("evaluate", tmp_path / "pairs", *how, "--compile", "--out", tmp_path / "e")[0] == 0
    assert run("search", tmp_path / "initial.extxyz", *how, "-n", 1, "--compile", "--out", tmp_path / "s")[0] == 0
    assert len(asked) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, where compiling is quick")
def test_inductor():
    potential = lj().to("cuda")
    made = compiled(potential)
    for _ in range(4):
        found = evaluated(made, crystals(3))
    for value, right in zip(found, evaluated(potential, crystals(3)), strict=True):
        assert value.cpu().numpy() == pytest.approx(right.cpu().numpy(), abs=1e-8)
