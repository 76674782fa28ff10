"""Dealing structures out to processes and batches, and going on where memory runs out."""

import logging
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.potentials import Narrow, lennard_jones, tiny_mace
from helpers.structures import argon, rattled, silicon

from ase_bptt import RelaxationPair, delta_q, load_potential, relax
from ase_bptt.evaluation import evaluate
from ase_bptt.throughput import relax_all
from ase_bptt.throughput.memory import in_parts, peak_bytes, sizes
from ase_bptt.throughput.packing import Planner, pack, share

RUN_OUT = {
    "torch": torch.OutOfMemoryError("out of memory"),
    "python": MemoryError(),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    "TorchScript": RuntimeError("The following operation failed in the TorchScript interpreter: CUDA out of memory."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.fixture
def costs():
    return np.random.default_rng(0).lognormal(sigma=0.8, size=200).tolist()


@pytest.mark.parametrize("parts", [1, 3, 16, 300])
def test_every_item_is_dealt_out_once(costs, parts):
    dealt = share(costs, parts)
    assert len(dealt) == parts
    assert sorted(k for part in dealt for k in part) == list(range(200))


def test_no_part_has_much_more_to_do_than_the_others(costs):
    loads = [sum(costs[k] for k in part) for part in share(costs, 16)]
    assert max(loads) < 1.02 * np.mean(loads)


@pytest.mark.parametrize("most", [None, 4])
def test_batches_keep_within_their_capacity_and_waste_little(costs, most):
    batches = pack(costs, 10.0, most)
    assert sorted(k for batch in batches for k in batch) == list(range(200))
    assert max(sum(costs[k] for k in batch) for batch in batches) <= 10.0
    if most is None:
        assert len(batches) <= 1.05 * sum(costs) / 10 + 1
    else:
        assert max(map(len, batches)) == 4


def test_an_item_beyond_the_capacity_stands_alone():
    assert pack([1.0, 5.0, 1.0], 2.0) == [[0, 2], [1]]


@pytest.mark.parametrize("error", RUN_OUT.values(), ids=RUN_OUT)
@pytest.mark.parametrize("fits", [3, 20])
def test_where_memory_runs_out_halves_are_run_in_order(fits, error, caplog):
    def run(items):
        if len(items) > fits:
            raise error
        return sum(items)

    found = list(in_parts(run, range(13)))
    assert [k for part, _ in found for k in part] == list(range(13))
    assert all(total == sum(part) and len(part) <= fits for part, total in found)
    assert ("Memory ran out on 13 structures" in caplog.text) is (fits < 13)


def test_a_single_structure_that_does_not_fit_is_told(caplog):
    def run(items):
        raise torch.OutOfMemoryError

    with pytest.raises(MemoryError, match="single structure: use a device with more memory"):
        list(in_parts(run, [1, 2]))
    assert caplog.record_tuples[0][1] == logging.WARNING


def test_other_errors_are_not_taken_for_it():
    def run(items):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_parts(run, [1, 2]))
    assert list(in_parts(run, [])) == []


def test_the_peak_counts_what_is_alive_together():
    def run():
        a = torch.zeros(1000, dtype=torch.float64)
        b = a + 1  # two of 8,000 bytes
        del a
        return (b * 2).sum()  # two, and a number

    assert peak_bytes(run)[1] == 16_008


def test_on_a_gpu_its_allocator_counts():
    allocated = {"memory_allocated": 5_000, "max_memory_allocated": 12_000}
    fakes = {name: mock.Mock(return_value=value) for name, value in allocated.items()}
    with mock.patch.multiple(torch.cuda, reset_peak_memory_stats=mock.DEFAULT, **fakes) as patched:
        assert peak_bytes(lambda: "found", torch.device("cuda")) == ("found", 7_000)
    patched["reset_peak_memory_stats"].assert_called_once_with(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_allocator_of_a_gpu_counts_what_is_alive_together():
    device = torch.device("cuda")

    def run():
        a = torch.zeros(10**6, dtype=torch.float64, device=device)
        return (a + 1).sum().item()

    found, peak = peak_bytes(run, device)
    assert found == 10**6
    assert peak == pytest.approx(1.6e7, rel=0.3)


@pytest.fixture(scope="module")
def mace():
    return load_potential(tiny_mace(), dtype=torch.float64)


def cells(*repeats):
    return [rattled(silicon().repeat((n, 1, 1)), 0.02, seed=k) for k, n in enumerate(repeats)]


def through(potential, adjoint, steps=3):
    def run(batch):
        end = relax(potential, batch, stepper="gd", steps=steps, fmax=1e-6, adjoint=adjoint)
        torch.autograd.grad(delta_q(end, batch).sum(), list(potential.parameters()), allow_unused=True)

    return run


def without_gradient(potential):
    def run(batch):
        with torch.no_grad():
            relax(potential, batch, steps=2)

    return run


@pytest.mark.parametrize("adjoint", ["replay", "full", None])
def test_the_footprint_foretells_larger_batches(mace, adjoint):
    run = through(mace, adjoint) if adjoint else without_gradient(mace)
    planner = Planner(mace, run, lambda atoms: atoms, memory=1.0)
    planner.parts(cells(1, 2))
    batch = cells(1, 3, 2)
    foretold = planner.footprint.fixed + sum(planner.footprint.of(size) for size in sizes(mace, batch))
    assert foretold == pytest.approx(peak_bytes(lambda: run(batch))[1], rel=0.1)


def test_a_full_tape_takes_more_with_every_frame(mace):
    found = []
    for steps in (2, 6):
        planner = Planner(mace, through(mace, "full", steps), lambda atoms: atoms, memory=1.0)
        planner.parts(cells(1, 2))
        found.append(planner.footprint.of(sizes(mace, cells(2))[0]))
    assert found[1] > 2 * found[0]


@pytest.mark.parametrize("memory", [0.008, 0.02])
def test_parts_keep_within_the_memory(mace, memory):
    run = through(mace, "full")
    planner = Planner(mace, run, lambda atoms: atoms, memory=memory)
    batch = cells(1, 2, 1, 3, 2, 1)
    parts = planner.parts(batch)
    assert sorted(k for part in parts for k in part) == list(range(6))
    assert len(parts) > 1
    for part in parts:
        if len(part) > 1:
            assert peak_bytes(lambda part=part: run([batch[k] for k in part]))[1] < 1.1 * memory * 2**30


def test_without_a_limit_nothing_is_measured():
    def run(batch):
        raise AssertionError("measured")

    planner = Planner(lennard_jones(), run, lambda atoms: atoms)
    assert planner.parts(cells(1, 2)) == [[0, 1]]
    assert planner.parts([]) == []


def test_relaxing_many_keeps_within_the_memory(mace):
    batch = cells(1, 1, 2, 1, 1, 2)
    _, together = peak_bytes(lambda: list(relax_all(mace, batch, steps=3)))
    _, limited = peak_bytes(lambda: list(relax_all(mace, batch, steps=3, memory=together / 3 / 2**30)))
    assert limited < 0.5 * together


@pytest.mark.parametrize("most", [8, 16, 24])
def test_what_is_measured_itself_may_not_fit(mace, most):
    narrow = Narrow(mace, most)
    planner = Planner(narrow, without_gradient(narrow), lambda atoms: atoms, memory=1.0)
    costs, _ = planner.costs(cells(1, 1, 2))
    assert costs[2] > costs[0] > 1e4
    ends = list(relax_all(narrow, cells(1, 1, 1), steps=2, memory=1.0))
    assert len(ends) == 3


def test_where_nothing_fits_it_is_told(mace):
    narrow = Narrow(mace, 7)
    with pytest.raises(MemoryError, match="single structure"):
        list(relax_all(narrow, cells(1, 1), steps=2, memory=1.0))


@pytest.mark.parametrize("memory", [None, 1.0])
def test_memory_that_ran_out_once_is_remembered(memory, caplog):
    sizes_run = []

    def run(batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError
        sizes_run.append(len(batch))
        return len(batch)

    planner = Planner(lennard_jones(), run, lambda atoms: atoms, memory)
    batch = cells(*[1] * 10)
    for _ in range(2):
        parts = list(planner.computed(run, batch))
        assert sorted(k for part, _ in parts for k in part) == list(range(10))
        assert all(len(part) == found for part, found in parts)
    assert sum("Memory ran out" in r.message for r in caplog.records) < 5
    assert max(sizes_run[-4:]) == 3


def test_measurements_go_on_with_fewer_where_memory_runs_out():
    pairs = [RelaxationPair(argon(k), argon(k + 20), f"pair {k}") for k in range(6)]
    found = evaluate(Narrow(lennard_jones(), 10), pairs, steps=60)
    expected = evaluate(lennard_jones(), pairs, steps=60)
    assert [row.delta_q for row in found.rows] == pytest.approx([row.delta_q for row in expected.rows], abs=1e-9)
    assert [row.residual_force for row in found.rows] == pytest.approx([r.residual_force for r in expected.rows])
