"""Many unlike structures at once: each has the path, the end and the gradient that it would have had alone."""

from functools import cache, partial
from unittest import mock

import numpy as np
import pytest
import torch
from ase import Atoms
from helpers.potentials import Narrow, lennard_jones, tiny_mace
from helpers.structures import argon, cluster, pentamer, rattled, silicon, vacancy
from torch.utils._python_dispatch import TorchDispatchMode

from ase_bptt import Status, delta_q, load_potential, relax
from ase_bptt.adjoints import FullTape, Guided, Implicit, OneStep, Replay, Truncated
from ase_bptt.steppers import BFGS, FIRE, LBFGS, GradientDescent
from ase_bptt.throughput import relax_all
from ase_bptt.throughput.memory import peak_bytes

SETTINGS = {"fmax": 0.02, "steps": 60}


def zoo(n: int) -> list[Atoms]:
    """Crystals, vacancies, clusters and a dimer of 2 to 15 atoms, each rattled in its own way."""
    kinds = [
        argon,
        vacancy,
        cluster,
        lambda seed: cluster(3, seed),
        pentamer,
        lambda seed: argon(seed).repeat((2, 1, 1)),
    ]
    return [kinds[k % len(kinds)](seed=k + 1) for k in range(n)]


def lost() -> Atoms:
    atoms = argon(4)
    atoms.positions[1, 2] = np.nan
    return atoms


def bursting() -> Atoms:
    """Two atoms so close that they fly apart."""
    return Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 0.02]])


STEPPERS = {
    "fire": partial(FIRE, dt=0.03, dtmax=0.06),
    "gd": partial(GradientDescent, 0.002),
    "momentum": partial(GradientDescent, 0.001, anneal=0.99, momentum=0.8),
    "bfgs": BFGS,
    "lbfgs": LBFGS,
    "short memory": partial(LBFGS, memory=3),
}


@cache
@torch.no_grad()
def alone_in_zoo(k, name):
    return relax(lennard_jones(), zoo(k + 1)[k], stepper=STEPPERS[name](), **SETTINGS)


def agree(ends, alone_of):
    for k, end in ends:
        alone = alone_of(k)
        assert (end.status, end.nsteps) == (alone.status[0], int(alone.nsteps[0])), k
        np.testing.assert_allclose(end.atoms.positions, alone.to_atoms().positions, atol=1e-10, rtol=0)
        assert end.atoms.get_potential_energy() == pytest.approx(alone.energies.item(), abs=1e-10)


@pytest.mark.parametrize("name", STEPPERS)
@pytest.mark.parametrize("batch_size", [5, None])
def test_32_unlike_structures_end_where_each_ends_alone(name, batch_size):
    stepper = STEPPERS[name]()
    ends = list(relax_all(lennard_jones(), zoo(32), stepper=stepper, batch_size=batch_size, **SETTINGS))
    assert sorted(k for k, _ in ends) == list(range(32))
    agree(ends, partial(alone_in_zoo, name=name))


def test_the_same_with_mace():
    structures = [rattled(silicon().repeat((1 + k % 2, 1, 1)), 0.03, seed=k) for k in range(6)]
    potential = load_potential(tiny_mace())
    with torch.no_grad():
        ends = list(relax_all(potential, structures, batch_size=4, **SETTINGS))
        agree(ends, lambda k: relax(potential, structures[k], **SETTINGS))


@pytest.mark.parametrize("bad", [lost, bursting], ids=["NaN", "flies apart"])
@pytest.mark.parametrize("name", STEPPERS)
def test_one_that_goes_wrong_changes_no_other(bad, name):
    structures = [*zoo(5), bad()]
    ends = dict(relax_all(lennard_jones(), structures[::-1], stepper=STEPPERS[name](), batch_size=4, **SETTINGS))
    wrong = ends.pop(0)
    assert wrong.status is Status.DIVERGED or wrong.atoms.get_distance(0, 1) > 0.3
    agree([(5 - k, end) for k, end in ends.items()], partial(alone_in_zoo, name=name))


ADJOINTS = {
    "full": FullTape(),
    "replay": Replay(),
    "replay, every 4": Replay(every=4),
    "truncated": Truncated(5),
    "implicit": Implicit(tolerance=1e-12, fmax=1e-5),
    "one-step": OneStep(fmax=1e-3),
    "guided": Guided(6),
}


def gradients(structures, adjoint, stepper):
    """Of the mean Delta-Q to the starts, by the weights of a Lennard-Jones potential."""
    potential = lennard_jones().requires_grad_()
    run = relax(potential, structures, stepper=stepper, adjoint=adjoint, fmax=0.02, steps=2000)
    loss = delta_q(run, structures).mean()
    if run.early is not None:
        loss = loss + delta_q(run.early, structures).mean()
    return torch.stack(torch.autograd.grad(loss, list(potential.parameters()))), run.nsteps.tolist()


@pytest.mark.filterwarnings("ignore::ase_bptt.adjoints.GradientWarning")  # one of them does not converge
@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
def test_gradients_are_the_mean_of_the_single_ones(adjoint):
    structures = zoo(32 if adjoint == Replay() else 6)
    stepper = BFGS() if not adjoint.through_frames else FIRE(dt=0.03, dtmax=0.06)
    together, nsteps = gradients(structures, adjoint, stepper)
    single = [gradients([atoms], adjoint, stepper) for atoms in structures]
    assert nsteps == [n for _, (n,) in single]
    expected = torch.stack([gradient for gradient, _ in single]).mean(0)
    torch.testing.assert_close(together, expected, atol=1e-10, rtol=1e-8 if isinstance(adjoint, Implicit) else 1e-10)


@pytest.mark.parametrize("most", [15, 20, 40])
@pytest.mark.parametrize("name", ["fire", "lbfgs"])
def test_where_memory_runs_out_fewer_go_on_and_all_end_as_alone(most, name, caplog):
    narrow = Narrow(lennard_jones(), most)
    ends = list(relax_all(narrow, zoo(12), stepper=STEPPERS[name](), **SETTINGS))
    assert sorted(k for k, _ in ends) == list(range(12))
    agree(ends, partial(alone_in_zoo, name=name))
    assert "Memory ran out on 12 structures at once: continuing with half as many." in caplog.text
    assert narrow.largest > most // 2


def test_a_structure_that_never_fits_is_reported():
    with pytest.raises(MemoryError, match="single structure"):
        list(relax_all(Narrow(lennard_jones(), 3), zoo(4), **SETTINGS))


def test_a_place_that_becomes_free_is_taken_at_once():
    sizes = []
    potential = lennard_jones()
    evaluate = type(potential).energy_and_forces

    def spied(self, structures, pairs, **how):
        sizes.append(len(structures))
        return evaluate(self, structures, pairs, **how)

    with mock.patch.object(type(potential), "energy_and_forces", spied):
        ends = [
            end for _, end in relax_all(potential, zoo(12), stepper=FIRE(dt=0.03, dtmax=0.06), batch_size=4, **SETTINGS)
        ]
    assert len({end.nsteps for end in ends}) > 4
    # Full until the queue is empty.
    assert set(sizes[: sum(sizes) // 4 - max(end.nsteps for end in ends)]) == {4}
    assert sum(sizes) == sum(end.nsteps + 1 for end in ends)


WAITS = ("nonzero", "_local_scalar_dense", "equal", "is_nonzero", "masked_select")
"""Operations for whose result the host waits."""


class Waiting(TorchDispatchMode):
    """Takes note of them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        boolean = name == "index" and any(x is not None and x.dtype is torch.bool for x in args[1])
        if name in WAITS or boolean:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_a_frame_asks_the_device_once():
    calls = []
    structures = [rattled(argon().repeat((2, 2, 1)), 0.01, seed=k) for k in range(4)]
    real = torch.Tensor.tolist
    with mock.patch.object(torch.Tensor, "tolist", lambda x: calls.append(1) or real(x)):
        stream = relax_all(lennard_jones(), structures, stepper=GradientDescent(1e-4), fmax=1e-9, steps=30)
        with Waiting() as waiting:
            ends = list(stream)
    assert {end.nsteps for _, end in ends} == {30}
    # One each; the others begin and end the run.
    assert 31 <= len(calls) <= 31 + 6
    assert len(waiting.seen) <= 12, waiting.seen


@pytest.mark.parametrize("stepper", [STEPPERS["fire"], STEPPERS["short memory"]], ids=["fire", "short memory"])
def test_a_long_run_takes_no_more_memory_than_a_short_one(stepper):
    short, long = (
        peak_bytes(
            lambda steps=steps: list(relax_all(lennard_jones(), zoo(3), stepper=stepper(), fmax=0, steps=steps))
        )[1]
        for steps in (10, 60)
    )
    assert long < 1.1 * short
