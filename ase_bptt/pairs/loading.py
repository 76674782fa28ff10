"""From files to checked pairs: read by several processes at once, joined to relaxations, and counted."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import (
    MAX_REFERENCE_FORCE,
    InvalidPair,
    Loaded,
    NotARelaxation,
    RelaxationPair,
    check_converged,
    check_freedom,
    check_pair,
)
from .cell_changes import unwrapped, warn_of_freedom, warn_of_moves
from .chains import FURTHER, Chains, Legs, joined_legs
from .sources import File, Source, pair_of, short, sources_in, two_files
from .survey import Survey
from .symmetry import with_symmetry

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
"""Called with the number of files that are read, and that of all."""

WORTH = 100e6
"""Bytes of all files above which further processes read sooner, for each takes some seconds to start."""
AHEAD = 4
"""Files that are read ahead, for each process."""


def n_cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_all(
    sources: Iterable[Source], files: Iterable[Path], processes: int, check: Check
) -> Iterator[tuple[Loaded | InvalidPair, Reading]]:
    """What each source holds, or the InvalidPair that says why it cannot be used, and what the check says of it."""
    if processes < 2 or _size(files) < WORTH:
        yield from map(check.load, sources)
        return
    waiting: deque[Any] = deque()
    # Spawned: a process with threads, as torch has, must not be forked.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _uninterrupted)
    try:
        for source in sources:
            # What is at hand keeps its place in the order.
            later = pool.submit(check.load, source) if isinstance(source, File) else None
            waiting.append(later.result if later else partial(check.load, source))
            if len(waiting) > AHEAD * processes:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()
    finally:
        pool.shutdown(cancel_futures=True)


def load_one(source: Source) -> Loaded | InvalidPair:
    """What a source holds, or why it cannot be used."""
    try:
        return source.load()
    except InvalidPair as problem:
        return problem


def _uninterrupted() -> None:
    """Ctrl-C reaches all processes; only the first one is to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _size(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size * (8 if path.suffix in (".gz", ".bz2", ".xz") else 1) for path in files)


@dataclass(frozen=True)
class Choices:
    """What `read_pairs` was asked to take, and how."""

    skip_invalid: bool = False
    group: str | None = None
    max_force: float | None = MAX_REFERENCE_FORCE
    cell: str | tuple[int, ...] | None = None
    pressure: float = 0.0
    symmetry: str | None = None

    def with_cell(self, pair: RelaxationPair) -> RelaxationPair:
        """The pair with the cell's degrees of freedom that were asked for, where any were."""
        if self.cell is None:
            return pair
        return dataclasses.replace(pair, cell=self.cell, pressure=self.pressure)


@dataclass
class Reading:
    """What came of one source: a pair, or what is kept of it, or why there is none; and what there is to warn of."""

    source: Source
    made: Any = None
    problem: InvalidPair | None = None
    warnings: Sequence[tuple[Any, ...]] = ()
    settings: dict[str, str] | None = None
    n_files: int = 1


@dataclass(frozen=True)
class Check:
    """What is done to each source by itself, in any process: it is loaded, and made a pair named below the root."""

    root: Path
    choices: Choices

    def load(self, source: Source) -> tuple[Loaded | InvalidPair, Reading]:
        """What a source holds, or why it cannot be used, and what came of it."""
        found = load_one(source)
        return found, self.reading(source, found)

    def reading(self, source: Source, found: Loaded | InvalidPair) -> Reading:
        """What comes of what a source holds."""
        if isinstance(found, InvalidPair):
            return Reading(source, problem=found)
        warnings: list[tuple[Any, ...]] = []
        try:
            pair = self._pair(source, found, lambda *said: warnings.append(said))
        except InvalidPair as problem:
            return Reading(source, problem=problem)
        n_files = len(source.names) if isinstance(source, Legs) else 1
        return Reading(source, pair, None, warnings, found.settings, n_files)

    @np.errstate(over="ignore", invalid="ignore")  # by what a damaged file holds, before it is refused
    def _pair(self, source: Source, found: Loaded, warn: Callable[..., None]) -> RelaxationPair:
        pair = pair_of(found, source.name, self.root)
        pair = self.choices.with_cell(pair)
        _check_one(pair, source.name)
        check_converged(pair.relaxed, source.name, self.choices.max_force, found.left)
        check_pair(pair.initial, pair.relaxed, source.name, warn)
        check_freedom(pair, source.name)
        relaxed = unwrapped(pair.initial, pair.relaxed)
        warn_of_moves(pair.initial, relaxed, source.name, warn)
        warn_of_freedom(pair.initial, relaxed, pair.freedom, source.name, warn)
        key = self.choices.group
        named = "" if not key else _group(pair, key, short(source.name, self.root), self.root)
        return with_symmetry(dataclasses.replace(pair, relaxed=relaxed, group=named), self.choices.symmetry)


class Reader:
    """Reads and checks what files hold, and counts it in a survey.

    Parameters
    ----------
    root : Path
        Where the names of pairs begin.
    survey : Survey
    choices : Choices
    processes : int
    progress : callable or None
    keep : callable or None
        ``keep(source, pair)`` is what remains of a pair; without it all of them are in memory.
    """

    def __init__(
        self,
        root: Path,
        survey: Survey,
        choices: Choices,
        processes: int = 1,
        progress: Progress | None = None,
        keep: Callable[[Source, RelaxationPair], Any] | None = None,
    ):
        self.root, self.survey, self.choices = root, survey, choices
        self._processes, self._progress, self._keep = processes, progress, keep
        self._check = Check(root, choices)

    def read_two(self, initial: Path) -> list[tuple[Source, Any]]:
        """The pairs between the structures of two files, the second of which is the root."""
        return self._counted([self._kept(self._check.reading(s, s.load())) for s in two_files(initial, self.root)])

    def read(self, files: Sequence[Path]) -> list[tuple[Source, Any]]:
        """Each relaxation that can be used, once, with its source.

        Raises
        ------
        InvalidPair
            For the first that cannot be used, once all are read, unless they are to be skipped; or where none can.
        """
        chains, loaded = Chains(), dict[str, Loaded]()
        readings: list[Reading | None] = []
        place: dict[str, int] = {}
        for found, reading in load_all(sources_in(files), files, self._processes, self._check):
            source = reading.source
            if self._progress is not None:
                self._progress(len(readings) + 1, max(len(files), len(readings) + 1))
            readings.append(self._kept(reading))
            if isinstance(source, File) and isinstance(found, Loaded) and _is_sound(found, reading.problem):
                place[source.name] = len(readings) - 1
                if first := chains.add(source.name, found):
                    self.survey.note_copy(source.name, first)
                    readings[-1] = None
                elif self._keep is None:
                    loaded[source.name] = found
        relaxations, again = chains.joined()
        for names in relaxations:
            if len(names) > 1:
                legs = Legs(tuple(names))
                whole = joined_legs([loaded[name] for name in names]) if self._keep is None else legs.load()
                for name in names:
                    readings[place[name]] = None
                readings[place[names[0]]] = self._kept(self._check.reading(legs, whole))
        for name in again:
            problem = NotARelaxation(f"{name}: it is a {FURTHER}.", FURTHER)
            readings[place[name]] = Reading(File(name), problem=problem)
        return self._counted(filter(None, readings))

    def _kept(self, reading: Reading) -> Reading:
        """With what remains of its pair."""
        if self._keep is not None and reading.problem is None:
            reading.made = self._keep(reading.source, reading.made)
        return reading

    def _counted(self, readings: Iterable[Reading]) -> list[tuple[Source, Any]]:
        """Those that can be used; the survey counts them, and the others."""
        found, stop = [], None
        for reading in readings:
            name, problem = reading.source.name, reading.problem
            for said in reading.warnings:
                log.warning(*said)
            if problem is None:
                self.survey.use(name, reading.settings or {}, reading.n_files)
                found.append((reading.source, reading.made))
            elif not self.survey.passes_by(problem, name):
                self.survey.problems.append(str(problem))
                stop = stop or problem
                if self.choices.skip_invalid:
                    log.warning("Left out: %s", problem)
        if stop is not None and not self.choices.skip_invalid:
            stop.survey = self.survey
            raise stop
        self.survey.check()
        return found


@np.errstate(over="ignore", invalid="ignore")
def _is_sound(found: Loaded, problem: InvalidPair | None) -> bool:
    """Whether its structures can be compared with those of others: what is not converged may be continued."""
    if problem is None or not isinstance(problem, NotARelaxation):
        return problem is None
    try:
        check_pair(found.initial, found.relaxed, "", lambda *said: None)
    except InvalidPair:
        return False
    return True


PASSING = {"role", "stage", "status", "comment", "time", "timestamp", "date"}
"""Keys of info that may change along a relaxation."""


def _check_one(pair: RelaxationPair, name: str) -> None:
    """Raise InvalidPair where the info of the first and the last frame is of two structures."""
    if not pair.frames:
        return
    begin, end = pair.initial.info, pair.relaxed.info
    for key in sorted((begin.keys() & end.keys()) - PASSING):
        if isinstance(begin[key], str) and isinstance(end[key], str) and begin[key] != end[key]:
            raise InvalidPair(
                f"{name}: {key} of its first frame is {begin[key]} and of its last {end[key]}, so it is not one "
                "relaxation; give two files, or each frame a pair_id and a role (initial or relaxed)."
            )


def _group(pair: RelaxationPair, key: str, name: str, root: Path) -> str:
    if key in pair.relaxed.info:
        return str(pair.relaxed.info[key])
    if key == "folder":
        first = Path(name).parts[0]
        if (root / first).is_dir():
            return first
        raise InvalidPair(f"{pair.id}: it lies in no folder below {root} to group by.")
    there = ", ".join(pair.relaxed.info) or "nothing"
    raise InvalidPair(f"{pair.id}: its info has no {key!r} to group by; it has {there} ('folder' takes the folders).")
