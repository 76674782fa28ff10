"""Files to which relaxed structures are added as they finish, so that a stopped run can continue."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import Trajectory, TrajectoryReader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..cells import CellFreedom
from ..iterated_map import Status
from ..pairs import InvalidPair, add_to_hash
from ..potential import Potential
from . import Relaxed, relax_stream

if TYPE_CHECKING:
    from .parts import Parts

log = logging.getLogger(__name__)
KEYS = ("_index", "_status", "_nsteps", "_run")
RESULTS = ("energy", "forces", "stress")
OPEN = 128
"""Journals that are open at once, while ends are read in the order of the input."""


class Journal:
    """An ASE trajectory of relaxed structures, each with its index, to be read with any tool of ASE.

    It is written by one process, and never behind what another one has left: a frame that was cut off stays the last.

    Parameters
    ----------
    path : Path
    run : str
        A hash of all that the results depend on, from `run_key`.
    """

    def __init__(self, path: Path, run: str):
        self.path, self.run = path, run

    def add(self, index: int, end: Relaxed) -> None:
        """Append one end.

        Raises
        ------
        OSError
            Where the disk is full or the place is not writable, naming the file; the ends in it stay.
        """
        found = end.atoms.copy()
        found.constraints = []
        found.info = dict(zip(KEYS, (index, end.status.value, end.nsteps, self.run), strict=True))
        found.calc = end.atoms.calc
        try:
            with Trajectory(self.path, "a") as frames:
                frames.properties = [name for name in RESULTS if name in end.atoms.calc.results]
                frames.write(found)
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written ({error.strerror}): make room there; what had finished is kept in "
                "it, and --resume continues."
            ) from error


class Ends(Sequence[Relaxed]):
    """The ends that the journals of a folder hold, each read when it is asked for.

    Parameters
    ----------
    folder : Path
    run : str
        Frames of another run are passed over.
    structures : sequence of Atoms
        Those that were relaxed; all that the journals do not hold is taken from them.

    Attributes
    ----------
    places : dict of int to (Path, int)
        Journal and frame of each end that can be read.
    """

    def __init__(self, folder: Path, run: str, structures: Sequence[Atoms]):
        self.folder, self.run, self.structures = folder, run, structures
        self.places: dict[int, tuple[Path, int]] = {}
        self._open: OrderedDict[Path, TrajectoryReader] = OrderedDict()
        self._sizes: dict[Path, int] = {}
        self.update()

    def update(self) -> None:
        """Find the ends in journals that have grown."""
        for path in sorted(self.folder.glob("*.traj")):
            size = path.stat().st_size
            if size != self._sizes.get(path):
                self._sizes[path] = size
                self._close(path)
                self._scan(path, size)

    def _scan(self, path: Path, size: int) -> None:
        # ulm raises whatever its parsers do where a file was cut off or damaged.
        try:
            frames = self._frames(path)
            n = len(frames)
        except Exception:
            if size:
                log.warning("%s: it is damaged; the structures that it held are relaxed again.", path)
            return
        for k in range(n):
            try:
                info = frames.backend[k].get("info") or {}
                if info.get("_run") == self.run:
                    self.places.setdefault(int(info["_index"]), (path, k))
            except Exception:
                log.warning("%s: frame %d is damaged; its structure is relaxed again.", path, k)

    def _frames(self, path: Path) -> TrajectoryReader:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            if len(self._open) >= OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[path] = Trajectory(path)
        return self._open[path]

    def _close(self, path: Path) -> None:
        if path in self._open:
            self._open.pop(path).close()

    def close(self) -> None:
        """Close the journals."""
        for path in list(self._open):
            self._close(path)

    def _read(self, index: int) -> Atoms:
        path, frame = self.places[index]
        try:
            return self._frames(path)[frame]
        except Exception as error:
            raise OSError(
                f"{path}: frame {frame} is damaged: delete this file, and --resume relaxes its structures again."
            ) from error

    def __len__(self) -> int:
        return len(self.structures)

    @overload
    def __getitem__(self, index: int) -> Relaxed: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Relaxed]: ...
    def __getitem__(self, index: int | slice) -> Relaxed | Sequence[Relaxed]:
        if isinstance(index, slice):
            return Part(self, range(*index.indices(len(self))))
        index = range(len(self))[index]
        found, atoms = self._read(index), self.structures[index].copy()
        atoms.set_cell(found.cell, apply_constraint=False)
        atoms.positions = found.positions
        atoms.calc = SinglePointCalculator(atoms, **found.calc.results)
        return Relaxed(atoms, Status(found.info["_status"]), int(found.info["_nsteps"]))


class Part(Sequence[Any]):
    """Some of a sequence, or what a function makes of them, each made when it is asked for.

    Parameters
    ----------
    every : sequence
    indices : sequence of int
    made : callable, optional
        ``made(item)``.
    """

    def __init__(self, every: Sequence[Any], indices: Sequence[int], made: Callable[[Any], Any] | None = None):
        self.every, self.indices, self.made = every, indices, made

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, k: int | slice) -> Any:
        if isinstance(k, slice):
            return Part(self.every, self.indices[k], self.made)
        item = self.every[self.indices[k]]
        return item if self.made is None else self.made(item)


def relax_shared(
    potential: Potential,
    structures: Sequence[Atoms],
    parts: Parts,
    *,
    cells: Sequence[CellFreedom],
    usable: Callable[[int], Atoms] | None = None,
    skip_invalid: bool = False,
    progress: bool | None = False,
    report: Callable[[int, Relaxed], None] | None = None,
    **settings: Any,
) -> bool:
    """Relax what other processes do not, until nothing is left for this one, keeping each result as it is found.

    Parameters
    ----------
    potential : Potential
    structures : sequence of Atoms
    parts : Parts
        The shared run, entered by the caller. Once it is `complete`, its `ends` are those of all structures.
    cells : sequence of CellFreedom
        Of each structure.
    usable : callable
        ``usable(index)`` returns the structure, or raises InvalidPair.
    skip_invalid : bool
        Whether it is left out then.
    progress : bool or None
        Whether to show a bar on standard error, of the work of all processes; None does so where that is a terminal.
    report : callable
        ``report(index, end)`` is called for each new result of this process.
    **settings
        As for `relax_stream`.

    Returns
    -------
    bool
        Whether it is this process that continues: of those of a launcher, only the first does.
    """
    shown = sys.stderr.isatty() if progress is None else progress
    bar = tqdm(total=len(structures), initial=len(parts.ends.places), unit="structure", disable=not shown, leave=False)

    def show() -> None:
        if shown and time.monotonic() - bar.last_print_t > 1.0:
            bar.update(max(0, parts.finished() - bar.n))

    with bar, logging_redirect_tqdm() if shown else nullcontext():
        while True:
            work = _portions(structures, cells, parts, usable, skip_invalid)
            moves = any(cell.moves for cell in cells)
            for index, end in relax_stream(potential, work, cells_move=moves, **settings):
                parts.add(index, end)
                if report:
                    report(index, end)
                show()
            if not parts.wait_for_ranks(show):
                return False
            if not parts.wait():
                return True


def _portions(
    structures: Sequence[Atoms],
    cells: Sequence[CellFreedom],
    parts: Parts,
    usable: Callable[[int], Atoms] | None,
    skip_invalid: bool,
) -> Iterator[list[tuple[int, Atoms, CellFreedom]]]:
    """The structures of each chunk that this process claims."""
    for chunk in parts.claims():
        portion = []
        for k in chunk:
            try:
                portion.append((k, usable(k) if usable else structures[k], cells[k]))
            except InvalidPair as problem:
                if not skip_invalid:
                    raise
                parts.leave_out(k, str(problem))
        yield portion


def run_key(potential: Potential, content: str | Sequence[Atoms], settings: dict[str, Any]) -> str:
    """A hash of everything that the results of a run depend on: weights, structures (or a hash of them), settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in potential.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(content, str):
        digest.update(content.encode())
    else:
        for atoms in content:
            add_to_hash(digest, atoms)
    return digest.hexdigest()[:16]
