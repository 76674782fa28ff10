"""ase-bptt relax: many structures, written as they finish."""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read, write
from ase.io.formats import filetype, ioformats

from ..cells import CELLS, CellFreedom
from ..iterated_map import IteratedMap, Status
from ..pairs import InvalidPair
from ..pairs.formats import read_frames
from ..pairs.groups import check_structure
from ..potential import Potential
from ..relaxation import rows_of
from ..steppers import STEPPERS, make_stepper
from ..throughput import Relaxed
from ..throughput.journal import Journal, relax_kept, run_key
from ..utils import check_writable, replacing, without_nan
from . import messages
from .flags import add_cell, add_output, add_potential, add_room, command, count, flag, positive, potential_of

log = logging.getLogger(__name__)

DESCRIPTION = """\
Relax all structures of one or more files, many at once; --cell moves cells.
Structures are kept as they finish, and --resume continues a stopped run.
Constraints of the structures are obeyed.

examples:
  ase-bptt relax starts.extxyz --potential chgnet --out relaxed.extxyz
  ase-bptt relax */POSCAR --potential tuned --out relaxed.traj --fmax 0.01
  ase-bptt relax */CONTCAR --potential tuned --cell full --pressure 10
  ase-bptt relax starts.extxyz --potential tuned --resume
"""
NOT_DONE = 3
"""Exit code where structures did not converge or were left out."""


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "relax FILE [FILE ...] --potential NAME [options]",
        (run, stopped),
        "relax the structures of files",
        DESCRIPTION,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path,
                        help="structures in any format that ASE reads; every frame is relaxed")  # fmt: skip
    add_potential(parser)
    group = parser.add_argument_group("relaxation")
    flag(group, parser, "--stepper", "update rule", "fire", choices=sorted(STEPPERS))
    flag(group, parser, "--step-size", "step size of gd in Å^2/eV (default: 0.05)", type=positive, metavar="X")
    flag(group, parser, "--fmax", "converged when all forces are below this, in eV/Å", 0.05, type=positive, metavar="X")
    flag(group, parser, "--steps", "frames at most", 500, type=count, metavar="N")
    add_cell(group, parser, "what moves beside the atoms", "fixed")
    add_room(group, parser)
    flag(group, parser, "--skip-invalid", "leave out structures that cannot be relaxed, and list them", False,
         action="store_true")  # fmt: skip
    add_output(parser, "relaxed.extxyz", "file of the relaxed structures, in any format that ASE writes", resume=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    clock = time.monotonic()
    out = _checked_output(arguments)
    potential = potential_of(arguments)
    stepper = _stepper(arguments)
    of_cell = CellFreedom.of(arguments.cell, arguments.pressure)
    names, structures, left_out = read_structures(
        arguments.files, potential, skip_invalid=arguments.skip_invalid, cell=of_cell
    )
    if len(structures) > 1 and ioformats[_format(out)].single:
        raise ValueError(f"{out}: this format holds one structure, and there are {len(structures)}: take .extxyz.")
    warn_of_lost_constraints(out, _format(out), structures)
    settings = {"stepper": arguments.stepper, "step_size": arguments.step_size, "fmax": arguments.fmax,
                "steps": arguments.steps}  # fmt: skip
    settings |= {"cell": of_cell.todict()} if of_cell.moves else {}
    journal = Journal(_journal(out), run_key(potential, structures, settings))
    done = len(journal.read(structures)) if arguments.resume else 0
    if not arguments.dry_run:
        check_writable(out.parent)
    say = messages.quiet_if(arguments.json)
    again = f", {done} of them done before" if done else ""
    say(f"{len(structures)} structures{again}; {arguments.potential}, {arguments.stepper} to {arguments.fmax} eV/Å")
    if len(structures) + left_out > len(arguments.files):
        say("Every structure of a file is relaxed; ase convert -n -1 FILE last.extxyz writes the last alone.")
    if arguments.dry_run:
        return _planned(arguments, structures, left_out)
    if not arguments.resume:
        journal.remove()
    ends = relax_kept(
        potential, structures, journal=journal, progress=None, report=partial(_report, names), stepper=stepper,
        fmax=arguments.fmax, steps=arguments.steps, cells=[of_cell] * len(structures), batch_size=arguments.batch_size,
        memory=arguments.memory,
    )  # fmt: skip
    _write(out, ends)
    journal.remove()
    return _conclude(arguments, names, ends, left_out, time.monotonic() - clock)


def stopped(arguments: argparse.Namespace) -> str:
    """What is left after an interrupt."""
    journal = _journal(arguments.out)
    if not journal.exists():
        return "Nothing was relaxed yet, and nothing is lost."
    return (
        f"The structures that have finished are in {journal} (an ASE trajectory); the same command with --resume "
        "continues with the others."
    )


def _journal(out: Path) -> Path:
    return out.with_name(out.name + ".part.traj")


def _checked_output(arguments: argparse.Namespace) -> Path:
    out = arguments.out
    if out.is_dir() or not out.name:
        raise ValueError(f"{out} is a folder: give --out the name of a file, as {out / 'relaxed.extxyz'}.")
    kind = ioformats.get(_format(out))
    if kind is None or not kind.can_write:
        raise ValueError(f"{out}: ASE cannot write this format: take a name that ends with .extxyz, .traj or .db.")
    there = [path for path in (out, _journal(out)) if path.exists()]
    if arguments.resume:
        if out.exists() and not _journal(out).exists():
            raise FileExistsError(f"{out} is there already and complete: nothing is left to resume.")
    elif there and not arguments.overwrite:
        raise FileExistsError(f"{there[0]} is there already: --resume, --overwrite, or another --out.")
    return out


def _format(out: Path) -> str:
    try:
        return filetype(str(out), read=False)
    except Exception as error:  # ASE's UnknownFileTypeError and others
        raise ValueError(f"{out}: ASE knows no format for this name: take .extxyz, .traj or .db.") from error


def _stepper(arguments: argparse.Namespace) -> Any:
    if arguments.step_size is not None and arguments.stepper != "gd":
        raise ValueError("--step-size belongs to --stepper gd.")
    return make_stepper(arguments.stepper, **({"step_size": arguments.step_size} if arguments.step_size else {}))


def _report(names: list[str], k: int, end: Relaxed) -> None:
    if end.status is not Status.CONVERGED:
        log.warning("%s: %s after %d frames. %s", names[k], end.status.value, end.nsteps, end.status.sentence)


def _write(out: Path, ends: list[Relaxed]) -> None:
    frames = []
    for end in ends:
        end.atoms.info |= {"relaxation": end.status.value, "relaxation_frames": end.nsteps}
        frames.append(end.atoms)
    with replacing(out) as path:
        write(path, frames if len(frames) > 1 else frames[0], format=_format(out))


def warn_of_lost_constraints(out: Path, format: str, structures: Sequence[Atoms]) -> None:
    """Warn where a file of this format does not give back all constraints that are on these structures.

    Found by writing and reading one structure of each kind of constraints: what a format holds is the business of ASE.
    """
    kinds: dict[tuple[str, ...], list[Atoms]] = {}
    for atoms in structures:
        if atoms.constraints:
            kinds.setdefault(tuple(sorted(map(_kind, atoms.constraints))), []).append(atoms)
    lost = {names: _lost(some[0], out.name, format) for names, some in kinds.items()}
    names = sorted(set().union(*lost.values()))
    if names:
        n = sum(len(kinds[kind]) for kind in lost if lost[kind])
        log.warning(
            "%s: this format cannot hold the constraints %s, which %d of the structures %s; they are obeyed here, but "
            "they will be missing in the file: a name that ends with .traj or .db keeps all.",
            out, ", ".join(names), n, "has" if n == 1 else "have",
        )  # fmt: skip


def _kind(constraint: Any) -> str:
    """Of a constraint all that a format's room for it may depend on: atoms apart, its axes."""
    return f"{type(constraint).__name__} {getattr(constraint, 'mask', '')} {getattr(constraint, 'dir', '')}"


def _lost(atoms: Atoms, name: str, format: str) -> set[str]:
    """Class names of the constraints that are not the same after writing and reading."""
    every = atoms.constraints
    if _same_constraints(atoms, every, name, format):
        return set()
    alone = {type(c).__name__ for c in every if not _same_constraints(atoms, [c], name, format)}
    return alone or {type(c).__name__ for c in every}


def _same_constraints(atoms: Atoms, constraints: list[Any], name: str, format: str) -> bool:
    """Whether these constraints, written and read, change positions and forces as they did."""
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, constraint=constraints)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / name, bare, format=format)
            found = bare.copy()
            back: Any = read(Path(folder) / name, format=format)
            found.set_constraint(back.constraints)
        return bool(np.allclose(_effect(bare), _effect(found), atol=1e-4))
    # A format that cannot be read, or one that refuses the constraint.
    except Exception:
        return False


def _effect(atoms: Atoms) -> np.ndarray:
    """Where the constraints let the atoms move, and the forces that they leave, for fixed random ones."""
    steps, forces = np.random.default_rng(0).normal(0.0, 0.1, (2, len(atoms), 3))
    for constraint in atoms.constraints:
        constraint.adjust_forces(atoms, forces)
    atoms.set_positions(atoms.positions + steps)
    return np.stack([atoms.positions, forces])


def _planned(arguments: argparse.Namespace, structures: list[Atoms], left_out: int) -> int:
    if arguments.json:
        print(json.dumps({"dry_run": True, "n": len(structures), "left_out": left_out, "out": str(arguments.out)}))
    else:
        print(f"would be written: {arguments.out}\nA dry run: nothing was relaxed, nothing was written.")
    return 0


def _conclude(
    arguments: argparse.Namespace, names: list[str], ends: list[Relaxed], left_out: int, seconds: float
) -> int:
    rows = [
        {
            "name": name, "status": end.status.value, "nsteps": end.nsteps,
            "energy": float(end.atoms.calc.results["energy"]),
            "fmax": float(np.linalg.norm(end.atoms.get_forces(), axis=1).max(initial=0.0)),
        }
        for name, end in zip(names, ends, strict=True)
    ]  # fmt: skip
    converged = sum(row["status"] == Status.CONVERGED.value for row in rows)
    if arguments.json:
        found = {"n": len(rows), "converged": converged, "left_out": left_out, "out": str(arguments.out),
                 "seconds": round(seconds, 1), "structures": rows}  # fmt: skip
        print(json.dumps(without_nan(found)))
    else:
        print(f"{converged} of {len(rows)} converged, {left_out} left out; {seconds:.0f} s; {arguments.out}")
    return 0 if converged == len(rows) and not left_out else NOT_DONE


def _check_cell(potential: Potential, atoms: Atoms, cell: CellFreedom, name: str) -> None:
    """Raise InvalidPair where the cell of a structure cannot be relaxed."""
    try:
        if cell.moves:
            rows_of(potential.batch(atoms), [cell], IteratedMap(potential, make_stepper(None)))
    except (ValueError, NotImplementedError) as error:
        raise InvalidPair(f"{name}: {error}") from error


def read_structures(
    files: Sequence[Path], potential: Potential, *, skip_invalid: bool, cell: CellFreedom = CELLS["fixed"]
) -> tuple[list[str], list[Atoms], int]:
    """Names and structures of every frame of all files, and how many were left out."""
    names, structures, problems = [], [], []
    for path in files:
        if path.is_dir():
            raise InvalidPair(f"{path} is a folder: name the files in it, as {path}/*.extxyz or {path}/*/POSCAR.")
        try:
            frames = read_frames(path, limit=math.inf)
        except InvalidPair as problem:
            if not skip_invalid:
                raise
            problems.append(str(problem))
            continue
        for k, atoms in enumerate(frames):
            name = str(path) if len(frames) == 1 else f"structure {k} of {path}"
            try:
                check_structure(potential, atoms, name)
                _check_cell(potential, atoms, cell, name)
            except (InvalidPair, NotImplementedError) as problem:
                if not skip_invalid:
                    raise
                problems.append(str(problem))
                continue
            names.append(name)
            structures.append(atoms)
    for left_out in problems:
        log.warning("Left out: %s", left_out)
    if not structures:
        raise InvalidPair(f"None of the structures can be relaxed; the last: {problems[-1]}")
    return names, structures, len(problems)
