"""Where relaxations are read from: files of one, legs of one, files of many, two files in the same order, databases."""

from __future__ import annotations

import logging
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ase import Atoms, units

from . import InvalidPair, Loaded, NotARelaxation, RelaxationPair
from .calculations import CUT, Run, check_kind, check_length, check_steps
from .cells_of_runs import freedom_of
from .charges import same_specified
from .cp2k import CP2K, refuse_trajectory
from .databases import members_of, relaxations_in
from .formats import VaspFile, examined, format_of, read_frames
from .methods import describe, settings_of, symmetry_of
from .scans import run_of_incar
from .structure_matching import Equals
from .survey import other_code

log = logging.getLogger(__name__)
VASP_NAME = re.compile(rf"{re.escape(os.sep)}(vasprun\.xml|OUTCAR|CONTCAR)(\.relax\d+)?(\.gz|\.bz2|\.xz)?$")
"""What a folder's name says as well."""
OUTSIDE = 1e3
"""Cells away from which an atom is by mistake."""
STOPPED = re.compile(r"error\.\d+")
"""A folder in which custodian keeps a run that it stopped."""


class Source(Protocol):
    """One relaxation."""

    @property
    def name(self) -> str:
        """For messages."""

    def load(self) -> Loaded:
        """Its structures, and what is known of it; InvalidPair where the relaxation cannot be used."""


class Frames(Sequence[Atoms]):
    """The frames of a file, read on each access: those of many relaxations would fill the memory."""

    def __init__(self, path: Path, n: int):
        self.path, self._n = path, n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, k: Any) -> Any:
        return read_frames(self.path)[k]

    def __iter__(self) -> Iterator[Atoms]:
        return iter(read_frames(self.path))

    def __repr__(self) -> str:
        return f"Frames({str(self.path)!r}, {self._n})"


@dataclass(frozen=True, slots=True)
class File:
    """A file of the frames of one relaxation, or a CONTCAR with its POSCAR."""

    name: str

    def load(self) -> Loaded:
        path = Path(self.name)
        vasp = VaspFile.named(path)
        if vasp is None or vasp.kind != "CONTCAR":
            found = _ends(path)
            return found if vasp is None else found._replace(initial=_first_start(path.parent, found.initial))
        begin = read_frames(vasp.other("POSCAR") or path.with_name("POSCAR"))[0]
        if (settings := vasp.other("INCAR")) is None:
            return Loaded(begin, read_frames(path)[0])
        run = run_of_incar(settings)
        check_kind(path, [run])
        end = read_frames(path)[0]
        describe([begin, end], run)
        found = Loaded(begin, end, settings=settings_of(run, begin), symmetry=symmetry_of(run))
        return found._replace(cell=freedom_of([begin, end], path, run))


@dataclass(frozen=True)
class InMemory:
    """A relaxation whose structures are in memory."""

    name: str
    initial: Atoms
    relaxed: Atoms

    def load(self) -> Loaded:
        return Loaded(self.initial, self.relaxed)


@dataclass(frozen=True)
class Unusable:
    """A relaxation that cannot be used; loading it raises its problem."""

    name: str
    problem: InvalidPair

    def load(self) -> Loaded:
        raise self.problem


def sources_in(files: Sequence[Path]) -> Iterator[Source]:
    """Each relaxation in these files."""
    for path in files:
        vasp = VaspFile.named(path)
        if STOPPED.fullmatch(path.parent.name):
            sentence = f"{path}: custodian stopped this run and started it again; leave it out."
            yield Unusable(str(path), NotARelaxation(sentence, "run that custodian stopped"))
        elif path.suffix in (".db", ".json"):
            yield from _of_database(path)
        elif members := members_of(path):
            yield from members
        elif vasp is not None and vasp.kind == "POSCAR":
            yield File(str(vasp.other("CONTCAR") or path.with_name("CONTCAR")))
        elif len(files) > 1 and format_of(path) is None and (code := other_code(path)):
            kind = f"output of {code}"
            yield Unusable(
                str(path), NotARelaxation(f"{path}: it is an {kind}, which is not read; leave it out.", kind)
            )
        else:
            yield File(str(path))


def two_files(initial: Path, relaxed: Path) -> list[InMemory]:
    """The relaxations between the structures of two files, in order."""
    folder = next((path for path in (initial, relaxed) if path.is_dir()), None)
    if folder is not None:
        raise InvalidPair(f"{folder} is a folder; give one folder of relaxations, or two files in the same order.")
    first, last = read_frames(initial), read_frames(relaxed)
    if len(first) != len(last):
        raise InvalidPair(
            f"{initial} holds {len(first)} structures and {relaxed} {len(last)}; both need the same, in the same order."
        )
    return [InMemory(f"structure {k} of {relaxed}", a, b) for k, (a, b) in enumerate(zip(first, last, strict=True))]


def loaded(source: Source, root: Path) -> RelaxationPair:
    """What a source holds, as `pair_of` makes it."""
    return pair_of(source.load(), source.name, root)


def pair_of(found: Loaded, name: str, root: Path) -> RelaxationPair:
    """The pair with its id, before atoms are unwrapped, ends are checked and a group is assigned."""
    known = found.relaxed.info.get("id")
    id = short(name if known is None else str(known), root)
    same_specified(found.initial, found.relaxed, name)
    return RelaxationPair(
        found.initial, found.relaxed, id, frames=found.frames, cell=found.cell, symmetry=found.symmetry
    )


def short(name: str, root: Path) -> str:
    """A name that does not depend on how the path to the data was written, nor on what VASP calls its files."""
    short = name.replace(f"{root if root.is_dir() else root.parent}{os.sep}", "", 1)
    return VASP_NAME.sub("", short)


def _of_database(path: Path) -> Iterator[Source]:
    try:
        for found in relaxations_in(path):
            yield found if not isinstance(found, InvalidPair) else Unusable(str(path), found)
    except InvalidPair as problem:
        yield Unusable(str(path), problem)


def _ends(path: Path) -> Loaded:
    runs = examined(path)
    check_kind(path, runs)
    format = format_of(path)
    if format == "extxyz":
        refuse_trajectory(path)
    frames = read_frames(path, runs, ends_only=True)
    if format is None:
        log.warning("%s: it is read as ASE reads it; whether it is a relaxation, and complete, is not checked.", path)
    if "relaxation_frames" in frames[-1].info:
        raise InvalidPair(
            f"{path}: ase-bptt relax wrote it, a structure after the other; a reference is the file of one relaxation."
        )
    check_length(path, runs, len(frames))
    check_steps(path, runs, len(frames))
    if any(run.selective for run in runs):
        _hold(frames, path)
    # pw.x says JOB DONE even where its last electronic steps did not converge.
    failed = bool(runs) and "scf failed" in runs[-1].signs
    forced = "forces" in getattr(frames[-1].calc, "results", {})
    if (format == "espresso-out" and not forced) or (failed and format == CP2K):
        why = "the electronic steps did not converge" if failed else CUT
        raise InvalidPair(f"{path}: its last step has no forces, so {why}.")
    if len(frames) < 2:
        raise InvalidPair(
            f"{path}: it holds {len(frames)} structure; a relaxation needs its first and its last frame, "
            "or give initial and relaxed structures as two files."
        )
    found = Loaded(frames[0], frames[-1], Frames(path, len(frames)))
    if not runs:
        return found
    describe([frames[0], frames[-1]], runs[-1])
    begin, first = frames[0], None
    if runs[0].first is not None and not _is_at(begin, runs[0].first, path):
        begin, first = begin.copy(), begin
        begin.set_scaled_positions(runs[0].first)
    others = first, _onward(frames[-1], path, runs[-1])
    cell = freedom_of([begin, frames[-1]], path, runs[-1])
    found = found._replace(initial=begin, settings=settings_of(runs[-1], begin), others=others, cell=cell)
    # CP2K says this even where the forces themselves are not written.
    left = runs[-1].number("gradient")
    return found._replace(symmetry=symmetry_of(*runs), left=None if left is None else left * units.Ha / units.Bohr)


def _is_at(atoms: Atoms, fractions: np.ndarray, path: Path) -> bool:
    """Whether atoms are at these places, of which a step that is lost was the first."""
    here = atoms.get_scaled_positions(wrap=False)
    # A huge one, or one that is no number, is not below either.
    if fractions.shape != here.shape or not (np.abs([fractions, here]) < OUTSIDE).all():
        raise InvalidPair(f"{path}: its initial structure is damaged; copy it again, or leave it out.")
    apart = fractions - here
    return bool(np.abs(apart - np.rint(apart)).max() < 1e-5)


def _first_start(folder: Path, start: Atoms) -> Atoms:
    """Where custodian first started a run that it stopped, and started again from its CONTCAR."""
    stopped = sorted(folder.glob("error.*"), key=lambda place: (len(place.name), place.name), reverse=True)
    for begin, end in filter(None, map(_poscar_and_contcar, stopped)):
        if (places := Equals()).add(start) == places.add(end):
            begin.info.update(start.info)
            start = begin
    return start


def _poscar_and_contcar(place: Path) -> tuple[Atoms, Atoms] | None:
    """Of a folder or an archive in which custodian keeps a run that it stopped; None where it has not both."""
    try:
        if place.is_dir():
            begin, end = (read_frames(place / name)[0] for name in ("POSCAR", "CONTCAR"))
            return begin, end
        with tarfile.open(place) as files, tempfile.TemporaryDirectory() as folder:
            for name in ("POSCAR", "CONTCAR"):
                (Path(folder) / name).write_bytes(files.extractfile(name).read())  # type: ignore[union-attr]
            return _poscar_and_contcar(Path(folder))
    except (InvalidPair, OSError, EOFError, KeyError, AttributeError, zlib.error, tarfile.TarError):
        return None


def _onward(relaxed: Atoms, path: Path, run: Run) -> Atoms | None:
    """Where a run that continues this one begins: VASP writes its next step, which the output has not."""
    next_one = relaxed.copy()
    if run.final is not None and len(run.final) == len(relaxed) and np.isfinite(run.final).all():
        next_one.set_scaled_positions(run.final)
        return next_one
    vasp = VaspFile.named(path)
    beside = vasp.other("CONTCAR") if vasp is not None and vasp.kind == "OUTCAR" else None
    if beside is None:
        return None
    try:
        return read_frames(beside)[0]
    except InvalidPair:
        return None


def _hold(frames: Sequence[Atoms], path: Path) -> None:
    """Give frames the constraints of the POSCAR or CONTCAR beside an OUTCAR, which holds none.

    Raises
    ------
    InvalidPair
        Where there is none of these atoms.
    """
    vasp = VaspFile.named(path)
    beside = [] if vasp is None else [vasp.other(kind, tag) for tag in (None, "") for kind in ("POSCAR", "CONTCAR")]
    for file in filter(None, beside):
        (atoms,) = read_frames(file)
        if np.array_equal(atoms.numbers, frames[0].numbers):
            for frame in frames:
                frame.set_constraint(atoms.constraints)
            return
    raise InvalidPair(
        f"{path}: it was run with selective dynamics, which OUTCAR does not hold; put its POSCAR or CONTCAR beside it."
    )
