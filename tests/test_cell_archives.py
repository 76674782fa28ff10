"""Archives of runs whose cells moved: they train with the command that others do, and bad ones are named."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixCartesian, FixScaled
from ase.io import write
from helpers.dft_files import write_vasprun
from helpers.shell import run
from helpers.training import Killed, killed_in

from ase_bptt import RelaxationPair, TorchCalculator, Trainer, evaluate, read_pairs
from ase_bptt.cells import CellFreedom
from ase_bptt.pairs import InvalidPair, Loaded
from ase_bptt.pairs.chains import joined_legs
from ase_bptt.potentials import save_potential
from ase_bptt.potentials.analytic import Morse
from ase_bptt.potentials.direct import Direct

QUICK = ("--epochs", "1", "--steps", "4", "--batch-size", "2", "--group", "folder")


def frames(seed: int, moves: bool = True) -> list[Atoms]:
    """A relaxation of copper: strained and rattled, halfway, and at rest; with the forces and stress of EMT."""
    rng, last = np.random.default_rng(seed), bulk("Cu", a=3.5).repeat((2, 1, 1))
    strain, shift = rng.uniform(-0.02, 0.02, (3, 3)), rng.normal(0, 0.03, (2, 3))
    found, teacher = [], TorchCalculator("emt")
    for share in (1.0, 0.5, 0.0):
        atoms = last.copy()
        if moves:
            atoms.set_cell(atoms.cell @ (np.eye(3) + share * (strain + strain.T) / 2), scale_atoms=True)
        atoms.positions += share * shift
        results = {name: teacher.get_property(name, atoms) for name in ("energy", "forces", "stress")}
        if share == 0:
            results |= {"forces": np.zeros((2, 3)), "stress": np.zeros(6)}
        atoms.calc = SinglePointCalculator(atoms, **results)
        found.append(atoms)
    return found


def archive(folder: Path, mixed: bool = False) -> Path:
    """A folder of six runs with ISIF 3; mixed: two of them with ISIF 2, and one under pressure."""
    for k in range(6):
        moves = not (mixed and k < 2)
        pressure = {"PSTRESS": 20} if mixed and k == 2 else {}
        (folder / f"run_{k}").mkdir(parents=True)
        write_vasprun(folder / f"run_{k}" / "vasprun.xml", frames(k, moves), ISIF=3 if moves else 2, NSW=50,
                      IBRION=2, **pressure)  # fmt: skip
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    save_potential(Morse(r0=2.6, rho0=4.0), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("mixed", [False, True], ids=["ISIF 3", "mixed"])
def test_an_archive_trains_with_the_command_that_others_do(tmp_path, model, mixed):
    pairs = archive(tmp_path / "runs", mixed)
    out = tmp_path / "out"
    code, said, err = run("train", str(pairs), "--potential", str(model), *QUICK, "--out", str(out))
    assert code == 0, err
    moved = 4 if mixed else 6
    found = [p.freedom for p in read_pairs(pairs)]
    assert sum(f.moves for f in found) == moved
    assert sum(f.pressure > 0 for f in found) == mixed
    assert re.search(r"cells that moved \(\d\): mean absolute volume error \d", said)
    test = json.loads((out / "results.json").read_text())["test"]
    assert test["volume_error_after"] is not None
    card = (out / "potential" / "model_card.md").read_text()
    assert re.search(r"volume error [\d.]+ % before, [\d.]+ % after; median strain [\d.]+ before", card)
    assert re.search(r"error of a, b, c [\d.]+ Å before, .* of the angles [\d.]+° before", card)


def test_selective_dynamics_train_where_the_cell_moved(tmp_path, model):
    for k in range(4):
        first, *_, last = frames(k)
        (tmp_path / "runs" / f"run_{k}").mkdir(parents=True)
        for name, atoms in (("POSCAR", first), ("CONTCAR", last)):
            atoms.set_constraint(FixScaled([1], [False, False, True]))
            write(tmp_path / "runs" / f"run_{k}" / name, atoms, format="vasp", direct=True)
    out = tmp_path / "out"
    code, _, err = run("train", str(tmp_path / "runs"), "--potential", str(model), *QUICK, "--out", str(out))
    assert code == 0, err
    assert all(p.freedom.moves and p.initial.constraints for p in read_pairs(tmp_path / "runs"))


def test_lazy_pairs_whose_cells_move_are_those_in_memory(tmp_path):
    pairs = read_pairs(archive(tmp_path / "runs", mixed=True))
    lazy = pickle.loads(pickle.dumps(read_pairs(tmp_path / "runs", lazy=True)))
    assert [p.freedom for p in lazy] == [p.freedom for p in pairs]
    potential = Morse(r0=2.6, rho0=4.0)
    assert evaluate(potential, lazy, steps=3) == evaluate(potential, pairs, steps=3)


def test_training_on_cells_resumes_as_if_it_had_not_stopped(tmp_path):
    pairs = read_pairs(archive(tmp_path / "runs", mixed=True))

    def trainer(name: str) -> Trainer:
        return Trainer(Morse(r0=2.6, rho0=4.0), batch_size=2, steps=4, lr=0.01, out=tmp_path / name, progress=False)

    whole = trainer("whole")
    whole.fit(pairs, epochs=2)
    with pytest.raises(Killed):
        killed_in(trainer("halves"), 4).fit(pairs, epochs=2)
    resumed = Trainer.resume(tmp_path / "halves")
    assert resumed.epoch == 1
    resumed.fit(pairs, epochs=2)
    for a, b in zip(whole.potential.parameters(), resumed.potential.parameters(), strict=True):
        assert a.item() == b.item()


# Bad inputs -----------------------------------------------------------------------------------


def crystal(**changes) -> Atoms:
    atoms = bulk("Cu").repeat((2, 1, 1))
    for name, value in changes.items():
        setattr(atoms, name, value)
    return atoms


def squeezed(share: float) -> Atoms:
    atoms = crystal()
    atoms.set_cell(atoms.cell * share, scale_atoms=True)
    return atoms


def nan_stress() -> list[Atoms]:
    found = frames(0)
    found[-1].calc.results["stress"] = np.full(6, np.nan)
    return found


BAD = {
    "singular cell": ([Atoms("Cu", cell=[[3, 0, 0], [6, 0, 0], [0, 0, 3]], pbc=True)], ("--cell", "full"), "emt",
                      r"linearly dependent"),
    "zero volume": ([Atoms("Cu", pbc=True)], ("--cell", "full"), "emt", "length zero|no cell|no volume"),
    "molecule": ([molecule("N2")], ("--cell", "full"), "emt", "N2 is periodic along no direction"),
    "pressure at a fixed cell": ([crystal()], ("--pressure", "1"), "emt", "does nothing to a cell that is fixed"),
    "direct forces": ([crystal()], ("--cell", "full"), "direct", "predicted directly, and it has no stress"),
    "collapsed cell": ([squeezed(0.02)], ("--cell", "full"), "emt", r"less than 0.01 Å\^3"),
    "mask of another shape": ([crystal()], ("--cell", "1,1,1,0"), "emt", "six ones and zeros"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_cell_is_named_in_one_sentence(tmp_path, name):
    structures, flags, potential, sentence = BAD[name]
    write(tmp_path / "bad.extxyz", structures)
    code, _, err = run("relax", str(tmp_path / "bad.extxyz"), "--potential", potential, *flags)
    assert code != 0
    assert "Traceback" not in err
    assert re.search(sentence, err)


BAD_PAIRS = {
    "two lattices": (lambda: [crystal(), crystal(cell=crystal().cell.array * [1, 1, 3])], "write both structures with"),
    "other vectors": (
        lambda: [crystal(), crystal(cell=[[1, 1, 0], [0, 1, 0], [0, 0, 1]] @ crystal().cell.array)],
        "with other vectors of the same lattice",
    ),
    "collapsed": (
        lambda: [crystal(), crystal(cell=crystal().cell.array * 0.4)],
        "its volume changes from .* to .* Å.3",
    ),
    "handedness": (lambda: [crystal(), crystal(cell=crystal().cell.array[[1, 0, 2]])], "changes handedness"),
    "NaN stress": (nan_stress, "a stress is not a finite number"),
    "zero volume": (lambda: [crystal(), crystal(cell=np.diag([3.0, 3.0, 0.0]))], "no volume"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_of_cells_is_named_in_one_sentence(tmp_path, name):
    make, sentence = BAD_PAIRS[name]
    write(tmp_path / "bad.extxyz", make())
    with pytest.raises(InvalidPair, match=sentence) as found:
        read_pairs(tmp_path / "bad.extxyz")
    assert "\n" not in str(found.value)
    code, _, err = run("evaluate", str(tmp_path / "bad.extxyz"), "--potential", "emt")
    assert code != 0
    assert "Traceback" not in err
    assert re.search(sentence, err)


def constrained() -> Atoms:
    atoms = crystal()
    atoms.set_constraint(FixCartesian([0], [True, False, False]))
    return atoms


def partly_known(known: str) -> Atoms:
    return crystal(info={"known": known})


MADE = {
    "molecule": (lambda: molecule("N2"), {"cell": "full"}, "has no cell to relax"),
    "slab": (lambda: fcc111("Cu", (1, 1, 2), vacuum=5.0), {"cell": "hydrostatic"}, "so it has no volume"),
    "singular cell": (lambda: Atoms("Cu", cell=[[3, 0, 0], [6, 0, 0], [0, 0, 3]], pbc=True), {}, "linearly dependent"),
    "constraint": (constrained, {"cell": "full"}, "FixCartesian, whose directions this cell would turn"),
    "mask of another shape": (crystal, {"cell": [1, 1, 0]}, "six numbers"),
    "pressure at a fixed cell": (crystal, {"pressure": 0.1}, "does nothing to a cell that is fixed"),
    "pressure that is no number": (crystal, {"cell": "full", "pressure": np.nan}, "finite number of eV"),
    "known typo": (lambda: partly_known("volum"), {"cell": "full"}, "did you mean 'volume'"),
    "known volume of a fixed cell": (lambda: partly_known("volume"), {}, "only its volume is said to be known"),
}


@pytest.mark.parametrize("name", MADE)
def test_pairs_made_in_python_are_refused_by_their_id_before_any_work(name):
    make, given, sentence = MADE[name]
    pairs = [RelaxationPair(crystal(), crystal(), "good"), RelaxationPair(make(), make(), "the odd one", **given)]
    for work in (
        lambda: evaluate(Morse(), pairs),
        lambda: Trainer(Morse(), terms=(), progress=False).fit(pairs, epochs=1),
    ):
        with pytest.raises(InvalidPair, match=f"^the odd one: .*{sentence}"):
            work()


@pytest.mark.parametrize("lazy", [False, True])
def test_a_potential_without_stress_leaves_out_the_cells_that_moved(tmp_path, lazy):
    save_potential(Direct(cutoff=3.0), tmp_path / "direct")
    folder, flags = archive(tmp_path / "runs", mixed=True), ("--lazy",) if lazy else ()
    shared = "evaluate", folder, "--potential", tmp_path / "direct", "--steps", "2", *flags
    code, _, err = run(*shared)
    assert code == 2
    assert re.search(r"run_2.*: The forces of this direct potential are predicted directly", err)
    code, out, err = run(*shared, "--skip-invalid", "--dry-run")
    assert code == 0, err
    assert "2 relaxations of" in out


@pytest.mark.parametrize(
    ("isif", "cell", "warned"), [(3, None, False), (4, None, True), (7, None, True), (3, "hydrostatic", True)]
)
def test_a_cell_that_moved_otherwise_than_is_said_is_warned_of(tmp_path, caplog, isif, cell, warned):
    write_vasprun(tmp_path / "vasprun.xml", frames(0), ISIF=isif, NSW=50, IBRION=2)
    read_pairs(tmp_path / "vasprun.xml", cell=cell)
    assert ("so that no relaxation reaches its end" in caplog.text) == warned


def test_what_moved_by_turns_has_moved_in_full():
    (a, b, c), free = frames(0), [CellFreedom.of("hydrostatic"), CellFreedom.of("constant-volume", 0.01)]
    joined = joined_legs([Loaded(a, b, (a, b), cell=free[0]), Loaded(b, c, (b, c), cell=free[1])])
    assert joined.cell == CellFreedom.of("full", 0.01)


def test_a_pressure_without_a_cell_is_refused(tmp_path):
    write(tmp_path / "run.extxyz", frames(0))
    with pytest.raises(ValueError, match="not what moves of the cells"):
        read_pairs(tmp_path / "run.extxyz", pressure=0.01)
    code, _, err = run("evaluate", tmp_path / "run.extxyz", "--potential", "emt", "--pressure", "1")
    assert code == 2
    assert "not what moves of the cells" in err
