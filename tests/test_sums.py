"""Sums of potentials, and DFT-D3 as a part of them, against ASE's SumCalculator and torch-dftd's own calculator."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.mixing import SumCalculator
from helpers.potentials import lennard_jones, needs_chgnet, needs_mace, stiff_mace, wide_lennard_jones
from helpers.structures import argon, methanol, silicon, skewed

from ase_bptt import RelaxationPair, SumPotential, TorchCalculator, Trainer, load_potential, relax, save_potential
from ase_bptt.potentials import CORRECTION
from ase_bptt.potentials.analytic import LennardJones, Morse
from ase_bptt.testing import check_potential
from ase_bptt.tuning import layers

needs_d3 = pytest.mark.skipif(importlib.util.find_spec("torch_dftd") is None, reason='needs pip install "ase_bptt[d3]"')


def own_d3(functional="pbe", damping="bj", cutoff=12.0):
    """torch-dftd's calculator, with the same cutoff."""
    from torch_dftd.torch_dftd3_calculator import TorchDFTD3Calculator

    return TorchDFTD3Calculator(
        xc=functional, damping=damping, cutoff=cutoff, cnthr=cutoff, cutoff_smoothing="poly", dtype=torch.float64
    )


def agree(potential, calculator, atoms, atol=1e-6):
    twin = atoms.copy()
    atoms.calc, twin.calc = calculator, TorchCalculator(potential, dtype="float64")
    energy = atoms.get_potential_energy()
    assert twin.get_potential_energy() == pytest.approx(energy, abs=atol * len(atoms))
    np.testing.assert_allclose(twin.get_forces(), atoms.get_forces(), atol=atol)
    if atoms.cell.rank == 3:
        np.testing.assert_allclose(twin.get_stress(), atoms.get_stress(), atol=atol)
    return energy


def two():
    """Of different cutoffs."""
    return LennardJones(sigma=1.0, rc=2.4, ro=1.8, smooth=True), Morse()


class TestSums:
    @pytest.mark.parametrize("atoms", [argon, skewed, methanol])
    def test_agree_with_ases(self, atoms):
        parts = two()
        assert parts[0].cutoff != parts[1].cutoff
        own = SumCalculator([TorchCalculator(p) for p in two()])
        agree(SumPotential(*parts), own, atoms(), atol=1e-10)

    def test_keep_the_contract(self):
        atoms = bulk("Ar", a=2.0, cubic=True)
        atoms.rattle(0.1, seed=1)
        atoms = Atoms("Al2Cu2", atoms.positions, cell=[4] * 3, pbc=True)
        # EMT, as ASE's, leaves 1e-4 eV of an interaction at its cutoff, for each of the four atoms.
        check_potential(SumPotential(lennard_jones(), "emt"), atoms, tolerances={"cutoff": 8e-4})

    def test_each_part_has_the_edges_within_its_own_cutoff(self):
        seen = []

        class Short(LennardJones):
            def forward(self, structures, edges):
                seen.append(edges.vectors(structures).detach().norm(dim=1).max().item())
                return super().forward(structures, edges)

        relax(SumPotential(Short(rc=5.0), LennardJones(rc=7.0)), argon(), steps=2)
        assert seen
        assert 1.5 < max(seen) < 5.0

    def test_names_elements_and_properties(self):
        potential = SumPotential("emt", "lj")
        assert potential.atomic_numbers == load_potential("emt").atomic_numbers
        assert potential.atomic_properties == ("energies",)
        with pytest.raises(NotImplementedError, match="no parameters for Si"):
            relax(potential, silicon())

    def test_gradients_reach_all_parts(self):
        potential = SumPotential(*two())
        relaxation = relax(potential, methanol(), stepper="gd", fmax=0.01, steps=3)
        relaxation.positions.square().sum().backward()
        assert all(p.grad is not None for p in potential.parameters())

    def test_are_saved_and_loaded(self, tmp_path):
        potential = SumPotential(*two())
        with torch.no_grad():
            for parameter in potential.parameters():
                parameter.mul_(1.1)
        save_potential(potential, tmp_path)
        again = load_potential(tmp_path)
        assert [p.family for p in again] == ["lj", "morse"]
        agree(again, TorchCalculator(potential), methanol(), atol=1e-12)

    def test_what_cannot_be_added_is_refused(self):
        with pytest.raises(ValueError, match="needs two potentials at least; got 1"):
            SumPotential("lj")
        with pytest.raises(NotImplementedError, match="direct potential predicts its forces directly"):
            SumPotential("lj", "direct")
        with pytest.raises(ValueError, match=r"called by its parts, as chgnet\+d3"):
            load_potential("sum")

    def test_dtypes_are_those_of_the_first(self):
        second = Morse()
        potential = SumPotential(lennard_jones().float(), second)
        assert {p.dtype for p in potential.parameters()} == {torch.float32}
        assert second.dtype is torch.float64


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("chgnet+d3", ["chgnet", "d3"]),
        ("mace:medium+d3:pbe:bj", ["mace:medium", "d3:pbe:bj"]),
        ("runs/a+b", ["runs/a+b"]),
        ("runs/a+d3x", ["runs/a+d3x"]),
        ("runs/a+b+d3:pbe", ["runs/a+b", "d3:pbe"]),
    ],
)
def test_names_are_split_where_d3_follows(spec, parts):
    assert CORRECTION.split(spec) == parts


@needs_d3
@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays")  # by torch-dftd
class TestD3:
    @pytest.mark.parametrize("atoms", [methanol, silicon, skewed])
    @pytest.mark.parametrize(("functional", "damping"), [("pbe", "bj"), ("pbe", "zero"), ("b3-lyp", "bjm")])
    def test_agrees_with_torch_dftd(self, atoms, functional, damping):
        potential = load_potential(f"d3:{functional}:{damping}")
        assert abs(agree(potential, own_d3(functional, damping), atoms())) > 1e-3

    def test_agrees_at_another_cutoff(self):
        agree(load_potential("d3:pbe:bj:6"), own_d3(cutoff=6.0), silicon())

    @pytest.mark.parametrize("atoms", [methanol, skewed])
    def test_keeps_the_contract(self, atoms):
        report = check_potential(load_potential("d3:pbe:bj:6"), atoms(), calculator=own_d3(cutoff=6.0))
        assert report["parity forces"] < 1e-6

    @pytest.mark.parametrize("name", ["d3:nonsense", "d3:pbe:nonsense"])
    def test_what_has_no_parameters_is_refused(self, name):
        with pytest.raises(ValueError, match=r"torch-dftd has no parameters for the functional .* take a functional"):
            load_potential(name)

    @pytest.mark.parametrize("name", ["d3:pbe:bj:far", "d3:pbe:bj:-1", "d3:pbe:bj:9:9"])
    def test_what_is_no_name_is_refused(self, name):
        with pytest.raises(ValueError, match=r"A dispersion correction is d3:FUNCTIONAL:DAMPING:CUTOFF"):
            load_potential(name)

    def test_the_trained_part_is_tuned_and_the_correction_stays(self, tmp_path):
        pairs = []
        for k in range(2):
            initial, end = (Atoms("Ar2", [(0, 0, 0), (r, 0, 0)]) for r in (2.9 + 0.1 * k, 2.7))
            pairs.append(RelaxationPair(initial, end, f"Ar2 {k}", "Ar2"))
        potential = SumPotential(wide_lennard_jones(), "d3:pbe:bj:5")
        trainer = Trainer(potential, steps=4, progress=False, out=tmp_path / "run", terms=[])
        before = {name: value.clone() for name, value in trainer.potential.state_dict().items()}
        trainer.fit(pairs, epochs=1)
        after = trainer.potential.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed
        assert changed <= {name for name in before if name.startswith("parts.0.")}
        tuned = load_potential(tmp_path / "run")
        assert tuned.config()["parts"][1] == {
            "family": "d3", "config": {"functional": "pbe", "damping": "bj", "cutoff": 5.0},
        }  # fmt: skip
        assert json.loads((tmp_path / "run" / "potential" / "model.json").read_text())["family"] == "sum"

    @needs_mace
    def test_added_to_a_mace_as_by_ase(self, tmp_path):
        potential = SumPotential(stiff_mace(), "d3")
        own = SumCalculator([TorchCalculator(stiff_mace()), own_d3()])
        agree(potential, own, silicon())
        check_potential(SumPotential(stiff_mace(), "d3:pbe:bj:6"), silicon()[:3])
        save_potential(potential, tmp_path)
        agree(load_potential(tmp_path), own, silicon())
        native = load_potential(tmp_path / "mace.model", trust=True)
        agree(SumPotential(native, "d3"), own, silicon())
        assert layers(potential)[0][0].startswith("parts.0.model.")

    @needs_chgnet
    def test_by_name(self):
        potential = load_potential("chgnet+d3", dtype="float64")
        agree(potential, SumCalculator([TorchCalculator("chgnet", dtype="float64"), own_d3()]), silicon(), atol=1e-6)
        assert potential.metadata == {"source": "chgnet+d3"}
        assert "magmoms" in potential.atomic_properties
