"""MatterSim and NequIP, where they are installed: the contract, their own calculators, their files in and out."""

import copy
import json

import numpy as np
import pytest
import torch
from ase.build import bulk
from helpers.families import FAMILIES, NEQUIP, small_nequip, write_mattersim, write_nequip
from helpers.structures import methanol, rattled, silicon, skewed

from ase_bptt import Trainer, load_potential, relax, save_potential, tuning
from ase_bptt.neighbors import NeighborList
from ase_bptt.pairs import RelaxationPair
from ase_bptt.potentials import mattersim, nequip_files
from ase_bptt.potentials.matgl import MatGL
from ase_bptt.potentials.mattersim import MatterSim
from ase_bptt.potentials.nequip import NequIP
from ase_bptt.structures import Structures
from ase_bptt.testing import check_potential
from ase_bptt.tuning import layers

HAS = {family.name: family.here for family in FAMILIES}
needs_mattersim = pytest.mark.skipif(not HAS["mattersim"], reason='needs pip install "ase_bptt[mattersim]"')
needs_nequip = pytest.mark.skipif(not HAS["nequip"], reason='needs pip install "ase_bptt[nequip]", on its own')
EACH = pytest.mark.parametrize("family", [family.marked() for family in FAMILIES])
PARITY = {"parity energy": 1e-6, "parity forces": 1e-4, "parity stress": 1e-5, "parity atomic_energies": 1e-5}
"""In eV an atom, eV/Å, eV/Å^3 and eV: MatterSim's calculator, and NequIP's for a model in float32, compute in that."""
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _quiet(capfd, recwarn):
    """What these packages print and warn of is their own."""


def results(potential, atoms):
    structures = Structures.from_atoms(atoms, dtype=potential.dtype)
    return potential.results(structures, NeighborList(potential.cutoff)(structures))


def written(potential, folder):
    """The family's own file of a potential."""
    save_potential(potential, folder)
    return folder / potential.native_name


def alike(found, expected, limit):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=limit, rtol=0, equal_nan=True, check_dtype=False)


@EACH
class TestEach:
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("atoms", [skewed, silicon, methanol])
    def test_it_keeps_the_contract_and_agrees_with_its_own_calculator(self, family, dtype, atoms, tmp_path):
        potential = load_potential(family.write(tmp_path), trust=True, dtype=dtype)
        assert str(potential.dtype) == f"torch.{dtype}"
        assert all(p.requires_grad for p in potential.parameters())
        theirs = family.calculator(written(load_potential(potential, dtype="float32"), tmp_path / "native"))
        report = check_potential(potential, atoms(), calculator=theirs, tolerances=PARITY)
        print(report)
        assert {"parity energy", "parity forces", "gradient weights"} <= report.measured.keys()

    def test_a_pickle_is_not_opened_without_trust(self, family, tmp_path):
        if not family.pickled:
            load_potential(family.write(tmp_path))
            return
        with pytest.raises(PermissionError, match="trust=True"):
            load_potential(family.write(tmp_path))

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_tuned_it_comes_back_and_its_own_calculator_reads_it(self, family, dtype, tmp_path):
        base = load_potential(family.write(tmp_path), trust=True, dtype=dtype)
        potential = copy.deepcopy(base)
        with torch.no_grad():
            for weight in potential.parameters():
                weight.mul_(1.01)
        potential.metadata = {"source": "tests"}
        expected, untuned = results(potential, silicon()), results(base, silicon())
        assert (expected["forces"] - untuned["forces"]).abs().max() > 1e-3
        native = written(potential, tmp_path / "tuned")

        loaded = load_potential(tmp_path / "tuned")
        assert loaded.dtype == potential.dtype
        alike(results(loaded, silicon()), expected, 0)
        again = load_potential(native, trust=True)
        assert again.dtype == potential.dtype
        assert again.metadata == {"source": "tests"}
        alike(results(again, silicon()), expected, 1e-12 if dtype == "float64" else 1e-6)

        atoms = silicon()
        atoms.calc = family.calculator(native)
        assert expected["energy"].item() == pytest.approx(atoms.get_potential_energy(), abs=8e-6)
        np.testing.assert_allclose(expected["forces"], atoms.get_forces(), atol=1e-4)
        np.testing.assert_allclose(expected["stress"][0], atoms.get_stress(voigt=False), atol=1e-5)

    def test_a_module_is_wrapped_as_it_is(self, family, tmp_path):
        module = load_potential(family.write(tmp_path), trust=True).model.requires_grad_(False)
        state = copy.deepcopy(module.state_dict())
        double, single = load_potential(module, dtype="float64"), load_potential(module)
        alike(results(double, methanol()), results(single, methanol()), 1e-5)
        assert double.dtype is torch.float64
        assert single.model is module
        for name, value in module.state_dict().items():
            assert value.dtype == state[name].dtype
            assert torch.equal(value, state[name])

    @pytest.mark.parametrize("cell", ["fixed", "full"])
    def test_it_is_tuned_through_relaxations(self, family, cell, tmp_path):
        path = family.write(tmp_path)
        pairs = []
        for seed in range(4):
            start = skewed(seed)
            reference = relax(load_potential(path, trust=True), start, steps=4, cell=cell).to_atoms()
            reference.positions[1] += [0.05, 0, 0]
            if cell == "full":
                reference.set_cell(reference.cell * 1.01, scale_atoms=True)
            pairs.append(RelaxationPair(start, reference, str(seed), str(seed), cell=cell))
        trainer = Trainer(
            load_potential(path, trust=True), steps=3, batch_size=2, lr=1e-3, interpolate=0.0, rattle=0.0,
            out=tmp_path / "run", progress=False,
        )  # fmt: skip
        trainer.fit(pairs, epochs=2)
        losses = [row["train_loss"] for row in trainer.history]
        assert losses[-1] < losses[0]
        tuned = load_potential(tmp_path / "run")
        atoms = skewed()
        atoms.calc = family.calculator(tmp_path / "run" / "potential" / tuned.native_name)
        expected = results(tuned, skewed())["forces"]
        np.testing.assert_allclose(expected, atoms.get_forces(), atol=1e-4)
        assert (results(load_potential(path, trust=True), skewed())["forces"] - expected).abs().max() > 1e-4

    def test_its_layers_hold_every_weight_that_forces_depend_on_once(self, family, tmp_path):
        potential = load_potential(family.write(tmp_path), trust=True)
        names = [name for layer in layers(potential) for name in layer]
        assert sorted(names) == sorted(name for name, _ in potential.named_parameters())
        assert len(layers(potential)) == 3
        tuning.select(potential, last=1)
        chosen = {name for name, p in potential.named_parameters() if p.requires_grad}
        assert chosen == {*layers(potential)[-1]}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_where_it_is_missing_one_sentence_says_what_to_do(family, monkeypatch, tmp_path):
    if family.here:
        pytest.skip(f"for environments without {family.package}")
    adapter = {"mattersim": MatterSim, "nequip": NequIP, "matgl": MatGL}[family.name]
    config = {"mattersim": {"arguments": {}, "version": None}, "nequip": NEQUIP, "matgl": {}}[family.name]
    with pytest.raises(ImportError) as caught:
        adapter.from_config(config)
    message = str(caught.value)
    assert f'install it by pip install "ase_bptt[{family.name}]"' in message
    further = {"mattersim": "pip install --no-deps mattersim", "nequip": "MACE needs e3nn 0.4.4", "matgl": "'matgl'"}
    assert further[family.name] in message
    assert message.count(". ") == 0


class TestMatterSim:
    @needs_mattersim
    def test_it_computes_what_mattersims_own_module_computes(self, tmp_path):
        """Where angles are straight, and where there is no angle or no edge at all."""
        potential = load_potential(write_mattersim(tmp_path), trust=True)
        theirs = FAMILIES[0].calculator(tmp_path / "small.pth")
        rocksalt = bulk("NaCl", "rocksalt", a=5.2, cubic=True)
        for atoms in (rocksalt, rattled(rocksalt, 0.02), bulk("Xe", a=20.0), bulk("Xe", a=6.0)):
            atoms.calc = theirs
            found = results(potential, atoms)
            assert found["energy"].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-6 * len(atoms))
            np.testing.assert_allclose(found["forces"], atoms.get_forces(), atol=1e-4)

    @needs_mattersim
    @pytest.mark.parametrize(("name", "file"), [("mattersim", "1M"), ("mattersim:5m", "5M"), ("mattersim:1M", "1M")])
    def test_a_published_model_is_downloaded_once_by_mattersim(self, name, file, tmp_path, monkeypatch):
        from mattersim.utils import download_utils

        small, calls = write_mattersim(tmp_path), []

        def download(checkpoint, save_folder):
            calls.append(checkpoint)
            (tmp_path / "cache").mkdir()
            (tmp_path / "cache" / checkpoint).write_bytes(small.read_bytes())

        monkeypatch.setattr(download_utils, "download_checkpoint", download)
        monkeypatch.setattr(mattersim, "CACHE", str(tmp_path / "cache"))
        for _ in range(2):
            potential = load_potential(name)
        assert calls == [f"mattersim-v1.0.0-{file}.pth"]
        assert potential.version == file
        save_potential(potential, tmp_path / "saved")
        assert load_potential(tmp_path / "saved").version == file

    @needs_mattersim
    def test_without_a_connection_one_sentence_says_where_its_file_belongs(self, tmp_path, monkeypatch):
        import requests

        def refuse(*_, **__):
            raise requests.exceptions.ConnectionError("Max retries exceeded")

        monkeypatch.setattr(requests, "get", refuse)
        monkeypatch.setattr(mattersim, "CACHE", str(tmp_path / "cache"))
        with pytest.raises(ConnectionError, match="could not be downloaded") as caught:
            load_potential("mattersim:5M")
        assert f"put its file mattersim-v1.0.0-5M.pth into {tmp_path / 'cache'}" in str(caught.value)

    def test_an_unknown_model_is_refused_with_those_that_there_are(self):
        with pytest.raises(ValueError, match=r"'9M'.*1M, 5M"):
            load_potential("mattersim:9M")

    @needs_mattersim
    def test_a_checkpoint_without_some_of_its_weights_is_refused(self, tmp_path):
        native = torch.load(write_mattersim(tmp_path))
        del native["model"]["final.g.2.linear.bias"]
        torch.save(native, tmp_path / "broken.pth")
        with pytest.raises(ValueError, match=r"lacks 1 of its weights, as final\.g\.2\.linear\.bias"):
            load_potential(tmp_path / "broken.pth", trust=True)

    def test_its_checkpoints_are_known_by_what_they_hold(self):
        assert MatterSim.owns({"model_name": "m3gnet", "model": {}, "model_args": {}})
        assert not MatterSim.owns({"model": {"model_args": {}, "state_dict": {}}})
        assert not MatterSim.owns(torch.nn.Linear(1, 1))


class TestNequIP:
    @needs_nequip
    def test_in_float64_it_agrees_with_its_own_calculator_to_rounding(self, tmp_path):
        potential = load_potential(small_nequip(l_max=2), dtype="float64")
        theirs = FAMILIES[1].calculator(written(potential, tmp_path))
        limits = {f"parity {name}": 1e-9 for name in ("energy", "forces", "stress", "atomic_energies")}
        for atoms in (skewed(), methanol()):
            check_potential(potential, atoms, calculator=theirs, tolerances=limits)

    @needs_nequip
    def test_averaged_weights_are_those_that_count(self, tmp_path):
        native = torch.load(write_nequip(tmp_path), weights_only=False)
        potential = small_nequip()
        with torch.no_grad():
            for k, weight in enumerate(potential.parameters()):
                native["state_dict"][f"ema.ema_weight_{k}"] = weight.mul_(1.1).clone()
        torch.save(native, tmp_path / "averaged.ckpt")
        found = load_potential(tmp_path / "averaged.ckpt", trust=True)
        alike(results(found, silicon()), results(potential, silicon()), 1e-6)

    @needs_nequip
    def test_constants_keep_their_precision_in_the_package(self, tmp_path):
        potential = load_potential(small_nequip(per_type_energy_shifts=-1000.1), dtype="float32")
        package = nequip_files.from_package(written(potential, tmp_path))
        shift = package.weights["model.func.per_type_energy_scale_shift.shifts"]
        assert shift.dtype is torch.float64
        assert shift.item() == -1000.1

    @needs_nequip
    def test_a_package_whose_code_computes_other_energies_is_refused(self, tmp_path, monkeypatch):
        path = written(small_nequip(), tmp_path)
        built = nequip_files.build
        monkeypatch.setattr(nequip_files, "build", lambda settings: built(settings | {"num_bessels": 8, "r_max": 3.9}))
        with pytest.raises(ValueError, match=r"computes other energies than the code in .*nequip\.zip, off by"):
            load_potential(path, trust=True)
        monkeypatch.setattr(nequip_files, "build", lambda settings: built(settings | {"num_features": 5}))
        with pytest.raises(ValueError, match="do not fit what the nequip that is installed builds"):
            load_potential(path, trust=True)

    @needs_nequip
    def test_a_package_must_be_called_as_nequip_wants_it(self, tmp_path):
        written(small_nequip(), tmp_path).rename(tmp_path / "model.zip")
        with pytest.raises(ValueError, match=r"want its name to end in \.nequip\.zip: rename it"):
            load_potential(tmp_path / "model.zip", trust=True)

    @pytest.mark.parametrize("target", ["os.system", "nequip.model.ModelFromPackage", "nequip.model.utils.torch.load"])
    def test_what_a_folder_names_is_not_called_unless_it_builds_models(self, target):
        for settings in ({"_target_": target}, NEQUIP | {"pair_potential": {"_target_": target}}):
            with pytest.raises(ValueError, match=f"This NequIP model is made by .*{target}.*only those can be built"):
                NequIP.from_config(settings)

    def test_kernels_are_left_out(self):
        modifiers = [{"modifier": "enable_OpenEquivariance"}]
        modified = {"_target_": "nequip.model.modify", "modifiers": modifiers, "model": dict(NEQUIP)}
        assert nequip_files.checked(modified) == NEQUIP
        with pytest.raises(ValueError, match=r"made by nequip\.model\.modify"):
            nequip_files.checked(modified | {"modifiers": [{"modifier": "modify_PerTypeScaleShift"}]})

    @needs_nequip
    def test_types_that_are_no_elements_and_further_inputs_are_refused(self):
        with pytest.raises(ValueError, match="'Si1' is none"):
            small_nequip(type_names=["Si1"], per_type_energy_shifts=None, pair_potential=None)
        full = {name: value for name, value in NEQUIP.items() if name not in ("l_max", "num_features", "num_layers")}
        full |= {
            "_target_": "nequip.model.FullNequIPGNNModel",
            "irreps_edge_sh": "0e+1o",
            "type_embed_num_features": 4,
            "feature_irreps_hidden": ["4x0e+4x1o", "4x0e"],
            "radial_mlp_depth": [1, 1],
            "radial_mlp_width": [8, 8],
            "categorical_graph_field_embed": [{"field": "charge", "num_features": 2, "min": -2, "max": 2}],
        }
        with pytest.raises(NotImplementedError, match="an input that structures do not have here: charge"):
            NequIP.from_config(full)

    @needs_nequip
    def test_checkpoints_that_cannot_be_read_say_why(self, tmp_path):
        native = torch.load(write_nequip(tmp_path), weights_only=False)
        with pytest.raises(ValueError, match="averaged by its optimizer"):
            NequIP.from_native(native | {"schedulefree_optimizer_state_dict": {}})
        with pytest.raises(ValueError, match="holds several models"):
            NequIP.from_native(native | {"state_dict": {"model.one.weight": torch.ones(1)}})

    @needs_nequip
    def test_a_module_says_why_it_cannot_be_saved(self, tmp_path):
        with pytest.raises(NotImplementedError, match=r"load it from its \.nequip\.zip or \.ckpt file"):
            save_potential(load_potential(small_nequip().model), tmp_path)

    def test_it_has_no_names(self):
        with pytest.raises(ValueError, match=r"loaded from its file: give the \.nequip\.zip or \.ckpt file"):
            load_potential("nequip:large")

    @needs_nequip
    def test_the_folder_holds_no_code(self, tmp_path):
        written(small_nequip(), tmp_path)
        assert json.loads((tmp_path / "model.json").read_text())["config"] == NEQUIP
        torch.load(tmp_path / "weights.pt", weights_only=True)

    def test_its_files_are_known_by_what_they_hold(self, tmp_path):
        assert NequIP.owns({"state_dict": {}, "hyper_parameters": {"model": {}}})
        assert not NequIP.owns({"state_dict": {}, "hyper_parameters": {}})
        assert not NequIP.owns(torch.nn.Linear(1, 1))
        torch.save({"a": 1}, tmp_path / "pickle.pt")
        (tmp_path / "text").write_text("no archive")
        assert NequIP.read_native(tmp_path / "pickle.pt") is NequIP.read_native(tmp_path / "text") is None
