"""Damaged files of each format: refused in a sentence, or read as they were. benchmarks/fuzz_readers.py does more."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
N = 36
"""Mutations of each file, three of each kind."""


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_readers", FOLDER / "fuzz_readers.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


FORMATS = (
    "vasprun.xml", "OUTCAR", "relax.out", "aims.out", "cp2k.out", "cp2k-pos-1.xyz", "CONTCAR", "a.extxyz", "a.traj",
    "a.db", "OUTCAR.gz",
)  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_no_mutation_of_a_file_is_read_wrongly(fuzz, tmp_path, name):
    found = sum(fuzz.fuzz(name, N, tmp_path).values(), Counter())
    assert found.total() == N
    assert [said for said in found if said.startswith("WRONG")] == []
    assert found["refused"] > N / 3


@pytest.mark.parametrize(
    ("name", "seed"),
    # An atom nowhere, memory for what is not there, NaN in a cell, a force too few, a first step lost, ...
    [("a.traj", 50), ("a.traj", 25), ("a.traj", 450), ("a.extxyz", 727), ("a.extxyz", 126), ("relax.out", 325),
     ("relax.out", 847), ("vasprun.xml", 463), ("vasprun.xml", 52), ("vasprun.xml", 98), ("OUTCAR", 14),
     ("OUTCAR", 197), ("relax.out", 20), ("CONTCAR", 328), ("CONTCAR", 116)],
)  # fmt: skip
def test_what_once_was_read_wrongly(fuzz, tmp_path, name, seed):
    before = fuzz.original(name, tmp_path)
    fuzz.write_beside(name, tmp_path)
    (tmp_path / name).write_bytes(before)
    (truth,) = fuzz.read_pairs(tmp_path / name)
    _, data = fuzz.mutated(name, seed, before)
    (tmp_path / name).write_bytes(data)
    assert fuzz.verdict(tmp_path / name, truth, data, before) in ("refused", "read")


def test_every_format_is_among_the_benchmarks(fuzz):
    assert fuzz.FORMATS == FORMATS
