"""Targets: relaxed structures alone, how they are read and checked, started, and counted as far as known."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import write
from ase.spacegroup.symmetrize import check_symmetry
from helpers.shell import run

from ase_bptt import Trainer, evaluate, load_potential, read_targets, relax
from ase_bptt.displacements import as_far_as_known
from ase_bptt.losses import delta_q, named_loss
from ase_bptt.pairs import InvalidPair
from ase_bptt.pairs.targets import Target
from ase_bptt.terms.zero_force import zero_force
from ase_bptt.training.settings import SamplingSettings
from ase_bptt.training.training_data import Order

ELEMENTS = {"Al": 4.05, "Cu": 3.60, "Ag": 4.08, "Au": 4.07, "Ni": 3.52, "Pd": 3.88}
CIF = """data_{name}
_chemical_formula_sum '{formula}'
_cell_length_a 4.0
_cell_length_b 4.0
_cell_length_c 4.0
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
"""


def crystal(element="Cu", known=None) -> Atoms:
    atoms = bulk(element, a=ELEMENTS[element], cubic=True)
    if known:
        atoms.info["known"] = known
    return atoms


def write_cif(path, formula, *sites):
    lines = [f"{symbol}{k} {symbol} {x} {x} {x} {share}" for k, (symbol, x, share) in enumerate(sites)]
    path.write_text(CIF.format(name=path.stem, formula=formula) + "\n".join(lines) + "\n")
    return path


class TestReading:
    @pytest.mark.parametrize("name", ["Cu.cif", "POSCAR", "Cu.extxyz", "Cu.db"])
    def test_formats(self, tmp_path, name):
        write(tmp_path / name, crystal(), format="vasp" if name == "POSCAR" else None)
        (target,) = read_targets(tmp_path / name)
        assert isinstance(target, Target)
        assert target.freedom.name == "full"
        assert np.allclose(target.relaxed.cell, crystal().cell, atol=1e-4)
        assert not np.allclose(target.initial.cell, target.relaxed.cell, atol=1e-3)

    def test_a_folder_and_what_is_known(self, tmp_path):
        write(tmp_path / "some.extxyz", [crystal("Al", "volume"), crystal("Cu", "cell")])
        with connect(tmp_path / "more.db", append=False) as database:
            database.write(crystal("Ag"), known="volume", name="silver")
        (tmp_path / "notes.txt").write_text("not a structure")
        found = {target.id: target.relaxed.info["known"] for target in read_targets(tmp_path)}
        assert found == {"silver": "volume", "some:0": "volume", "some:1": "cell"}

    @pytest.mark.parametrize("name", ["Cu.CIF", "Cu.cif.gz", "Cu.extxyz.gz"])
    def test_endings_in_capitals_and_compressed(self, tmp_path, name):
        write(tmp_path / name.replace("CIF", "cif"), crystal())
        (tmp_path / name.replace("CIF", "cif")).rename(tmp_path / name)
        (target,) = read_targets(tmp_path)
        assert target.id == "Cu"
        assert np.allclose(target.relaxed.cell, crystal().cell, atol=1e-4)

    def test_an_occupancy_that_is_not_said_is_full(self, tmp_path):
        file = write_cif(tmp_path / "said.cif", "Cu", ("Cu", 0.0, "?"))
        assert len(read_targets(file)) == 1

    def test_a_force_that_is_allowed(self, tmp_path):
        atoms = crystal()
        atoms.calc = SinglePointCalculator(atoms, forces=np.full((len(atoms), 3), 1.0))
        write(tmp_path / "some.extxyz", atoms)
        with pytest.raises(InvalidPair, match=r"allow more than 0.5 eV/Å \(--max-reference-force\)"):
            read_targets(tmp_path)
        assert len(read_targets(tmp_path, max_reference_force=5.0)) == 1

    def test_starts_keep_the_space_group_where_asked(self, tmp_path):
        write(tmp_path / "Cu.cif", crystal())
        (target,) = read_targets(tmp_path, symmetry="keep")
        start = target.start(np.random.default_rng(1))
        assert check_symmetry(start).number == 225
        assert not np.allclose(start.cell, crystal().cell, atol=1e-3)

    @pytest.mark.parametrize("given", [{"strain": -1}, {"strain": np.nan}, {"strain": 2}, {"rattle": np.nan}])
    def test_starts_that_cannot_be_drawn(self, tmp_path, given):
        write(tmp_path / "Cu.cif", crystal())
        with pytest.raises(ValueError, match=r"Starts are strained by 0 to 0.5 and rattled by 0 Å or more"):
            read_targets(tmp_path, **given)

    def test_molecules_keep_their_cell(self, tmp_path):
        write(tmp_path / "water.xyz", molecule("H2O"))
        (target,) = read_targets([tmp_path / "water.xyz"])
        assert not target.freedom.moves

    @pytest.mark.parametrize("broken", ["occupancy", "mixed", "hydrogen", "flat", "clash", "known", "unreadable"])
    def test_one_sentence_each(self, tmp_path, broken):
        atoms, file = crystal(), tmp_path / "bad.extxyz"
        sentence = {
            "occupancy": "bad.cif: a site is occupied in part (Cu 0.5)", "mixed": "bad.cif: a site is occupied in part",
            "hydrogen": "hydrogen is missing", "flat": "linearly dependent", "clash": "nearer than",
            "known": "structure 1 of", "unreadable": "cannot be read as a structure",
        }[broken]  # fmt: skip
        if broken in ("occupancy", "mixed", "hydrogen"):
            sites = {
                "occupancy": [("Cu", 0.0, 0.5)], "mixed": [("Cu", 0.0, 0.5), ("Au", 0.0, 0.5)],
                "hydrogen": [("O", 0.0, 1.0)],
            }[broken]  # fmt: skip
            file = write_cif(tmp_path / "bad.cif", "H2 O" if broken == "hydrogen" else "Cu", *sites)
        elif broken == "unreadable":
            file.write_text("3\nnothing\n")
        else:
            if broken == "flat":
                atoms.cell[2] = atoms.cell[1]
            elif broken == "clash":
                atoms.positions[1] = atoms.positions[0] + 0.1
            else:
                atoms.info["known"] = "colour"
            write(file, [crystal(), atoms] if broken == "known" else atoms)
        with pytest.raises(InvalidPair, match=file.name) as error:
            read_targets(file)
        assert sentence in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("atoms", "given", "sentence"),
        [
            (molecule("H2O"), {"cell": "full"}, "no cell to relax"),
            (crystal("Cu", "volume"), {"cell": "fixed"}, "only its volume is said to be known"),
            (crystal(), {"cell": "fixed", "pressure": 0.1}, "does nothing to a cell that is fixed"),
            (crystal(), {"cell": [1, 1]}, "mask"),
            (Atoms("Cu", cell=[2.5, 2.5, 9], pbc=[1, 1, 0]), {"cell": "hydrostatic"}, "so it has no volume"),
        ],
    )
    def test_choices_that_do_not_go_together(self, tmp_path, atoms, given, sentence):
        write(tmp_path / "bad.extxyz", atoms)
        with pytest.raises(InvalidPair, match=sentence):
            read_targets(tmp_path / "bad.extxyz", **given)

    def test_skip_invalid(self, tmp_path, caplog):
        write_cif(tmp_path / "bad.cif", "Cu", ("Cu", 0.0, 0.5))
        write(tmp_path / "good.cif", crystal())
        assert [target.id for target in read_targets(tmp_path, skip_invalid=True)] == ["good"]
        assert f"Left out: {tmp_path / 'bad.cif'}: a site is occupied in part" in caplog.text


class TestStarts:
    def test_each_epoch_draws_new_ones(self):
        target, order = Target(crystal(), crystal(), "Cu", cell="full"), Order(SamplingSettings(1, 0.5, 0.03, 0))
        cells = [next(order.batches([target], epoch))[0].initial.cell.array for epoch in (0, 0, 1)]
        assert np.array_equal(cells[0], cells[1])
        assert not np.allclose(cells[0], cells[2], atol=1e-3)

    @pytest.mark.parametrize("cell", ["hydrostatic", "constant-volume", "fixed"])
    def test_they_keep_what_is_fixed_of_the_cell(self, cell):
        start = Target(crystal(), crystal(), "Cu", cell=cell, strain=0.02).start(np.random.default_rng(0))
        strain = np.linalg.inv(crystal().cell) @ start.cell - np.eye(3)
        assert abs(strain).max() < 0.02 * 4 / 3
        if cell == "hydrostatic":
            assert np.allclose(strain, strain[0, 0] * np.eye(3))
        else:
            assert np.trace(strain) == pytest.approx(0, abs=1e-12)
        assert not np.allclose(start.positions, crystal().positions, atol=1e-3)


class TestKnown:
    @pytest.mark.parametrize("loss", ["delta_q", "root_delta_q", "squared_delta_q"])
    @pytest.mark.parametrize("known", ["volume", "cell"])
    def test_what_is_not_known_counts_nothing(self, known, loss):
        measure, reference = named_loss(loss), crystal()
        end = reference.copy()
        end.rattle(0.05, seed=1)
        if known == "volume":
            shear = np.array([[1.02, 0.01, 0], [0, 1 / 1.02, 0], [0, 0, 1]])
            end.set_cell(end.cell.array @ shear, scale_atoms=True)
        assert measure(end, as_far_as_known(end, reference, [known])).item() == pytest.approx(0, abs=1e-5)
        assert measure(end, reference) > 0.01

    def test_the_gradient_is_that_of_the_volume(self):
        potential, reference = load_potential("emt"), crystal()
        reference.set_cell(reference.cell * 1.02, scale_atoms=True)
        with torch.enable_grad():
            relaxation = relax(potential, crystal(), cell="full", steps=3)
            cells = relaxation.cells
            loss = delta_q(relaxation, as_far_as_known(relaxation, reference, ["volume"]), cell_weight=1.0)
            (gradient,) = torch.autograd.grad(loss.sum(), cells, retain_graph=True)
        # dV/dC is V times the inverse transposed: nothing but the volume is asked for.
        direction = torch.linalg.inv(cells[0].detach()).mT
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), direction.flatten(), dim=0) < -1 + 1e-9

    def test_zero_force_counts_the_known_part(self):
        potential, atoms = load_potential("emt"), crystal()
        atoms.positions[0] += 0.1
        losses = []
        for known in ("all", "cell", "volume"):
            atoms.info["known"] = known
            losses.append(zero_force(potential, [Target(atoms.copy(), atoms.copy(), "Cu", cell="full")]).item())
        assert losses[0] > losses[1] > losses[2] > 0

    def test_evaluation_counts_the_known_part(self):
        target = Target(crystal("Cu", "cell"), crystal("Cu", "cell"), "Cu", cell="full")
        target.relaxed.positions[0] += 0.3
        row = evaluate(load_potential("emt"), [target]).rows[0]
        assert row.max_displacement < 1e-3 < row.delta_q


class TestTraining:
    def test_lattice_constants_are_data(self, tmp_path):
        write(tmp_path / "table.extxyz", [crystal(element, "volume") for element in ELEMENTS])
        targets = read_targets(tmp_path / "table.extxyz")
        trainer = Trainer("emt", adjoint="implicit", first="zero-force:2", lr=0.002, batch_size=6, progress=False)
        before = evaluate(trainer.potential, targets).volume_error
        trainer.fit(targets, epochs=3)
        assert evaluate(trainer.potential, targets).volume_error < before / 2

    def test_in_the_shell(self, tmp_path):
        write(tmp_path / "table.extxyz", [crystal(element) for element in ELEMENTS])
        code, out, _ = run(
            "train", tmp_path / "table.extxyz", "--targets", "--potential", "emt", "--first", "zero-force:1",
            "--epochs", 2, "--steps", 2, "--out", tmp_path / "tuned",
        )  # fmt: skip
        assert code == 0
        assert "volume" in out

    @pytest.mark.parametrize(
        ("given", "stages"),
        [
            (
                (),
                "by zero force at the references, 8 epochs, then through 10 frames of gd, gradient by replay, 6 epochs",
            ),
            (("--epochs", 1), "by zero force at the references, 1 epoch"),
        ],
    )
    def test_a_dry_run_under_pressure_names_the_stages(self, tmp_path, given, stages):
        write(tmp_path / "table.extxyz", [crystal(element) for element in ELEMENTS])
        code, out, _ = run(
            "train", tmp_path / "table.extxyz", "--targets", "--potential", "emt", "--first", "zero-force",
            "--pressure", 10, "--dry-run", "--out", tmp_path / "tuned", *given,
        )  # fmt: skip
        assert code == 0
        assert out.startswith(f"emt, fine-tuned {stages}\n")
        assert "estimated time and memory" in out

    def test_lazy_is_refused(self, tmp_path):
        code, _, said = run("train", tmp_path, "--targets", "--lazy", "--potential", "emt")
        assert code != 0
        assert "without --lazy" in said
