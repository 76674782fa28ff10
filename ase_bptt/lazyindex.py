"""A file in which what is known of each pair is kept, so that the next start reads no structure."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ase

from .databases import Rows
from .files import replacing
from .lazy import Store
from .sources import File, Source
from .version import __version__

log = logging.getLogger(__name__)
FORMAT = 1


class Index:
    """The index of a file or folder: a line of JSON about all of it, and one for each pair.

    Parameters
    ----------
    root : Path
    files : sequence of Path
        The files of relaxations; where the size or the time of change of one is another, the index counts no more.
    group : str or None
        As for `read_pairs`; each has an index of its own.
    folder : path or None
        Where indexes are kept.
    """

    def __init__(self, root: Path, files: Sequence[Path], group: str | None, folder: str | Path | None):
        self.root = root
        self._base = root if root.is_dir() else root.parent
        key = hashlib.sha256(json.dumps([str(root.resolve()), group]).encode()).hexdigest()[:16]
        self.path = (Path(folder) if folder else _cache()) / f"pairs-{key}.jsonl"
        self._stamp = self._stamped(files)

    def read(self) -> tuple[Store, list[str]] | None:
        """What is known of each pair, and what was wrong with those left out; None where that must be found anew."""
        try:
            with self.path.open() as file:
                head = json.loads(next(file))
                if head["stamp"] != self._stamp:
                    log.info("%s: something has changed there, so all pairs are read and checked again.", self.root)
                    return None
                n, problems, store = head["n"], head["problems"], Store(self.root)
                for line in file:
                    place, id, group, size, kind, digest = json.loads(line)
                    store.add(self._source(place, id), id, group, size, kind, bytes.fromhex(digest))
        except (OSError, ValueError, LookupError, TypeError, StopIteration):
            return None
        return (store, problems) if len(store.sources) == n else None

    def write(self, store: Store, problems: Sequence[str]) -> None:
        """Keep it, where one may; else say that the next start will read all again."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as path, path.open("w") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in self._lines(store, problems))
        except OSError as error:
            log.warning("No index of %s is kept, and the next start will read all pairs again: %s", self.root, error)

    def _lines(self, store: Store, problems: Sequence[str]) -> Iterator[Any]:
        yield {"stamp": self._stamp, "problems": list(problems), "n": len(store.sources)}
        for k, source in enumerate(store.sources):
            known = store.ids[k], store.groups[k], store.sizes[k], store.kinds[k]
            yield [self._place(source), *known, store.digest(k).hex()]

    def _place(self, source: Source) -> list[Any]:
        """As JSON; paths from the one that was given, for that may be written in another way the next time."""
        if isinstance(source, Rows):
            return [os.path.relpath(source.path, self._base), source.first, source.last, source.label, source.named]
        return [os.path.relpath(source.name, self._base)]

    def _source(self, place: list[Any], id: str) -> Source:
        path, *rows = place
        path = str(self._base / path)
        if not rows:
            return File(path)
        first, last, label, named = rows
        return Rows(sys.intern(path), first, last, id if label == id else label, named)

    def _stamped(self, files: Sequence[Path]) -> str:
        """A hash of all that the index depends on."""
        digest = hashlib.sha256(json.dumps([FORMAT, __version__, ase.__version__]).encode())
        for file in files:
            ends = [file.with_name(name) for name in ("POSCAR", "CONTCAR")]
            for path in ends if file in ends else [file]:
                # What is not there is told of where it is read.
                found = (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ()
                digest.update(json.dumps([os.path.relpath(path, self._base), *found]).encode())
        return digest.hexdigest()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ase_bptt"
