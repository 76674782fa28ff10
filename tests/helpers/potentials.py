"""Small potentials, and those whose answers are known."""

from __future__ import annotations

import copy
import importlib.util
import json
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import nn

from ase_bptt import Potential, Prediction, potentials
from ase_bptt.potentials import quiet, require
from ase_bptt.potentials.analytic import LennardJones

needs_mace = pytest.mark.skipif(importlib.util.find_spec("mace") is None, reason='needs pip install "ase_bptt[mace]"')
needs_chgnet = pytest.mark.skipif(
    importlib.util.find_spec("chgnet") is None, reason='needs pip install "ase_bptt[chgnet]"'
)


def lennard_jones(smooth: bool = True) -> LennardJones:
    """Sigma and epsilon are 1."""
    return LennardJones(smooth=smooth, rc=2.4, ro=1.8)


def wide_lennard_jones(sigma: float = 2.5, **changes) -> LennardJones:
    """A well about as wide and stiff as a bond of silicon."""
    return LennardJones(**{"epsilon": 0.3, "sigma": sigma, "rc": 6.0, "ro": 4.5, "smooth": True} | changes)


def tiny_mace(elements=(6, 8, 14, 15), seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    """A module of mace-torch with random weights, small enough for tests."""
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


def stiff_mace() -> Potential:
    """A MACE for silicon, whose random weights give forces that move atoms."""
    from ase_bptt.potentials.mace import MACE

    return MACE(tiny_mace(elements=(14,), atomic_inter_scale=20.0, max_ell=1)).requires_grad_()


@cache
def _mace_of_elements(elements):
    return tiny_mace(elements=elements, max_ell=1, correlation=1)


def quick_mace(*elements: int) -> Potential:
    """A MACE of these elements that is built once: to build one takes longer than to train it here."""
    from ase_bptt.potentials.mace import MACE

    return MACE(copy.deepcopy(_mace_of_elements(elements)))


@cache
def _mace_of_irreps(hidden):
    require("mace", extra="mace")  # before e3nn, which it makes fit for this torch
    return tiny_mace(hidden_irreps=require("e3nn.o3", extra="mace").Irreps(hidden))


def mace_of_irreps(hidden: str = "8x0e") -> Potential:
    """A MACE whose messages are of this kind, built once."""
    from ase_bptt.potentials.mace import MACE

    return MACE(copy.deepcopy(_mace_of_irreps(hidden)))


def tiny_chgnet() -> Potential:
    """A CHGNet with random weights."""
    from ase_bptt.potentials.chgnet import CHGNet

    torch.manual_seed(0)
    with quiet():
        model = require("chgnet.model", extra="chgnet").CHGNet(
            atom_fea_dim=16, bond_fea_dim=16, angle_fea_dim=16, n_conv=3, mlp_hidden_dims=(16, 16)
        )
    return CHGNet(model).double()


def built_once():
    """A patch under which potentials of one config are copies of one."""
    real, made = potentials._rebuild, {}

    def rebuild(adapter, config, dtype):
        key = json.dumps([adapter.family, config, str(dtype)])
        if key not in made:
            made[key] = real(adapter, config, dtype)
        return copy.deepcopy(made[key])

    return mock.patch.object(potentials, "_rebuild", rebuild)


class Bowl(Potential):
    """u K u / 2 - load u with the displacements u from known places, centred: the minimum is u = K^+ load.

    Parameters
    ----------
    eigenvalues : sequence
        Of the Hessian, in eV/Å^2, without the three zeros of translations; three times (atoms - 1).
    """

    family = "bowl"

    def __init__(self, eigenvalues):
        super().__init__()
        rng = np.random.default_rng(5)
        n = len(eigenvalues) // 3 + 1
        translations = np.tile(np.eye(3), (n, 1))
        basis, _ = np.linalg.qr(np.hstack((translations, rng.normal(size=(3 * n, 3 * n - 3)))))
        self.modes = torch.from_numpy(basis[:, 3:].copy())
        self.places = torch.from_numpy(rng.uniform(0, 4, (n, 3)))
        diagonal = torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64))
        self.hessian = nn.Parameter(self.modes @ diagonal @ self.modes.T)
        self.load = nn.Parameter(self.modes @ torch.from_numpy(rng.normal(0, 0.1, 3 * n - 3)))
        self.cutoff = 0.5

    def forward(self, structures, edges):
        u = structures.positions.view(len(structures), -1, 3) - self.places
        u = (u - u.mean(1, keepdim=True)).flatten(1)
        return Prediction(((u @ self.hessian) * u).sum(1) / 2 - u @ self.load)

    def atoms(self, offset=0.0) -> Atoms:
        """A periodic cell, which cannot turn, displaced along all modes."""
        n = len(self.places)
        moved = (self.modes @ torch.full((3 * n - 3,), offset, dtype=torch.float64)).view(n, 3)
        return Atoms(f"Ar{n}", positions=(self.places + moved).numpy(), cell=[9, 9, 9], pbc=True)


class Narrow(Potential):
    """A potential that says that memory has run out where there are more atoms than fit."""

    family = "narrow"

    def __init__(self, inner, most):
        super().__init__()
        self.inner, self.most, self.cutoff, self.largest = inner, most, inner.cutoff, 0

    def forward(self, structures, edges):
        if structures.n_atoms > self.most:
            raise torch.OutOfMemoryError("out of memory")
        self.largest = max(self.largest, structures.n_atoms)
        return self.inner(structures, edges)
