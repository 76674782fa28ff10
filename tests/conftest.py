"""Seeded, offline, single-threaded, warnings as errors; the zoo of small structures and potentials."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from ase_bptt.potentials import quiet, require
from ase_bptt.potentials.analytic import LennardJones

HAS_MACE = importlib.util.find_spec("mace") is not None
HAS_CHGNET = importlib.util.find_spec("chgnet") is not None
needs_mace = pytest.mark.skipif(not HAS_MACE, reason='needs pip install "ase_bptt[mace]"')
needs_chgnet = pytest.mark.skipif(not HAS_CHGNET, reason='needs pip install "ase_bptt[chgnet]"')


@pytest.fixture(autouse=True)
def _deterministic():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (for what ASE draws from the global state)
    yield
    torch.set_num_threads(threads)
    assert torch.get_default_dtype() is torch.float32, "a test changed torch's default dtype"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """A test that litters, litters here."""
    monkeypatch.chdir(tmp_path)


def rattled(atoms: Atoms, amplitude: float = 0.1, seed: int = 1) -> Atoms:
    atoms = atoms.copy()
    atoms.rattle(amplitude, seed=seed)
    return atoms


def silicon(seed: int = 1, amplitude: float = 0.1) -> Atoms:
    return rattled(bulk("Si", a=5.43, cubic=True), amplitude, seed)


def argon(seed: int = 1) -> Atoms:
    """A periodic cell for Lennard-Jones with sigma 1."""
    return rattled(bulk("Ar", "fcc", a=1.6, cubic=True), 0.05, seed)


def cluster(n: int = 6, seed: int = 1) -> Atoms:
    """An isolated Lennard-Jones cluster, sigma 1, not far from a minimum."""
    corners = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]) * 0.79
    return rattled(Atoms("Ar" * n, positions=corners[:n]), 0.05, seed)


def skewed(seed: int = 1) -> Atoms:
    """A two-atom primitive cell, strained."""
    atoms = bulk("Si", a=5.43)
    atoms.set_cell(
        atoms.cell.array @ (np.eye(3) + np.array([[0.02, 0.03, 0], [0, -0.02, 0.05], [0, 0, 0.01]])), scale_atoms=True
    )
    return rattled(atoms, 0.1, seed)


def methanol() -> Atoms:
    return rattled(molecule("CH3OH"), 0.02)


def lennard_jones(smooth: bool = True) -> LennardJones:
    return LennardJones(smooth=smooth, rc=2.4, ro=1.8)


def tiny_mace(elements=(6, 8, 14, 15), seed: int = 0, dtype: torch.dtype = torch.float64, **changes):
    """A MACE with random weights, small enough for tests."""
    modules, o3 = require("mace.modules", extra="mace"), require("e3nn.o3", extra="mace")
    arguments = {
        "r_max": 4.0,
        "num_bessel": 6,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        "interaction_cls_first": modules.interaction_classes["RealAgnosticInteractionBlock"],
        "num_interactions": 2,
        "num_elements": len(elements),
        "hidden_irreps": o3.Irreps("8x0e"),
        "MLP_irreps": o3.Irreps("8x0e"),
        "atomic_energies": -np.arange(1.0, len(elements) + 1),
        "avg_num_neighbors": 12.0,
        "atomic_numbers": list(elements),
        "correlation": 2,
        "gate": torch.nn.functional.silu,
        "radial_MLP": [16, 16],
        "atomic_inter_scale": 0.8,
        "atomic_inter_shift": 0.1,
    } | changes
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with quiet():
            return modules.ScaleShiftMACE(**arguments)
    finally:
        torch.set_default_dtype(torch.float32)
