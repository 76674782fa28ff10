"""Which files of a folder are relaxations, and what else is found there."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from . import InvalidPair, NotARelaxation
from .calculations import ZIPPED
from .formats import NAMES, VASP, VaspFile, format_of

log = logging.getLogger(__name__)
SUFFIXES = (
    "vasprun.xml",
    "OUTCAR",
    "POSCAR and CONTCAR",
    ".pwo",
    ".espresso",
    ".out",
    ".extxyz",
    ".xyz",
    ".traj",
    ".db",
)
"""What a folder is searched for; of the .out files only those of pw.x."""


@dataclass
class Survey:
    """What was found in one place.

    Attributes
    ----------
    where : path
        The file or folder that was given.
    used : int
        Relaxations.
    problems : list of str
        Why others cannot be used, one sentence each.
    passed_by : dict
        Files that are no relaxations, by what they are instead.
    copies : list of str
        Files that hold the same relaxation as another, as "backup/OUTCAR of OUTCAR".
    """

    where: str | Path
    used: int = 0
    problems: list[str] = field(default_factory=list)
    passed_by: dict[str, list[str]] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)

    def note_copy(self, name: str, first: str) -> None:
        """Count a file that holds the same relaxation as another."""
        a, b = (os.path.relpath(path, self.where) for path in (name, first))
        self.copies.append(f"{a} of {b}")

    def leave_out(self, problem: InvalidPair) -> None:
        """Count a relaxation that cannot be used, and warn of it."""
        self.problems.append(str(problem))
        log.warning("Left out: %s", problem)

    def passes_by(self, problem: InvalidPair, name: str) -> bool:
        """Count what is no relaxation, and say True; unless it was given itself, and not found in a folder."""
        if not (isinstance(problem, NotARelaxation) and Path(self.where).is_dir()):
            return False
        self.passed_by.setdefault(problem.kind, []).append(
            " with ".join(filter(None, [os.path.relpath(name, self.where), problem.detail]))
        )
        return True

    def others(self) -> str:
        """What was passed by, as "molecular dynamics (2, as md/OUTCAR)", with an example of each kind."""
        return ", ".join(f"{kind} ({len(names)}, as {names[0]})" for kind, names in sorted(self.passed_by.items()))

    def report(self) -> None:
        """Say what was passed by and left out.

        Raises
        ------
        InvalidPair
            Where nothing is used.
        """
        n_others = sum(map(len, self.passed_by.values()))
        if not self.used and self.problems:
            raise InvalidPair(
                f"None of the {len(self.problems)} pairs in {self.where} can be used; the last: {self.problems[-1]}"
            )
        if not self.used:
            raise InvalidPair(f"{self.where} holds no relaxation; passed by {n_others}: {self.others()}.")
        if n_others:
            log.warning("Passed by %d that are no relaxations: %s.", n_others, self.others())
        if self.copies:
            log.warning("Counted once: %d copies, as %s.", len(self.copies), self.copies[0])
        if self.problems:
            log.warning("Left out %d of %d.", len(self.problems), len(self.problems) + self.used)


def relaxation_files(path: Path) -> list[Path]:
    """The file itself, or the files of relaxations below a folder, one a run, in order.

    Raises
    ------
    FileNotFoundError
        Where there is none.
    """
    if path.is_dir():
        return _found_below(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    return [path]


def _found_below(folder: Path) -> list[Path]:
    ours = {path.parent for path in folder.rglob("command.json")}
    every = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    # What ase-bptt has written there is not a reference.
    files = sorted(
        p for p in every if not (ours & set(p.parents)) and not p.name.endswith(".part.traj") and _is_relaxation(p)
    )
    if not files:
        raise FileNotFoundError(
            f"The folder {folder} holds no relaxation: no file that ends with {', '.join(SUFFIXES)}."
        )
    best: dict[object, Path] = {}
    for file in files:
        vasp = VaspFile.named(file)
        key = file if vasp is None else vasp.run
        best[key] = min(best.get(key, file), file, key=_preference)
    chosen = sorted(best.values())
    for file in sorted({*files} - {*chosen}):
        vasp = VaspFile.named(file)
        log.debug("%s: left out, for %s is the same run.", file, best[vasp.run if vasp else file])
    if len(chosen) < len(files):
        log.info(
            "%s: left out %d files (%s), for a file of the same run beside each is preferred.",
            folder, len(files) - len(chosen), ", ".join(sorted({f.name for f in {*files} - {*chosen}})),
        )  # fmt: skip
    return chosen


def _is_relaxation(file: Path) -> bool:
    vasp = VaspFile.named(file)
    if vasp is not None:
        if vasp.kind == "POSCAR" or (vasp.kind == "CONTCAR" and vasp.other("POSCAR") is None):
            return False
        # Anything may follow a name of VASP's.
        return not vasp.tag or format_of(file) == VASP[vasp.kind]
    plain = file.name.removesuffix(file.suffix) if file.suffix in ZIPPED else file.name
    if plain.endswith(".out"):
        return format_of(file) is not None
    return plain.endswith(tuple(NAMES)) or file.suffix == ".db"


def _preference(file: Path) -> tuple[int, int]:
    """Lower for the better of several files of a run: by its name, then not compressed."""
    vasp = VaspFile.named(file)
    return (list(VASP).index(vasp.kind) if vasp else 0, int(file.suffix in ZIPPED))
