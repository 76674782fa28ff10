"""Dealing structures out to processes and batches, and going on where memory runs out."""

import logging

import numpy as np
import pytest
import torch

from ase_bptt.planning import in_parts, pack, share

RUN_OUT = {
    "torch": torch.OutOfMemoryError("out of memory"),
    "python": MemoryError(),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
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
@pytest.mark.parametrize("fits", [1, 3, 7, 20])
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
