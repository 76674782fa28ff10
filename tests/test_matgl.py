"""matgl, where it is installed: what only its models have. Its contract and files: test_mattersim_nequip.py."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from helpers.families import FAMILIES, MATGL, matgl_calculator, small_matgl, write_matgl
from helpers.structures import methanol, rattled, silicon, skewed

from ase_bptt import TorchCalculator, load_potential, save_potential
from ase_bptt.potentials.matgl import FILES, MatGL
from ase_bptt.testing import check_potential

HERE = next(family.here for family in FAMILIES if family.name == "matgl")
needs_matgl = pytest.mark.skipif(not HERE, reason='needs pip install "ase_bptt[matgl]"')
NETWORKS = pytest.mark.parametrize("network", MATGL)
VARIANTS = {
    "M3GNet": ("M3GNet", {}),
    "M3GNet, plain Bessel functions": ("M3GNet", {"use_smooth": False}),
    "TensorNet": ("TensorNet", {}),
    "TensorNet, SO(3)": ("TensorNet", {"equivariance_invariance_group": "SO(3)"}),
    "TensorNet, Bessel functions": ("TensorNet", {"rbf_type": "SphericalBessel"}),
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _quiet(capfd, recwarn):
    """What matgl prints and warns of is its own."""


@pytest.fixture
def exactly(monkeypatch):
    """matgl's calculator rounds coordinates to float32 on their way to a potential in float64, unless told not to."""
    import matgl

    monkeypatch.setattr(matgl, "float_th", torch.float64)


@needs_matgl
class TestModels:
    @pytest.mark.parametrize(("network", "changes"), VARIANTS.values(), ids=VARIANTS)
    def test_in_float64_it_agrees_with_its_own_calculator_to_rounding(self, network, changes, tmp_path, exactly):
        small_matgl(network, **changes).to(torch.float32).save(tmp_path)
        potential = load_potential(tmp_path, dtype="float64")
        theirs = matgl_calculator(tmp_path, torch.float64)
        limits = {f"parity {name}": 1e-9 for name in ("energy", "forces", "stress")}
        others = {
            "batch",
            "translation",
            "rotation",
            "permutation",
            "far atom",
            "charge",
            "gradient",
            "cells",
            "cutoff",
        }
        for atoms in (skewed(), methanol()):
            check_potential(potential, atoms, calculator=theirs, tolerances=limits, skip=others)

    @NETWORKS
    def test_where_there_is_no_edge_or_no_angle_and_where_angles_are_straight(self, network, tmp_path, exactly):
        path = write_matgl(tmp_path, network)
        ours, theirs = TorchCalculator(load_potential(path, dtype="float64")), matgl_calculator(path, torch.float64)
        straight = bulk("SiC", "rocksalt", a=5.0, cubic=True)
        pair = bulk("Si", "sc", a=20.0) * (2, 1, 1)
        pair.set_distance(0, 1, 2.5)
        for atoms in (straight, rattled(straight, 0.02), bulk("Si", "sc", a=20.0), pair, bulk("Si", "sc", a=4.2)):
            found, expected = atoms.copy(), atoms.copy()
            found.calc, expected.calc = ours, theirs
            assert found.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-9)
            np.testing.assert_allclose(found.get_forces(), expected.get_forces(), atol=1e-9)
            np.testing.assert_allclose(found.get_stress(voigt=False), expected.get_stress(voigt=False), atol=1e-9)

    def test_a_mean_belongs_to_a_structure(self, tmp_path):
        small_matgl("TensorNet").save(tmp_path / "without")
        module = small_matgl("TensorNet")
        module.data_mean.fill_(0.7)
        module.save(tmp_path / "with")
        energies = []
        for name in ("without", "with"):
            atoms = silicon()
            atoms.calc = TorchCalculator(load_potential(tmp_path / name))
            energies.append(atoms.get_potential_energy())
            assert atoms.get_potential_energies().sum() == pytest.approx(energies[-1], abs=1e-4)
        assert energies[1] - energies[0] == pytest.approx(0.7, abs=1e-5)

    def test_centres_of_gaussians_are_not_trained(self, tmp_path):
        module = small_matgl("TensorNet")
        centers = module.model.bond_expansion.rbf.centers
        potential = load_potential(module)
        assert all(p.requires_grad for p in potential.parameters())
        assert "model.model.bond_expansion.rbf.centers" not in dict(potential.named_parameters())
        centers.data.mul_(1.1)  # saved, for the arguments give others
        save_potential(potential, tmp_path)
        for saved in (tmp_path, tmp_path / "matgl"):
            found = dict(load_potential(saved).named_buffers())["model.model.bond_expansion.rbf.centers"]
            assert torch.equal(found, centers)

    def test_the_process_is_left_as_it_was(self, tmp_path):
        path = write_matgl(tmp_path)
        code = (
            "import logging, sys, warnings, torch\n"
            "torch.set_default_dtype(torch.float64)\n"
            "def state():\n"
            "    return torch.get_default_dtype(), torch.get_rng_state().sum(), sys.stdout, logging.root.level,"
            " list(logging.root.handlers), torch.is_grad_enabled(), torch.get_float32_matmul_precision()\n"
            "from ase.build import bulk\n"
            "from ase_bptt import TorchCalculator, load_potential\n"
            "before = state()\n"
            f"potential = load_potential({str(path)!r}, device='cpu')\n"
            "atoms = bulk('Si', cubic=True)\n"
            "atoms.rattle(0.1)\n"
            "atoms.calc = TorchCalculator(potential)\n"
            "print(repr(float(abs(atoms.get_forces()).max())), potential.dtype)\n"
            "assert state() == before, (state(), before)\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        force, dtype = done.stdout.split()
        atoms = bulk("Si", cubic=True)
        atoms.rattle(0.1)
        atoms.calc = TorchCalculator(load_potential(path, device="cpu"))
        assert dtype == "torch.float32"
        assert float(force) == pytest.approx(abs(atoms.get_forces()).max(), abs=1e-6)


@needs_matgl
class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"is_intensive": True}, "an intensive output"),
            ({"ntargets": 2}, "several outputs"),
            ({"include_state": True, "dim_state_embedding": 4, "ntypes_state": 2}, "the state of a structure"),
        ],
    )
    def test_networks_that_are_no_energies_of_structures_alone(self, changes, reason):
        with pytest.raises(NotImplementedError, match=f"This M3GNet of matgl has {reason}"):
            load_potential(small_matgl("M3GNet", use_smooth=False, **changes))

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"calc_charge": True}, "charges among its outputs"),
            ({"calc_repuls": True}, "matgl's ZBL repulsion"),
            ({"element_refs": [[0.0] * 4] * 2}, "reference energies of several states"),
        ],
    )
    def test_what_is_added_to_them(self, changes, reason):
        from matgl.apps.pes import Potential

        with pytest.raises(NotImplementedError, match=reason):
            load_potential(Potential(small_matgl("TensorNet").model, **changes))

    def test_other_networks(self):
        from matgl.apps.pes import Potential
        from matgl.models import SO3Net

        module = Potential(SO3Net(element_types=("Si",), lmax=1, nmax=1, units=4, is_intensive=False))
        with pytest.raises(NotImplementedError, match="holds a SO3Net, and only M3GNet and TensorNet are supported"):
            load_potential(module)

    def test_a_network_without_its_potential(self, tmp_path):
        small_matgl("TensorNet").model.save(tmp_path)
        with pytest.raises(NotImplementedError, match="holds a TensorNet of matgl and no energies"):
            load_potential(tmp_path)

    def test_a_folder_without_some_of_its_weights(self, tmp_path):
        path = write_matgl(tmp_path)
        state = torch.load(path / "state.pt")
        for name in ("model.final_layer.gated.layers.0.bias", "model.out_norm.weight"):
            del state[name]
        torch.save(state, path / "state.pt")
        with pytest.raises(ValueError, match=r"lacks 2 of the model's weights, as model\.final_layer\.gated"):
            load_potential(path)

    def test_a_folder_that_would_run_code(self, tmp_path):
        path = write_matgl(tmp_path)
        arguments = torch.load(path / "model.pt", weights_only=False)
        arguments["model"]["@class"] = "system"
        arguments["model"]["@module"] = "os"
        torch.save(arguments, path / "model.pt")
        with pytest.raises(NotImplementedError, match="holds a system, and only M3GNet and TensorNet"):
            load_potential(path)
        torch.save({"model": Path(".")}, path / "model.pt")
        with pytest.raises(ValueError, match="damaged, or hold more than tensors and numbers"):
            load_potential(path)
        save_potential(load_potential(small_matgl("TensorNet")), tmp_path / "ours")
        description = json.loads((tmp_path / "ours" / "model.json").read_text())
        description["config"]["class"] = "MGLPotentialTrainer"
        (tmp_path / "ours" / "model.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match="MGLPotentialTrainer is none of matgl's networks"):
            load_potential(tmp_path / "ours")

    def test_a_folder_of_an_older_release_is_read_with_a_warning(self, tmp_path, caplog):
        path = write_matgl(tmp_path)
        arguments = torch.load(path / "model.pt")
        arguments["model"]["@model_version"] = 1
        torch.save(arguments, path / "model.pt")
        with caplog.at_level(logging.WARNING):
            load_potential(path)
        assert "This TensorNet is of an older release of matgl" in caplog.text


class TestNames:
    @needs_matgl
    @pytest.mark.parametrize(
        ("name", "repository"),
        [("TensorNet-PES", "materialyze/TensorNet-PES"), ("somebody/TensorNet", "somebody/TensorNet")],
    )
    def test_a_published_model_comes_into_matgls_cache(self, name, repository, tmp_path, monkeypatch):
        import huggingface_hub
        from matgl.config import MATGL_CACHE

        path, asked = write_matgl(tmp_path), []

        def download(repo_id, filename, cache_dir):
            asked.append((repo_id, filename, cache_dir))
            return str(path / filename)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        potential = load_potential(f"matgl:{name}")
        assert asked == [(repository, file, str(MATGL_CACHE)) for file in FILES]
        assert potential.metadata == {"source": f"matgl:{name}"}

    @needs_matgl
    def test_where_it_cannot_be_had_one_sentence_says_so(self, monkeypatch):
        import huggingface_hub

        def download(*_, **__):
            raise OSError("no route")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        with pytest.raises(ValueError, match=r"materialyze/M3GNet-PES is not in matgl's cache.*OSError"):
            load_potential("matgl:M3GNet-PES")

    def test_the_family_alone_names_no_model(self):
        with pytest.raises(ValueError, match=r"matgl has many models: name one, as in matgl:TensorNet-PES"):
            MatGL.from_name(None)

    def test_other_folders_are_not_its_own(self, tmp_path):
        assert MatGL.read_native(tmp_path) is None
        for name in FILES:
            (tmp_path / name).write_text("{}")
        assert MatGL.read_native(tmp_path) is None
        assert not MatGL.owns({"model": {}})
        assert not MatGL.owns(torch.nn.Linear(1, 1))
