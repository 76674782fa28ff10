"""Changed weights are known, in whatever way they were changed: no stale energy, and no gradient of neither model."""

import copy
import pickle
import time
from functools import partial

import numpy as np
import pytest
import torch
from ase import Atoms
from helpers.potentials import lennard_jones, needs_chgnet, needs_mace, quick_mace, tiny_chgnet
from helpers.structures import pentamer, silicon
from torch import nn
from torch.optim import swa_utils

from ase_bptt import BPTTOptimizer, Potential, Prediction, TorchCalculator, load_potential, relax
from ase_bptt.steppers import FIRE, GradientDescent
from ase_bptt.weights import _Copy, weights_version


class Network(Potential):
    """A sum over the neighbours of a small function of the distance, with a buffer and weights of several shapes."""

    family = "network"
    cutoff = 6.0

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(1, 4, dtype=dtype), nn.Linear(4, 1, dtype=dtype)
        for p in self.parameters():
            p.data = torch.rand(p.shape, generator=generator, dtype=dtype)
        self.mix = nn.Parameter(torch.rand(4, 4, generator=generator, dtype=dtype))
        self.register_buffer("scale", torch.tensor([0.7, 1.3], dtype=dtype))

    def forward(self, structures, edges):
        r = edges.vectors(structures).norm(dim=1, keepdim=True)
        hidden = torch.tanh(self.first(r)) @ self.mix
        pair = self.last(torch.tanh(hidden)).squeeze(1) * self.scale[0] * (r.squeeze(1) / 6 - 1) ** 2 + self.scale[1]
        atomic = pair.new_zeros(structures.n_atoms).index_add(0, edges.i, pair)
        return Prediction(structures.sum(atomic))


def step(potential, make):
    optimizer = make(potential.parameters())
    for p in potential.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def through_data(potential):
    potential.mix.data.mul_(1.05)


def another_storage(potential):
    potential.mix.data = potential.mix.detach() * 1.05


def transposed_in_place(potential):
    potential.mix.data = potential.mix.data.T


def set_to_another(potential):
    with torch.no_grad():
        potential.mix.set_(potential.mix.detach() * 1.05)


def two_swapped(potential):
    with torch.no_grad():
        potential.mix[[0, 1]] = potential.mix[[1, 0]].clone()


def two_tensors_swapped(potential):
    a, b = potential.first, potential.last
    a.weight.data, b.weight.data = b.weight.data.T.contiguous(), a.weight.data.T.contiguous()


def by_numpy(potential):
    potential.mix.detach().numpy()[0, 0] += 1e-3


def one_bit(potential):
    bits = potential.mix.detach().numpy().view(np.int64)
    bits[2, 3] ^= 1 << 40


def under_inference_mode(potential):
    with torch.inference_mode():
        potential.mix.mul_(1.05)


def assigned(potential):
    potential.load_state_dict({k: v * 1.05 for k, v in potential.state_dict().items()}, assign=True)


def averaged_elsewhere(potential):
    average = swa_utils.AveragedModel(potential, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    twin = copy.deepcopy(potential)
    through_data(twin)
    average.update_parameters(twin)
    for p, other in zip(potential.parameters(), average.module.parameters(), strict=True):
        p.data.copy_((p.data + other.data) / 2 + 1e-3)


def averaged_by_torch_ema(potential):
    ema = pytest.importorskip("torch_ema").ExponentialMovingAverage(potential.parameters(), decay=0.5)
    through_data(potential)
    ema.update()
    ema.copy_to()


def as_a_vector(potential):
    vector = nn.utils.parameters_to_vector(potential.parameters()) * 1.05
    nn.utils.vector_to_parameters(vector.detach(), potential.parameters())


def the_buffer(potential):
    potential.scale[0] += 0.1


def the_buffer_through_data(potential):
    potential.scale.data.mul_(1.1)


def another_buffer(potential):
    potential.scale = potential.scale * 1.1


def another_module(potential):
    potential.last = copy.deepcopy(potential.last)
    potential.last.bias.data += 0.1


def a_module_within(potential):
    class Shifted(nn.Module):
        def forward(self, weight):
            return weight + 0.01

    nn.utils.parametrize.register_parametrization(potential.first, "weight", Shifted())


FUSED = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD]
CHANGES = [
    *(pytest.param(partial(step, make=partial(o, lr=0.01, fused=True)), id=f"{o.__name__}-fused") for o in FUSED),
    *(pytest.param(partial(step, make=partial(o, lr=0.01, foreach=True)), id=f"{o.__name__}-foreach") for o in FUSED),
    *(
        pytest.param(change, id=change.__name__)
        for change in (
            through_data, another_storage, transposed_in_place, set_to_another, two_swapped, two_tensors_swapped,
            by_numpy, one_bit, under_inference_mode, assigned, averaged_elsewhere, averaged_by_torch_ema, as_a_vector,
            the_buffer, the_buffer_through_data, another_buffer, another_module, a_module_within,
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_by_the_calculator_and_by_a_gradient(change):
    potential, atoms = Network(), pentamer()
    atoms.calc = TorchCalculator(potential)
    before = atoms.get_potential_energy()
    relaxation = relax(potential, pentamer(), steps=2, fmax=1e-9)
    run = pentamer()
    run.calc = TorchCalculator(potential)
    optimizer = BPTTOptimizer(run, logfile=None)
    optimizer.run(fmax=1e-9, steps=2)
    change(potential)
    fresh = pentamer()
    fresh.calc = TorchCalculator(copy.deepcopy(potential))
    assert atoms.get_potential_energy() == fresh.get_potential_energy() != before
    np.testing.assert_array_equal(atoms.get_forces(), fresh.get_forces())
    for refused in (lambda: relaxation.positions.sum().backward(), lambda: optimizer.relaxation):
        with pytest.raises(RuntimeError, match="were changed after this relaxation"):
            refused()


def test_changes_that_are_taken_back_are_none_and_those_within_a_block_do_not_stay():
    potential, atoms = Network(), pentamer()
    atoms.calc = TorchCalculator(potential)
    before, kept = atoms.get_potential_energy(), copy.deepcopy(potential.state_dict())
    relaxation = relax(potential, pentamer(), steps=2, fmax=1e-9)
    through_data(potential)
    potential.load_state_dict(kept)
    relaxation.positions.sum().backward()
    # As libraries that average weights do for an evaluation.
    through_data(potential)
    atoms.positions += 0.1 * np.arange(15).reshape(5, 3) ** 2 / 196
    averaged = atoms.get_potential_energy()
    potential.load_state_dict(kept)
    after = atoms.get_potential_energy()
    atoms.calc.reset()
    assert after == atoms.get_potential_energy() != averaged
    assert before != after


def test_the_steppers_hyperparameters_belong_to_the_run():
    for stepper, change in (
        (GradientDescent(step_size=0.01), lambda s: setattr(s, "step_size", 0.02)),
        (FIRE(), lambda s: setattr(s, "dt", 0.2)),
        (GradientDescent(step_size=nn.Parameter(torch.tensor(0.01))), lambda s: s.step_size.data.mul_(2)),
    ):
        relaxation = relax(Network(), pentamer(), stepper=stepper, steps=2, fmax=1e-9)
        change(stepper)
        with pytest.raises(RuntimeError, match="of the potential or the stepper were changed"):
            relaxation.positions.sum().backward()


@pytest.mark.parametrize("family", [Network, lennard_jones, pytest.param(lambda: quick_mace(14), marks=needs_mace),
                                    pytest.param(tiny_chgnet, marks=needs_chgnet)])  # fmt: skip
def test_every_weight_and_buffer_counts_and_computing_changes_none(family):
    potential = family()
    version = weights_version(potential)
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode:
            relax(potential, silicon(), steps=1)
    potential.requires_grad_(False).train().eval()
    assert weights_version(potential) == version
    for tensor in (*potential.parameters(), *potential.buffers()):
        if tensor.numel():
            old = tensor.detach().clone()
            tensor.data.view(-1)[-1] = 1 - tensor.data.view(-1)[-1].to(torch.int64)
            changed = weights_version(potential)
            assert changed != version
            tensor.data.copy_(old)
            version = weights_version(potential)
            assert version != changed


@needs_mace
def test_weights_within_torchscript_count():
    class Scripted(Network):
        def __init__(self):
            super().__init__()
            self.first = torch.jit.script(self.first)

    potential = Scripted()
    version = weights_version(potential)
    potential.first.weight.data.mul_(1.1)
    assert weights_version(potential) != version


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("where", ["on the host", "permuted", "elsewhere", "with gaps"])
def test_bytes_are_compared_whatever_they_mean(dtype, where, monkeypatch):
    tensors = [torch.ones(2, 3).to(dtype), torch.zeros(0, dtype=dtype), torch.tensor(1).to(dtype)]
    if where == "with gaps":
        tensors.append(torch.ones(7).to(dtype)[::2])
    if where == "permuted":  # as constants of MACE are
        tensors.append(torch.ones(3, 1, 2).to(dtype).permute(2, 1, 0))
    if where == "elsewhere":  # as on a GPU
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    kept = _Copy(tensors)
    assert kept._on_host is (where in ("on the host", "permuted"))
    assert kept.equals(tensors)
    assert kept.equals([tensors[0].clone(), *tensors[1:]])
    assert not kept.equals(tensors[:-1])
    for t in (tensors[0], tensors[-1]):
        t.fill_(0)
        assert not kept.equals(tensors)
        t.fill_(1)
        assert kept.equals(tensors)
    assert not kept.equals([tensors[0].view(3, 2), *tensors[1:]])
    assert not kept.equals([tensors[0].T.contiguous().T, *tensors[1:]])


def test_nan_is_itself_and_minus_zero_is_not_zero():
    potential = Network()
    potential.mix.data[0, 0] = torch.nan
    version = weights_version(potential)
    assert weights_version(potential) == version
    potential.mix.data[0, 0] = 0.0
    version = weights_version(potential)
    potential.mix.data[0, 0] = -0.0
    assert weights_version(potential) != version


def test_copies_and_pickles_have_versions_of_their_own():
    potential = lennard_jones()
    version = weights_version(potential)
    assert weights_version(copy.deepcopy(potential)) != version
    atoms = Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 1.1]])
    atoms.calc = TorchCalculator(potential)
    before = atoms.get_potential_energy()
    for twin in (copy.deepcopy(atoms), pickle.loads(pickle.dumps(atoms))):
        twin.calc.potential.epsilon.data.mul_(2)
        assert twin.get_potential_energy() == pytest.approx(2 * before)
    assert atoms.get_potential_energy() == before


@pytest.mark.parametrize(
    "name", [pytest.param("mace-si", marks=needs_mace), pytest.param("chgnet", marks=needs_chgnet)]
)
def test_to_look_costs_little_beside_the_forces(name):
    """Below 1 % of them where it was measured; a loose bound, for a machine that has other work."""
    potential, atoms = load_potential(name), silicon()
    atoms.calc = TorchCalculator(potential)

    def fastest(call, n):
        times = []
        for _ in range(n):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        return min(times)

    def forces():
        atoms.calc.reset()
        atoms.get_forces()

    assert fastest(lambda: weights_version(potential), 50) < 0.02 * fastest(forces, 8)
