"""Which files of an archive may be relaxations, and what was found in it: other calculations, copies, methods."""

from __future__ import annotations

import logging
import lzma
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import InvalidPair, NotARelaxation
from .calculations import ZIPPED, opened
from .formats import NAMES, VASP, VaspFile, format_of
from .methods import CHARGE, CUTOFF

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
OUTPUTS = (".out", ".log", ".txt", ".castep", ".abo")
"""Ends of names of outputs, of which what they hold says whose they are."""
OTHER_CODES = {
    "ABINIT": b"ABINIT", "CASTEP": b"CASTEP", "Gaussian": b"Entering Gaussian System",
    "GPAW": b"|__ |  _|___|_____|", "ORCA": b"O   R   C   A", "SIESTA": b"SIESTA", "NWChem": b"NWChem",
    "another program of Quantum ESPRESSO": b"Quantum ESPRESSO suite",
}  # fmt: skip
"""Codes whose relaxations are not read from a folder, by what stands near the beginning of their outputs."""
Tally = dict[str, list[str]]
"""Names of files, by what they are."""
SHOWN = 4
"""Values of a setting that are named."""


@dataclass
class Survey:
    """What was found in one place.

    Attributes
    ----------
    where : path
        The file or folder that was given.
    used : int
        Relaxations.
    example : str
        One of them.
    legs : int
        Files that continue another one's relaxation.
    problems : list of str
        Why others cannot be used, one sentence each.
    passed_by : dict
        Files that are no relaxations, by what they are instead.
    copies : list of str
        Files that hold the same relaxation as another, as "backup/OUTCAR of OUTCAR".
    settings : dict
        For each setting of the reference calculations its values, and for each of these the number of relaxations and
        the name of one.
    """

    where: str | Path
    used: int = 0
    example: str = ""
    legs: int = 0
    problems: list[str] = field(default_factory=list)
    passed_by: Tally = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)
    settings: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    def use(self, name: str, settings: Mapping[str, str], legs: int = 1) -> None:
        """Count a relaxation, of so many files."""
        self.used += 1
        self.legs += legs - 1
        self.example = self.example or self._short(name)
        for setting, value in settings.items():
            found = self.settings.setdefault(setting, {}).setdefault(value, [0, self._short(name)])
            found[0] += 1

    def note_copy(self, name: str, first: str) -> None:
        """Count a file that holds the same relaxation as another."""
        self.copies.append(f"{self._short(name)} of {self._short(first)}")

    def passes_by(self, problem: InvalidPair, name: str) -> bool:
        """Count what is no relaxation, and say True; unless it was given itself, and not found in a folder."""
        if not (isinstance(problem, NotARelaxation) and Path(self.where).is_dir()):
            return False
        self.passed_by.setdefault(problem.kind, []).append(
            " with ".join(filter(None, [self._short(name), problem.detail]))
        )
        return True

    def _short(self, name: str) -> str:
        """The name below the place, of "9 of pairs.db" as well as of a file."""
        label, of, path = name.rpartition(" of ")
        return f"{label}{of}{os.path.relpath(path, self.where)}" if Path(self.where).is_dir() else name

    def others(self) -> str:
        """What was passed by, as "molecular dynamics (2, as md/OUTCAR)", with an example of each kind."""
        return ", ".join(f"{kind} ({len(names)}, as {names[0]})" for kind, names in sorted(self.passed_by.items()))

    def check(self) -> None:
        """Raise InvalidPair where nothing is used."""
        if not self.used and self.problems:
            raise InvalidPair(
                f"None of the {len(self.problems)} pairs in {self.where} can be used; the last: {self.problems[-1]}"
            )
        if not self.used:
            n_others = sum(map(len, self.passed_by.values()))
            raise InvalidPair(f"{self.where} holds no relaxation; passed by {n_others}: {self.others()}.")

    def report(self) -> None:
        """Warn of what was passed by and left out, and of references that contradict each other."""
        n_others = sum(map(len, self.passed_by.values()))
        if n_others:
            log.warning("Passed by %d that are no relaxations: %s.", n_others, self.others())
        if self.copies:
            log.warning("Counted once: %d copies, as %s.", len(self.copies), self.copies[0])
        self.warn()

    def warn(self) -> None:
        """Warn of what was left out, and of references that contradict each other."""
        if self.problems:
            log.warning("Left out %d of %d.", len(self.problems), len(self.problems) + self.used)
        if mixed := {name: values for name, values in self.mixed().items() if name not in (CHARGE, CUTOFF)}:
            log.warning(
                "The relaxations are of several methods, and what fits one contradicts the other; keep those of one: "
                "%s.", "; ".join(f"{name} {_values(values)}" for name, values in mixed.items()),
            )  # fmt: skip

    def mixed(self) -> dict[str, dict[str, list[Any]]]:
        """The settings that have several values."""
        return {name: values for name, values in sorted(self.settings.items()) if len(values) > 1}

    def tells_more(self) -> bool:
        """Whether there is more to tell than the number of relaxations, and what cannot be used."""
        return bool(self.passed_by or self.copies or self.legs or self.settings)

    def table(self) -> str:
        """What is there, a line for each kind with its number of files and an example."""
        rows = [("relaxations used", self.used, self.example)]
        if self.legs:
            rows.append(("files that continue one of them", self.legs, ""))
        rows += [(kind, len(names), names[0]) for kind, names in sorted(self.passed_by.items())]
        if self.copies:
            rows.append(("copies", len(self.copies), self.copies[0]))
        if self.problems:
            rows.append(("cannot be used", len(self.problems), self._short_of(self.problems[0])))
        width = max(len(name) for name, _, _ in rows)
        lines = [f"  {name:{width}} {n:6}  {example}".rstrip() for name, n, example in rows]
        for name, values in sorted(self.settings.items()):
            # What all have in common is written where it fits on the line.
            if len(values) > 1 or not name.startswith(("U (eV)", "pseudopotential", CHARGE)):
                lines.append(f"  {name:{width}} {_values(values)}")
        return "\n".join([f"{self.where}:", *lines])

    def _short_of(self, problem: str) -> str:
        return problem.replace(f"{self.where}{os.sep}", "", 1)

    def todict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"where": str(self.where)}


def _values(values: Mapping[str, list[Any]]) -> str:
    if len(values) == 1:
        return next(iter(values))
    most = sorted(values.items(), key=lambda item: -item[1][0])
    named = [f"{value} ({n}, as {example})" for value, (n, example) in most[:SHOWN]]
    return ", ".join([*named, *([f"{len(most) - SHOWN} more"] if len(most) > SHOWN else [])])


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
        p for p in every if not (ours & set(p.parents)) and ".parts" not in p.parent.suffix and _is_relaxation(p)
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
    if plain.endswith(OUTPUTS):
        return format_of(file) is not None or other_code(file) is not None
    return plain.endswith(tuple(NAMES)) or file.suffix == ".db"


def other_code(path: Path) -> str | None:
    """The code, not one of ours, that wrote an output."""
    try:
        with opened(path) as file:
            text = file.read(2**16)
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return None
    return next((code for code, word in OTHER_CODES.items() if word in text), None)


def _preference(file: Path) -> tuple[int, int]:
    """Lower for the better of several files of a run: by its name, then not compressed."""
    vasp = VaspFile.named(file)
    return (list(VASP).index(vasp.kind) if vasp else 0, int(file.suffix in ZIPPED))
