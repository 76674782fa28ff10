"""From names, files and modules to potentials and back, without running anybody's code."""

import json
import pickle
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from ase import Atoms
from helpers.potentials import lennard_jones, needs_chgnet, needs_mace, tiny_mace
from helpers.structures import argon, cluster, silicon, skewed
from torch import nn

import ase_bptt
from ase_bptt import RelaxationPair, TorchCalculator, Trainer, load_potential, relax, save_potential
from ase_bptt.potentials import families, family, weights_hash
from ase_bptt.utils import replacing


def mace_potential(**changes):
    from ase_bptt.potentials.mace import MACE

    return MACE(tiny_mace(elements=(14, 15), max_ell=1, **changes))


def chgnet_potential():
    from ase_bptt.potentials.chgnet import CHGNet

    return CHGNet.from_name(None)


FAMILIES = [
    pytest.param((lennard_jones, argon), id="lj"),
    pytest.param((mace_potential, skewed), id="mace", marks=needs_mace),
    pytest.param((chgnet_potential, silicon), id="chgnet", marks=needs_chgnet),
]


def results(potential, atoms):
    atoms = atoms.copy()
    atoms.calc = TorchCalculator(potential)
    return atoms.get_potential_energy(), atoms.get_forces()


def tune(potential):
    """Other weights than any pretrained ones."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in potential.parameters():
            p += 1e-3 * torch.randn_like(p)
    return potential


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, dtype, tmp_path_factory):
    """A tuned potential, the folder that it was saved to, what loads from there, and Atoms for both."""
    make, atoms = request.param
    folder = tmp_path_factory.mktemp("potential")
    potential = tune(make().to(dtype)).requires_grad_(False)
    save_potential(potential, folder)
    return potential, folder, load_potential(folder), atoms()


class TestRoundTrip:
    def test_energies_and_forces_are_the_same_bit_for_bit(self, saved, dtype):
        potential, _, again, atoms = saved
        assert type(again) is type(potential)
        assert again.dtype is potential.dtype is dtype
        assert again.cutoff == potential.cutoff
        assert again.atomic_numbers == potential.atomic_numbers
        before, after = results(potential, atoms), results(again, atoms)
        assert before[0] == after[0]
        assert np.array_equal(before[1], after[1])

    def test_all_parameters_require_gradients_afterwards(self, saved):
        _, _, again, atoms = saved
        assert all(p.requires_grad for p in again.parameters())
        relax(again, atoms, fmax=0.0, steps=2, stepper="gd").positions.pow(3).sum().backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in again.parameters())

    def test_its_weights_load_without_unpickling(self, saved, dtype):
        potential, folder, _, _ = saved
        weights = torch.load(folder / "weights.pt", weights_only=True)
        assert {name for name, _ in potential.named_parameters()} <= weights.keys()
        assert all(isinstance(value, torch.Tensor) for value in weights.values())
        description = json.loads((folder / "model.json").read_text())
        assert description["family"] == potential.family
        assert description["dtype"] in str(dtype)

    def test_nothing_but_the_files_is_left(self, saved):
        potential, folder, _, _ = saved
        expected = {"model.json", "model_card.md", "weights.pt", potential.native_name} - {None}
        assert {p.name for p in folder.iterdir()} == expected


def test_a_second_save_replaces_the_first():
    potential = lennard_jones()
    save_potential(potential, "saved")
    save_potential(tune(potential), "saved")
    assert results(load_potential("saved"), argon())[0] == results(potential, argon())[0]


def test_a_run_folder_is_loaded_by_its_potential():
    save_potential(lennard_jones(), "run/potential")
    assert results(load_potential("run"), argon())[0] == results(lennard_jones(), argon())[0]


def test_loading_leaves_the_random_numbers_and_the_default_dtype_alone():
    save_potential(lennard_jones(), "saved")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_potential("saved")
    assert torch.equal(torch.rand(3), expected)


def test_the_familys_own_tools_load_the_native_file(saved, dtype, capsys):
    potential, folder, _, atoms = saved
    if potential.family == "mace":
        from mace.calculators import MACECalculator

        name = str(dtype).removeprefix("torch.")
        atoms = atoms.copy()
        atoms.calc = MACECalculator(model_paths=folder / "mace.model", device="cpu", default_dtype=name)
        energy, forces = results(potential, atoms)
        tolerance = 1e-6 if dtype is torch.float64 else 1e-4
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=tolerance)
        np.testing.assert_allclose(atoms.get_forces(), forces, atol=tolerance)
    elif potential.family == "chgnet":
        from chgnet.model.model import CHGNet

        loaded = CHGNet.from_file(str(folder / "chgnet.pth.tar")).state_dict()
        for name, value in potential.model.state_dict().items():
            # chgnet builds its modules in float32.
            assert torch.equal(loaded[name].float(), value.float()), name
    else:
        assert potential.native_name is None
    capsys.readouterr()


def test_we_load_the_native_file_ourselves_where_it_is_trusted(saved):
    potential, folder, _, atoms = saved
    if potential.native_name:
        path = folder / potential.native_name
        with pytest.raises(PermissionError, match="trust=True"):
            load_potential(path)
        again = load_potential(path, trust=True, dtype=potential.dtype)
        exact = potential.family != "chgnet" or potential.dtype is torch.float32
        found, expected = results(again, atoms)[0], results(potential, atoms)[0]
        assert found == (expected if exact else pytest.approx(expected, abs=1e-5))


class Malice:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_is_refused_and_not_even_opened(write):
    with open("gift.model", "wb") as file:
        write(Malice(), file)
    for spec in ("gift.model", Path("gift.model")):
        with pytest.raises(PermissionError, match=r"loading a pickle can run any code.*trust=True, or --trust"):
            load_potential(spec)
    with pytest.raises(PermissionError, match="is a pickle"):
        TorchCalculator("gift.model")
    assert not Path("executed").exists()
    # Otherwise this test could not fail.
    with pytest.raises(ValueError, match=r"No family|cannot be unpickled"):
        load_potential("gift.model", trust=True)
    assert Path("executed").exists()


def test_weights_that_hide_a_pickle_are_refused_and_not_executed():
    save_potential(lennard_jones(), "saved")
    torch.save({"epsilon": Malice()}, "saved/weights.pt")
    with pytest.raises(ValueError, match="The folder saved holds no potential that can be read"):
        load_potential("saved")
    assert not Path("executed").exists()


def cut(name):
    path = Path("saved", name)
    path.write_bytes(path.read_bytes()[:-30])


def describe(**changes):
    path = Path("saved/model.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(key):
    path = Path("saved/model.json")
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))


DAMAGES = {
    "no weights": lambda: Path("saved/weights.pt").unlink(),
    "no description": lambda: Path("saved/model.json").unlink(),
    "weights cut": lambda: cut("weights.pt"),
    "weights empty": lambda: Path("saved/weights.pt").write_bytes(b""),
    "weights are text": lambda: Path("saved/weights.pt").write_text("hello world"),
    "weights are no table": lambda: torch.save([1, 2], "saved/weights.pt"),
    "weights of another shape": lambda: torch.save({"epsilon": torch.ones(3), "sigma": torch.ones(())}, W),
    "weights missing": lambda: torch.save({"epsilon": torch.ones(())}, W),
    "weights unknown": lambda: torch.save({k: torch.ones(()) for k in ("epsilon", "sigma", "tau")}, W),
    "description cut": lambda: cut("model.json"),
    "description is a list": lambda: Path("saved/model.json").write_text("[]"),
    "description is another's": lambda: describe(format="pickled dreams"),
    "no family": lambda: without("family"),
    "no dtype": lambda: without("dtype"),
    "no config": lambda: without("config"),
    "unknown family": lambda: describe(family="gap"),
    "unknown dtype": lambda: describe(dtype="float8"),
    "config of another family": lambda: describe(config={"version": "0.3.0"}),
    "newer version": lambda: describe(version=99),
}
W = "saved/weights.pt"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_one_sentence(damage):
    save_potential(lennard_jones(), "saved")
    DAMAGES[damage]()
    with pytest.raises(ValueError, match=r"The (folder|weights in) saved") as error:
        load_potential("saved")
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_refused():
    Path("nothing").mkdir()
    with pytest.raises(ValueError, match=r"The folder nothing.* holds no potential"):
        load_potential("nothing")


def test_a_trusted_file_that_is_no_pickle_is_refused_with_a_sentence():
    Path("notes.txt").write_text("hello world")
    with pytest.raises(ValueError, match=r"notes\.txt cannot be unpickled"):
        load_potential("notes.txt", trust=True)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no potential 'gap': it is no file or folder here.*mace-si.*lj"):
        load_potential("gap")


@pytest.mark.parametrize(
    ("spec", "known"),
    [
        ("lj:argon", "no variant 'argon'"),
        pytest.param("chgnet:9.9", "no CHGNet '9.9'; there are 0.3.0, 0.2.0, r2scan", marks=needs_chgnet),
    ],
)
def test_unknown_variants_are_named(spec, known):
    with pytest.raises(ValueError, match=known):
        load_potential(spec)


def test_unknown_modules_are_named_with_the_known_families():
    with pytest.raises(ValueError, match=r"what to do with this module \(a torch\.nn.*Linear\).*lj, mace"):
        load_potential(nn.Linear(2, 2))


def test_unknown_dtypes_are_named():
    with pytest.raises(ValueError, match=r"no dtype 'float16'.*; there are float64, float32"):
        load_potential("lj", dtype="float16")


@pytest.mark.parametrize(("package", "spec"), [("mace", "mace:medium"), ("chgnet", "chgnet")])
def test_a_missing_package_is_answered_with_the_extra_that_brings_it(package, spec, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'pip install "ase_bptt\[{package}\]"'):
        load_potential(spec)


def test_the_package_imports_no_familys_package():
    code = (
        "import sys, ase_bptt; ase_bptt.load_potential('lj'); "
        "print(sorted({'mace', 'chgnet', 'e3nn', 'pymatgen', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == ""


def test_families_are_found_through_their_entry_points():
    assert {"lj", "mace", "chgnet"} <= set(families())
    assert all(family(name).family == name for name in families())


class TestModules:
    def test_a_potential_comes_back_as_it_is(self):
        potential = lennard_jones()
        assert load_potential(potential) is potential
        assert load_potential(potential, dtype="float64", device="cpu") is potential

    @pytest.mark.parametrize("dtype", [torch.float32, "float32"])
    def test_another_dtype_makes_a_copy_and_leaves_the_original_alone(self, dtype):
        potential = lennard_jones().requires_grad_(False)
        other = load_potential(potential, dtype=dtype)
        assert other is not potential
        assert other.dtype is torch.float32
        assert all(p.requires_grad for p in other.parameters())
        assert potential.dtype is torch.float64
        assert not any(p.requires_grad for p in potential.parameters())

    def test_another_device_makes_a_copy(self, monkeypatch):
        monkeypatch.setattr("ase_bptt.potentials.as_device", torch.device)  # meta is refused otherwise
        potential = lennard_jones()
        other = load_potential(potential, device="meta")
        assert other.device.type == "meta"
        assert potential.device.type == "cpu"

    @needs_mace
    def test_a_native_module_is_wrapped_and_never_cast(self):
        model = tiny_mace(elements=(14,)).requires_grad_(False).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        other = load_potential(model, dtype="float32")
        assert other.dtype is torch.float32
        assert model.training
        assert not any(p.requires_grad for p in model.parameters())
        for name, value in model.state_dict().items():
            assert value.dtype is before[name].dtype
            assert torch.equal(value, before[name])
        assert load_potential(model).model is model


class TestReplacing:
    def test_the_file_is_there_after_a_good_end(self):
        with replacing("a.txt") as path:
            path.write_text("new")
            assert not Path("a.txt").exists()
        assert Path("a.txt").read_text() == "new"
        assert len(list(Path().iterdir())) == 1

    @pytest.mark.parametrize("old", [None, "old"])
    def test_an_error_leaves_what_there_was_and_nothing_else(self, old):
        if old:
            Path("a.txt").write_text(old)
        before = sorted(Path().iterdir())
        with pytest.raises(UnicodeEncodeError), replacing("a.txt") as path:
            path.write_text("n\udcff")
        assert sorted(Path().iterdir()) == before
        assert not old or Path("a.txt").read_text() == old

    def test_the_files_of_a_folder_take_their_places(self):
        for text in ("old", "new"):
            with replacing("folder") as path:
                path.mkdir()
                for name in "ab":
                    (path / name).write_text(text)
        assert {file.name: file.read_text() for file in Path("folder").iterdir()} == {"a": "new", "b": "new"}
        with pytest.raises(FileNotFoundError), replacing("folder") as path:
            shutil.copytree("nothing", shutil.copytree("folder", path) / "a")
        assert Path("folder/a").read_text() == "new"
        assert len(list(Path().iterdir())) == 1

    def test_a_save_that_fails_leaves_the_saved_potential_whole(self, monkeypatch):
        save_potential(lennard_jones(), "saved")
        before = {p.name: p.read_bytes() for p in Path("saved").iterdir()}
        monkeypatch.setattr(torch, "save", lambda weights, path: (Path(path).write_bytes(b"half"), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            save_potential(tune(lennard_jones()), "saved")
        assert {p.name: p.read_bytes() for p in Path("saved").iterdir()} == before


def test_a_single_atom_and_a_cluster_survive_the_round_trip():
    save_potential(lennard_jones(), "saved")
    for atoms in (Atoms("Ar"), cluster()):
        assert results(load_potential("saved"), atoms)[0] == results(lennard_jones(), atoms)[0]


def test_a_potential_is_not_saved_where_another_would_be_loaded(tmp_path):
    save_potential(lennard_jones(), tmp_path / "run" / "potential")
    with pytest.raises(FileExistsError, match="run is the folder of a training run"):
        save_potential(lennard_jones(), tmp_path / "run")


def test_a_folder_of_the_same_name_does_not_hide_a_family(tmp_path, caplog):
    (tmp_path / "lj").mkdir()
    assert load_potential("lj").family == "lj"
    with pytest.raises(ValueError, match="holds no potential"):
        load_potential("./lj")
    assert "./" in caplog.text


def test_a_checkpoint_of_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'mace'")

    (tmp_path / "some.model").write_bytes(b"pickle")
    monkeypatch.setattr(torch, "load", missing)
    with pytest.raises(ImportError, match=r"ase_bptt\[mace\]"):
        load_potential(tmp_path / "some.model", trust=True)


@needs_chgnet
def test_what_is_saved_says_where_it_comes_from(tmp_path):
    pair = RelaxationPair(silicon(), silicon(amplitude=0.02), "a", group="a")
    trainer = Trainer("chgnet", steps=1, seed=3, out=tmp_path / "run")
    before = weights_hash(trainer.potential)
    trainer.fit([pair], epochs=1)
    tuned = load_potential(tmp_path / "run")
    assert weights_hash(tuned) not in (before, "")
    base, settings = tuned.metadata["base"], tuned.metadata["settings"]
    assert (base["source"], base["family"], base["weights"]) == ("chgnet", "chgnet", before)
    assert (settings["seed"], settings["steps"], settings["epochs"]) == (3, 1, 1)
    assert tuned.metadata["trained"] == "trains all 412,525 weights"
    versions = tuned.metadata["versions"]
    assert versions.items() >= {"ase": ase.__version__, "chgnet": version("chgnet")}.items()
    assert (versions["torch"], versions["ase_bptt"]) == (torch.__version__, ase_bptt.__version__)
    native = torch.load(tmp_path / "run" / "potential" / "chgnet.pth.tar", weights_only=False)
    assert native["metadata"] == json.loads(json.dumps(tuned.metadata))
    # A second tuning names the first as its base.
    again = Trainer(tuned, steps=1)
    again.fit([pair], epochs=1)
    assert again.potential.metadata["base"]["base"] == base


@needs_mace
def test_native_files_bring_back_where_they_come_from():
    from ase_bptt.potentials.mace import MACE

    model = tiny_mace()
    potential = MACE(model)
    potential.metadata = {"base": {"source": "mine"}}
    save_potential(potential, "saved")
    assert not hasattr(model, "metadata")
    again = load_potential("saved/mace.model", trust=True)
    assert again.metadata == {"base": {"source": "mine"}}
    save_potential(again, "again")
    assert again.model.metadata == load_potential("again/mace.model", trust=True).metadata
