"""A run that processes share without waiting for each other: chunks of work that they claim, and a journal for each.

All of it is files in one folder, so that processes on any machines that see it take part, at any time:

run.json        which run it is: a hash of all that the results depend on
NAME.traj       the journal of one process
NAME.alive      its heartbeat: a number that changes every few seconds
00012.lock      the chunk that a process has claimed, with the name of that process
00012.done      a chunk that is finished, with the structures that were left out

Should two processes compute a chunk all the same, its results are in two journals, and one of them is taken.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from ase import Atoms

from ..utils import replacing
from . import Relaxed, locks
from .journal import Ends, Journal
from .locks import Holder, create, owner_of

MOST = 64
"""Structures of a chunk at most: as many as are lost where a process is killed, apart from those that have finished."""
FEW = 4
"""Processes for which there are chunks enough at least."""
RUN = "run.json"


def divided(sizes: Sequence[float] | np.ndarray, processes: int) -> list[list[int]]:
    """Indices in chunks, the largest structures first, and ever smaller chunks, so that all processes end together.

    A chunk is at most half of what is left for each process (guided self-scheduling: Polychronopoulos and Kuck, IEEE
    Trans. Comput. C-36, 1425 (1987)), and at most `MOST` structures.
    """
    order = sorted(range(len(sizes)), key=lambda k: (-sizes[k], k))
    left, cost = float(sum(sizes)), 0.0
    chunks: list[list[int]] = []
    for k in order:
        if not chunks or len(chunks[-1]) == MOST or cost + sizes[k] > left / (2 * max(processes, FEW)):
            chunks.append([])
            left, cost = left - cost, 0.0
        chunks[-1].append(k)
        cost += sizes[k]
    return chunks


class Parts:
    """This process's view of a shared run.

    Parameters
    ----------
    folder : Path
        Made where it is not there.
    run : str
        A hash of all that the results depend on, from `run_key`.
    structures : sequence of Atoms
    sizes : sequence of float
        What each costs, about.
    shard, ranks : (int, int)
        Number of this process and how many there are, by itself (where it looks for work first: all is done whoever
        comes), and within a launcher whose processes have a store.
    store : torch.distributed.Store, optional
        Its counter deals out the chunks.
    facts : mapping, optional
        Written into run.json.

    Attributes
    ----------
    ends : Ends
        What has finished, as far as it was looked for.
    left_out : dict of int to str
        Structures that cannot be relaxed, and why.
    is_new : bool
        Whether there was no run before.

    Raises
    ------
    ValueError
        Where the folder holds another run.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        structures: Sequence[Atoms],
        sizes: Sequence[float] | np.ndarray,
        *,
        shard: tuple[int, int] = (0, 1),
        ranks: tuple[int, int] = (0, 1),
        store: Any = None,
        facts: Mapping[str, Any] | None = None,
    ):
        self.folder, self.run, self.shard, self.ranks, self.store = folder, run, shard, ranks, store
        folder.mkdir(parents=True, exist_ok=True)
        about = {"run": run, "processes": shard[1] * ranks[1], "n": len(sizes), **(facts or {})}
        if not (created := create(folder / RUN, json.dumps(about))):
            about = about_run(folder)
            if about.get("run") != run:
                raise ValueError(
                    f"{folder} belongs to a run on other structures, with another potential or with other "
                    "settings: give those again, or --overwrite."
                )
        self.chunks, self.ends = divided(sizes, int(about["processes"])), Ends(folder, run, structures)
        self.left_out: dict[int, str] = {}
        self.holder = Holder(folder)
        self.journal = Journal(folder / f"{self.holder.name}.traj", run)
        self.n_before, self.n_mine = len(self.ends.places), 0
        self._mine, self._chunk_of = dict[int, set[int]](), dict[int, int]()
        self.is_new, self._first_pass, self._merges = created, True, False
        self._done_chunks: set[int] = set()
        self._reopen()

    def __enter__(self) -> Parts:
        self.holder.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for k in self._mine:
            self._path(k, "lock").unlink(missing_ok=True)
        if self._merges:
            (self.folder / "merge.lock").unlink(missing_ok=True)
        self.holder.stop()
        self.ends.close()

    def claims(self) -> Iterator[list[int]]:
        """The indices of chunks that nobody has claimed or finished, each claimed when it is asked for."""
        for k in self._order():
            if not self._claim(k):
                continue
            waiting = [index for index in self.chunks[k] if index not in self.ends.places]
            self._mine[k] = set(waiting)
            self._chunk_of |= dict.fromkeys(waiting, k)
            self._finish_if_empty(k)
            if waiting:
                yield waiting

    def add(self, index: int, end: Relaxed) -> None:
        """Keep an end."""
        self.journal.add(index, end)
        self.n_mine += 1
        self._ended(index)

    def leave_out(self, index: int, why: str) -> None:
        """Note a structure that cannot be relaxed."""
        self.left_out[index] = why
        self._ended(index)

    def wait(self) -> bool:
        """Wait until others have finished their chunks, or show that they live; True where a chunk is free again."""
        self.holder.forget()
        while True:
            self._look()
            held = {k: owner_of(self._path(k, "lock")) for k in range(len(self.chunks)) if k not in self._done_chunks}
            dead = [k for k, owner in held.items() if owner and self.holder.has_died(owner)]
            for k in dead:
                self.holder.free(self._path(k, "lock"))
            if dead or None in held.values():
                self.ends.update()
                return self.folder.is_dir()
            if not held:
                return self.folder.is_dir() and self._reopen()
            if all(self.holder.lives(owner) for owner in held.values() if owner):
                return False
            time.sleep(min(1.0, locks.BEAT / 5))

    def wait_for_ranks(self, meanwhile: Callable[[], None]) -> bool:
        """Of a launcher's processes: whether this is the one that continues, once the others have ended their work."""
        if self.store is None:
            return True
        ended, (rank, size) = f"{self.folder.name} ended", self.ranks
        self.store.add(ended, int(rank > 0))
        while rank == 0 and self.store.add(ended, 0) < size - 1:
            meanwhile()
            time.sleep(0.05)
        return rank == 0

    def complete(self) -> bool:
        """Whether all structures have been relaxed or left out."""
        self._look()
        return len(self._done_chunks) == len(self.chunks) and self.folder.is_dir()

    def merging(self) -> bool:
        """Whether it is this process that writes the results; another one may be about to."""
        self.holder.forget()
        with suppress(FileNotFoundError):
            while not self.holder.take(lock := self.folder / "merge.lock"):
                owner = owner_of(lock)
                if owner and self.holder.lives(owner):
                    return False
                if owner and self.holder.has_died(owner):
                    self.holder.free(lock)
                time.sleep(min(1.0, locks.BEAT / 5))
            self._merges = True
        return self._merges

    def remove(self) -> None:
        """Delete the folder."""
        self.ends.close()
        remove(self.folder)

    def finished(self) -> int:
        """How many structures have finished or were left out, in all processes, about."""
        if self.store is not None:
            return self.n_before + int(self.store.add(f"{self.folder.name} finished", 0))
        self._look()
        in_hand = sum(len(self.chunks[k]) - len(left) for k, left in self._mine.items())
        return in_hand + sum(len(self.chunks[k]) for k in self._done_chunks)

    def _order(self) -> Iterator[int]:
        first, of = self.shard
        order = sorted(range(n := len(self.chunks)), key=lambda k: (k % of != first, k))
        if self.store is None or not self._first_pass:
            yield from order
        else:
            self._first_pass = False
            while (at := self.store.add(f"{self.folder.name} chunk", 1) - 1) < n:
                yield order[at]

    def _claim(self, k: int) -> bool:
        if k in self._mine or k in self._done_chunks:
            return False
        with suppress(FileNotFoundError):  # all is merged and gone
            if self.holder.take(self._path(k, "lock")):
                if not self._path(k, "done").exists():
                    return True
                self._done_chunks.add(k)
                self._path(k, "lock").unlink(missing_ok=True)
        return False

    def _ended(self, index: int) -> None:
        k = self._chunk_of.pop(index)
        self._mine[k].discard(index)
        if self.store is not None:
            self.store.add(f"{self.folder.name} finished", 1)
        self._finish_if_empty(k)

    def _finish_if_empty(self, k: int) -> None:
        if self._mine[k]:
            return
        with replacing(self._path(k, "done")) as path:
            path.write_text(json.dumps({i: self.left_out[i] for i in self.chunks[k] if i in self.left_out}))
        del self._mine[k]
        self._done_chunks.add(k)
        self._path(k, "lock").unlink(missing_ok=True)

    def _reopen(self) -> bool:
        """Take back that a chunk is done where results of it are missing, as where a journal was damaged."""
        self._look()
        missing = {k for k in self._done_chunks if self._missing(k)}
        if missing:
            self.ends.update()  # they may have come after the journals were read
            missing = {k for k in missing if self._missing(k)}
        for k in missing:
            self._path(k, "done").unlink(missing_ok=True)
        self._done_chunks -= missing
        return bool(missing)

    def _missing(self, k: int) -> set[int]:
        """Structures of a chunk that is said to be done, which have no end and were not left out."""
        missing = {index for index in self.chunks[k] if index not in self.ends.places}
        if missing:
            with suppress(OSError, ValueError):
                found = json.loads(self._path(k, "done").read_text())
                self.left_out |= {int(index): why for index, why in found.items()}
        return missing - set(self.left_out)

    def _look(self) -> None:
        with suppress(FileNotFoundError):
            names = os.listdir(self.folder)
            self._done_chunks |= {int(name[:-5]) for name in names if name.endswith(".done") and name[0].isdigit()}

    def _path(self, k: int, kind: str) -> Path:
        return self.folder / f"{k:06d}.{kind}"


def about_run(folder: Path) -> dict[str, Any]:
    """What run.json says; nothing where it is not there or damaged."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads((folder / RUN).read_text()))
    return {}


def remove(folder: Path) -> None:
    """Delete a folder of parts, if it is there, at once for all who look."""
    gone = folder.with_name(f".{os.getpid()}.part.{folder.name}")
    with suppress(FileNotFoundError):
        shutil.rmtree(folder.rename(gone), ignore_errors=True)
