"""Training in several processes: the weights of one process, one writer, and a sentence where a process dies.

As a script, this file is one of the processes.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from helpers.dft_files import unread
from helpers.potentials import wide_lennard_jones
from helpers.shell import drawn, is_refused, write_relaxations
from helpers.shell import run as shell
from helpers.training import Exploding, make_pairs, trainer, untuned, with_xenon, without_times
from torch import distributed as dist

from ase_bptt import RelaxationPair, TorchCalculator, Trainer, load_potential, read_pairs, relax
from ase_bptt.losses import rmsd
from ase_bptt.pairs import lazy
from ase_bptt.training.distributed import Lost, Ranks, together
from ase_bptt.training.pair_loss import PairEnd

TESTS = Path(__file__).parent
TRAIN = ["--epochs", "3", "--batch-size", "2", "--steps", "2", "--lr", "0.02", "--dtype", "float64"]
MINIMA = {"adjoint": "implicit", "stepper": None, "steps": 60, "warm_start_every": 2}


def labelled(atoms):
    """As a reference of another zero of energy has it."""
    atoms = atoms.copy()
    atoms.calc = TorchCalculator(wide_lennard_jones())
    found = {"energy": atoms.get_potential_energy() + len(atoms), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        found["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **found)
    return atoms


@cache
def made():
    return [
        dataclasses.replace(pair, frames=[labelled(pair.initial), labelled(pair.relaxed)]) for pair in make_pairs(0, 8)
    ]


@cache
def crystals():
    """The first and last with the cell fixed, the second under pressure, one with the volume alone free."""
    ways = ["fixed", ("full", 0.02), "full", "hydrostatic", "full", "full", "full", "fixed"]
    found = []
    for k, way in enumerate(ways):
        cell, pressure = way if isinstance(way, tuple) else (way, 0.0)
        start, strain = bulk("Ar", a=3.8).repeat((2, 1, 1)), np.random.default_rng(k).uniform(-0.02, 0.02, (3, 3))
        if cell == "full":
            start.set_cell(start.cell @ (np.eye(3) + strain + strain.T), scale_atoms=True)
        start.rattle(0.05, seed=k)
        with torch.no_grad():
            end = relax(wide_lennard_jones(), start, cell=cell, pressure=pressure, fmax=1e-3, steps=500).to_atoms()
        how = {"cell": cell, "pressure": pressure, "frames": [labelled(start), labelled(end)]}
        found.append(RelaxationPair(start, end, f"pair {k}", f"group {k}", **how))
    return found


def data(name=""):
    """Pairs to train on, and to choose by."""
    pairs = crystals() if name.startswith("cells") else made()
    return pairs[:5], pairs[5:]


class Killed(BaseException):
    pass


def sharp(relaxation, reference):
    """A loss with no finite gradient where there is xenon."""
    found = rmsd(relaxation, reference)
    bad = [k for k, numbers in enumerate(relaxation.start.numbers.split(relaxation.start.counts)) if 54 in numbers]
    extra = (found[bad] - found[bad].detach()).abs().sqrt()
    return found.index_add(0, torch.tensor(bad, dtype=torch.int64), extra)


def exploding():
    potential = Exploding(**untuned().config())
    potential.fault = float("nan")
    return potential


CASES = {
    "some diverge": lambda **how: trainer(exploding(), batch_size=3, **how),
    "some have no finite gradient": lambda **how: trainer(loss=sharp, **how),
    "minima": lambda **how: trainer(**MINIMA, terms=["weight_anchor", {"name": "teacher", "weight": 0.1}], **how),
    "cells move": lambda **how: trainer(terms=["reference"], first="zero-force:1", batch_size=3, **how),
    "cells at minima": lambda **how: trainer(**MINIMA, terms=["reference"], **how),
}
GO_ON = {
    "warm starts": MINIMA,
    # Of two, it is the second process that knows how the term has changed.
    "a term that changes": {"terms": ["weight_anchor", "reference"]},
}


def weights(run):
    return {name: value.item() for name, value in run.potential.state_dict().items()}


def fitted(name, out):
    """What a run of two epochs leaves."""
    train, valid = data(name)
    if name.startswith("some"):
        train[4] = with_xenon(train[4])
    run = CASES[name](out=out).fit(train, valid, epochs=2)
    ends = run.pair_loss.warm.ends if run.pair_loss.warm else {}
    return {
        "weights": weights(run),
        "history": without_times(run.history),
        "ends": {key: positions.tolist() for key, positions in ends.items()},
    }


def begun(out, name):
    """A run of three epochs that is killed in the second, in a folder of its own."""
    real, steps = Trainer.train_step, []

    def dying(self, pairs):
        steps.append(pairs)
        if len(steps) == 5:
            raise Killed
        return real(self, pairs)

    with mock.patch.object(Trainer, "train_step", dying), pytest.raises(Killed):
        trainer(out=out / name, **GO_ON[name]).fit(*data(), epochs=3)


def resumed(out, name):
    run = Trainer.resume(out / name, progress=False).fit(*data(), epochs=3)
    if not run.ranks.writes:
        # The files may not be there yet.
        return None
    state = torch.load(out / name / "checkpoint.pt", weights_only=True)
    differences = [term["differences"].tolist() for term in state["terms"] if "differences" in term]
    return {"weights": weights(run), "differences": differences}


def told(run):
    with pytest.raises(ValueError, match="processes of this run") as caught:
        run()
    return str(caught.value)


def unlike(ranks, out):
    """What each process says where the others resume the run that it begins, or stand at another epoch of it."""

    def another():
        run = trainer(**GO_ON["warm starts"])
        run.record.epoch = int(ranks.rank == 0)
        run.fit(*data(), epochs=3)

    def mixed():
        run = trainer() if ranks.rank else Trainer.resume(out, progress=False)
        run.fit(*data(), epochs=3)

    return [told(mixed), told(another)]


def one_of_many(folder, store):
    """The work of one process; where there is a store, the group is a person's own."""
    torch.set_num_threads(1)
    if store:
        own = {"rank": int(os.environ["OWN_RANK"]), "world_size": 3}
        dist.init_process_group("gloo", init_method=f"file://{folder / store}", **own)
    ranks = together()
    # Each has a folder of its own, to see who writes.
    mine = folder / f"rank_{ranks.rank}"
    found = {name: fitted(name, mine / name) for name in CASES}
    for name in GO_ON:
        begun(folder / f"begun_by_{ranks.size}", name)
    found["unlike"] = unlike(ranks, folder / "begun_by_1" / "warm starts")
    found["resumed"] = {name: resumed(folder / "begun_by_1", name) for name in GO_ON}
    (folder / f"found_{ranks.rank}.json").write_text(json.dumps(found))


def torchrun(*arguments, processes=2):
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        *map(str, arguments),
    ]  # fmt: skip


def begin(command, **environment):
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    for name in GO_ON:
        begun(folder / "begun_by_1", name)
    shutil.copytree(folder / "begun_by_1", folder / "goes_on")
    found = {name: fitted(name, folder / name) for name in CASES}
    return folder, found | {"resumed": {name: resumed(folder / "goes_on", name) for name in GO_ON}}


@pytest.fixture(scope="module", params=[2, 3], ids=["torchrun", "a group of one's own"])
def shared(request, alone, tmp_path_factory):
    """Where several processes have worked; with three of them, some have nothing to do in a batch of two."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(alone[0] / "begun_by_1", folder / "begun_by_1")
    if request.param == 2:
        running = [begin(torchrun(__file__, folder, ""))]
    else:
        script = [sys.executable, __file__, str(folder), "store"]
        running = [begin(script, OWN_RANK=str(rank)) for rank in range(3)]
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return folder, request.param


def close(one, other) -> bool:
    """Whether two nests of numbers are equal to 1e-8."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, abs=1e-8, nan_ok=True)


class TestSeveralProcesses:
    @pytest.mark.parametrize("name", CASES)
    def test_weights_metrics_and_ends_are_those_of_one_process(self, alone, shared, name):
        folder, n = shared
        for rank in range(n):
            assert close(json.loads((folder / f"found_{rank}.json").read_text())[name], alone[1][name])
        assert alone[1][name]["weights"]["sigma"] != 2.65
        assert any(row["skipped"] for row in alone[1][name]["history"]) == name.startswith("some")

    @pytest.mark.parametrize("name", GO_ON)
    def test_a_run_goes_on_with_more_and_with_fewer(self, alone, shared, name):
        folder, n = shared
        expected = alone[1]["resumed"][name]
        assert close(json.loads((folder / "found_0.json").read_text())["resumed"][name], expected)
        assert close(resumed(folder / f"begun_by_{n}", name), expected)
        assert len(expected["differences"]) == (name != "warm starts")

    def test_all_refuse_to_begin_unlike(self, shared):
        folder, n = shared
        for rank in range(n):
            for said in json.loads((folder / f"found_{rank}.json").read_text())["unlike"]:
                assert "do not all continue from the same epoch: build or resume the Trainer alike on each." in said

    def test_one_writes(self, shared):
        folder, _ = shared
        assert {path.name for path in (folder / "rank_0" / "minima").iterdir()} == {
            "settings.json", "metrics.csv", "checkpoint.pt", "checkpoint.previous.pt", "potential",
        }  # fmt: skip
        assert not (folder / "rank_1").exists()


class Second(Ranks):
    """One of two processes, the other of which is only said to have done its share: its pairs diverged."""

    def __init__(self):
        super().__init__(1, 2)
        self.mine = []

    def dealt(self, items, costs, run):
        self.items = items
        return super().dealt(items, costs, run)

    def each(self, run):
        self.mine = run()
        others = len(self.items) - len(self.mine)
        return [[PairEnd(False, None, 3, None, None)] * others, self.mine]

    def sum_(self, tensors):
        pass


@pytest.mark.parametrize("how", [{}, MINIMA], ids=["unroll", "minima"])
def test_a_process_reads_its_share_alone(tmp_path, how, caplog):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for pair in made()[:6]:
        write(folder / f"{pair.id}.extxyz", [pair.initial, labelled(pair.relaxed)])
    pairs = read_pairs(folder, lazy=True, index=tmp_path / "index")
    pairs = unread(pairs)
    run = trainer(batch_size=6, **how)
    ranks = run.ranks = run.pair_loss.ranks = run.updates.ranks = Second()
    [batch] = run.order.batches(pairs, 0)
    with mock.patch.object(lazy, "loaded", side_effect=lazy.loaded) as reads:
        losses, _ = run.train_step(batch)
    assert reads.call_count == len(losses) == len(ranks.mine) == 3
    assert sum("left out of this step" in line for line in caplog.messages) == 3


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError),
        (RuntimeError("No backend type associated with device type cpu"), RuntimeError),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:1] Connection closed by peer [::1]:1"), Lost),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), Lost),
    ],
    ids=["memory", "backend", "gloo", "store"],
)
def test_only_a_process_out_of_reach_is_called_so(error, told, tmp_path):
    """In a group of one, whose sum fails."""
    real = dist.all_reduce

    def failing(tensor, **how):
        if not how:
            raise error
        return real(tensor, **how)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with mock.patch.object(dist, "all_reduce", failing), pytest.raises(told) as caught:
            Ranks(0, 2).sum_([torch.ones(1)])
        assert type(caught.value) is told
    finally:
        dist.destroy_process_group()


class Limited(Exploding):
    """Of a device on which so many atoms are too many."""

    fault, most = 1.0, 100

    def forward(self, structures, edges):
        if structures.n_atoms > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(structures, edges)


class TestMemory:
    def gradient(self, most, **how):
        potential = Limited(**untuned().config())
        potential.most = most
        run = trainer(potential, **how)
        losses = run.backward(data()[0])
        return [*losses, potential.sigma.grad.item(), potential.epsilon.grad.item()], run

    @pytest.mark.parametrize("most", [18, 6])
    @pytest.mark.parametrize("how", [{}, MINIMA], ids=["unroll", "minima"])
    def test_a_batch_that_is_halved_has_the_same_gradient(self, most, how, caplog):
        (expected, whole), (found, parts) = (self.gradient(n, **how) for n in (100, most))
        assert found == pytest.approx(expected, abs=1e-12)
        assert len(found) == 7
        assert "Memory ran out on 5 structures at once" in caplog.text
        assert parts.pair_loss.unsolved == whole.pair_loss.unsolved
        if how:
            assert parts.pair_loss.warm.ends.keys() == whole.pair_loss.warm.ends.keys() != set()

    def test_a_structure_that_does_not_fit_alone_is_told(self):
        with pytest.raises(MemoryError, match="a single structure"):
            self.gradient(5)


@pytest.fixture
def pairs(tmp_path):
    write_relaxations(tmp_path)
    return tmp_path / "pairs"


DYING = """
import os, signal, sys
from ase_bptt.cli import main
from ase_bptt import Trainer

real, steps = Trainer.train_step, []


def dying(self, pairs):
    steps.append(pairs)
    if len(steps) == 2:
        # What came before is written and said.
        self.ranks.each(lambda: None)
        here, sent = sys.argv[1].split(":")
        if here == os.environ["RANK"]:
            os.kill(os.getpid(), int(sent))
        if here == "all":
            os.kill(os.getpid(), int(sent))
    return real(self, pairs)


Trainer.train_step = dying
sys.exit(main(sys.argv[2:]))
"""


def command(pairs, *more):
    return ["train", pairs, "--potential", pairs.parent / "lj", "--out", "run", *TRAIN, *more]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Sigma after the whole run of one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_relaxations(folder)
    with mock.patch("matplotlib.figure.Figure.savefig", drawn):
        code, _, err = shell(*command(folder / "pairs"), "--out", folder / "run")
    assert code == 0, err
    return load_potential(folder / "run").sigma.item()


class TestShell:
    @pytest.mark.parametrize(
        ("who", "sentence"),
        [
            (f"1:{signal.SIGKILL:d}", "stopped, for one of its processes has died."),
            (f"0:{signal.SIGKILL:d}", "stopped, for one of its processes has died."),
            (f"all:{signal.SIGTERM:d}", "stopped."),
        ],
        ids=["killed", "the writer is killed", "all are terminated"],
    )
    def test_where_one_dies_a_sentence_says_so_and_the_run_goes_on(self, pairs, undisturbed, tmp_path, who, sentence):
        (tmp_path / "dying.py").write_text(DYING)
        process = begin(torchrun("dying.py", who, *command(pairs)))
        out, err = process.communicate(timeout=120)
        assert process.returncode != 0
        [said] = [line for line in err.splitlines() if line.startswith("ase-bptt: ")]
        assert said.startswith(f"ase-bptt: {sentence} The state after the last complete epoch is in run/checkpoint.pt")
        assert said.endswith("ase-bptt train --out run --resume continues.")
        assert "ase_bptt/" not in err  # no traceback goes through here
        assert out.count("shared by 2 processes") == 1
        assert err.count("epoch   1/3") == 1
        with mock.patch("matplotlib.figure.Figure.savefig", drawn):
            code, _, err = shell("train", "--out", "run", "--resume")
        assert code == 0, err
        assert load_potential("run").sigma.item() == pytest.approx(undisturbed, abs=1e-8)

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            (["--loss", "colour"], "ase-bptt train: error: argument --loss: There is no loss 'colour'"),
            (["--stepper", "bfgs"], "ase-bptt: "),
        ],
    )
    def test_what_cannot_be_done_is_said_once(self, pairs, flags, sentence):
        process = begin(torchrun("-m", "ase_bptt", *command(pairs, *flags)))
        out, err = process.communicate(timeout=120)
        assert process.returncode != 0
        assert out == ""
        assert len([line for line in err.splitlines() if line.startswith(sentence)]) == 1
        # As torchrun has it from each of them.
        assert err.count("exitcode  : 2 ") == 2
        assert "ase_bptt/" not in err
        assert not Path("run").exists()

    def test_what_one_process_does_is_refused_to_several(self, pairs):
        with mock.patch("ase_bptt.cli.together", return_value=Ranks(0, 2)):
            refused = shell("info", pairs.parent / "lj")
        is_refused(refused, "info runs in one process", "torchrun began 2", "call it without torchrun")


if __name__ == "__main__":
    one_of_many(Path(sys.argv[1]), sys.argv[2])
