"""MACE with cuEquivariance's kernels, and with the reduced product basis that comes with it."""

import copy
import importlib.util
import sys

import numpy as np
import pytest
import torch
from helpers.potentials import needs_mace, tiny_mace
from helpers.structures import silicon, skewed

from ase_bptt import RelaxationPair, TorchCalculator, Trainer, load_potential, save_potential
from ase_bptt.potentials import require, weights_hash
from ase_bptt.testing import check_potential

pytestmark = needs_mace


@pytest.fixture(autouse=True)
def _quiet(capsys):
    """What mace-torch prints is its own."""


@pytest.fixture
def cueq():
    return pytest.importorskip("cuequivariance_torch", reason='needs pip install "ase_bptt[cueq]"')


def small(irreps="8x0e", **changes):
    """With products of three factors, where a reduced basis is smaller than the full one."""
    # mace-torch first: it prepares torch for the old files of its e3nn.
    require("mace.modules", extra="mace")
    irreps = require("e3nn.o3", extra="mace").Irreps(irreps)
    return tiny_mace(elements=(14,), max_ell=1, correlation=3, hidden_irreps=irreps, atomic_inter_scale=20.0, **changes)


def contractions(model):
    return [m for m in model.modules() if type(m).__name__ == "Contraction"]


def reduced(which=0):
    """As a file holds it that was made beside cuEquivariance: fewer paths than this mace-torch would make."""
    model = small("8x0e + 8x1o", use_reduced_cg=False)
    product = contractions(model)[which]
    product.U_matrix_3 = product.U_matrix_3[..., :2].clone()
    product.weights_max = torch.nn.Parameter(product.weights_max[:, :2].detach().clone())
    model.use_reduced_cg = True
    return model


TRAIN_STEP = Trainer.train_step


def _steps_once(trainer, pairs):
    if trainer.epoch:
        raise KeyboardInterrupt
    return TRAIN_STEP(trainer, pairs)


def results(potential, dtype="float64"):
    atoms = silicon()
    atoms.calc = TorchCalculator(load_potential(potential, dtype=dtype))
    return np.append(atoms.get_forces().ravel(), atoms.get_potential_energy() / len(atoms))


@pytest.mark.parametrize("which", [0, 1])
def test_a_reduced_basis_is_kept_in_what_is_saved(which, tmp_path):
    model = reduced(which)
    save_potential(load_potential(model), tmp_path / "saved")
    again = load_potential(tmp_path / "saved")
    np.testing.assert_allclose(results(again), results(model), atol=1e-12)
    assert contractions(again.model)[which].weights_max.shape[1] == 2
    assert again.model.use_reduced_cg
    save_potential(again, tmp_path / "again")
    np.testing.assert_allclose(results(load_potential(tmp_path / "again")), results(model), atol=1e-12)


def test_what_is_saved_says_which_basis_it_has(tmp_path):
    """mace-torch marks models as reduced that are not, where cuEquivariance is missing; it converts by the mark."""
    model = small(use_reduced_cg=False)
    model.use_reduced_cg = True
    save_potential(load_potential(model), tmp_path)
    assert model.use_reduced_cg
    assert not load_potential(tmp_path).model.use_reduced_cg
    assert not load_potential(tmp_path / "mace.model", trust=True).model.use_reduced_cg


@pytest.mark.parametrize("name", ["PolarMACE", "MACELES"])
def test_electrostatics_beyond_the_cutoff_are_refused(name):
    model = small()
    model.__class__ = type(name, (type(model),), {"__module__": "mace.modules.extensions"})
    with pytest.raises(
        NotImplementedError, match=f"class {name}, whose electrostatics reach beyond the cutoff"
    ) as error:
        load_potential(model)
    assert "\n" not in str(error.value)


def test_mace_polar_is_refused_by_name():
    with pytest.raises(
        NotImplementedError, match=r"'polar-1-m' is a MACE-POLAR, .*: take another, such as mace:medium"
    ):
        load_potential("mace:polar-1-m")


def test_without_cuequivariance_a_sentence_says_how_to_get_it(monkeypatch):
    from ase_bptt.potentials.mace import MACE

    monkeypatch.setitem(sys.modules, "cuequivariance_torch", None)
    with pytest.raises(
        ImportError, match=r"'cuequivariance_torch'.*: install it by pip install \"ase_bptt\[cueq\]\"\."
    ):
        MACE(small(), cueq=True)


@pytest.mark.usefixtures("cueq")
class TestCuEquivariance:
    @pytest.fixture(params=["full", "reduced"])
    def model(self, request):
        return small("8x0e + 8x1o", use_reduced_cg=request.param == "reduced")

    @pytest.fixture
    def potential(self, model):
        from ase_bptt.potentials.mace import MACE

        return MACE(model, cueq=True)

    def test_it_is_the_same_potential_with_other_weights(self, model, caplog):
        from ase_bptt.potentials.mace import MACE

        potential = MACE(model, cueq=True)
        np.testing.assert_allclose(results(potential), results(model), atol=1e-10)
        kernels = importlib.util.find_spec("cuequivariance_ops_torch") is not None
        assert ("slower than without" in caplog.text) is not kernels
        names = {name for name, _ in potential.named_parameters()}
        assert "model.products.0.symmetric_contractions.weight" in names
        np.testing.assert_allclose(results(potential, "float32"), results(model), atol=1e-4)

    def test_second_derivatives_are_right(self, potential):
        check_potential(potential, skewed())

    @pytest.mark.parametrize("model", ["reduced"], indirect=True)
    def test_a_model_that_somebody_converted_is_used_as_it_is(self, potential, tmp_path):
        from ase_bptt.potentials.mace import MACE

        torch.save(potential.model, tmp_path / "converted.model")
        again = load_potential(tmp_path / "converted.model", trust=True)
        np.testing.assert_allclose(results(again), results(potential), atol=1e-12)
        assert MACE(potential.model, cueq=True).model is potential.model

    @pytest.mark.filterwarnings("ignore:To copy construct from a tensor", "ignore:cuequivariance_ops_torch is not")
    @pytest.mark.parametrize(("model", "dtype"), [("full", "float32"), ("reduced", "float64")], indirect=["model"])
    def test_what_is_saved_is_plain(self, potential, dtype, tmp_path):
        from mace.calculators import MACECalculator

        base = results(potential)
        pair = RelaxationPair(skewed(), skewed(2), "a", group="a")
        trainer = Trainer(
            load_potential(potential, dtype=dtype), steps=2, lr=1e-3, interpolate=0.0, rattle=0.0, progress=False
        )
        trainer.fit([pair], epochs=2).save(tmp_path)
        tuned, energy, forces = results(trainer.potential, dtype), 1e-6, 1e-6 if dtype == "float64" else 1e-4
        for accelerate in (False, True):
            atoms = silicon()
            atoms.calc = MACECalculator(
                model_paths=tmp_path / "mace.model", device="cpu", default_dtype=dtype, enable_cueq=accelerate
            )
            torch.set_default_dtype(torch.float32)
            assert atoms.get_potential_energy() / len(atoms) == pytest.approx(tuned[-1], abs=energy)
            np.testing.assert_allclose(atoms.get_forces().ravel(), tuned[:-1], atol=forces)
        stored = load_potential(tmp_path)
        np.testing.assert_allclose(results(stored, dtype), tuned, atol=forces)
        assert contractions(stored.model)
        assert np.abs(tuned - base).max() > 1e-3
        assert stored.metadata == trainer.potential.metadata

    @pytest.mark.parametrize("model", ["full"], indirect=True)
    def test_a_resumed_run_computes_with_it_again_bit_for_bit(self, potential, model, monkeypatch, tmp_path):
        pair = RelaxationPair(skewed(), skewed(2), "a", group="a")
        assert weights_hash(potential) == weights_hash(load_potential(model))

        def trainer(out) -> Trainer:
            return Trainer(copy.deepcopy(potential), steps=2, lr=1e-3, out=tmp_path / out, progress=False)

        whole, stopped = trainer("whole").fit([pair], epochs=2), trainer("stopped")
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", _steps_once)
            with pytest.raises(KeyboardInterrupt):
                stopped.fit([pair], epochs=2)
        resumed = Trainer.resume(tmp_path / "stopped", progress=False)
        assert resumed.epoch == 1
        assert resumed.potential.form == potential.form != ""
        ends = [run.potential.state_dict() for run in (whole, resumed.fit([pair], epochs=2))]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    def test_the_embedded_model_is_converted_too(self):
        from ase_bptt.potentials.mace import MACE

        plain = load_potential("mace-si")
        np.testing.assert_allclose(results(MACE(plain.model, cueq=True)), results(plain), atol=1e-10)
