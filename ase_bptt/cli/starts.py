"""The structures that a command relaxes, and which of several processes it is that relaxes them."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase import Atoms

from ..cells import CELLS, CellFreedom
from ..pairs import InvalidPair
from ..pairs.usable import check_cell, check_structure
from ..potential import Potential
from ..throughput.structure_files import StructureFiles
from .flags import add_cell, add_room, flag
from .values import shard

log = logging.getLogger(__name__)
CHECKED = 1000
"""Structures that are checked before any is relaxed; others when their turn has come."""
ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_STEP")


class Starts:
    """The structures of files, checked before they are relaxed.

    Parameters
    ----------
    paths : sequence of Path
    potential : Potential
    skip_invalid : bool
        Whether what cannot be relaxed is left out with a warning.
    cell : CellFreedom

    Attributes
    ----------
    files : StructureFiles
    problems : dict of int to str
        Structures that are left out, as far as they were checked.
    unread : int
        Files that could not be read.

    Raises
    ------
    InvalidPair
        Where nothing can be read, or without `skip_invalid` one file cannot.
    """

    def __init__(
        self, paths: Sequence[Path], potential: Potential, *, skip_invalid: bool, cell: CellFreedom = CELLS["fixed"]
    ):
        self.potential, self.skip_invalid, self.cell = potential, skip_invalid, cell
        self.problems: dict[int, str] = {}
        self.unread, self._last = 0, ""
        self.files = StructureFiles(paths, self._refuse if skip_invalid else None)
        if not len(self.files):
            raise InvalidPair(f"None of the structures can be relaxed; the last: {self._last}")

    def __len__(self) -> int:
        return len(self.files)

    def check(self) -> list[Atoms]:
        """Check the first thousand, and return those that can be relaxed; the others are left out, or raise."""
        found = []
        for k in range(min(len(self), CHECKED)):
            try:
                found.append(self.usable(k))
            except InvalidPair:
                if not self.skip_invalid:
                    raise
        if not found and len(self) <= CHECKED:
            raise InvalidPair(f"None of the structures can be relaxed; the last: {self._last}")
        return found

    def usable(self, k: int) -> Atoms:
        """A structure.

        Raises
        ------
        InvalidPair
            Where it cannot be relaxed.
        NotImplementedError
            For elements that the potential does not know, without `skip_invalid`.
        """
        name = self.files.name(k)
        try:
            if k in self.problems:
                raise InvalidPair(self.problems[k])
            atoms = self.files[k]
            check_structure(self.potential, atoms, name)
            if self.cell.moves:
                check_cell(self.potential, atoms, self.cell, name)
        except (InvalidPair, NotImplementedError) as problem:
            if not self.skip_invalid:
                raise
            if k not in self.problems:
                self.problems[k] = self._last = str(problem)
                log.warning("Left out: %s", problem)
            raise InvalidPair(str(problem)) from problem
        return atoms

    def _refuse(self, problem: InvalidPair) -> None:
        self.unread, self._last = self.unread + 1, str(problem)
        log.warning("Left out: %s", problem)


def add_many(group: Any, parser: argparse.ArgumentParser) -> None:
    """What all commands that relax many structures take: --cell, --pressure, memory, --shard and --skip-invalid."""
    add_cell(group, parser, "what moves beside the atoms", "fixed")
    add_room(group, parser)
    add_shard(group, parser)
    flag(group, parser, "--skip-invalid", "leave out structures that cannot be relaxed, and list them", False,
         action="store_true")  # fmt: skip


def add_shard(group: Any, parser: argparse.ArgumentParser) -> None:
    """--shard."""
    flag(group, parser, "--shard", "the I-th of N processes that share the work through files "
         "(default: in a Slurm array, that of the task)", type=shard, metavar="I/N")  # fmt: skip


def shard_of(arguments: argparse.Namespace) -> tuple[int, int]:
    """Which of several processes this is, from --shard or from the variables of a Slurm array."""
    if arguments.shard is not None:
        return arguments.shard
    task, first, n, step = (os.environ.get(name, "") for name in ARRAY)
    if not (task.isdecimal() and first.isdecimal() and n.isdecimal()) or int(n) < 2:
        return 0, 1
    return (int(task) - int(first)) // max(1, int(step or 1)) % int(n), int(n)
