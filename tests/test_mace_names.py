"""MACE's foundation models by name and head, with small random models in place of the files; nothing is downloaded."""

import io
from email.message import Message
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.potentials import needs_mace, tiny_mace
from helpers.structures import silicon, skewed

from ase_bptt import TorchCalculator, load_potential, save_potential

pytestmark = needs_mace
HEADS = ["omat_pbe", "spice", "r2scan"]
SPECS = {
    "total_charge": {"type": "categorical", "per": "graph", "num_classes": 5, "offset": 2, "emb_dim": 3},
    "total_spin": {"type": "categorical", "per": "graph", "num_classes": 4, "emb_dim": 3},
}


@cache
def many_headed():
    """Each head has its own readout, reference energies, scale and shift."""
    return tiny_mace(
        elements=(14,), max_ell=1, correlation=1, heads=HEADS, atomic_energies=-np.arange(1.0, 4)[:, None],
        atomic_inter_scale=[20.0, 30.0, 10.0], atomic_inter_shift=[0.1, 0.2, 0.3],
    )  # fmt: skip


@cache
def charged():
    return tiny_mace(elements=(14,), max_ell=1, correlation=1, atomic_inter_scale=20.0, embedding_specs=SPECS)


class Served(io.BytesIO):
    """An answer that holds a model."""

    headers = Message()

    def info(self):
        return self.headers


@pytest.fixture
def serving(tmp_path, monkeypatch, capsys):
    """Give mace-torch a model in place of whatever it downloads; what it asked for."""
    from mace.calculators import foundations_models

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(foundations_models, "module_dir", str(tmp_path))
    asked = []

    def serve(model):
        content = io.BytesIO()
        torch.save(model, content)

        def answer(address, **_):
            asked.append(address)
            return Served(content.getvalue())

        monkeypatch.setattr("urllib.request.urlopen", answer)
        return asked

    return serve


def agrees(potential, model, head=None):
    """With mace's own calculator, by the head."""
    from mace.calculators import MACECalculator

    own = MACECalculator(models=model, device="cpu", default_dtype="float64", **({"head": head} if head else {}))
    for atoms in (silicon(), skewed()):
        twin = atoms.copy()
        atoms.calc, twin.calc = own, TorchCalculator(potential)
        assert twin.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(twin.get_forces(), atoms.get_forces(), atol=1e-10)


@pytest.mark.parametrize("head", HEADS[1:])
def test_a_head_is_chosen_by_name_and_kept(serving, tmp_path, head):
    serving(many_headed())
    potential = load_potential(f"mace:mh-1:{head}")
    agrees(potential, many_headed(), head)
    save_potential(potential, tmp_path / "saved")
    agrees(load_potential(tmp_path / "saved"), many_headed(), head)
    native = load_potential(tmp_path / "saved" / "mace.model", trust=True)
    agrees(native, many_headed(), head)
    save_potential(native, tmp_path / "again")
    agrees(load_potential(tmp_path / "again"), many_headed(), head)


def test_heads_differ(serving):
    serving(many_headed())
    energies = {TorchCalculator(load_potential(f"mace:mh-0:{head}")).get_potential_energy(silicon()) for head in HEADS}
    assert len(energies) == 3


@pytest.mark.parametrize(
    ("spec", "named"), [("mace:mh-1:pbe", "'pbe'"), ("mace:mh-1", "'default'"), ("mace:mh-1:", "'default'")]
)
def test_where_a_head_must_be_chosen_they_are_listed_in_one_sentence(serving, spec, named):
    serving(many_headed())
    sentence = f"has the heads omat_pbe, spice, r2scan; {named} is none of them: choose one, as mace:NAME:HEAD"
    with pytest.raises(ValueError, match=sentence) as error:
        load_potential(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("medium", "mace-128-L1_epoch-199"), ("mh-0", "mace-mh-0.model"), ("mace-matpes-r2scan-0", "matpes-r2scan"),
        ("off-small", "MACE-OFF23_small"), ("anicc", "ani500k_large_CC"), ("omol", "MACE-omol-0"),
        ("medium:Default", "mace-128-L1_epoch-199"),
    ],
)  # fmt: skip
def test_a_name_asks_for_its_own_file(serving, name, asked):
    addresses = serving(charged())
    potential = load_potential(f"mace:{name}")
    assert len(addresses) == 1
    assert asked in addresses[0]
    assert potential.metadata == {"source": f"mace:{name}"}


def test_an_unknown_name_is_refused_with_all_that_there_are():
    with (
        mock.patch("urllib.request.urlopen", side_effect=AssertionError("went to the network")),
        pytest.raises(
            ValueError, match=r"no foundation model 'mh-9:spice' .*; there are small, medium, .*, mh-1, "
        ) as error,
    ):
        load_potential("mace:mh-9:spice")
    assert str(error.value).endswith("off-small, off-medium, off-large, anicc, omol.")


class TestCharges:
    """Models that are told charge and spin, such as omol."""

    def test_structures_are_neutral_with_paired_spins_as_maces_calculator_takes_them(self, serving, tmp_path):
        serving(charged())
        potential = load_potential("mace:omol")
        agrees(potential, charged())
        save_potential(potential, tmp_path / "saved")
        agrees(load_potential(tmp_path / "saved"), charged())

    def test_other_inputs_are_refused_by_name(self):
        specs = {"temperature": {"type": "continuous", "per": "graph", "in_dim": 1, "emb_dim": 3}}
        with pytest.raises(NotImplementedError, match="needs temperature for each structure"):
            load_potential(tiny_mace(elements=(14,), max_ell=1, correlation=1, embedding_specs=specs))
