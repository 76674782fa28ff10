"""Lock files with which processes on any machines claim work, and heartbeats by which they see who has died.

A lock whose process has died is removed by another: at once where it ran on the same machine, else when its heartbeat
has not changed for `PATIENCE` seconds of the other's own clock. Clocks of different machines are never compared, and
one that jumps changes nothing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..threads import Watching

BEAT = 5.0
"""Seconds between two heartbeats."""
PATIENCE = 300.0
"""Seconds without a heartbeat after which the work of a process on another machine is taken over. File systems of
clusters may show a file as it was a minute ago."""
Owner = dict[str, Any]


class Holder:
    """A process that takes locks in a folder.

    Parameters
    ----------
    folder : Path

    Attributes
    ----------
    name : str
        Of this process, like no other's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._stop = threading.Event()
        self._seen: dict[str, tuple[str, float]] = {}

    def start(self) -> None:
        """Begin to show that this process lives."""
        with suppress(FileNotFoundError):  # others have finished all in this moment
            write_text(self._beating(self.name), "0")
        Watching(target=self._beat, daemon=True).start()

    def stop(self) -> None:
        """Show it no longer."""
        self._stop.set()
        self._beating(self.name).unlink(missing_ok=True)

    def take(self, lock: Path) -> bool:
        """Make a lock, also in the place of one whose process has died on this machine; False where it is held."""
        me = json.dumps({"name": self.name, "host": socket.gethostname(), "pid": os.getpid()})
        if create(lock, me):
            return True
        owner = owner_of(lock)
        if owner is None or _is_dead(owner):
            self.free(lock)
            return create(lock, me)
        return False

    def free(self, lock: Path) -> None:
        """Remove a lock that another one has left."""
        # Of several who rename it, one succeeds.
        aside = lock.with_name(f"{lock.name}.{self.name}")
        with suppress(FileNotFoundError):
            os.rename(lock, aside)
            aside.unlink()

    def lives(self, owner: Owner) -> bool:
        """Whether a process has shown, since it was first asked about, that it lives."""
        beat = _read(self._beating(owner["name"]))
        return beat != self._seen.setdefault(owner["name"], (beat, time.monotonic()))[0]

    def has_died(self, owner: Owner) -> bool:
        """Whether a process is gone from this machine, or has been silent for `PATIENCE`."""
        if self.lives(owner):
            return False
        return _is_dead(owner) or time.monotonic() - self._seen[owner["name"]][1] > PATIENCE

    def forget(self) -> None:
        """Ask again who lives."""
        self._seen.clear()

    def _beating(self, name: str) -> Path:
        return self.folder / f"{name}.alive"

    def _beat(self) -> None:
        beats = 0
        while not self._stop.wait(BEAT):
            beats += 1
            with suppress(OSError):  # a full disk is reported where results are written
                self._beating(self.name).write_text(str(beats))


def create(path: Path, text: str) -> bool:
    """Write a file that is not there yet, whole or not at all; False where it is there.

    Raises
    ------
    OSError
        Where the disk is full or the place is not writable, naming the file.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.part.{path.name}")
    write_text(temporary, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # file systems without links
        with suppress(FileExistsError), path.open("x") as file:
            file.write(text)
            return True
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def write_text(path: Path, text: str) -> None:
    """Write a small file.

    Raises
    ------
    OSError
        Where the disk is full or the place is not writable, naming the file.
    """
    try:
        path.write_text(text)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror}): make room there; what had finished is kept, and --resume "
            "continues."
        ) from error


def owner_of(lock: Path) -> Owner | None:
    """Who holds a lock; None where it is not there, or damaged."""
    with suppress(OSError, ValueError):
        found = json.loads(lock.read_text())
        return found if isinstance(found, dict) and {"name", "host", "pid"} <= set(found) else None
    return None


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


def _is_dead(owner: Owner) -> bool:
    """Whether a process ran on this machine, and is gone."""
    if owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        pass
    return False
