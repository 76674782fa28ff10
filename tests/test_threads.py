"""Threads that load and compute at once: each as if it were alone, and nothing of the process is changed."""

import contextlib
import io
import logging
import os
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ase.mep import NEB
from helpers.gradients import gradient
from helpers.potentials import lennard_jones, needs_chgnet, needs_mace, quick_mace, tiny_chgnet, tiny_mace
from helpers.structures import pentamer, silicon, skewed, vacancy
from torch import nn

from ase_bptt import TorchCalculator, load_potential, relax, save_potential
from ase_bptt.potentials.direct import Direct
from ase_bptt.threads import Building, alone, quiet, view

FAMILIES = [
    pytest.param(lambda: quick_mace(14), id="mace", marks=needs_mace),
    pytest.param(tiny_chgnet, id="chgnet", marks=needs_chgnet),
    pytest.param(Direct, id="direct"),
]
NAMES = [
    pytest.param("mace-si", marks=needs_mace), pytest.param("chgnet", marks=needs_chgnet), "direct", "morse",
]  # fmt: skip


def at_once(*calls):
    """What the calls give that begin together, in as many threads."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [found.result() for found in [pool.submit(run, call) for call in calls]]


def of_the_process():
    return {
        "standard output": sys.stdout,
        "standard error": sys.stderr,
        "filters of warnings": list(warnings.filters),
        "the way warnings are shown": warnings.showwarning,
        "default dtype": torch.get_default_dtype(),
        "threads of torch": torch.get_num_threads(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "TorchScript": torch._C._get_graph_executor_optimize(),
        "environment": dict(os.environ),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "numpy": np.geterr(),
    }


@pytest.mark.parametrize("make", FAMILIES)
def test_bands_whose_images_are_computed_in_threads_are_those_computed_in_turn(make, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: pytest.fail(str(args.exc_value)))
    potential, start = make(), silicon(amplitude=0.0)
    del start[0]
    end = start.copy()
    end.positions[0] += [-0.8, -0.4, 0.6]
    found = []
    for parallel in (False, True):
        images = [start.copy() for _ in range(5)] + [end.copy()]
        for image in images:
            image.calc = TorchCalculator(potential)
        band = NEB(images, parallel=parallel, method="improvedtangent")
        band.interpolate()
        found.append((band.get_forces(), band.energies.copy()))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", FAMILIES)
def test_structures_of_other_sizes_at_once(make):
    potential = make()
    structures = [silicon(seed=k) if k % 2 else skewed(seed=k) for k in range(6)]

    def forces(atoms):
        atoms = atoms.copy()
        atoms.calc = TorchCalculator(potential)
        for _ in range(4):
            atoms.positions += 0.01
            found = atoms.get_forces()
        return found

    expected = [forces(atoms) for atoms in structures]
    for x, y in zip(at_once(*(lambda a=a: forces(a) for a in structures)), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", FAMILIES)
def test_a_gradient_keeps_its_weights_while_other_threads_compute_forces(make):
    """Flags of shared weights that are switched off for a moment would be missing in the other thread's graph."""
    potential = make().requires_grad_()
    weights = list(potential.parameters())

    def trained():
        relaxation = relax(potential, skewed(), steps=3, fmax=1e-9, stepper="gd")
        return torch.autograd.grad(relaxation.positions.square().sum(), weights, allow_unused=True)

    def computed():
        atoms = silicon()
        atoms.calc = TorchCalculator(potential)
        for _ in range(12):
            atoms.positions += 0.01
            atoms.get_forces()

    expected = trained()
    _, found, _, again = at_once(computed, trained, computed, trained)
    for other in (found, again):
        assert [g is None for g in other] == [g is None for g in expected]
        torch.testing.assert_close([g for g in other if g is not None], [g for g in expected if g is not None])
    assert all(p.requires_grad for p in weights)


def test_relaxations_at_once_are_those_in_turn():
    potential = lennard_jones().requires_grad_()
    starts = [vacancy(), pentamer(), vacancy(0.05), pentamer(0.1)]

    def moved(atoms):
        relaxation = relax(potential, atoms, steps=20, fmax=1e-4)
        return gradient([potential.sigma], relaxation.positions.square().sum())[0]

    expected = [moved(atoms) for atoms in starts]
    torch.testing.assert_close(at_once(*(lambda a=a: moved(a) for a in starts)), expected, rtol=1e-12, atol=0)


@needs_mace
def test_computing_leaves_a_shared_module_as_it_is():
    model = tiny_mace(elements=(14,))

    def inside(module):
        return {
            name: (id(m), len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)), list(m._modules.values()))
            for name, m in module.named_modules()
        }

    seen, before = [], inside(model)
    model.interactions[0].linear_up.register_forward_hook(lambda *_: seen.append(inside(model)))
    model.register_forward_hook(lambda *_: seen.append(inside(model)))
    expected = inside(model)
    potential = load_potential(model)
    atoms = skewed()
    atoms.calc = TorchCalculator(potential)
    atoms.get_forces()
    assert len(seen) == 2  # hooks of the user's own run as they would
    assert seen[0] == seen[1] == inside(model) == expected != before


@pytest.mark.parametrize("name", NAMES)
def test_loading_at_once_changes_nothing_of_the_process(name):
    load_potential(name)  # what the import of its package does is done
    before, states = of_the_process(), [torch.random.get_rng_state(), np.random.get_state()[1].copy()]  # noqa: NPY002
    seen, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            seen.append((torch.get_default_dtype(), torch.zeros(1).dtype))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = at_once(*[lambda: load_potential(name)] * 2)
    finally:
        stop.set()
        watcher.join()
    assert of_the_process() == before
    assert set(seen) == {(torch.float32, torch.float32)}
    assert torch.equal(torch.random.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    for other in found[1:]:
        for key, value in other.state_dict().items():
            assert torch.equal(value, found[0].state_dict()[key]), key


@pytest.mark.parametrize("make", FAMILIES)
def test_both_dtypes_at_once(make, tmp_path):
    dtypes = torch.float64, torch.float32
    for dtype in dtypes:
        save_potential(make().to(dtype), tmp_path / str(dtype))
    in_turn = [load_potential(tmp_path / str(dtype)) for dtype in dtypes]
    for potential, other in zip(at_once(*(lambda d=d: load_potential(tmp_path / str(d)) for d in dtypes)), in_turn,
                                strict=True):  # fmt: skip
        for (key, value), expected in zip(potential.named_buffers(), other.buffers(), strict=True):
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected), key
        assert potential.dtype == other.dtype


@pytest.mark.parametrize("make", FAMILIES)
def test_the_callers_default_dtype_does_not_matter(make, tmp_path):
    save_potential(make(), tmp_path / "saved")
    expected = load_potential(tmp_path / "saved")
    torch.set_default_dtype(torch.float64)
    try:
        found = load_potential(tmp_path / "saved")
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for (key, value), other in zip(found.named_buffers(), expected.buffers(), strict=True):
        assert value.dtype == other.dtype
        assert torch.equal(value, other), key


# The tools for it -------------------------------------------------------------------------------


def test_quiet_threads_are_quiet_and_the_others_are_heard(capsys):
    inside, done = threading.Event(), threading.Event()

    def silent():
        with quiet():
            print("lost")
            warnings.warn("lost", UserWarning, stacklevel=1)
            inside.set()
            done.wait(10)
            print("lost")

    thread = threading.Thread(target=silent)
    before = sys.stdout
    thread.start()
    inside.wait(10)
    print("heard", end=" ")
    sys.stdout.write("too\n")
    assert sys.stdout.encoding == before.encoding
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)
    with pytest.raises(UserWarning, match="raised"):
        warnings.warn("raised", UserWarning, stacklevel=1)
    done.set()
    thread.join()
    assert sys.stdout is before
    assert capsys.readouterr().out == "heard too\n"


def test_what_others_have_put_in_the_place_of_standard_output_stays(capsys):
    own = io.StringIO()
    with quiet():
        with contextlib.redirect_stdout(own):
            with quiet():
                print("lost")
            sys.stdout.write("lost")
        assert sys.stdout is not own
    before = sys.stdout
    with contextlib.redirect_stdout(own), quiet():
        pass
    assert sys.stdout is before
    print("heard")
    assert (own.getvalue(), capsys.readouterr().out) == ("", "heard\n")


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_quiet_ends_with_its_block(error, capsys):
    filters = list(warnings.filters)
    with contextlib.suppress(KeyError, KeyboardInterrupt), quiet():
        if error:
            raise error
    print("heard")
    assert capsys.readouterr().out == "heard\n"
    assert list(warnings.filters) == filters


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_modules_are_built_in_a_dtype_and_from_numbers_of_their_own(dtype):
    state = torch.random.get_rng_state()
    with Building(dtype, seed=3):
        linear, embedding = nn.Linear(4, 4), nn.Embedding(5, 3)
        made = [
            torch.zeros(2), torch.tensor([0.1]), torch.full((2,), 0.5), torch.linspace(0, 1, 3), torch.rand(3),
            torch.empty(1, dtype=torch.get_default_dtype()), torch.ones(2).to(torch.get_default_dtype()),
        ]  # fmt: skip
        others = [torch.arange(3), torch.tensor([1]), torch.tensor(True), torch.ones(2, dtype=torch.float16)]
        nn.init.xavier_normal_(torch.empty(3, 3))
    assert {t.dtype for t in (*linear.parameters(), *embedding.parameters(), *made)} == {dtype}
    assert [t.dtype for t in others] == [torch.int64, torch.int64, torch.bool, torch.float16]
    assert torch.equal(made[1], torch.tensor([0.1], dtype=dtype))
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = nn.Linear(4, 4, dtype=dtype)
    if dtype is torch.float32:
        assert torch.equal(linear.weight, expected.weight)


def test_of_two_buildings_the_inner_one_decides():
    with Building(torch.float64, seed=3):
        before = torch.rand(2)
        with Building(torch.float32, seed=4):
            inner = torch.rand(2)
        with Building():
            untouched = torch.zeros(2)
        after = torch.rand(2)
    assert [x.dtype for x in (before, inner, untouched, after)] == [torch.float64, *[torch.float32] * 2, torch.float64]
    assert torch.equal(inner, torch.rand(2, generator=torch.Generator().manual_seed(4)))


def test_a_view_shares_all_but_what_is_replaced():
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    doubled = view(module, **{"1": lambda x: 2 * x})
    x = torch.ones(2)
    assert torch.equal(doubled(x), 2 * module[0](x))
    assert doubled[0] is module[0]
    doubled.name = "other"
    assert not hasattr(module, "name")
    assert isinstance(module[1], nn.Tanh)


def test_alone_is_who_has_no_other_thread():
    assert alone()
    assert at_once(alone) == [False]
