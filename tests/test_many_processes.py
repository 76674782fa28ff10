"""Relaxations and evaluations that processes share: the same results, every structure once, whoever dies."""

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from helpers.potentials import wide_lennard_jones
from helpers.shell import cluster_relaxation, drawn, is_refused, run, write_relaxations

from ase_bptt import Status, save_potential
from ase_bptt.cli import run_folder
from ase_bptt.throughput import Relaxed, locks, relax_all
from ase_bptt.throughput.journal import Journal
from ase_bptt.throughput.parts import Parts, divided
from ase_bptt.throughput.structure_files import StructureFiles

N = 12
SETTINGS = ["--potential", "./lj", "--fmax", "0.01", "--dtype", "float64"]
RELAX = ["relax", "starts.extxyz", *SETTINGS, "--out", "relaxed.traj"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def starts():
    structures = [cluster_relaxation(k)[0] for k in range(N)]
    for k, atoms in enumerate(structures):
        atoms.info = {"name": f"start {k}", "weights": [1.5, float(k)]}
    write("starts.extxyz", structures)
    save_potential(wide_lennard_jones(2.5), "lj")
    return structures


@pytest.fixture
def quick_beats():
    with mock.patch.object(locks, "BEAT", 0.05), mock.patch.object(locks, "PATIENCE", 0.5):
        yield


def started(*command, **variables):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def process(*arguments, **variables):
    return started(sys.executable, "-m", "ase_bptt", *arguments, **variables)


def ended(*processes):
    found = [p.communicate(timeout=240) for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(err for _, err in found)
    return [out for out, _ in found]


def says(result, *texts) -> None:
    """One sentence on standard error, at whatever time."""
    code, _, err = result
    assert code == 2
    assert len(err.splitlines()) == 1
    for text in ("ase-bptt: ", *texts):
        assert text in err


def equal_to_one_process(out="relaxed.traj"):
    assert run(*RELAX[:-1], "alone.traj")[0] == 0
    found, expected = read(out, ":"), read("alone.traj", ":")
    assert len(found) == len(expected) == N
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-10, rtol=0)
        assert one.get_potential_energy() == pytest.approx(other.get_potential_energy(), abs=1e-10)
        assert one.info.keys() == other.info.keys()
        assert one.info["name"] == other.info["name"]
    assert not list(Path().glob("*.parts"))


def test_two_processes_of_torchrun(starts):
    (out,) = ended(started(*TORCHRUN, "-m", "ase_bptt", *RELAX))
    assert out.count(f"{N} of {N} converged") == 1
    equal_to_one_process()


def test_three_shards_of_which_a_slurm_array_gives_one(starts):
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "3"}
    said = ended(process(*RELAX, "--shard", "1/3"), process(*RELAX, "--shard", "2/3"), process(*RELAX, **array))
    assert sum(f"{N} of {N} converged" in out for out in said) == 1
    equal_to_one_process()
    # One that comes late finds all done.
    code, out, _ = run(*RELAX, "--shard", "3/3")
    assert (code, out) == (0, "relaxed.traj is there already and complete: nothing is left to do.\n")


KILLED = """
import itertools, os, signal, sys
from unittest import mock
from ase_bptt.cli import main
from ase_bptt.throughput.journal import Journal
real, calls = Journal.add, itertools.count(1)
def add(self, index, end):
    if next(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, index, end)
with mock.patch.object(Journal, "add", add):
    main(sys.argv[1:])
"""


def test_a_process_that_is_killed_loses_what_it_had_in_hand_and_no_more(starts):
    killed = started(sys.executable, "-c", KILLED, *RELAX, "--shard", "1/2")
    killed.communicate(timeout=240)
    assert killed.returncode == -signal.SIGKILL
    (journal,) = Path("relaxed.traj.parts").glob("*.traj")
    kept = [atoms.info["_index"] for atoms in read(journal, ":")]
    assert len(kept) == 3
    done, real = [], Journal.add
    with mock.patch.object(Journal, "add", lambda self, k, end: (done.append(k), real(self, k, end))):
        code, out, err = run(*RELAX, "--resume")
    assert code == 0, err
    assert "3 of them done before" in out
    assert sorted(kept + done) == list(range(N))
    equal_to_one_process()


def test_torchrun_ends_all_where_one_is_killed_and_any_number_continues(starts):
    Path("killed.py").write_text(KILLED)
    run_of_two = started(*TORCHRUN, "killed.py", *RELAX)
    run_of_two.communicate(timeout=240)
    assert run_of_two.returncode != 0
    assert not Path("relaxed.traj").exists()
    ended(process(*RELAX, "--resume", "--shard", "1/2"), process(*RELAX, "--resume", "--shard", "2/2"))
    equal_to_one_process()


def test_an_evaluation(tmp_path):
    write_relaxations(tmp_path)
    evaluation = ["evaluate", "pairs", "--potential", "lj", "--against", "lj", "--json"]
    with mock.patch("matplotlib.figure.Figure.savefig", drawn):
        code, alone, err = run(*evaluation, "--out", "alone")
    assert code == 0, err
    (out,) = ended(started(*TORCHRUN, "-m", "ase_bptt", *evaluation, "--out", "two"))
    said = ended(*(process(*evaluation[:-1], "--out", "shards", "--shard", f"{k}/2") for k in (1, 2)))
    assert sum("all figures and pictures" in text for text in said) == 1
    shards = json.loads(Path("shards/results.json").read_text())
    for found in (json.loads(out), shards):
        assert found["test"] == json.loads(alone)["test"]
    for name in ("two", "shards"):
        assert not list(Path(name).glob("*.parts"))
        assert len(read(f"{name}/relaxed.extxyz", ":")) == 5


class TestSharedFolder:
    """Of an evaluation or a search, which several processes start."""

    def arguments(self, **other):
        return argparse.Namespace(
            **{"command": "evaluate", "out": Path("shards"), "overwrite": False, "fmax": 0.1} | other
        )

    @pytest.mark.parametrize("moment", ["check_writable", "create"])
    def test_one_that_starts_at_the_same_moment_finds_it_whole(self, moment):
        """Another process starts, and begins to work, wherever this one is."""
        real, before = getattr(run_folder, moment), Path("shards/evaluation.parts/000000.done")
        others = iter([True])

        def meanwhile(*given):
            if next(others, False):
                run_folder.begin_shared(self.arguments(), (1, 2))
                before.parent.mkdir()
                before.touch()
            return real(*given)

        with mock.patch.object(run_folder, moment, meanwhile):
            run_folder.begin_shared(self.arguments(), (0, 2))
        assert before.is_file()
        assert run_folder.holds(self.arguments())

    def test_another_run_and_a_folder_of_others_are_refused(self):
        run_folder.begin_shared(self.arguments(), (0, 2))
        with pytest.raises(FileExistsError, match="is there already"):
            run_folder.begin_shared(self.arguments(fmax=0.2), (1, 2))
        Path("other").mkdir()
        Path("other/thesis.tex").touch()
        with pytest.raises(FileExistsError, match="is there already"):
            run_folder.begin_shared(self.arguments(out=Path("other")), (0, 2))
        assert [path.name for path in Path("other").iterdir()] == ["thesis.tex"]


class TestParts:
    """Chunks and their locks, without relaxing."""

    @pytest.fixture
    def parts(self, starts, tmp_path):
        files = StructureFiles([Path("starts.extxyz")])
        return lambda run="run", **how: Parts(tmp_path / "parts", run, files, files.sizes, **how)

    def finish(self, parts, chunk):
        for k in chunk:
            end = parts.ends.structures[k].copy()
            end.calc = SinglePointCalculator(end, energy=0.0, forces=np.zeros((len(end), 3)))
            parts.add(k, Relaxed(end, Status.CONVERGED, 1))

    def test_each_chunk_is_claimed_once(self, parts):
        with parts(shard=(0, 2)) as one, parts(shard=(1, 2)) as two:
            mine, others = one.claims(), two.claims()
            chunks = [next(mine), next(others), *mine, *others]
        assert sorted(k for chunk in chunks for k in chunk) == list(range(N))

    def test_what_a_stopped_process_had_is_free_at_once(self, parts):
        with parts() as one:
            self.finish(one, next(one.claims()))
            next(one.claims())
        with parts() as two:
            assert len(two.ends.places) == len(one.chunks[0])
            assert sorted(k for chunk in two.claims() for k in chunk) == sorted(k for c in two.chunks[1:] for k in c)

    @pytest.mark.parametrize("host", ["here", "elsewhere"])
    def test_the_chunk_of_one_that_died_is_taken_over(self, parts, quick_beats, host):
        dead = subprocess.Popen(["true"])
        dead.wait()
        with parts() as one:
            name = one.holder.name if host == "here" else "elsewhere-1"
            owner = {"name": name, "host": "elsewhere" if host == "elsewhere" else os.uname().nodename, "pid": dead.pid}
            (one.folder / "000000.lock").write_text(json.dumps(owner))
            began = time.monotonic()
            for chunk in one.claims():
                self.finish(one, chunk)
            assert one.complete() == (host == "here")
            while one.wait():
                for chunk in one.claims():
                    self.finish(one, chunk)
            assert one.complete()
            assert (time.monotonic() - began > 0.4) == (host == "elsewhere")

    def test_one_that_shows_that_it_lives_keeps_its_chunk_whatever_the_clock(self, parts, quick_beats):
        with parts() as one, parts() as two:
            chunk = next(one.claims())
            os.utime(one.folder / f"{one.holder.name}.alive", (0, 0))  # a clock that jumps
            for some in two.claims():
                self.finish(two, some)
            assert not two.wait()
            assert not two.complete()
            self.finish(one, chunk)
            assert one.complete()

    def test_the_last_of_two_merges_and_no_other(self, parts, quick_beats):
        with parts() as one, parts() as two:
            for chunk in one.claims():
                self.finish(one, chunk)
            assert two.complete()
            assert one.merging()
            assert not two.merging()

    def test_a_damaged_journal_frees_what_it_held(self, parts):
        with parts() as one:
            for chunk in one.claims():
                self.finish(one, chunk)
        one.journal.path.write_bytes(b"- of Ulm, but no more")
        with parts() as two:
            assert not two.complete()
            assert sorted(k for chunk in two.claims() for k in chunk) == list(range(N))

    def test_another_run_is_refused(self, parts):
        parts()
        with pytest.raises(ValueError, match="parts belongs to a run on other structures"):
            parts("another")

    def test_a_thread_that_watches_is_no_thread_that_computes(self, parts):
        from ase_bptt.threads import alone

        with parts():
            assert threading.active_count() > 1
            assert alone()


def test_chunks_shrink_and_hold_each_structure_once():
    sizes = np.random.default_rng(0).integers(8, 200, 2000)
    chunks = divided(sizes, 4)
    assert sorted(k for chunk in chunks for k in chunk) == list(range(2000))
    work = [sum(sizes[chunk]) for chunk in chunks]
    assert work[0] == max(work)
    assert work[-1] < 0.001 * sum(work)
    assert max(map(len, chunks)) <= 64


class TestMerge:
    def test_a_stopped_run_is_merged_in_part_and_then_whole(self, starts):
        real, added = Journal.add, []

        def stopping(self, index, end):
            if len(added) == 5:
                raise KeyboardInterrupt
            added.append(index)
            real(self, index, end)

        with mock.patch.object(Journal, "add", stopping):
            assert run(*RELAX)[0] == 130
        is_refused(run("merge", "relaxed.traj.parts"), "5 of 12 structures have finished", "--resume", "--partial")
        code, _, err = run("merge", "relaxed.traj.parts", "--partial", "--out", "so_far.extxyz")
        assert code == 0, err
        assert [a.info["name"] for a in read("so_far.extxyz", ":")] == [f"start {k}" for k in sorted(added)]
        assert Path("relaxed.traj.parts").is_dir()
        assert run(*RELAX, "--resume")[0] == 0
        equal_to_one_process()

    def test_what_is_complete(self, starts):
        with mock.patch("ase_bptt.cli.relax.merge", side_effect=KeyboardInterrupt):
            assert run(*RELAX)[0] == 130
        write("relaxed.traj", starts[0])
        is_refused(run("merge", "relaxed.traj.parts"), "relaxed.traj is there already", "--overwrite")
        code, out, err = run("merge", "relaxed.traj.parts", "--overwrite", "--json")
        assert code == 0, err
        assert (json.loads(out)["n"], json.loads(out)["converged"]) == (N, N)
        equal_to_one_process()

    def test_other_folders_and_changed_structures(self, starts, tmp_path):
        (tmp_path / "other").mkdir()
        is_refused(run("merge", "other"), "other holds no run of ase-bptt relax")
        is_refused(run("merge", "nowhere"), "nowhere holds no run of ase-bptt relax")
        with mock.patch("ase_bptt.cli.relax.merge", side_effect=KeyboardInterrupt):
            run(*RELAX)
        write("starts.extxyz", starts[1:])
        is_refused(run("merge", "relaxed.traj.parts"), "relaxed.traj.parts", "have changed", "starts.extxyz")


class TestFiles:
    def test_folders_databases_and_files_of_many(self, starts, tmp_path):
        (tmp_path / "all" / "deep").mkdir(parents=True)
        starts[0].cell, starts[0].pbc = [20, 20, 20], True
        for name in ("a.traj", "b.db", "deep/c.extxyz"):
            write(tmp_path / "all" / name, starts[:3])
        write(tmp_path / "all/deep/POSCAR_1", starts[0], format="vasp")
        write(tmp_path / "all/deep/OUTCAR.extxyz.parts", starts[0], format="extxyz")
        files = StructureFiles([Path("all"), Path("starts.extxyz")])
        assert len(files) == 3 * 3 + 1 + N
        assert files.name(4) == "structure 1 of all/b.db"
        assert files.name(9) == "all/deep/POSCAR_1" or files.name(6) == "all/deep/POSCAR_1"
        assert sum(files.sizes[:-N]) > 0
        for k, atoms in enumerate(starts):
            np.testing.assert_allclose(files[10 + k].positions, atoms.positions, atol=1e-7)
        with pytest.raises(ValueError, match="is a folder without structures"):
            StructureFiles([Path("lj")])

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda text: text[: len(text) // 2], "is cut within structure"),
            (lambda text: text.replace("\n5\n", "\n\n5\n", 1) if "\n5\n" in text else "\n" + text, ""),
            (lambda text: "five" + text[1:], "does not begin with its number of atoms"),
        ],
    )
    def test_a_damaged_file_is_named(self, starts, spoil, words):
        path = Path("starts.extxyz")
        path.write_text(spoil(path.read_text()))
        with pytest.raises(ValueError, match=rf"starts\.extxyz: .*{words}"):
            StructureFiles([path])

    def test_an_invalid_structure_behind_the_first_thousand(self, starts):
        bad = starts[0].copy()
        bad.positions[0] = bad.positions[1]
        write("many.extxyz", [*starts, bad])
        arguments = ["relax", "many.extxyz", *SETTINGS]
        with mock.patch("ase_bptt.cli.starts.CHECKED", 3):
            is_refused_later = run(*arguments)
            assert is_refused_later[0] == 2
            assert "structure 12 of many.extxyz" in is_refused_later[2]
            code, out, err = run(*arguments, "--resume", "--skip-invalid", "--json")
        assert code == 3, err
        assert (json.loads(out)["n"], json.loads(out)["left_out"]) == (N, 1)
        assert "Left out: structure 12 of many.extxyz" in err


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/", "-1/2"])
def test_a_shard_that_there_is_not(text):
    code, _, err = run("relax", "x.extxyz", "--potential", "lj", f"--shard={text}")
    assert code == 2
    assert "--shard" in err


def test_overwrite_is_not_for_one_of_several(starts):
    is_refused(run(*RELAX, "--shard", "1/2", "--overwrite"), "--overwrite is not for one of several processes")


def test_few_structures_are_in_memory(starts):
    """The queue asks for a portion when it has room, and no earlier."""
    from ase_bptt.cells import CELLS
    from ase_bptt.throughput import relax_stream

    asked = []

    def work():
        for k, atoms in enumerate(starts):
            asked.append(k)
            yield [(k, atoms, CELLS["fixed"])]

    ends = relax_stream(wide_lennard_jones(2.5), work(), fmax=0.01, batch_size=2)
    next(ends)
    assert len(asked) <= 3
    assert sorted([k for k, _ in ends]) != list(range(N))
    assert len(asked) == N
    every = dict(relax_all(wide_lennard_jones(2.5), starts, fmax=0.01))
    assert len(every) == N


class TestFaults:
    """A full disk, two runs into one folder, an input that cannot be written: one sentence, and nothing is lost."""

    @pytest.mark.parametrize("call", [1, 4])
    def test_a_full_disk(self, starts, call):
        from ase.io.trajectory import TrajectoryWriter

        real, calls = TrajectoryWriter.write, []

        def full(self, *args, **kwargs):
            calls.append(1)
            if len(calls) >= call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(self, *args, **kwargs)

        with mock.patch.object(TrajectoryWriter, "write", full):
            says(run(*RELAX), "No space left on device", "--resume continues")
        code, out, err = run(*RELAX, "--resume")
        assert code == 0, err
        assert (f"{call - 1} of them done before" in out) == (call > 1)
        equal_to_one_process()

    def test_a_full_disk_while_the_results_are_written(self, starts):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with mock.patch("ase_bptt.cli.output_file.Trajectory", full):
            says(run(*RELAX), "relaxed.traj could not be written", "No space left")
        assert not Path("relaxed.traj").exists()
        done = []
        with mock.patch.object(Journal, "add", lambda self, k, end: done.append(k)):
            assert run(*RELAX, "--resume")[0] == 0
        assert not done
        equal_to_one_process()

    def test_two_runs_into_one_place(self, starts):
        with mock.patch.object(Journal, "add", side_effect=KeyboardInterrupt):
            run(*RELAX)
        # While the first is at work, or was stopped:
        is_refused(run(*RELAX), "relaxed.traj.parts is there already", "--resume", "--overwrite")
        is_refused(run(*RELAX, "--resume", "--steps", 3), "relaxed.traj.parts belongs to a run on other structures")
        is_refused(run(*RELAX, "--shard", "1/2", "--steps", 3), "relaxed.traj.parts belongs to a run")
        assert run(*RELAX, "--resume")[0] == 0
        equal_to_one_process()

    def test_two_resume_at_once(self, starts):
        with mock.patch.object(Journal, "add", side_effect=KeyboardInterrupt):
            run(*RELAX)
        both = [process(*RELAX, "--resume") for _ in range(2)]
        found = [p.communicate(timeout=240) for p in both]
        # The second may come when all is done, which it says.
        assert 0 in {p.returncode for p in both} <= {0, 2}, found
        assert all("Traceback" not in err for _, err in found)
        equal_to_one_process()

    def test_an_input_that_cannot_be_written(self, starts, tmp_path):
        (tmp_path / "input").mkdir()
        Path("starts.extxyz").rename("input/starts.extxyz")
        (tmp_path / "input/starts.extxyz").chmod(0o444)
        (tmp_path / "input").chmod(0o555)
        try:
            before = sorted((tmp_path / "input").iterdir())
            code, _, err = run("relax", "input/starts.extxyz", *RELAX[2:])
            assert code == 0, err
            assert sorted((tmp_path / "input").iterdir()) == before
        finally:
            (tmp_path / "input").chmod(0o755)

    def test_a_folder_that_is_deleted_under_a_run(self, starts):
        real = Journal.add

        def deleted(self, index, end):
            shutil.rmtree("relaxed.traj.parts", ignore_errors=True)
            real(self, index, end)

        with mock.patch.object(Journal, "add", deleted):
            says(run(*RELAX), "relaxed.traj.parts", "could not be written")
