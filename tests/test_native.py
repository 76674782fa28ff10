"""Native checkpoints of potentials that were really tuned: the families' own tools read the tuned weights."""

import sys

import numpy as np
import pytest
import torch
from helpers.potentials import needs_chgnet, needs_mace, tiny_mace
from helpers.structures import silicon, skewed

from ase_bptt import RelaxationPair, TorchCalculator, Trainer, load_potential, save_potential
from ase_bptt.neighbors import find_edges
from ase_bptt.potentials import weights_hash
from ase_bptt.structures import Structures

ENERGY, FORCE = {"float64": 1e-6, "float32": 1e-6}, {"float64": 1e-6, "float32": 1e-4}
"""eV an atom and eV/Å, by dtype."""


@pytest.fixture(autouse=True)
def _quiet(capsys):
    """What the families' tools print is their own."""


def small_mace(dtype="float64"):
    """With forces that are large enough to relax by."""
    return load_potential(tiny_mace(elements=(14,), max_ell=1, atomic_inter_scale=20.0), dtype=dtype)


def tuned(potential, folder):
    """Trained on one pair, and saved by the Trainer; with its weights before."""
    base = {name: weight.detach().clone() for name, weight in potential.model.named_parameters()}
    pair = RelaxationPair(skewed(), skewed(2), "a", group="a")
    trainer = Trainer(potential, steps=2, lr=1e-3, interpolate=0.0, rattle=0.0, progress=False)
    trainer.fit([pair], epochs=2).save(folder)
    return trainer.potential, base


def agrees(calculator, potential, atoms, dtype):
    atoms, twin = atoms.copy(), atoms.copy()
    atoms.calc, twin.calc = calculator, TorchCalculator(potential)
    off = atoms.get_potential_energy() - twin.get_potential_energy()
    assert abs(off) / len(atoms) < ENERGY[dtype]
    np.testing.assert_allclose(atoms.get_forces(), twin.get_forces(), atol=FORCE[dtype], rtol=0)


def moved(found, base):
    """Largest change of a weight, of all that have the name."""
    assert found.keys() == base.keys()
    return max((found[name].detach().double() - base[name].double()).abs().max().item() for name in base)


@needs_mace
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_maces_calculator_computes_with_the_tuned_weights(dtype, tmp_path):
    from mace.calculators import MACECalculator

    potential, base = tuned(small_mace(dtype), tmp_path)
    calculator = MACECalculator(model_paths=tmp_path / "mace.model", device="cpu", default_dtype=dtype)
    agrees(calculator, potential, silicon(), dtype)
    assert moved(dict(calculator.models[0].named_parameters()), base) > 1e-4


@needs_chgnet
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_chgnets_calculator_computes_with_the_tuned_weights(dtype, tmp_path):
    from chgnet.model.dynamics import CHGNetCalculator
    from chgnet.model.model import CHGNet

    potential, base = tuned(load_potential("chgnet", dtype=dtype), tmp_path)
    model = CHGNet.from_file(str(tmp_path / "chgnet.pth.tar"))
    # It builds its modules in float32, whatever the file holds.
    agrees(CHGNetCalculator(model, use_device="cpu"), load_potential(potential, dtype="float32"), silicon(), "float32")
    assert moved(dict(model.named_parameters()), base) > 1e-4


@needs_chgnet
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_file_of_chgnets_keeps_its_dtype_where_we_read_it(dtype, tmp_path):
    potential = load_potential("chgnet", dtype=dtype)
    with torch.no_grad():
        for weight in potential.parameters():
            weight.mul_(1 + 1e-9)
    save_potential(potential, tmp_path)
    again = load_potential(tmp_path / "chgnet.pth.tar", trust=True)
    assert again.dtype == potential.dtype
    assert weights_hash(again) == weights_hash(potential)


@needs_mace
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
def test_maces_export_for_lammps_computes_with_the_tuned_weights(tmp_path, monkeypatch):
    from mace.cli.create_lammps_model import main

    potential, base = tuned(small_mace(), tmp_path)
    monkeypatch.setattr(sys, "argv", ["mace_create_lammps_model", str(tmp_path / "mace.model")])
    main()
    exported = torch.jit.load(tmp_path / "mace.model-lammps.pt")
    assert moved({k.removeprefix("model."): p for k, p in exported.named_parameters()}, base) > 1e-4
    structures = Structures.from_atoms(silicon(), dtype=torch.float64)
    pairs = find_edges(structures, potential.cutoff)
    found = exported(
        {
            "positions": structures.positions.clone().requires_grad_(),
            "cell": structures.cells[0],
            "edge_index": torch.stack((pairs.i, pairs.j)),
            "shifts": pairs.offsets(structures),
            "unit_shifts": pairs.shifts.double(),
            "node_attrs": torch.ones(structures.n_atoms, 1, dtype=torch.float64),
            "batch": structures.batch,
            "ptr": torch.tensor([0, structures.n_atoms]),
            "weight": torch.ones(1, dtype=torch.float64),
        },
        torch.ones(structures.n_atoms, dtype=torch.float64),
    )
    energy, forces = potential.energy_and_forces(structures, pairs)
    torch.testing.assert_close(found["total_energy_local"], energy, atol=1e-6, rtol=0)
    torch.testing.assert_close(found["forces"], forces, atol=1e-6, rtol=0)
