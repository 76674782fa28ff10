"""metatomic, where it is installed: the contract, parity with its own calculator, its files in and out."""

# metatomic knows annotations of typing alone.
# ruff: noqa: UP006, UP035, UP045

import copy
import importlib.util
import warnings
from typing import Dict, List, Optional

import numpy as np
import pytest
import torch
from ase import Atoms
from helpers.structures import methanol, silicon, skewed

from ase_bptt import Trainer, load_potential, relax, save_potential
from ase_bptt.neighbors import NeighborList
from ase_bptt.pairs import RelaxationPair
from ase_bptt.potentials.metatomic import Metatomic
from ase_bptt.structures import Structures
from ase_bptt.testing import check_potential

HAS_METATOMIC = importlib.util.find_spec("metatomic") is not None
CUTOFF = 4.0
PARITY = {"float64": 1e-9, "float32": 1e-5}
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not HAS_METATOMIC, reason='needs pip install "ase_bptt[metatomic]"'),
]

if HAS_METATOMIC:
    from metatensor.torch import Labels, TensorBlock, TensorMap
    from metatomic.torch import (
        AtomisticModel,
        ModelCapabilities,
        ModelMetadata,
        ModelOutput,
        NeighborListOptions,
        System,
    )

    class Small(torch.nn.Module):
        """Densities of neighbours through a network; a list with one of each pair gives both atoms its share."""

        def __init__(self, full: bool):
            super().__init__()
            self.full = full
            self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 1))
            self.centres = torch.nn.Buffer(torch.linspace(0.5, 4.0, 8))
            self.species = torch.nn.Parameter(torch.rand(40))
            self.wanted = NeighborListOptions(cutoff=4.0, full_list=full, strict=True)

        def requested_neighbor_lists(self) -> List[NeighborListOptions]:
            return [self.wanted]

        def forward(
            self,
            systems: List[System],
            outputs: Dict[str, ModelOutput],
            selected_atoms: Optional[Labels],
        ) -> Dict[str, TensorMap]:
            energies: List[torch.Tensor] = []
            for system in systems:
                near = system.get_neighbor_list(self.wanted)
                lengths = torch.linalg.vector_norm(near.values.reshape(-1, 3), dim=1)
                i = near.samples.column("first_atom").to(torch.long)
                j = near.samples.column("second_atom").to(torch.long)
                # In the precision of the structures, as in models whose first layer is given these.
                features = torch.exp(-4 * (lengths[:, None] - self.centres) ** 2).to(lengths.dtype)
                pair = self.net(features)[:, 0] * (0.5 + 0.5 * torch.cos(torch.pi * lengths / 4.0)) ** 2
                types = system.types.to(torch.long)
                density = torch.zeros(len(system), dtype=pair.dtype, device=pair.device)
                density = density.index_add(0, i, pair * self.species[types[j]])
                if not self.full:
                    density = density.index_add(0, j, pair * self.species[types[i]])
                energies.append((density + torch.tanh(density)).sum())
            zero = torch.zeros((1, 1), dtype=torch.long)
            samples = Labels(["system"], torch.arange(len(systems)).reshape(-1, 1))
            block = TensorBlock(torch.stack(energies).reshape(-1, 1), samples, [], Labels(["energy"], zero))
            return {"energy": TensorMap(Labels(["_"], zero), [block])}


def export(path, dtype="float64", full=True, output="energy", length_unit="Angstrom"):
    torch.manual_seed(0)
    capabilities = ModelCapabilities(
        outputs={output: ModelOutput(unit="eV")},
        atomic_types=[1, 6, 8, 14],
        interaction_range=CUTOFF,
        length_unit=length_unit,
        supported_devices=["cpu"],
        dtype=dtype,
    )
    model = Small(full).to(getattr(torch, dtype)).eval()
    AtomisticModel(model, ModelMetadata(name="small"), capabilities).save(path)
    return path


def calculator(path):
    from metatomic_ase import MetatomicCalculator

    return MetatomicCalculator(str(path), device="cpu")


def results(potential, *atoms):
    structures = Structures.from_atoms(list(atoms), dtype=potential.dtype)
    return potential.results(structures, NeighborList(potential.cutoff)(structures))


@pytest.fixture(autouse=True)
def _quiet(capfd, recwarn):
    """What metatomic prints and warns of is its own."""


@pytest.fixture
def exported(tmp_path):
    return export(tmp_path / "small.pt")


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("atoms", [skewed, silicon, methanol])
def test_it_keeps_the_contract_and_agrees_with_metatomics_calculator(full, dtype, atoms, tmp_path):
    path = export(tmp_path / "small.pt", dtype, full)
    potential = load_potential(path, trust=True)
    assert str(potential.dtype) == f"torch.{dtype}"
    assert all(p.requires_grad for p in potential.parameters())
    limits = {f"parity {name}": PARITY[dtype] for name in ("energy", "forces", "stress")}
    report = check_potential(potential, atoms(), calculator=calculator(path), tolerances=limits)
    print(report)
    assert {"parity energy", "parity forces"} <= report.measured.keys()


def test_second_derivatives_are_those_of_differences(exported):
    potential = load_potential(exported, trust=True)
    structures = Structures.from_atoms([skewed(), methanol()], dtype=torch.float64)
    edges = NeighborList(potential.cutoff)(structures)
    weights = list(potential.parameters())
    torch.manual_seed(1)
    ways = [torch.randn_like(p) for p in weights]

    def loss(create_graph=False):
        return potential.energy_and_forces(structures, edges, create_graph=create_graph)[1].square().sum()

    gradients = torch.autograd.grad(loss(create_graph=True), weights)
    slope = sum((g * way).sum() for g, way in zip(gradients, ways, strict=True)).item()
    values = []
    for k in (-2, -1, 1, 2):
        with torch.no_grad():
            for p, way in zip(weights, ways, strict=True):
                p.add_(k * 1e-4 * way)
            values.append(loss().item())
            for p, way in zip(weights, ways, strict=True):
                p.sub_(k * 1e-4 * way)
    differences = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / 12e-4
    print("second derivatives", slope, differences)
    assert slope == pytest.approx(differences, rel=1e-6)


def test_a_batch_gives_what_its_members_give(exported):
    potential = load_potential(exported, trust=True)
    members = [silicon(), methanol(), skewed()]
    together = results(potential, *members)
    alone = [results(potential, atoms) for atoms in members]
    torch.testing.assert_close(together["energy"], torch.cat([found["energy"] for found in alone]))
    torch.testing.assert_close(together["forces"], torch.cat([found["forces"] for found in alone]))


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float64", None), ("float32", None), ("float32", "float64"), ("float64", "float32")]
)
def test_tuned_it_comes_back_and_metatomics_calculator_reads_it(stored, dtype, tmp_path):
    path = export(tmp_path / "small.pt", stored)
    potential = copy.deepcopy(load_potential(path, trust=True, dtype=dtype))
    untuned = results(potential, skewed())["forces"]
    with torch.no_grad():
        for weight in potential.parameters():
            weight.mul_(1.1)
    expected = results(potential, skewed())
    assert (expected["forces"] - untuned).abs().max() > 1e-3
    assert torch.equal(results(load_potential(path, trust=True, dtype=dtype), skewed())["forces"], untuned)
    save_potential(potential, tmp_path / "tuned")

    loaded = load_potential(tmp_path / "tuned")
    assert loaded.dtype == potential.dtype
    for name, value in results(loaded, skewed()).items():
        assert torch.equal(value, expected[name]), name

    atoms = skewed()
    atoms.calc = calculator(tmp_path / "tuned" / "metatomic.pt")
    limit = max(PARITY[stored], PARITY[dtype or stored])
    assert expected["energy"].item() == pytest.approx(atoms.get_potential_energy(), abs=limit)
    np.testing.assert_allclose(expected["forces"], atoms.get_forces(), atol=limit)
    np.testing.assert_allclose(expected["stress"][0], atoms.get_stress(voigt=False), atol=limit)

    native = load_potential(tmp_path / "tuned" / "metatomic.pt", trust=True)
    assert str(native.dtype) == f"torch.{stored}"
    again = load_potential(native, dtype=dtype)
    torch.testing.assert_close(results(again, skewed())["forces"], expected["forces"], atol=limit, rtol=0)


def test_a_file_is_not_opened_without_trust(exported):
    with pytest.raises(PermissionError, match="trust=True"):
        load_potential(exported)


def test_saving_does_not_warn(exported, tmp_path):
    potential = load_potential(exported, trust=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_potential(potential, tmp_path / "tuned")


def test_a_model_without_an_energy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="computes no energy, but"):
        load_potential(export(tmp_path / "small.pt", output="small::charges"), trust=True)


def test_only_its_own_files_are_read(tmp_path):
    torch.save({"a": 1}, tmp_path / "pickle.pt")
    assert Metatomic.read_native(tmp_path / "pickle.pt") is None
    (tmp_path / "text").write_text("no archive")
    assert Metatomic.read_native(tmp_path / "text") is None


@pytest.mark.parametrize("cell", ["fixed", "full"])
def test_it_is_tuned_through_a_relaxation(exported, cell, tmp_path):
    start = skewed()
    reference = relax(load_potential(exported, trust=True), start, steps=4, cell=cell).to_atoms()
    reference = Atoms(reference.numbers, reference.positions, cell=reference.cell, pbc=True)
    reference.positions[1] += [0.05, 0, 0]
    if cell == "full":
        reference.set_cell(reference.cell * 1.01, scale_atoms=True)
    trainer = Trainer(
        load_potential(exported, trust=True), steps=2, batch_size=1, lr=1e-3, interpolate=0.0, rattle=0.0,
        out=tmp_path / "run", progress=False,
    )  # fmt: skip
    trainer.fit([RelaxationPair(start, reference, "one", "one", cell=cell)], epochs=2)
    losses = [row["train_loss"] for row in trainer.history]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "potential" / "metatomic.pt").is_file()
