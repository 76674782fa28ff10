"""SevenNet, in its own environment: the contract, parity with sevenn's own calculator, checkpoints in and out."""

import copy
import importlib.util
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.structures import methanol, skewed

from ase_bptt import TorchCalculator, Trainer, load_potential, relax, save_potential, tuning
from ase_bptt.neighbors import NeighborList
from ase_bptt.pairs import RelaxationPair
from ase_bptt.potentials.sevennet import SevenNet
from ase_bptt.structures import Structures
from ase_bptt.testing import check_potential
from ase_bptt.tuning import layers

HAS_SEVENNET = importlib.util.find_spec("sevenn") is not None
needs_sevennet = pytest.mark.skipif(not HAS_SEVENNET, reason='needs pip install "ase_bptt[sevennet]", on its own')
PARITY = {"parity energy": 1e-6, "parity forces": 1e-5, "parity stress": 1e-6, "parity atomic_energies": 1e-5}
"""Of float32, in which sevenn computes."""
NAMES = {
    "sevennet": ("7net-0", None),
    "sevennet:7net-l3i5": ("7net-l3i5", None),
    "sevennet:7net-mf-0": ("7net-mf-0", "PBE"),
    "sevennet:7net-mf-0:r2scan": ("7net-mf-0", "R2SCAN"),
}


def calculator(name, modal=None):
    from sevenn.calculator import SevenNetCalculator

    return SevenNetCalculator(name, device="cpu", modal=modal)


def own(spec):
    """sevenn's own calculator for one of our names."""
    return calculator(*NAMES[spec])


def results(potential, atoms):
    structures = Structures.from_atoms(atoms, dtype=potential.dtype)
    return potential.results(structures, NeighborList(potential.cutoff)(structures))


@pytest.fixture(autouse=True)
def _quiet(capsys, recwarn):
    """What sevenn prints and warns of is its own."""


@needs_sevennet
@pytest.mark.filterwarnings("ignore")
class TestPretrained:
    @pytest.mark.parametrize("spec", NAMES)
    def test_it_keeps_the_contract_in_float64(self, spec):
        potential = load_potential(spec, dtype="float64")
        report = check_potential(potential, skewed(), calculator=own(spec), tolerances=PARITY)
        assert not report.skipped

    @pytest.mark.parametrize("atoms", [skewed, methanol])
    def test_it_keeps_the_contract_in_float32(self, atoms):
        potential = load_potential("sevennet")
        assert potential.dtype is torch.float32
        report = check_potential(potential, atoms(), calculator=own("sevennet"), tolerances=PARITY)
        assert {"parity energy", "parity forces", "parity atomic_energies"} <= report.measured.keys()

    def test_modals_differ_and_are_named_where_there_is_none(self):
        energies = [
            results(load_potential(f"sevennet:7net-mf-0{m}"), skewed())["energy"] for m in ("", ":PBE", ":R2SCAN")
        ]
        assert energies[0] == energies[1]
        assert abs(energies[1] - energies[2]) > 0.1
        with pytest.raises(ValueError, match="has the modals R2SCAN, PBE; 'HSE' is none of them"):
            load_potential("sevennet:7net-mf-0:HSE")
        assert load_potential("sevennet:7net-mf-0").modal == "PBE"
        with pytest.raises(ValueError, match="has no modals, and 'PBE' is none"):
            load_potential("sevennet:7net-0:PBE")

    @pytest.mark.parametrize("variant", ["7net-omni", "../7net-0", "9net"])
    def test_what_the_wheel_does_not_carry_is_refused_without_a_download(self, variant):
        with pytest.raises(ValueError, match=f"carries no SevenNet '{variant}', but 7net-0, 7net-l3i5, 7net-mf-0"):
            load_potential(f"sevennet:{variant}")


@needs_sevennet
@pytest.mark.filterwarnings("ignore")
class TestCheckpoints:
    @pytest.mark.parametrize(("spec", "dtype"), [("sevennet", "float32"), ("sevennet:7net-mf-0:r2scan", "float64")])
    def test_tuned_it_comes_back_and_sevenns_calculator_reads_it(self, spec, dtype, tmp_path):
        # A copy: e3nn's layers hold more tensors once they have been copied.
        potential = copy.deepcopy(load_potential(spec, dtype=dtype))
        untuned = results(potential, skewed())["forces"].clone()
        with torch.no_grad():
            for weight in potential.parameters():
                weight.mul_(1.01)
        expected = results(potential, skewed())
        assert (expected["forces"] - untuned).abs().max() > 1e-3
        save_potential(potential, tmp_path)

        loaded = load_potential(tmp_path)
        assert (loaded.dtype, loaded.modal) == (potential.dtype, potential.modal)
        for name, value in results(loaded, skewed()).items():
            assert torch.equal(value, expected[name]), name

        atoms = skewed()
        atoms.calc = calculator(str(tmp_path / "sevennet.pth"), potential.modal)
        assert expected["energy"].item() == pytest.approx(atoms.get_potential_energy(), abs=4e-6)
        np.testing.assert_allclose(expected["forces"], atoms.get_forces(), atol=1e-4)
        np.testing.assert_allclose(expected["stress"][0], atoms.get_stress(voigt=False), atol=1e-5)

        again = load_potential(tmp_path / "sevennet.pth", trust=True, dtype=dtype)
        assert again.modal == potential.modal
        torch.testing.assert_close(results(again, skewed())["forces"], expected["forces"], atol=1e-6, rtol=0)

    def test_a_module_is_wrapped_as_it_is_and_says_why_it_cannot_be_saved(self, tmp_path):
        model = own("sevennet").model.requires_grad_(False)
        flag = model.is_batch_data
        potential = load_potential(model, dtype="float64")
        expected = results(load_potential("sevennet", dtype="float64"), methanol())
        torch.testing.assert_close(results(potential, methanol())["forces"], expected["forces"], atol=1e-6, rtol=0)
        assert model.is_batch_data is flag
        assert not any(p.requires_grad for p in model.parameters())
        with pytest.raises(NotImplementedError, match="load it from its checkpoint"):
            save_potential(potential, tmp_path)

    def test_sevenns_calculator_and_ours_share_a_module(self):
        theirs = own("sevennet")
        atoms, twin = skewed(), skewed()
        atoms.calc, twin.calc = theirs, TorchCalculator(theirs.model)
        for _ in range(2):
            np.testing.assert_allclose(twin.get_forces(), atoms.get_forces(), atol=1e-5)
            atoms.rattle(0.01, seed=1)
            twin.rattle(0.01, seed=1)


def moved_pair() -> RelaxationPair:
    start = skewed()
    with torch.no_grad():
        reference = relax("sevennet", start, steps=4).to_atoms()
    reference.positions[1] += [0.05, 0, 0]
    return RelaxationPair(start, reference, "one", "one")


@needs_sevennet
@pytest.mark.filterwarnings("ignore")
def test_a_copy_loads_its_own_weights_and_is_trained():
    potential, other = (copy.deepcopy(load_potential("sevennet", dtype="float64")) for _ in range(2))
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.01)
    expected = results(other, skewed())["forces"]
    potential.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(results(potential, skewed())["forces"], expected)
    trainer = Trainer(potential, steps=2, batch_size=1, lr=1e-4, interpolate=0.0, rattle=0.0, progress=False)
    trainer.fit([moved_pair()], epochs=1)
    assert not torch.equal(results(potential, skewed())["forces"], expected)


@needs_sevennet
@pytest.mark.filterwarnings("ignore")
def test_it_is_tuned_through_a_relaxation(tmp_path):
    pair = moved_pair()
    trainer = Trainer(
        "sevennet", steps=2, batch_size=1, lr=1e-4, interpolate=0.0, rattle=0.0, out=tmp_path, progress=False
    )
    trainer.potential.requires_grad_()
    trainer.fit([pair], epochs=2)
    losses = [row["train_loss"] for row in trainer.history]
    assert losses[-1] < losses[0]
    assert (tmp_path / "potential" / "sevennet.pth").is_file()


@needs_sevennet
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", ["sevennet", "sevennet:7net-mf-0", "sevennet:7net-l3i5"])
def test_its_layers_hold_every_weight_that_forces_depend_on_once(spec):
    potential = load_potential(spec)
    found = layers(potential)
    names = [name for layer in found for name in layer]
    every = {name for name, _ in potential.named_parameters()}
    assert len(names) == len(set(names))
    assert every - set(names) == {"model.rescale_atomic_energy.shift"}
    assert "model.onehot_to_feature_x.linear.weight" in found[0]
    tuning.select(potential, last=1)
    chosen = {name for name, p in potential.named_parameters() if p.requires_grad}
    assert {"model.4_self_interaction_2.linear.weight", "model.reduce_hidden_to_energy.linear.weight"} <= chosen
    assert not any(name.startswith("model.3_") for name in chosen)


@pytest.mark.skipif(HAS_SEVENNET, reason="for environments without sevenn")
@pytest.mark.parametrize("spec", ["sevennet", "sevennet:7net-mf-0:PBE"])
def test_without_sevenn_one_sentence_says_what_to_do(spec):
    with pytest.raises(ImportError) as caught:
        load_potential(spec)
    message = str(caught.value)
    assert 'pip install "ase_bptt[sevennet]", in an environment of its own: MACE needs e3nn 0.4.4' in message
    assert message.count(". ") == 0
    assert "\n" not in message


@needs_sevennet
def test_beside_sevenn_mace_is_sent_to_another_environment():
    with pytest.raises(ImportError, match=r'"ase_bptt\[mace\]", in an environment of its own'):
        load_potential("mace-si")


def test_its_checkpoints_are_known_by_what_they_hold():
    assert SevenNet.owns({"model_state_dict": {}, "config": {}})
    assert not SevenNet.owns({"model": {"model_args": {}, "state_dict": {}}})
    assert not SevenNet.owns(torch.nn.Linear(1, 1))


@needs_sevennet
@pytest.mark.filterwarnings("ignore")
def test_threads_share_one_model_whose_settings_stay():
    potential = load_potential("sevennet")
    potential.model.set_is_batch_data(False)  # as sevenn's own calculator leaves it
    structures = [skewed(seed=k) for k in range(4)]

    def forces(atoms):
        atoms = atoms.copy()
        atoms.calc = TorchCalculator(potential)
        return atoms.get_forces()

    expected = [forces(atoms) for atoms in structures]
    with ThreadPoolExecutor(4) as pool:
        np.testing.assert_allclose(list(pool.map(forces, structures)), expected, atol=1e-5)
    assert not potential.model.is_batch_data
    assert not any(getattr(layer, "_is_batch_data", False) for layer in potential.model)
