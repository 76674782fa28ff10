"""Pairs that are read when they are asked for: the same as those that are kept, and few of them in memory."""

import dataclasses
import gc
import json
import multiprocessing
import os
import pickle
import tracemalloc
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.db import connect
from ase.io import write
from helpers import shell
from helpers.dft_files import changed_cell, spoilt, three_frames, unread, write_poscar_and_contcar
from helpers.shell import is_one_sentence
from helpers.training import same, trainer, without_times

from ase_bptt import read_pairs
from ase_bptt.pairs import InvalidPair, fingerprint, lazy, loading, sources
from ase_bptt.pairs.groups import split_by_group, split_into_folds
from ase_bptt.pairs.lazy import LazyPair
from ase_bptt.pairs.usable import usable
from ase_bptt.training.training_data import VariedStarts

N = 7


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def relaxations():
    """Clusters of four kinds, some of which end in one structure."""
    return [shell.cluster_relaxation(k) for k in range(N)]


def as_database(folder: Path, relaxations) -> Path:
    with connect(folder / "all.db") as database:
        for relaxed in (False, True):
            for k, frames in enumerate(relaxations):
                database.write(frames[-1 if relaxed else 0], relaxed=relaxed, pair=f"pair {k}", kind=f"kind {k % 3}")
    return folder / "all.db"


def as_folder(folder: Path, relaxations) -> Path:
    for k, frames in enumerate(relaxations):
        write(folder / f"{k}.extxyz", frames)
    return folder


def as_runs(folder: Path, relaxations) -> Path:
    for k, frames in enumerate(relaxations):
        (folder / f"kind {k % 3}" / str(k)).mkdir(parents=True)
        in_a_box = [a.copy() for a in frames]
        for atoms in in_a_box:
            atoms.set_cell([12, 12, 12])
            atoms.pbc = True
        write_poscar_and_contcar(folder / f"kind {k % 3}" / str(k), in_a_box)
    return folder


WAYS = pytest.mark.parametrize("written", [as_database, as_folder, as_runs])


def loads(counted=sources):
    """Counts how often a relaxation is read."""
    return mock.patch.object(lazy, "loaded", side_effect=counted.loaded)


def found(pairs):
    """Everything of some pairs."""
    return [
        (p.id, p.group, p.n_atoms, p.kind, p.digest(), p.relaxed.info, len(p.frames), p.initial.positions.tolist(),
         p.relaxed.positions.tolist(), p.relaxed.cell.array.tolist(), str(p.relaxed.symbols))
        for p in pairs
    ]  # fmt: skip


class TestSame:
    @WAYS
    @pytest.mark.parametrize("again", [False, True], ids=["first start", "second start"])
    def test_pairs_groups_splits_and_hashes_are_those_of_pairs_in_memory(self, tmp_path, relaxations, written, again):
        path = written(tmp_path, relaxations)
        eager = read_pairs(path)
        if again:
            read_pairs(path, lazy=True)
        pairs = read_pairs(path, lazy=True)
        assert all(isinstance(p, LazyPair) for p in pairs)
        assert found(pairs) == found(eager)
        assert len({p.group for p in pairs}) < len(pairs)
        assert fingerprint(pairs) == fingerprint(eager)

        def ids(splits):
            return {name: [p.id for p in side] for name, side in splits.items()}

        assert ids(split_by_group(pairs, seed=3)) == ids(split_by_group(eager, seed=3))
        assert [ids(s) for s in split_into_folds(pairs, 3)] == [ids(s) for s in split_into_folds(eager, 3)]

    def test_groups_are_the_same_though_few_structures_are_kept_for_comparison(self, tmp_path, monkeypatch):
        every = [three_frames(k % 4, symbol=["Si", "P"][k % 2]) for k in range(12)]
        path = as_database(tmp_path, every)
        eager = [p.group for p in read_pairs(path)]
        monkeypatch.setattr("ase_bptt.pairs.reading.DESCRIPTORS", 1)
        assert [p.group for p in read_pairs(path, lazy=True)] == eager
        assert 1 < len(set(eager)) < 12

    @pytest.mark.parametrize(("written", "key"), [(as_database, "kind"), (as_folder, "kind"), (as_runs, "folder")])
    def test_groups_that_are_named(self, tmp_path, relaxations, written, key):
        path = written(tmp_path, relaxations)
        for _ in range(2):
            pairs = read_pairs(path, lazy=True, group=key)
            assert {p.group for p in pairs} == {"kind 0", "kind 1", "kind 2"}
            assert [p.group for p in pairs] == [p.group for p in read_pairs(path, group=key)]

    def test_a_database_may_be_given_by_another_path(self, tmp_path, relaxations, monkeypatch):
        path = as_database(tmp_path, relaxations)
        read_pairs(path, lazy=True)
        monkeypatch.chdir(tmp_path)
        with mock.patch.object(loading, "load_one", side_effect=AssertionError):
            pairs = read_pairs("all.db", lazy=True)
        assert found(pairs) == found(read_pairs(path))

    @WAYS
    def test_training_gives_the_same_weights_bit_for_bit(self, tmp_path, relaxations, written):
        path = written(tmp_path, relaxations)
        tuned = []
        for pairs in (read_pairs(path), read_pairs(path, lazy=True)):
            splits = split_by_group(pairs)
            tuned.append(trainer().fit(splits["train"], splits["valid"], epochs=2))
        assert same(tuned[0].potential.state_dict(), tuned[1].potential.state_dict())
        assert same(without_times(tuned[0].history), without_times(tuned[1].history))
        assert tuned[0].record.fingerprint == tuned[1].record.fingerprint

    def test_starts_do_not_depend_on_the_order_in_which_they_are_asked_for(self, tmp_path, relaxations):
        pairs = read_pairs(as_database(tmp_path, relaxations), lazy=True)

        def varied():
            return VariedStarts(pairs, 0.5, 0.1, [4, 0])

        forth = [p.initial.positions for p in varied()]
        asked = varied()
        back = [asked[k].initial.positions for k in reversed(range(N))]
        np.testing.assert_array_equal(forth, back[::-1])


class TestMemory:
    def test_a_pair_of_a_database_takes_a_few_hundred_bytes(self, tmp_path):
        atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.7]])
        with connect(tmp_path / "all.db") as database:
            for k in range(4000):
                atoms.positions[1, 2] += 1e-5
                database.write(atoms, relaxed=bool(k % 2), pair=f"pair {k // 2}", kind=f"kind {k % 7}")
        read_pairs(tmp_path / "all.db", lazy=True, group="pair")
        gc.collect()
        tracemalloc.start()
        try:
            pairs = read_pairs(tmp_path / "all.db", lazy=True, group="pair")
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(pairs) == 2000
        assert held / len(pairs) < 500
        assert peak < 4 * held

    def test_no_more_structures_live_than_the_recent_ones(self, tmp_path, relaxations, monkeypatch):
        monkeypatch.setattr(lazy, "RECENT", 2)
        begun, most = [], 0

        def counting(load):
            def counted(*arguments):
                nonlocal most
                read = load(*arguments)
                begun.append(weakref.ref(read.initial))
                most = max(most, sum(ref() is not None for ref in begun))
                return read

            return counted

        path = as_database(tmp_path, relaxations * 3)
        at_start, later = counting(loading.load_one), counting(sources.loaded)
        with mock.patch.object(lazy, "loaded", later), mock.patch.object(loading, "load_one", at_start):
            pairs = read_pairs(path, lazy=True, group="kind")
            assert most <= 2
            # Two in the batch before, the two that were read last, and one that is being read.
            trainer(batch_size=2).fit(pairs, epochs=2)
        assert len(begun) > 2 * 3 * N
        assert most <= 5

    def test_what_is_asked_before_a_training_reads_nothing(self, tmp_path, relaxations):
        pairs = read_pairs(as_database(tmp_path, relaxations), lazy=True)
        tuned = trainer()
        kinds = len({p.kind for p in pairs})
        pairs = unread(pairs)
        with loads() as read:
            splits = split_by_group(usable(tuned.potential, pairs))
            fingerprint(pairs)
            tuned.check(*splits.values())
            assert sorted(p.n_atoms for p in pairs) == [6] * N
        # One of each kind is shown to the potential; it stays among the recent ones.
        assert read.call_count == kinds < N

    def test_both_ends_are_read_at_once(self, tmp_path, relaxations):
        (pair, *_) = read_pairs(as_folder(tmp_path, relaxations), lazy=True)
        (pair,) = unread([pair])
        with loads() as read:
            assert len(pair.initial) == len(pair.relaxed) == 6
        assert read.call_count == 1


class TestIndex:
    def first(self, path, **how):
        """How many relaxations are read at the start."""
        with mock.patch.object(loading, "load_one", side_effect=loading.load_one) as read:
            pairs = read_pairs(path, lazy=True, **how)
        return len(pairs), read.call_count

    @WAYS
    def test_it_is_used_again_and_rebuilt_where_a_file_has_changed(self, tmp_path, relaxations, written):
        path = written(tmp_path, relaxations)
        assert self.first(path) == (N, N)
        assert self.first(path) == (N, 0)
        (file,) = [path] if path.is_file() else list(path.rglob("0.extxyz")) or list(path.rglob("0/POSCAR"))
        os.utime(file, ns=(1, 1))
        assert self.first(path) == (N, N)
        assert self.first(path) == (N, 0)

    def test_a_file_that_is_new_is_noticed(self, tmp_path, relaxations):
        path = as_folder(tmp_path, relaxations)
        self.first(path)
        write(path / "new.extxyz", three_frames())
        assert self.first(path) == (N + 1, N + 1)

    def test_its_folder_can_be_chosen(self, tmp_path, relaxations):
        (tmp_path / "data").mkdir()
        path = as_folder(tmp_path / "data", relaxations)
        assert self.first(path, index=tmp_path / "run") == (N, N)
        assert [file.suffix for file in (tmp_path / "run").iterdir()] == [".jsonl"]
        assert self.first(path) == (N, N)
        assert self.first(path, index=tmp_path / "run") == (N, 0)

    @pytest.mark.parametrize("harm", [lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]\n" + text,
                                      lambda text: text.replace('"problems"', '"other"'),
                                      lambda text: "\n".join(text.splitlines()[:-1])])  # fmt: skip
    def test_a_damaged_one_is_rebuilt(self, tmp_path, relaxations, harm):
        (tmp_path / "data").mkdir()
        path = as_folder(tmp_path / "data", relaxations)
        self.first(path, index=tmp_path / "run")
        (file,) = (tmp_path / "run").iterdir()
        file.write_text(harm(file.read_text()))
        assert self.first(path, index=tmp_path / "run") == (N, N)

    def test_where_it_cannot_be_written_a_warning_says_so(self, tmp_path, relaxations, caplog):
        (tmp_path / "file").write_text("no folder")
        (tmp_path / "data").mkdir()
        path = as_folder(tmp_path / "data", relaxations)
        assert self.first(path, index=tmp_path / "file") == (N, N)
        assert f"No index of {path} is kept" in caplog.text

    def test_invalid_pairs_are_left_out_with_the_same_words_each_time(self, tmp_path, caplog):
        write(tmp_path / "bad.extxyz", spoilt(changed_cell))
        write(tmp_path / "good.extxyz", three_frames())
        with pytest.raises(InvalidPair, match=r"bad\.extxyz: its cell changes"):
            read_pairs(tmp_path, lazy=True)
        said = []
        for _ in range(2):
            caplog.clear()
            assert self.first(tmp_path, skip_invalid=True)[0] == 1
            said.append([r.message for r in caplog.records])
        assert said[0] == said[1]
        assert said[0][0].startswith(f"Left out: {tmp_path}/bad.extxyz: its cell changes")
        assert said[0][1] == "Left out 1 of 2."
        with pytest.raises(InvalidPair, match=r"bad\.extxyz: its cell changes") as error:
            read_pairs(tmp_path, lazy=True)
        assert is_one_sentence(error.value)

    def test_warnings_come_once(self, tmp_path, caplog):
        frames = three_frames()
        write(tmp_path / "a.extxyz", [frames[0], frames[0]])
        (pair,) = read_pairs(tmp_path, lazy=True)
        (pair,) = unread([pair])
        assert len(pair.relaxed)
        assert len([r for r in caplog.records if "its relaxed structure is its initial one" in r.message]) == 1


def ends(pairs):
    return [float(p.relaxed.positions.sum()) for p in pairs]


class TestProcesses:
    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_two_processes_read_one_database_at_once(self, tmp_path, relaxations):
        pairs = read_pairs(as_database(tmp_path, relaxations), lazy=True)
        expected = ends(pairs)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(ends, [pairs, pairs[::-1]], chunksize=1) == [expected, expected[::-1]]

    def test_a_pickle_holds_no_structures(self, tmp_path, relaxations):
        pairs = read_pairs(as_database(tmp_path, relaxations), lazy=True)
        assert len(pairs[0].initial) == 6
        text = pickle.dumps(pairs)
        assert b"numpy" not in text
        assert found(pickle.loads(text)) == found(pairs)


class TestRefusing:
    @pytest.mark.parametrize("name", ["all.json", "relaxed.extxyz"])
    def test_what_is_read_whole_is_refused_with_the_mend(self, tmp_path, relaxations, name):
        more = [] if name == "all.json" else [tmp_path / name]
        with pytest.raises(InvalidPair, match=rf"{name} holds many structures and is read whole: give") as error:
            read_pairs(tmp_path / (name if not more else "initial.extxyz"), *more, lazy=True)
        assert is_one_sentence(error.value)

    def test_nothing_to_read(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no file or folder"):
            read_pairs(tmp_path / "absent", lazy=True)

    @WAYS
    def test_a_file_that_vanishes_in_mid_run_is_one_sentence(self, tmp_path, relaxations, written):
        path = written(tmp_path, relaxations)
        pairs = read_pairs(path, lazy=True)
        pairs = unread(pairs)
        for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
            file.unlink()
        with pytest.raises(InvalidPair, match=r"it could be read before and now it cannot \(There is no file") as error:
            trainer().fit(pairs, epochs=1)
        assert is_one_sentence(error.value)

    @pytest.mark.parametrize("written", [as_database, as_folder])
    def test_one_that_changes_in_mid_run_is_not_trained_on(self, tmp_path, relaxations, written):
        pairs = read_pairs(written(tmp_path, relaxations), lazy=True)
        pairs = unread(pairs)
        (tmp_path / "all.db").unlink(missing_ok=True)
        written(tmp_path, relaxations[::-1])
        with pytest.raises(InvalidPair, match="it has changed since it was checked; put back what it was") as error:
            trainer().fit(pairs, epochs=1)
        assert is_one_sentence(error.value)

    def test_a_copy_with_other_structures_is_an_ordinary_pair(self, tmp_path, relaxations):
        (pair, *_) = read_pairs(as_folder(tmp_path, relaxations), lazy=True)
        moved = dataclasses.replace(pair, initial=pair.relaxed)
        assert type(moved) is not LazyPair
        assert (moved.id, moved.group, moved.initial) == (pair.id, pair.group, moved.relaxed)


class TestShell:
    def test_train_and_resume(self, tmp_path, capsys):
        shell.write_relaxations(tmp_path)
        flags = ["--potential", tmp_path / "lj", "--seed", "1", *shell.QUICK]
        for name, more in (("eager", []), ("lazy", ["--lazy"])):
            code, _, err = shell.run("train", tmp_path / "pairs", *flags, "--out", tmp_path / name, *more)
            assert code == 0, err
        weights = [torch.load(tmp_path / name / "potential" / "weights.pt") for name in ("eager", "lazy")]
        assert same(*weights)
        assert json.loads((tmp_path / "lazy" / "command.json").read_text())["lazy"] is True
        (tmp_path / "lazy" / "results.json").unlink()
        with mock.patch.object(loading, "load_one", side_effect=AssertionError):
            code, _, err = shell.run("train", "--out", tmp_path / "lazy", "--resume")
        assert code == 0, err

    def test_evaluate(self, tmp_path):
        shell.write_relaxations(tmp_path)
        tables = []
        for name, more in (("eager", []), ("lazy", ["--lazy"])):
            code, _, err = shell.run("evaluate", tmp_path / "pairs", "--potential", tmp_path / "lj", "--steps", "20",
                                     "--out", tmp_path / name, *more)  # fmt: skip
            assert code == 0, err
            tables.append((tmp_path / name / "table.csv").read_text())
        assert tables[0] == tables[1]

    def test_two_files_are_refused_before_any_work(self, tmp_path):
        shell.write_relaxations(tmp_path)
        code, _, err = shell.run("train", tmp_path / "initial.extxyz", tmp_path / "relaxed.extxyz", "--potential",
                                 tmp_path / "lj", "--out", tmp_path / "run", "--lazy")  # fmt: skip
        assert code == 2
        assert "relaxed.extxyz holds many structures and is read whole" in err
        assert not (tmp_path / "run").exists()
