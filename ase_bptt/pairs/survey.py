"""What was found where pairs were sought: relaxations that are used, others that cannot be, and what is none."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from . import InvalidPair, NotARelaxation

log = logging.getLogger(__name__)


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
    """

    where: str | Path
    used: int = 0
    problems: list[str] = field(default_factory=list)
    passed_by: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, problem: InvalidPair) -> None:
        """Count a relaxation that cannot be used, and warn of it."""
        self.problems.append(str(problem))
        log.warning("Left out: %s", problem)

    def passes_by(self, problem: InvalidPair, name: str) -> bool:
        """Count what is no relaxation, and say True; unless it was given itself, and not found in a folder."""
        if not (isinstance(problem, NotARelaxation) and Path(self.where).is_dir()):
            return False
        self.passed_by.setdefault(problem.kind, []).append(os.path.relpath(name, self.where))
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
        if self.problems:
            log.warning("Left out %d of %d.", len(self.problems), len(self.problems) + self.used)
