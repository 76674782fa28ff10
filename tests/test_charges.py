"""Charge and spin multiplicity: from info to the potential, through batches, pairs, hashes and the calculator."""

import json
import logging

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read, write
from helpers.potentials import needs_mace, tiny_mace
from helpers.structures import silicon
from torch import nn

from ase_bptt import (
    BPTTOptimizer,
    Potential,
    Prediction,
    RelaxationPair,
    Structures,
    TorchCalculator,
    Trainer,
    load_potential,
    read_pairs,
    relax,
)
from ase_bptt.cells import CellFreedom
from ase_bptt.cells.strained import Strained
from ase_bptt.cli import main, run_folder, train
from ase_bptt.cli.pair_flags import read_grouped
from ase_bptt.losses import LOSSES
from ase_bptt.pairs import InvalidPair
from ase_bptt.pairs.charges import contradictions, of_charge
from ase_bptt.terms.probes import Targets
from ase_bptt.throughput import relax_all

SPECS = {
    "total_charge": {"type": "categorical", "per": "graph", "num_classes": 5, "offset": 2, "emb_dim": 3},
    "total_spin": {"type": "categorical", "per": "graph", "num_classes": 4, "emb_dim": 3},
}


class Charged(Potential):
    """Springs between all neighbours that are as long at rest as the charge and the spin say."""

    family, cutoff, inputs = "charged", 4.0, frozenset({"charge", "spin"})

    def __init__(self):
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, structures, edges):
        batch = structures.batch[edges.i]
        rest = 1.0 + 0.1 * structures.charges[batch] + 0.01 * (structures.spins[batch] - 1)
        energies = self.stiffness * (edges.vectors(structures).norm(dim=1) - rest).square() / 4
        return Prediction(energies.new_zeros(len(structures)).index_add(0, batch, energies))

    def config(self):
        return {}


def n2(charge=None, spin=None):
    atoms = molecule("N2")
    atoms.info |= {k: v for k, v in (("charge", charge), ("spin", spin)) if v is not None}
    return atoms


def length(atoms):
    return float(np.linalg.norm(atoms.positions[0] - atoms.positions[1]))


def test_they_come_from_info_and_go_back():
    batch = Structures.from_atoms([n2(), n2(-1, 2), n2(0.5)])
    assert batch.charges.tolist() == [0, -1, 0.5]
    assert batch.spins.tolist() == [1, 2, 1]
    assert [a.info for a in batch.to_atoms()] == [{}, {"charge": -1.0, "spin": 2.0}, {"charge": 0.5}]
    assert batch.to(torch.device("cpu"), torch.float32).charges.dtype is torch.float32


def test_they_follow_their_structures():
    batch = Structures.from_atoms([n2(1), n2(2, 3), n2(3)])
    assert batch.select([2, 0]).charges.tolist() == [3, 1]
    joined = batch.select([1]).joined(batch)
    assert joined.charges.tolist() == [2, 1, 2, 3]
    assert joined.spins.tolist() == [3, 1, 3, 1]
    moved = batch.replace(positions=batch.positions + 1)
    assert moved.charges is batch.charges


def test_they_follow_structures_whose_cells_move():
    crystals = [silicon(), silicon()]
    crystals[1].info["charge"] = 1
    rows = Strained.of(Structures.from_atoms(crystals), [CellFreedom.of("full"), CellFreedom.of("fixed")])
    for batch in (rows, rows.placed(), rows.select([0]).joined(rows.select([1])).placed()):
        assert batch.charges.tolist() == [0, 1]


@pytest.mark.parametrize(("key", "value"), [("charge", "plus"), ("charge", [1, 2]), ("spin", np.nan)])
def test_what_is_no_number_is_refused(key, value):
    atoms = n2()
    atoms.info[key] = value
    with pytest.raises(ValueError, match=rf"info\['{key}'\] of N2 is .*: give one number"):
        Structures.from_atoms(atoms)


def test_each_relaxes_to_its_own_end():
    ends = relax(Charged(), [n2(), n2(2), n2(0, 3)], fmax=1e-4).to_atoms()
    assert [length(a) for a in ends] == pytest.approx([1.0, 1.2, 1.02], abs=1e-3)


def test_in_flight_too():
    starts = [n2(q) for q in (0, 1, 2, -1, -2)]
    found = dict(relax_all(Charged(), starts, fmax=1e-4, steps=200, batch_size=2))
    assert [length(found[k].atoms) for k in range(5)] == pytest.approx([1.0, 1.1, 1.2, 0.9, 0.8], abs=1e-3)


def test_the_calculator_notices_another_charge():
    atoms = n2()
    atoms.calc = TorchCalculator(Charged())
    energies = []
    for atoms.info["charge"], atoms.info["spin"] in ((0, 1), (1, 1), (1, 2), (0, 1)):
        twin = atoms.copy()
        twin.calc = TorchCalculator(Charged())
        energies.append(atoms.get_potential_energy())
        assert energies[-1] == twin.get_potential_energy()
    assert len(set(energies)) == 3


def test_a_recorded_run_ends_where_the_charge_changes():
    atoms = n2()
    atoms.calc = TorchCalculator(Charged())
    run = BPTTOptimizer(atoms, logfile=None)
    run.run(fmax=1e-6, steps=2)
    atoms.info["charge"] = 1
    with pytest.raises(RuntimeError, match="changed after the last step"):
        _ = run.relaxation


def test_targets_keep_them():
    potential = Charged()
    targets = Targets.of(potential, [n2(), n2(2)])
    again = Targets.from_state(targets.state(), potential)
    assert again.structures.charges.tolist() == [0, 2]


def of_two_charges(folder):
    """A folder of three molecules, each relaxed with the charges 0 and 1."""
    folder.mkdir()
    for k, q in enumerate((0, 1, 0, 1, 0, 1)):
        start = molecule(("N2", "CO", "H2")[k // 2], info={"charge": q})
        end = start.copy()
        end.positions[1, 2] += 0.02 * (k + 1)
        write(folder / f"{k}.extxyz", [start, end])
    return folder


class TestPairs:
    def pair(self, charge=None, stretch=0.1):
        end = n2(charge)
        end.positions[1, 2] += stretch
        return RelaxationPair(n2(charge), end, f"{charge} {stretch} {id(end)}", "N2")

    def test_charges_are_in_hashes(self):
        assert self.pair().digest() == self.pair(0).digest()
        assert self.pair().digest() != self.pair(1).digest()

    @pytest.mark.parametrize("lazy", [False, True])
    def test_they_are_read(self, tmp_path, lazy):
        for q in (-1, 0, 1):
            write(tmp_path / f"q{q}.extxyz", [self.pair(q).initial, self.pair(q, 0.1 + q / 20).relaxed])
        pairs = read_pairs(tmp_path, lazy=lazy, index=tmp_path / "index" if lazy else None)
        assert sorted(p.charge for p in pairs) == [-1, 0, 1]
        assert [p.initial.info.get("charge") for p in pairs] == [p.charge for p in pairs]
        assert [p.id for p in of_charge(pairs, "neutral")] == ["q0.extxyz"]
        assert [p.id for p in of_charge(pairs, -1)] == ["q-1.extxyz"]
        assert of_charge(pairs, "all") == pairs
        with pytest.raises(InvalidPair, match=r"None of the 3 pairs has the charge 2; there are -1, 0, \+1\."):
            of_charge(pairs, 2.0)

    def test_one_end_says_it_for_both(self, tmp_path):
        write(tmp_path / "a.extxyz", [n2(), self.pair(1).relaxed])
        (pair,) = read_pairs(tmp_path / "a.extxyz")
        assert pair.charge == pair.initial.info["charge"] == 1

    def test_ends_that_differ_are_refused(self, tmp_path):
        write(tmp_path / "a.extxyz", [n2(2), self.pair(1).relaxed])
        with pytest.raises(InvalidPair, match=r"charge and spin change from 2 and 1 to 1 and 1; give both"):
            read_pairs(tmp_path / "a.extxyz")
        made = RelaxationPair(n2(2), self.pair(1).relaxed, "made", "N2")
        with pytest.raises(InvalidPair, match="made: its initial and its relaxed structure differ in charge or spin"):
            Trainer(Charged()).check([made])

    def test_what_cannot_fall(self, caplog):
        pairs = [self.pair(0, 0.0), self.pair(1, 0.1), self.pair(2, 0.2), self.pair(0, 0.0)]
        found, bound = contradictions(pairs, loss="delta_q")
        assert len(found) == 4
        q = LOSSES["delta_q"](pairs[0].relaxed, pairs[1].relaxed)
        assert bound == pytest.approx((q + 2 * q + q + 0 + q + 2 * q) / 3 / 4)
        assert contradictions(pairs, frozenset({"charge"}))[0] == []
        # Wherever the common end is, the loss is no smaller.
        for stretch in np.linspace(-0.1, 0.3, 9):
            end = self.pair(0, stretch).relaxed
            for name, loss in LOSSES.items():
                least = contradictions(pairs, loss=name)[1]
                assert least <= np.mean([loss(end, p.relaxed) for p in pairs]) + 1e-9
        with caplog.at_level(logging.WARNING):
            Trainer("morse", loss="delta_q").check(pairs)
        assert "4 of 4 pairs (charges 0, +1, +2) begin in one structure and end in several" in caplog.text
        assert f"(delta_q), {bound:.3f} cannot fall" in caplog.text

    def test_a_potential_that_takes_the_charge_is_not_warned_of(self, caplog):
        Trainer(Charged()).check([self.pair(0, 0.0), self.pair(1, 0.1)])
        assert "cannot fall" not in caplog.text

    def test_by_choice_in_the_shell(self, tmp_path, capsys):
        folder = of_two_charges(tmp_path / "runs")
        common = ["train", str(folder), "--potential", "morse", "--epochs", "1", "--steps", "2", "--dry-run", "--json"]
        seen = {}
        for choice in ("neutral", "all", "1", "each"):
            assert main([*common, "--charges", choice, "--out", str(tmp_path / choice)]) == 0
            seen[choice] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [len(found) for found in seen.values()] == [1, 1, 1, 2]

    @pytest.mark.parametrize("flags", [[], ["--charges", "each"]])
    def test_each_is_resumed_where_it_was_stopped(self, tmp_path, capsys, monkeypatch, flags):
        folder, out = of_two_charges(tmp_path / "runs"), tmp_path / "out"
        start = ["train", str(folder), "--potential", "morse", "--steps", "2", "--charges", "each", "--out", str(out)]
        seen, stop = [], True

        def launch(arguments, read, *, refit):
            if arguments.charges == 1 and stop:
                raise KeyboardInterrupt
            if arguments.resume:
                run_folder.take_over(arguments)
            else:
                run_folder.prepare(arguments)
                (arguments.out / "checkpoint.pt").touch()
            pairs = read(arguments, None)["train"]
            seen.append(
                (arguments.out.name, arguments.charges, arguments.steps, arguments.resume, {p.charge for p in pairs})
            )

        monkeypatch.setattr(train, "launch", launch)
        monkeypatch.setattr(train, "_splits", lambda arguments, _: {"train": read_grouped(arguments)})
        assert main(start) == 130
        said = capsys.readouterr().err
        assert f"in {out}/charge_*/checkpoint.pt" in said
        assert f"--out {out} --resume continues" in said
        stop = False
        assert main(["train", "--out", str(out), "--resume", *flags]) == 0
        assert seen == [
            ("charge_0", 0.0, 2, False, {0.0}),
            ("charge_0", 0.0, 2, True, {0.0}),
            ("charge_+1", 1.0, 2, False, {1.0}),
        ]
        assert main(["train", "--out", str(tmp_path / "none"), "--resume", *flags]) == 2
        assert "holds no run that can be resumed" in capsys.readouterr().err


@needs_mace
class TestMACE:
    def potential(self):
        made = tiny_mace(elements=(14,), max_ell=1, correlation=1, atomic_inter_scale=20.0, embedding_specs=SPECS)
        return load_potential(made)

    def test_is_told_as_by_its_own_calculator(self):
        from mace.calculators import MACECalculator

        potential = self.potential()
        own = MACECalculator(models=potential.model, device="cpu", default_dtype="float64")
        assert potential.inputs == {"charge", "spin"}
        energies = set()
        for q, m in ((0, 1), (1, 2), (-2, 3)):
            atoms = silicon()
            atoms.info |= {"charge": q, "spin": m}
            twin = atoms.copy()
            atoms.calc, twin.calc = own, TorchCalculator(potential)
            assert twin.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
            np.testing.assert_allclose(twin.get_forces(), atoms.get_forces(), atol=1e-10)
            energies.add(round(twin.get_potential_energy(), 8))
        assert len(energies) == 3

    @pytest.mark.parametrize(("info", "said"), [({"charge": 3}, "whole charges from -2 to 2"), ({"spin": 4}, "spins"),
                                                ({"charge": 0.5}, "is 0.5")])  # fmt: skip
    def test_what_its_table_lacks_is_refused(self, info, said):
        atoms = silicon()
        atoms.info |= info
        with pytest.raises(NotImplementedError, match=said):
            relax(self.potential(), atoms)

    def test_others_are_blind(self):
        assert load_potential("mace-si").inputs == frozenset()


def test_files_hold_them(tmp_path):
    write(tmp_path / "a.extxyz", n2(-1, 2))
    found = read(tmp_path / "a.extxyz")
    assert isinstance(found, Atoms)
    assert Structures.from_atoms(found).charges.tolist() == [-1]
