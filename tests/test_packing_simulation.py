"""The simulation of many relaxations on many devices, made small."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "packing.py"


@pytest.fixture(scope="module")
def packing():
    spec = importlib.util.spec_from_file_location("packing", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pairs(packing):
    return packing.draw(10_000, np.random.default_rng(0))


@pytest.mark.parametrize("per_rank", [8, 16])
def test_ranks_have_equally_much_to_do(packing, pairs, per_rank):
    foreseen = [pairs.foreseen(spread, np.random.default_rng(1)) for spread in (0.0, 0.1)]
    known, guessed, naive, best = packing.efficiencies(pairs, foreseen, 16, 16 * per_rank)
    assert 0.95 <= known <= best
    assert naive < guessed - 0.15


def test_batches_that_are_packed_are_fuller_than_those_filled_in_order(packing, pairs):
    packed, in_order = packing.fillings(pairs, 16, 512, 256, steps=4)
    assert in_order + 0.03 < packed <= 1
