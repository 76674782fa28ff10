"""Ctrl-C, SIGTERM and SIGKILL: what is said, what is left, and that --resume ends as if nothing had happened."""

import inspect
import itertools
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.io import read, write
from ase.io.trajectory import Trajectory
from helpers.potentials import lennard_jones, wide_lennard_jones
from helpers.shell import drawn, is_refused, run, write_relaxations

from ase_bptt import load_potential, save_potential
from ase_bptt.cli.run_folder import Terminated, signals_deferred, terminable
from ase_bptt.throughput.journal import Ends

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
TRAIN = ["--epochs", "3", "--batch-size", "1", "--steps", "2", "--lr", "0.02", "--dtype", "float64"]
FOLDS = ["--folds", "3", *TRAIN, "--epochs", "2"]


@contextmanager
def interrupting(where: str, call: int, sent: int):
    """Send this process a signal as a function is called for the so many-th time."""
    owner, name = where.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    real, calls = getattr(owner, name), itertools.count(1)

    def function(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), sent)
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, function):
        yield


CHILD = f"""
import itertools, os, pkgutil, signal, sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock
from ase_bptt.cli import main

{inspect.getsource(drawn)}
{inspect.getsource(interrupting)}
signal.signal(signal.SIGINT, signal.default_int_handler)
where, call, sent, *arguments = sys.argv[1:]
with mock.patch("matplotlib.figure.Figure.savefig", drawn), interrupting(where, int(call), int(sent)):
    sys.exit(main(arguments))
"""
FORWARD = "ase_bptt.potentials.analytic:LennardJones.forward"
STEP = "ase_bptt.training:Trainer.train_step"
ADD = "ase_bptt.throughput.journal:Journal.add"


def in_a_child(where, call, sent, *arguments):
    """Exit code, standard output and standard error of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, where, str(call), str(int(sent)), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def in_this_process(where, call, sent, *arguments):
    with interrupting(where, call, sent):
        return run(*arguments)


@pytest.fixture(autouse=True)
def _pictures():
    with mock.patch("matplotlib.figure.Figure.savefig", drawn):
        yield


@pytest.fixture(autouse=True)
def _interruptible():
    """Shells start what runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_relaxations(folder)
    (folder / "lj").rename(folder / "model")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def workplace(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The run folder of a command, and the file of a relaxation, that nothing stopped."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("undisturbed") / ("relax.traj" if name == "relax" else name)
            code, _, err = run(*command(name, data, made[name]))
            assert code == 0, err
        return made[name]

    return make


def command(name: str, data=Path(), out=None) -> list:
    potential = ["--potential", data / "model"]
    if name == "relax":
        return ["relax", data / "initial.extxyz", *potential, "--batch-size", 2, "--out", out or "relaxed.traj"]
    return ["train", data / "pairs", *potential, *(FOLDS if name == "folds" else TRAIN), "--out", out or "run"]


def has_stopped(result, sent, *texts) -> None:
    """The code of the signal, and one sentence on what is left."""
    code, _, err = result
    assert code == CODES[sent], err
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("ase-bptt: stopped. ")]
    assert len(said) == 1
    for text in texts:
        assert text in said[0]


def leaves_nothing_unfinished(folder=".") -> None:
    assert not [path for path in Path(folder).rglob("*") if ".part." in path.name]


def ends_like(out, whole) -> None:
    """The same weights, bit for bit, and the same results."""
    folders = sorted(path.parent for path in Path(whole).rglob("checkpoint.pt"))
    assert folders
    for folder in folders:
        mine = Path(out) / folder.relative_to(whole)
        expected, found = (load_potential(f / "potential").state_dict() for f in (folder, mine))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        scores = [(f / "metrics.csv").read_text().splitlines() for f in (folder, mine)]
        assert [row.rsplit(",", 1)[0] for row in scores[0]] == [row.rsplit(",", 1)[0] for row in scores[1]]
    expected, found = (json.loads((Path(f) / "results.json").read_text()) for f in (whole, out))
    assert found["test"] == expected["test"]
    assert found["test_bfgs"] == expected["test_bfgs"]
    leaves_nothing_unfinished(out)


def relaxed_like(out, whole) -> None:
    """The same structures, in the same order and at the same places."""
    found, expected = read(out, ":"), read(whole, ":")
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.symbols.get_chemical_formula() == other.symbols.get_chemical_formula()
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-10)
        assert one.info["relaxation"] == other.info["relaxation"]
        assert one.info["relaxation_frames"] == other.info["relaxation_frames"]
    leaves_nothing_unfinished(Path(out).parent)


class TestTrain:
    @pytest.mark.parametrize(
        ("where", "call", "sent", "stop"),
        [
            (FORWARD, 5, signal.SIGINT, in_a_child),
            (FORWARD, 5, signal.SIGTERM, in_this_process),
            (STEP, 5, signal.SIGTERM, in_a_child),
            (STEP, 5, signal.SIGINT, in_this_process),
            ("torch.save", 3, signal.SIGTERM, in_this_process),
            ("os.replace", 14, signal.SIGTERM, in_this_process),
            ("os.replace", 20, signal.SIGINT, in_this_process),
            ("os.link", 2, signal.SIGTERM, in_this_process),
            ("matplotlib.figure:Figure.savefig", 1, signal.SIGTERM, in_this_process),
        ],
        ids=[
            "first measurement", "first measurement, SIGTERM", "epoch", "epoch, SIGINT", "weights", "checkpoint",
            "checkpoint, SIGINT", "checkpoint before it", "report",
        ],
    )  # fmt: skip
    def test_a_stopped_run_goes_on_to_the_same_weights(self, undisturbed, where, call, sent, stop):
        whole = undisturbed("train")
        has_stopped(stop(where, call, sent, *command("train")), sent, "run/checkpoint.pt", "run/potential", "--resume")
        assert not Path("run/results.json").exists()
        leaves_nothing_unfinished()
        load_potential("run")
        code, _, err = run("train", "--out", "run", "--resume")
        assert code == 0, err
        ends_like("run", whole)

    @pytest.mark.parametrize(
        ("call", "sent", "stop", "done"),
        [(3, signal.SIGINT, in_a_child, [0]), (2, signal.SIGTERM, in_this_process, [])],
        ids=["second fold", "first fold, SIGTERM"],
    )
    def test_so_does_a_cross_validation(self, undisturbed, call, sent, stop, done):
        whole = undisturbed("folds")
        result = stop(STEP, call, sent, *command("folds"))
        has_stopped(result, sent, "run/fold_*/checkpoint.pt", "--resume")
        assert [k for k in range(3) if Path(f"run/fold_{k}/results.json").exists()] == done
        leaves_nothing_unfinished()
        code, _, err = run("train", "--out", "run", "--resume")
        assert code == 0, err
        ends_like("run", whole)

    def test_a_run_that_is_stopped_twice(self, undisturbed):
        sent = signal.SIGINT
        has_stopped(in_this_process(STEP, 2, sent, *command("train")), sent)
        has_stopped(in_this_process(STEP, 5, sent, "train", "--out", "run", "--resume"), sent, "--resume")
        assert run("train", "--out", "run", "--resume")[0] == 0
        ends_like("run", undisturbed("train"))

    @pytest.mark.parametrize("call", [19, 20], ids=["checkpoint before the last", "checkpoint"])
    def test_a_run_that_was_killed(self, undisturbed, call):
        code, *_ = in_a_child("os.replace", call, signal.SIGKILL, *command("train"))
        assert code == -signal.SIGKILL
        assert [path for path in Path("run").rglob("*") if ".part." in path.name]
        assert run("train", "--out", "run", "--resume")[0] == 0
        ends_like("run", undisturbed("train"))

    def test_before_anything_is_there_it_is_said_that_nothing_is_lost(self):
        sent = signal.SIGTERM
        result = in_this_process("ase_bptt.cli.train.read_grouped", 1, sent, *command("train"))
        has_stopped(result, sent, "Nothing was trained yet", "nothing is lost")
        assert not Path("run").exists()


@pytest.fixture
def stopped_run():
    """A run folder that was stopped in its third epoch."""
    has_stopped(in_this_process(STEP, 5, signal.SIGINT, *command("train")), signal.SIGINT)
    return Path("run").absolute()


class TestResumeTrain:
    @pytest.mark.parametrize("name", ["train", "folds"])
    def test_it_goes_on_from_another_folder(self, undisturbed, tmp_path, monkeypatch, name):
        has_stopped(in_this_process(STEP, 5, signal.SIGINT, *command(name)), signal.SIGINT)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        code, _, err = run("train", "--out", "../run", "--resume")
        assert code == 0, err
        ends_like(tmp_path / "run", undisturbed(name))
        assert not any(Path().iterdir())

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (["--lr", "0.5"], ("--lr 0.02", "0.5")),
            (["--potential", "other"], ("--potential", "model, not", "other")),
            (["--loss", "rmsd"], ("--loss root_delta_q", "rmsd")),
            (["--epochs", "5"], ("--epochs 3", "5")),
            (["--seed", "1"], ("--seed 0", "1")),
            (["--dtype", "float32"], ("--dtype float64", "float32")),
            (["--stepper", "fire"], ("without --stepper", "fire")),
            (["--folds", "3"], ("--folds", "3")),
        ],
        ids=lambda x: x[0] if x[0].startswith("--") and len(x[0].split()) == 1 else "",
    )
    def test_other_settings_are_refused_with_both_values(self, undisturbed, stopped_run, more, words):
        save_potential(wide_lennard_jones(2.4), "other")
        before = {path: path.read_bytes() for path in stopped_run.rglob("*") if path.is_file()}
        is_refused(run("train", "--out", "run", "--resume", *more), "The run in run", *words, "leave the flag out")
        assert {path: path.read_bytes() for path in stopped_run.rglob("*") if path.is_file()} == before

    def test_the_same_settings_said_again_are_not(self, undisturbed, stopped_run):
        code, _, err = run(*command("train"), "--resume")
        assert code == 0, err
        ends_like("run", undisturbed("train"))

    @pytest.mark.parametrize("name", ["train", "folds"])
    def test_other_pairs_are_refused(self, name):
        has_stopped(in_this_process(STEP, 2, signal.SIGINT, *command(name)), signal.SIGINT)
        shutil.copytree("pairs", "others")
        frames = read("others/2.extxyz", ":")
        frames[0].positions[0, 0] += 1e-3
        write("others/2.extxyz", frames)
        result = run("train", "others", "--out", "run", "--resume")
        is_refused(result, "The run in run was started with other pairs", str(Path("pairs").absolute()), "others")
        shutil.copytree("pairs", "same")
        assert run("train", "same", "--out", "run", "--resume")[0] == 0

    def test_a_run_of_another_command_is_refused(self, stopped_run):
        is_refused(run("demo", "--out", "run", "--resume"), "run was started by ase-bptt train", "demo")

    def test_a_folder_without_a_run_is_refused(self):
        Path("empty").mkdir()
        for out in ("empty", "nowhere"):
            is_refused(run("train", "--out", out, "--resume"), f"{out} holds no run that can be resumed")
        assert not Path("nowhere").exists()

    def test_where_the_checkpoint_is_cut_the_one_before_it_is_used_and_said(self, undisturbed, stopped_run):
        cut(stopped_run / "checkpoint.pt")
        code, _, err = run("train", "--out", "run", "--resume")
        assert code == 0, err
        said = [line for line in err.splitlines() if "cannot be read" in line]
        assert len(said) == 1
        assert said[0].startswith("run/checkpoint.pt cannot be read (ValueError: checkpoint.pt was cut or changed):")
        assert said[0].endswith("continues from run/checkpoint.previous.pt, after epoch 1.")
        ends_like("run", undisturbed("train"))

    def test_where_both_are_cut_the_run_is_refused(self, stopped_run):
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            cut(stopped_run / name)
        is_refused(run("train", "--out", "run", "--resume"), "run holds no run that can be resumed")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


class TestRelax:
    @pytest.mark.parametrize(
        ("call", "sent", "stop"),
        [
            (3, signal.SIGTERM, in_a_child),
            (2, signal.SIGINT, in_a_child),
            (4, signal.SIGTERM, in_this_process),
            (5, signal.SIGINT, in_this_process),
        ],
    )
    def test_a_stopped_run_goes_on_to_the_same_structures(self, undisturbed, call, sent, stop):
        whole = undisturbed("relax")
        parts = Path("relaxed.traj.parts")
        has_stopped(stop(ADD, call, sent, *command("relax")), sent, str(parts), "--resume")
        assert not Path("relaxed.traj").exists()
        # What has finished is not done again, and any tool of ASE's reads it.
        (journal,) = parts.glob("*.traj")
        assert len(read(journal, ":")) == call - 1
        code, out, err = run(*command("relax"), "--resume")
        assert code == 0, err
        assert f"{call - 1} of them done before" in out
        relaxed_like("relaxed.traj", undisturbed("relax"))
        assert not parts.exists()
        assert whole.exists()

    @pytest.mark.parametrize("out", ["ended.traj", "ended.extxyz"])
    def test_cells_that_move_go_on_to_the_same_file(self, out):
        crystals = [bulk("Ar", a=1.6 + 0.03 * k).repeat((1 + k % 2, 1, 1)) for k in range(5)]
        for k, atoms in enumerate(crystals):
            atoms.rattle(0.03, seed=k)
        write("crystals.traj", crystals)
        save_potential(lennard_jones(), "small")
        words = ["relax", "crystals.traj", "--potential", "./small", "--cell", "full", "--pressure", 10,
                 "--fmax", 0.001, "--dtype", "float64", "--batch-size", 2, "--out"]  # fmt: skip
        code, _, err = run(*words, f"whole/{out}")
        assert code == 0, err
        has_stopped(in_this_process(ADD, 4, signal.SIGTERM, *words, out), signal.SIGTERM, "--resume")
        code, said, err = run(*words, out, "--resume")
        assert code == 0, err
        assert "3 of them done before" in said
        relaxed_like(out, f"whole/{out}")
        for start, one, other in zip(crystals, read(out, ":"), read(f"whole/{out}", ":"), strict=True):
            assert np.abs(one.cell - start.cell).max() > 0.01
            np.testing.assert_allclose(one.cell, other.cell, rtol=0, atol=1e-10)
            np.testing.assert_allclose(one.get_stress(), other.get_stress(), rtol=0, atol=1e-8)

    @pytest.mark.parametrize(("where", "call"), [(FORWARD, 1), (FORWARD, 4), ("os.replace", 1)])
    def test_before_the_first_has_finished_and_while_all_are_written(self, undisturbed, where, call):
        sent = signal.SIGTERM
        has_stopped(in_this_process(where, call, sent, *command("relax")), sent)
        assert not Path("relaxed.traj").exists()
        assert run(*command("relax"), "--resume")[0] == 0
        relaxed_like("relaxed.traj", undisturbed("relax"))

    @pytest.mark.parametrize(
        ("where", "call"), [("ase.io.ulm:Writer.sync", 3), ("ase.io.trajectory:TrajectoryWriter.close", 3)]
    )
    def test_a_run_that_was_killed_in_the_midst_of_keeping_a_structure(self, undisturbed, where, call):
        code, *_ = in_a_child(where, call, signal.SIGKILL, *command("relax"))
        assert code == -signal.SIGKILL
        code, out, err = run(*command("relax"), "--resume")
        assert code == 0, err
        assert "2 of them done before" in out or "3 of them done before" in out
        relaxed_like("relaxed.traj", undisturbed("relax"))

    def test_killed_while_a_resumed_run_begins_its_file_anew(self, undisturbed):
        """What had finished before the first stop must outlive a second."""
        sent = signal.SIGTERM
        has_stopped(in_this_process(ADD, 4, sent, *command("relax")), sent)
        has_stopped(in_this_process(ADD, 2, sent, *command("relax"), "--resume"), sent, "--resume")
        code, out, err = run(*command("relax"), "--resume")
        assert code == 0, err
        assert "3 of them done before" in out or "4 of them done before" in out
        relaxed_like("relaxed.traj", undisturbed("relax"))


@pytest.fixture
def journal():
    """What a relaxation that was stopped leaves: three structures of five."""
    has_stopped(in_this_process(ADD, 4, signal.SIGINT, *command("relax")), signal.SIGINT)
    (journal,) = Path("relaxed.traj.parts").glob("*.traj")
    return journal


class TestJournal:
    def test_cut_at_any_byte_of_its_last_frame(self, journal, undisturbed):
        content, structures = journal.read_bytes(), read("initial.extxyz", ":")
        with Trajectory(journal) as frames:
            known = frames[0].info["_run"]
            places = [frames[k].info["_index"] for k in range(3)]
            begins = int(frames.backend._offsets[2])
        sizes = sorted({*range(begins + 1, len(content), 13), len(content) - 1})
        for size in sizes:
            journal.write_bytes(content[:size])
            found = Ends(journal.parent, known, structures)
            assert set(places[:2]) <= set(found.places) <= set(places), size
            found.close()
        shutil.copytree(journal.parent, "kept")
        for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1]):
            shutil.copytree("kept", journal.parent, dirs_exist_ok=True)
            journal.write_bytes(content[:size])
            Path("relaxed.traj").unlink(missing_ok=True)
            code, _, err = run(*command("relax"), "--resume")
            assert code == 0, err
            relaxed_like("relaxed.traj", undisturbed("relax"))

    @pytest.mark.parametrize("content", [b"", b"no trajectory", b"- of Ulm"], ids=["empty", "other", "cut"])
    def test_one_that_holds_nothing(self, journal, undisturbed, content):
        journal.write_bytes(content)
        code, out, err = run(*command("relax"), "--resume")
        assert code == 0, err
        assert "done before" not in out
        assert (f"{journal}: it is damaged; the structures that it held are relaxed again." in err) == bool(content)
        relaxed_like("relaxed.traj", undisturbed("relax"))

    @pytest.mark.parametrize(
        "more",
        [["--fmax", "0.01"], ["--steps", "7"], ["--stepper", "gd"], ["--potential", "other"], ["pairs/0.extxyz"]],
        ids=lambda x: x[0],
    )
    def test_of_another_run_is_refused_by_name(self, journal, undisturbed, more):
        save_potential(wide_lennard_jones(2.4), "other")
        before = journal.read_bytes()
        name, *rest = command("relax")
        arguments = [*rest, *more] if more[0].startswith("--") else [*more, *rest]
        is_refused(run(name, *arguments, "--resume"), str(journal.parent), "other", "--overwrite")
        assert journal.read_bytes() == before
        assert not Path("relaxed.traj").exists()
        assert run(*command("relax"), "--resume")[0] == 0
        relaxed_like("relaxed.traj", undisturbed("relax"))

    def test_is_not_written_over_unless_asked(self, journal):
        before = journal.read_bytes()
        is_refused(run(*command("relax")), f"{journal.parent} is there already", "--resume", "--overwrite")
        assert journal.read_bytes() == before
        code, out, err = run(*command("relax"), "--overwrite")
        assert code == 0, err
        assert "done before" not in out

    def test_a_complete_file_is_nothing_to_resume(self, journal):
        assert run(*command("relax"), "--resume")[0] == 0
        before = Path("relaxed.traj").read_bytes()
        is_refused(run(*command("relax"), "--resume"), "relaxed.traj", "nothing is left to resume")
        assert Path("relaxed.traj").read_bytes() == before


@pytest.mark.parametrize(("sent", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_interrupt_that_loading_would_swallow_is_held_back(sent, raised):
    reached = []

    def load():
        with terminable(), signals_deferred():
            os.kill(os.getpid(), sent)
            reached.append(True)

    before = signal.getsignal(sent)
    with pytest.raises(raised):
        load()
    assert reached
    assert signal.getsignal(sent) is before
