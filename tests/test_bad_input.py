"""Bad input at the shell: refused in one sentence, nothing written over; and the good twin of each input passes."""

import errno
import importlib
import json
import os
import pickle
import resource
import shutil
import sys
import urllib.error
import zipfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from ase.constraints import FixBondLengths
from ase.io import read, write
from helpers.potentials import needs_chgnet, needs_mace, tiny_mace, wide_lennard_jones
from helpers.shell import KINDS, QUICK, cluster_relaxation, is_refused, run, write_relaxations

from ase_bptt import load_potential, save_potential
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.potentials.mace import MACE
from ase_bptt.training import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_relaxations(folder)
    return folder


@pytest.fixture(autouse=True)
def workplace(data, tmp_path):
    """Good input, and what was there before: a finished run and a file of relaxed structures."""
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    (tmp_path / "lj").rename(tmp_path / "model")
    for folder, command in (("run", "train"), ("run-evaluate", "evaluate")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "command.json").write_text(json.dumps({"command": command}))
        (tmp_path / folder / "results.json").write_text("years of work")
    (tmp_path / "run.extxyz").write_text("years of work")


def files(folder=".") -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in sorted(Path(folder).rglob("*"))}


PAIRS = ("train", "evaluate", "info")
COMMANDS = (*PAIRS, "relax")


def called(command: str, *more, pairs=("pairs",), structures=("initial.extxyz",), potential="model"):
    """A command on this input, allowed to replace what is there."""
    replacing = ["--out", "run-evaluate" if command == "evaluate" else "run", "--overwrite", *more]
    if command == "info":
        with mock.patch("ase_bptt.cli.info.diagnose") as diagnose:
            diagnose.return_value.text.return_value = "a diagnosis"
            return run("info", potential, "--pairs", *pairs, *more)
    if command == "relax":
        return run("relax", *structures, "--potential", potential, *replacing, "--out", "run.extxyz")
    quick = QUICK if command == "train" else []
    return run(command, *pairs, "--potential", potential, *quick, *replacing)


def dry(command: str) -> list[str]:
    return [] if command == "info" else ["--dry-run"]


def is_refused_untouched(command: str, *words: str, more=(), **given: Any) -> None:
    before = files()
    is_refused(called(command, *more, **given), *words)
    assert files() == before


def is_accepted(command: str, *more, **given: Any) -> None:
    before = files()
    code, out, err = called(command, *dry(command), *more, **given)
    assert code == 0, err
    assert out
    assert files() == before


# Pairs ----------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """A change to a good pair that spoils it, another one that does not, and what the message must hold."""

    name: str
    spoil: Any
    words: tuple[str, ...]
    twin: Any = None


def changed(change):
    """Change the two frames of a file."""

    def spoil(path: Path) -> None:
        frames = read(path, ":")
        for atoms in frames:
            atoms.calc = None
        change(*frames)
        write(path, frames)

    return spoil


def boxed(change):
    """Change the two frames after both were put into a periodic box."""

    def both(a, b):
        for atoms in (a, b):
            atoms.cell = [20.0, 20.0, 20.0]
            atoms.pbc = True
        change(a, b)

    return changed(both)


def named(first: str, last: str):
    def change(a, b):
        a.symbols[:], b.symbols[:] = first, last

    return changed(change)


def set_position(which: int, value: float):
    def change(*frames):
        frames[which].positions[1, 2] = value

    return changed(change)


def approach(which: int, distance: float):
    def change(*frames):
        atoms = frames[which]
        atoms.positions[1] = atoms.positions[0] + [distance, 0, 0]

    return changed(change)


def approach_image(distance: float):
    def change(a, b):
        for atoms in (a, b):
            atoms.positions += 10 - atoms.positions.mean(axis=0)
        a.positions[0], a.positions[1] = [0.1, 10, 10], [20.1 - distance, 10, 10]

    return boxed(change)


def stretched(by: float):
    def change(a, b):
        b.cell[0, 0] += by

    return boxed(change)


def mirrored(a, b):
    b.cell[0] *= -1


def bounded(*pbc: bool):
    def change(a, b):
        b.pbc = pbc

    return boxed(change)


def flat(height: float):
    def change(a, b):
        for atoms in (a, b):
            atoms.cell = [20.0, 20.0, height]

    return boxed(change)


def cut(share: float):
    def spoil(path: Path) -> None:
        text = path.read_text()
        path.write_text(text[: int(share * len(text))])

    return spoil


def frames_kept(n: int):
    return lambda path: write(path, read(path, ":")[:n])


def text(content: str):
    return lambda path: path.write_text(content)


FAULTS = [
    Fault("number", changed(lambda a, b: b.pop()), ("the initial structure has 6 atoms and the relaxed one 5",)),
    Fault("species", named("Kr", "Xe"), ("change from Kr6 to Xe6",), named("Xe", "Xe")),
    Fault(
        "order",
        named(["Ne"] * 3 + ["Ar"] * 3, ["Ar"] * 3 + ["Ne"] * 3),
        ("change from Ne3Ar3 to Ar3Ne3", "same order"),
        named(["Ne"] * 3 + ["Ar"] * 3, ["Ne"] * 3 + ["Ar"] * 3),
    ),
    Fault("cell", boxed(mirrored), ("its cell changes handedness",), stretched(0.02)),
    Fault("pbc", bounded(True, True, False), ("periodic boundaries change",), bounded(True, True, True)),
    Fault("flat cell", flat(0.0), ("is periodic along a cell vector of length zero",), flat(20.0)),
    Fault("NaN", set_position(0, np.nan), ("not a finite number",), set_position(0, 3.0)),
    Fault("infinite", set_position(1, np.inf), ("not a finite number",), set_position(1, 3.0)),
    Fault("clash", approach(0, 0.45), ("initial structure", "0 and 1 are 0.45 Å", "0.5 Å"), approach(0, 0.55)),
    Fault("clash at the end", approach(1, 0.45), ("relaxed structure", "0.45 Å apart"), approach(1, 0.55)),
    Fault("clash with an image", approach_image(0.45), ("0 and 1 are 0.45 Å",), approach_image(0.55)),
    Fault("one frame", frames_kept(1), ("holds 1 structure", "two files"), frames_kept(2)),
    Fault("empty", text(""), ("it is empty",)),
    Fault("truncated", cut(0.8), ("it is cut", "structure 1")),
    Fault("not a structure", text("nothing\n"), ("ASE cannot read it",)),
]


@pytest.mark.parametrize("command", PAIRS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_bad_pair_is_named_and_its_good_twin_passes(command, fault):
    file = Path("pairs") / "2.extxyz"
    good = file.read_bytes()
    fault.spoil(file)
    is_refused_untouched(command, str(file), *fault.words)
    file.write_bytes(good)
    if fault.twin:
        fault.twin(file)
    is_accepted(command)


BONDS = FixBondLengths([[0, 1]])
"""A constraint that no gradient goes through."""


@pytest.mark.parametrize("command", PAIRS)
@pytest.mark.parametrize(
    ("treat", "words"),
    [
        (lambda frames: frames[0].set_constraint(BONDS), ("cluster 2", "FixBondLengths", "--skip-invalid")),
        (lambda frames: frames[1].info.pop("kind"), ("cluster 2", "'kind'", "group by")),
    ],
    ids=["constraint", "group"],
)
def test_a_pair_that_can_be_read_but_not_used_is_named(command, treat, words):
    file = Path("pairs") / "2.extxyz"
    frames = read(file, ":")
    for atoms in frames:
        atoms.calc = None
    is_accepted(command, "--group", "kind")
    treat(frames)
    file.unlink()
    write(file.with_suffix(".traj"), frames)
    is_refused_untouched(command, *words, more=["--group", "kind"])


@pytest.mark.parametrize("command", COMMANDS)
def test_an_element_that_the_potential_does_not_know(command):
    structures = [f"pairs/{k}.extxyz" for k in range(4)]
    with mock.patch.object(LennardJones, "atomic_numbers", frozenset({10, 18, 36, 54})):
        is_accepted(command, structures=structures)
    name = "structure 0 of pairs/2.extxyz" if command == "relax" else "cluster 2"
    with mock.patch.object(LennardJones, "atomic_numbers", frozenset({10, 18, 54})):
        is_refused_untouched(command, name, "Kr", "Ne Ar Xe", structures=structures)


@pytest.mark.parametrize("command", PAIRS)
@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (("nowhere",), ("There is no file or folder nowhere",)),
        (("notes",), ("notes holds no relaxation", "vasprun.xml", ".extxyz")),
        (("bare",), ("bare holds no relaxation",)),
        (("notes/notes.txt",), ("notes.txt", "ASE cannot read it")),
        (("initial.extxyz", "few.extxyz"), ("initial.extxyz holds 5", "few.extxyz 4", "same order")),
        (("initial.extxyz", "nowhere.extxyz"), ("There is no file nowhere.extxyz",)),
        (("initial.extxyz", "pairs"), ("pairs is a folder", "two files")),
        (("initial.extxyz", "pairs", "model"), ("one file or folder of relaxations, or two files",)),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) and "." not in x[0][:-9] else None,
)
def test_paths_that_hold_no_pairs(command, pairs, words):
    Path("bare").mkdir()
    Path("notes").mkdir()
    Path("notes/notes.txt").write_text("to do: relax everything")
    write("few.extxyz", read("relaxed.extxyz", ":4"))
    is_refused_untouched(command, *words, pairs=pairs)


@pytest.mark.parametrize("command", PAIRS)
def test_the_good_twins_of_these_paths_pass(command):
    (Path("pairs") / "notes.txt").write_text("done")
    is_accepted(command)
    is_accepted(command, pairs=("initial.extxyz", "relaxed.extxyz"))


@pytest.mark.parametrize(
    ("more", "twin", "words"),
    [
        (
            ["--group", "five", "--folds", "6"],
            ["--group", "five", "--folds", "5"],
            ("5 pairs form 5 group(s)", "6 folds need one each", "--group"),
        ),
        (["--folds", "2"], ["--folds", "3"], ("3 folds at least",)),
        (["--group", "few"], ["--group", "kind"], ("form 2 group(s)", "training, validation and test")),
        (["--stepper", "fire", "--step-size", "0.1"], ["--step-size", "0.1"], ("--step-size", "--stepper gd")),
    ],
    ids=lambda x: " ".join(x) if x[0].startswith("--") else "",
)
def test_what_cannot_be_split_or_does_not_fit_together(more, twin, words):
    for k, path in enumerate(sorted(Path("pairs").iterdir())):
        frames = read(path, ":")
        frames[1].info |= {"few": k % 2, "five": k}
        write(path, frames)
    is_refused_untouched("train", *words, more=more)
    is_accepted("train", *twin)


# Structures to relax --------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name in {
    "flat cell", "NaN", "clash", "clash with an image", "empty", "truncated", "not a structure",
}], ids=lambda fault: fault.name)  # fmt: skip
def test_a_bad_structure_is_named_and_its_good_twin_passes(fault):
    file = Path("pairs") / "2.extxyz"
    given = {"structures": ["initial.extxyz", file]}
    good = file.read_bytes()
    fault.spoil(file)
    words = [word for word in fault.words if word != "initial structure"]
    is_refused_untouched("relax", str(file), *words, **given)
    file.write_bytes(good)
    if fault.twin:
        fault.twin(file)
    is_accepted("relax", **given)


@pytest.mark.parametrize(
    ("structures", "words"),
    [
        (("nowhere.extxyz",), ("There is no file nowhere.extxyz",)),
        (("initial.extxyz", "nowhere.extxyz"), ("nowhere.extxyz",)),
        (("bare",), ("bare is a folder without structures",)),
        (("bare.traj",), ("bare.traj",)),
    ],
    ids=["missing", "one of two", "a folder", "no atoms"],
)
def test_files_that_hold_no_structures(structures, words):
    write("bare.traj", type(read("initial.extxyz"))())
    Path("bare").mkdir()
    is_refused_untouched("relax", *words, structures=structures)


@pytest.mark.parametrize(
    ("out", "twin", "words"),
    [
        ("out.nonsense", "out.extxyz", ("out.nonsense", ".extxyz")),
        ("out", "out.traj", ("out", ".extxyz")),
        ("out.cube", "out.xyz", ("out.cube", "one structure", "5")),
        ("out.gpw", "out.db", ("out.gpw", "cannot write")),
        ("initial.extxyz/out.extxyz", "new/out.extxyz", ("initial.extxyz",)),
    ],
)
def test_an_output_that_cannot_hold_the_structures(out, twin, words):
    before = files()
    is_refused(run("relax", "initial.extxyz", "--potential", "model", "--out", out), *words)
    assert files() == before
    code, _, err = run("relax", "initial.extxyz", "--potential", "model", "--out", twin)
    assert code == 0, err
    new = {path for path in files() if path not in before}
    assert new == {Path(twin), *Path(twin).parents} - {Path(), *before}
    for one, other in zip(read(twin, ":"), read("relaxed.extxyz", ":"), strict=True):
        assert one.get_chemical_formula() == other.get_chemical_formula()


# Skipping -------------------------------------------------------------------------------------


@pytest.fixture
def twenty(tmp_path):
    """Twenty relaxations, of which three have faults of different kinds."""
    shutil.rmtree("pairs")
    Path("pairs").mkdir()
    for k in range(20):
        frames = cluster_relaxation(k)
        frames[1].calc = None
        write(f"pairs/{k:02}.extxyz", frames)
    changed(lambda a, b: b.pop())(Path("pairs/03.extxyz"))
    set_position(0, np.nan)(Path("pairs/07.extxyz"))
    text("")(Path("pairs/11.extxyz"))
    return {
        "03": "the initial structure has 6 atoms and the relaxed one 5",
        "07": "not a finite number",
        "11": "it is empty",
    }


@pytest.mark.parametrize("command", PAIRS)
def test_three_bad_pairs_of_twenty_are_listed_with_their_reasons(command, twenty):
    is_refused_untouched(command, "pairs/03.extxyz", twenty["03"])
    code, out, err = called(command, "--skip-invalid", *dry(command))
    assert code == 0, err
    listed = [line for line in err.splitlines() if line.startswith("Left out: ")]
    assert len(listed) == 3
    for name, reason in twenty.items():
        assert any(f"pairs/{name}.extxyz" in line and reason in line for line in listed)
    assert "Left out 3 of 20." in err
    if command == "evaluate":
        assert "17 relaxations" in out


def test_a_run_continues_without_the_bad_pairs(twenty):
    code, _, err = called("train", "--skip-invalid", "--json")
    assert code == 0, err
    rows = Path("run/table.csv").read_text().splitlines()
    assert len(rows) > 1
    assert not any(f"cluster {k}" in row.split(",") for k in (3, 7, 11) for row in rows)


def test_bad_structures_are_listed_with_their_reasons_and_the_others_relaxed(twenty):
    structures = sorted(Path("pairs").iterdir())
    is_refused_untouched("relax", "pairs/11.extxyz", twenty["11"], structures=structures)
    code, out, err = called("relax", "--skip-invalid", structures=structures)
    assert code == 3
    listed = [line for line in err.splitlines() if line.startswith("Left out: ")]
    assert len(listed) == 2
    for name in ("07", "11"):
        assert any(f"pairs/{name}.extxyz" in line and twenty[name] in line for line in listed)
    assert "37 of 37 converged, 2 left out" in out
    assert len(read("run.extxyz", ":")) == 37


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_left_where_all_are_bad(command):
    for path in Path("pairs").iterdir():
        path.write_text("")
    structures = sorted(Path("pairs").iterdir())
    result = called(command, "--skip-invalid", structures=structures)
    assert result[0] == 2
    assert "None of the" in result[2].splitlines()[-1]
    assert "it is empty" in result[2].splitlines()[-1]
    assert Path("run/results.json").read_text() == Path("run.extxyz").read_text() == "years of work"


# Potentials -----------------------------------------------------------------------------------


class Bomb:
    """Its unpickling makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("marker",)


def plain(path: str) -> None:
    with open(path, "wb") as file:
        pickle.dump(Bomb(), file)


PICKLES = {
    "plain": plain,
    "torch": lambda path: torch.save(Bomb(), path),
    "old torch": lambda path: torch.save({"weights": Bomb()}, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_without_trust_is_not_opened(command, kind):
    PICKLES[kind]("native.model")
    is_refused_untouched(command, "native.model is a pickle", "--trust", potential="native.model")
    if command == "evaluate":
        is_refused_untouched(command, "native.model is a pickle", more=["--against", "native.model"])
    assert not Path("marker").exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_these_pickles_would_have_done_harm(kind):
    PICKLES[kind]("native.model")
    is_refused(run("info", "native.model", "--trust"), "native.model")
    assert Path("marker").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", PICKLES)
def test_code_in_the_weights_of_a_folder_is_not_run(command, kind):
    PICKLES[kind]("model/weights.pt")
    is_refused_untouched(command, "The folder model holds no potential")
    # Trust is for native checkpoints: our own format never needs it.
    is_refused_untouched(command, "The folder model holds no potential", more=["--trust"])
    assert not Path("marker").exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_code_in_a_checkpoint_is_not_run(kind):
    assert called("train")[0] == 0
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        PICKLES[kind](f"run/{name}")
    Path("run/results.json").unlink()  # or the complete run would be reported again, without a look at its checkpoint
    before = files()
    is_refused(run("train", "pairs", "--out", "run", "--resume"), "run holds no run that can be resumed")
    assert files() == before


@needs_mace
def test_a_native_checkpoint_passes_with_trust_and_not_without():
    save_potential(MACE(tiny_mace((10, 18, 36, 54))), "mace")
    for command in COMMANDS:
        is_refused_untouched(command, "mace/mace.model is a pickle", potential="mace/mace.model")
        is_accepted(command, "--trust", potential="mace/mace.model")


def broken(name: str, content: str | None):
    def spoil() -> None:
        path = Path("model") / name
        if content is None:
            path.unlink()
        else:
            path.write_text(content)

    return spoil


def cut_weights() -> None:
    path = Path("model/weights.pt")
    path.write_bytes(path.read_bytes()[:500])


def other_weights() -> None:
    torch.save({"epsilon": torch.tensor(1.0), "gold": torch.tensor(1.0)}, "model/weights.pt")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (broken("model.json", None), ("No such file",)),
        (broken("weights.pt", None), ("No such file",)),
        (broken("model.json", '{"format": '), ("JSON",)),
        (broken("model.json", "[]"), ("can be read",)),
        (broken("model.json", '{"format": "another", "version": 1}'), ("this release reads",)),
        (
            broken("model.json", '{"format": "ase_bptt potential", "version": 1, "family": "gold"}'),
            ("'gold'", "chgnet", "mace"),
        ),
        (cut_weights, ("can be read",)),
        (other_weights, ("do not fit", "gold")),
    ],
    ids=["no description", "no weights", "cut", "a list", "another format", "another family", "cut weights", "others"],
)
def test_a_folder_that_holds_no_potential(command, spoil, words):
    spoil()
    is_refused_untouched(command, "The folder model" if "do not" not in words[0] else "The weights in model", *words)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("potential", "words"),
    [
        ("gold", ("'gold'", "mace-si", "chgnet", "lj")),
        ("./nowhere/model", ("nowhere/model", "no file or folder")),
        ("lj:hard", ("'hard'", "no variant")),
        ("notes.txt", ("notes.txt is a pickle", "--trust")),
        ("pairs", ("The folder pairs holds no potential",)),
        ("chgnet:gold", ("'gold'", "r2scan")),
        ("chgnet:pairs", ("'pairs'", "r2scan")),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_name_or_path_that_is_no_potential(command, potential, words):
    Path("notes.txt").write_text("no pickle")
    is_refused_untouched(command, *words, potential=potential)
    assert not Path("marker").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 no zip", b"\x80\x04\x95"], ids=repr)
def test_what_is_trusted_and_cannot_be_unpickled(content):
    Path("native.model").write_bytes(content)
    is_refused_untouched("info", "native.model", "cannot be unpickled", more=["--trust"], potential="native.model")


def test_what_is_trusted_and_belongs_to_no_family():
    torch.save({"weights": [1]}, "native.model")
    is_refused_untouched("info", "native.model", "dict", "families", more=["--trust"], potential="native.model")


def test_what_is_trusted_and_needs_a_package_that_is_not_here():
    Path("native.model").write_bytes(b"cgoldsmith.models\nModel\n.")
    words = ("native.model", "goldsmith", 'pip install "ase_bptt[mace]"')
    is_refused_untouched("info", *words, more=["--trust"], potential="native.model")


def test_a_file_whose_family_is_known_names_that_family_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "metatomic.torch", None)
    with zipfile.ZipFile("exported.pt", "w") as archive:
        archive.writestr("exported/extra/metatomic-version", "0.1.19")
    refusal = called("info", "--trust", potential="exported.pt")
    is_refused(refusal, "'metatomic'")
    assert refusal[2].count("pip install") == 1


def test_a_family_without_names_asks_for_a_file():
    is_refused_untouched("info", ".pt file", "--trust", potential="metatomic:small")


@needs_mace
@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_or_an_address_does_not_pass_as_a_variant(command):
    torch.save(Bomb(), "evil.model")
    with mock.patch("urllib.request.urlopen", side_effect=AssertionError("went to the network")):
        for variant in (Path("evil.model").absolute(), "evil.model", "https://example.org/evil.model"):
            is_refused_untouched(command, f"'{variant}'", "medium", potential=f"mace:{variant}")
    assert not Path("marker").exists()


@needs_mace
@pytest.mark.parametrize("command", COMMANDS)
def test_no_network_for_a_model_that_must_be_downloaded(command, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    unreachable = urllib.error.URLError("Name or service not known")
    with mock.patch("urllib.request.urlopen", side_effect=unreachable) as opened:
        for name in ("mace:medium", "mace:off-small"):
            before = files()
            code, out, err = called(command, potential=name)
            assert (code, out) == (2, "")
            said = [line for line in err.splitlines() if line.startswith("ase-bptt: ")]
            assert len(said) == 1
            assert "Traceback" not in err
            for word in (repr(name.removeprefix("mace:")), "could not be downloaded", "connect once", "--trust"):
                assert word in said[0]
            assert files() == before
    assert opened.call_count == 2


class TestExtras:
    """Packages of potentials that are not installed."""

    @pytest.fixture(autouse=True)
    def _without(self, monkeypatch):
        real = importlib.import_module

        def without(name, package=None):
            if name.partition(".")[0] in {"mace", "e3nn", "chgnet"}:
                raise ModuleNotFoundError(f"No module named {name.partition('.')[0]!r}")
            return real(name, package)

        # One by one: a module that is imported meanwhile must not be forgotten with the patch, and then be there twice.
        for name in [name for name in sys.modules if name.partition(".")[0] in {"mace", "e3nn", "chgnet"}]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr("importlib.import_module", without)

    @pytest.mark.parametrize("command", COMMANDS)
    @pytest.mark.parametrize(
        ("potential", "extra"), [("mace-si", "mace"), ("mace:small", "mace"), ("chgnet", "chgnet")]
    )
    def test_the_message_tells_what_to_install(self, command, potential, extra):
        words = (repr(extra), f'pip install "ase_bptt[{extra}]"')
        is_refused_untouched(command, *words, potential=potential)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_other_potentials_need_nothing(self, command):
        is_accepted(command)


@pytest.mark.parametrize(
    "potential", [pytest.param("mace-si", marks=needs_mace), pytest.param("chgnet", marks=needs_chgnet)]
)
def test_with_the_extra_the_potential_is_there(potential):
    code, out, err = run("info", potential)
    assert code == 0, err
    assert "Si" in out


# Flags ----------------------------------------------------------------------------------------

NUMBERS = [
    *[(c, flag, bad, "1", "at least 1") for c, flag in [
        ("train", "--steps"), ("train", "--epochs"), ("train", "--batch-size"),
        ("relax", "--steps"), ("relax", "--batch-size"), ("evaluate", "--steps"), ("evaluate", "--batch-size"),
        ("info", "--sample"),
    ] for bad in ("0", "-2")],
    *[(c, flag, bad, "0.01", "positive") for c, flag in [
        ("train", "--step-size"), ("train", "--lr"), ("train", "--fmax"), ("relax", "--fmax"), ("evaluate", "--fmax"),
    ] for bad in ("0", "-0.1", "nan", "inf")],
    ("train", "--steps", "2.5", "2", "whole number"),
    ("train", "--lr", "fast", "1e-3", "must be a number"),
    *[(c, "--device", bad, "cpu", f"no device '{bad}'") for c in COMMANDS
      for bad in ("abacus", "cuda:99", "meta", "")],
    *[(c, "--dtype", "float16", "float64", "float32") for c in COMMANDS],
]  # fmt: skip


@pytest.mark.parametrize(("command", "flag", "bad", "good", "word"), NUMBERS, ids=lambda x: str(x))
def test_a_value_that_makes_no_sense(command, flag, bad, good, word):
    before = files()
    code, out, err = called(command, f"{flag}={bad}")
    assert (code, out) == (2, "")
    assert err.startswith("usage: ase-bptt")
    said = err.splitlines()[-1]
    assert said.startswith(f"ase-bptt {command}: error: argument {flag}: ")
    assert word in said
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert files() == before
    is_accepted(command, f"{flag}={good}")


# Folders and disks ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "evaluate", "relax"])
def test_what_is_there_is_kept_unless_asked_otherwise(command):
    out = "run.extxyz" if command == "relax" else "run"
    source = "initial.extxyz" if command == "relax" else "pairs"
    words = [f"{out} is there already", "--overwrite", "--out"]
    if command != "evaluate":
        words.append("--resume")
    before = files()
    for more in ([], ["--dry-run"], ["--json"]):
        is_refused(run(command, source, "--potential", "model", "--out", out, *more), *words)
    assert files() == before
    is_accepted(command)


def _refuses_root(folder: str) -> bool:
    try:
        os.mkdir(f"{folder}/ase_bptt")
    except OSError:
        return True
    os.rmdir(f"{folder}/ase_bptt")
    return False


@pytest.fixture(params=["chmod", "/sys", "/proc", "below a file"])
def read_only(request):
    """A folder into which nothing can be written."""
    folder = Path("locked")
    if request.param == "chmod":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        folder.mkdir()
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
    elif request.param == "below a file":
        folder.write_text("a file")
        yield folder
    elif os.path.isdir(request.param) and _refuses_root(request.param):
        yield Path(request.param)
    else:
        pytest.skip(f"there is no read-only {request.param} here")


@pytest.mark.parametrize("command", ["train", "evaluate", "relax"])
def test_a_folder_that_is_read_only(command, read_only):
    out = read_only / ("new.extxyz" if command == "relax" else "new")
    source = "initial.extxyz" if command == "relax" else "pairs"
    before = files()
    is_refused(run(command, source, "--potential", "model", "--out", out), str(read_only), "choose another place")
    assert files() == before


def test_a_run_in_a_folder_that_has_become_read_only_is_not_deleted():
    """--overwrite may delete a run only where another can take its place."""
    before = files()
    with mock.patch("ase_bptt.utils.Path.write_bytes", side_effect=PermissionError(errno.EACCES, "Permission denied")):
        is_refused(called("train"), "run", "Permission denied", "choose another place")
    assert files() == before


@contextmanager
def full_disk(room: int):
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


LONGER = ["--epochs", "3", "--batch-size", "1", "--steps", "2", "--dtype", "float64"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Weights of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, _, err = run("train", data / "pairs", "--potential", data / "lj", "--out", folder, *LONGER)
    assert code == 0, err
    return load_potential(folder).state_dict()


@pytest.mark.parametrize("name", ["weights.pt", "checkpoint.pt"])
def test_a_disk_that_fills_in_the_midst_of_training(name, whole):
    calls, real = iter(range(100)), Trainer.train_step

    def filling(self, pairs):
        # Three pairs an epoch: in the midst of the second.
        if next(calls) == 4:
            before.update(files("new"))
            (size,) = (len(content) for path, content in before.items() if path.name == name)
            disk.enter_context(full_disk(size - 100))
        return real(self, pairs)

    before: dict[Path, bytes] = {}
    disk = ExitStack()
    arguments = ("train", "pairs", "--potential", "model", "--out", "new", *LONGER)
    try:
        with mock.patch.object(Trainer, "train_step", filling):
            code, _, err = run(*arguments)
    finally:
        disk.close()
    assert code == 2
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("ase-bptt: ")]
    assert len(said) == 1
    assert said[0].startswith("ase-bptt: new/")
    assert f"{name} could not be written" in said[0]
    assert "make room" in said[0]
    now = files("new")
    kept = ("checkpoint.pt", "checkpoint.previous.pt", "before.json", "command.json")
    untouched = [path for path in before if path.name in kept]
    assert len(untouched) == 4
    assert all(now[path] == before[path] for path in untouched)
    assert set(now) == set(before)
    load_potential("new")
    code, _, err = run("train", "pairs", "--out", "new", "--resume")
    assert code == 0, err
    found = load_potential("new").state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_disk_that_has_no_room_for_the_checkpoint_before_the_last(whole):
    full = OSError(errno.ENOSPC, "No space left on device")
    arguments = ("train", "pairs", "--potential", "model", "--out", "new", *LONGER)
    with mock.patch("os.link", side_effect=full), mock.patch("shutil.copyfile", side_effect=full):
        code, _, err = run(*arguments)
    assert code == 2
    assert "new/checkpoint.previous.pt could not be written (No space left on device)" in err.splitlines()[-1]
    code, _, err = run("train", "pairs", "--out", "new", "--resume")
    assert code == 0, err
    found = load_potential("new").state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


@pytest.mark.parametrize("name", ["report.html", "before_after.png", "learning_curve.png", "table.csv", "results.json"])
def test_a_disk_that_fills_when_the_report_is_written(name):
    real = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    arguments = ("train", "pairs", "--potential", "model", "--out", "new", "--json", *QUICK)
    with mock.patch("os.replace", full):
        code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert f"new/{name} could not be written (No space left on device)" in err.splitlines()[-1]
    assert not Path("new/results.json").exists()
    assert not list(Path("new").rglob("*.part*"))
    code, _, err = run("train", "pairs", "--out", "new", "--resume")
    assert code == 0, err
    assert Path("new", name).stat().st_size > 0


def test_a_disk_that_is_full_before_an_evaluation_writes():
    with full_disk(10):
        result = run("evaluate", "pairs", "--potential", "model", "--out", "new")
    assert result[0] == 2
    assert "new/" in result[2]
    assert "could not be written" in result[2]
    assert not any(path.is_file() for path in Path("new").rglob("*"))
    assert run("evaluate", "pairs", "--potential", "model", "--out", "new")[0] == 0


# ASE leaves a trajectory open that could not be written.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("out", ["new.extxyz", "new.traj", "new.db"])
def test_a_disk_that_fills_while_structures_are_relaxed(out):
    arguments = ("relax", "initial.extxyz", "--potential", "model", "--out", out)
    with full_disk(3000):
        code, _, err = run(*arguments)
    assert code == 2, err
    assert "Traceback" not in err
    said = err.splitlines()[-1]
    assert said.startswith(f"ase-bptt: {out}")
    assert "could not be written" in said
    assert not Path(out).exists()
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]
    code, _, err = run(*arguments, "--resume")
    assert code == 0, err
    again = run("relax", "initial.extxyz", "--potential", "model", "--out", "whole.extxyz")
    assert again[0] == 0
    for one, other in zip(read(out, ":"), read("whole.extxyz", ":"), strict=True):
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-7)
        assert one.symbols[0] in KINDS


def test_the_potential_in_these_tests_is_the_one_that_was_saved(data):
    assert load_potential(data / "lj").sigma.item() == wide_lennard_jones(2.65).sigma.item()
