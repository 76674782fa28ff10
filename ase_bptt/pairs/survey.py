"""What was found in an archive: relaxations, other calculations, copies, what cannot be used, and the methods."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import InvalidPair, NotARelaxation
from .methods import CHARGE, CUTOFF

log = logging.getLogger(__name__)
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
            # What all have in common is told where it fits on the line.
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
