"""Reading pairs from files, folders and databases."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.db.row import AtomsRow

from .formats import format_of, read_frames, read_rows
from .groups import with_groups
from .pairs import InvalidPair, RelaxationPair, check_pair, unwrapped, warn_of_order

log = logging.getLogger(__name__)

VASP = ("vasprun.xml", "vasprun.xml.gz", "OUTCAR", "OUTCAR.gz", "CONTCAR")
"""Files of one VASP run, the preferred first; a CONTCAR counts where a POSCAR is beside it."""
SUFFIXES = (*VASP[:-1], "POSCAR and CONTCAR", ".pwo", ".espresso", ".out", ".extxyz", ".xyz", ".traj", ".db")
"""What a folder is searched for; of the .out files only those of pw.x."""

Load = Callable[[], tuple[Any, ...]]
"""Gives the initial and the relaxed structure, and all frames where there are more."""


class Frames(Sequence[Atoms]):
    """The frames of a file, read anew by each who asks: those of many relaxations would fill the memory."""

    def __init__(self, path: Path, n: int):
        self.path, self._n = path, n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, k: Any) -> Any:
        return read_frames(self.path)[k]

    def __iter__(self) -> Iterator[Atoms]:
        return iter(read_frames(self.path))

    def __repr__(self) -> str:
        return f"Frames({str(self.path)!r}, {self._n})"


def read_pairs(
    initial: str | Path, relaxed: str | Path | None = None, *, skip_invalid: bool = False
) -> list[RelaxationPair]:
    """Read reference relaxations.

    Parameters
    ----------
    initial : path
        A file of one relaxation in any format that ASE reads frame by frame (the first frame is
        the initial structure, the last the relaxed one), or a folder of such files; a CONTCAR with
        a POSCAR beside it; or a database of ase.db whose rows have the key ``relaxed``, False or
        True. With a second argument, a file of initial structures.
    relaxed : path, optional
        A file of the relaxed structures, in the same order.
    skip_invalid : bool
        Leave pairs out that cannot be used, with a warning for each, instead of raising.

    Returns
    -------
    list of RelaxationPair
        Relaxed positions are at the periodic images nearest to the initial ones. The id is
        ``info["id"]`` where the relaxed structure has one, else the path below the one that was given,
        without VASP's own file names.

    Raises
    ------
    FileNotFoundError
        Where there is nothing to read.
    InvalidPair
        Naming the structure, the file and the mend.
    """
    sources = _two_files(Path(initial), Path(relaxed)) if relaxed is not None else _relaxations(Path(initial))
    root = Path(initial if relaxed is None else relaxed)
    pairs, names, problems = [], [], []
    for name, load in sources:
        try:
            pairs.append(_pair(name, root, *load()))
            names.append(_short(name, root))
        except InvalidPair as problem:
            if not skip_invalid:
                raise
            problems.append(problem)
            log.warning("Left out: %s", problem)
    if not pairs:
        raise InvalidPair(f"None of the {len(problems)} pairs in {initial} can be used; the last: {problems[-1]}")
    if problems:
        log.warning("Left out %d of %d.", len(problems), len(sources))
    return with_groups(_told_apart(pairs, names))


def _told_apart(pairs: list[RelaxationPair], names: list[str]) -> list[RelaxationPair]:
    """The same with the path behind each id that is not the only one."""
    count = Counter(p.id for p in pairs)
    return [
        p if count[p.id] == 1 or p.id == name else dataclasses.replace(p, id=f"{p.id} ({name})")
        for p, name in zip(pairs, names, strict=True)
    ]


def _short(name: str, root: Path) -> str:
    """A name that does not depend on how the path to the data was written, nor on what VASP calls its files."""
    short = name.replace(f"{root if root.is_dir() else root.parent}{os.sep}", "", 1)
    kind = next((f"{os.sep}{kind}" for kind in VASP if short.endswith(f"{os.sep}{kind}")), "")
    return short.removesuffix(kind)


def _pair(name: str, root: Path, initial: Atoms, relaxed: Atoms, frames: Sequence[Atoms] = ()) -> RelaxationPair:
    check_pair(initial, relaxed, name)
    relaxed = unwrapped(initial, relaxed)
    warn_of_order(initial, relaxed, name)
    known = relaxed.info.get("id")
    return RelaxationPair(initial, relaxed, _short(name if known is None else str(known), root), frames=frames)


def _relaxations(path: Path) -> list[tuple[str, Load]]:
    """(name, loader) of each relaxation in a file or below a folder."""
    if path.is_dir():
        return [source for file in _found_below(path) for source in _of_file(file)]
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    return _of_file(path)


def _of_file(path: Path) -> list[tuple[str, Load]]:
    if path.suffix in (".db", ".json"):
        return _of_database(path)
    if path.name in ("POSCAR", "CONTCAR"):
        return [(str(path.with_name("CONTCAR")), partial(_poscar_and_contcar, path.parent))]
    return [(str(path), partial(_ends, path))]


def _found_below(folder: Path) -> list[Path]:
    """The files of relaxations, one a run."""
    ours = {path.parent for path in folder.rglob("command.json")}
    every = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    # What ase-bptt wrote there is no reference.
    files = sorted(
        p for p in every if not (ours & set(p.parents)) and not p.name.endswith(".part.traj") and _is_relaxation(p)
    )
    if not files:
        raise FileNotFoundError(
            f"The folder {folder} holds no relaxation: no file that ends with {', '.join(SUFFIXES)}."
        )
    chosen = [file for file in files if not _doubled(file)]
    if len(chosen) < len(files):
        log.info(
            "%s: left out %d files (%s), for a file of the same run beside each is preferred.",
            folder, len(files) - len(chosen), ", ".join(sorted({f.name for f in files if f not in chosen})),
        )  # fmt: skip
    return chosen


def _is_relaxation(file: Path) -> bool:
    if file.name == "CONTCAR":
        return file.with_name("POSCAR").is_file()
    if file.suffix == ".out":
        return format_of(file) is not None
    return file.name.endswith(SUFFIXES)


def _doubled(file: Path) -> bool:
    """Whether a VASP run's other file, which is preferred, tells the same relaxation."""
    kind = next((name for name in VASP if file.name.endswith(name)), None)
    if kind is None:
        return False
    better = [file.with_name(file.name.removesuffix(kind) + name) for name in VASP[: VASP.index(kind)]]
    twin = next((other for other in better if other.is_file()), None)
    if twin is not None:
        log.debug("%s: left out, for %s is the same run.", file, twin)
    return twin is not None


def _ends(path: Path) -> tuple[Atoms, Atoms, Frames]:
    frames = read_frames(path)
    if "relaxation_frames" in frames[-1].info:
        raise InvalidPair(
            f"{path}: ase-bptt relax wrote it, a structure after the other; a reference is the file of one relaxation."
        )
    first, last = (frames[k].info.get("id") for k in (0, -1))
    if None not in (first, last) and first != last:
        log.warning(
            "%s: its first frame is %s and its last %s; is it one relaxation? Of many structures, give two files.",
            path, first, last,
        )  # fmt: skip
    if len(frames) < 2:
        raise InvalidPair(
            f"{path}: it holds {len(frames)} structure; a relaxation needs its first and its last frame, "
            "or give initial and relaxed structures as two files."
        )
    return frames[0], frames[-1], Frames(path, len(frames))


def _poscar_and_contcar(folder: Path) -> tuple[Atoms, Atoms]:
    return read_frames(folder / "POSCAR")[0], read_frames(folder / "CONTCAR")[0]


def _two_files(initial: Path, relaxed: Path) -> list[tuple[str, Load]]:
    folder = next((path for path in (initial, relaxed) if path.is_dir()), None)
    if folder is not None:
        raise InvalidPair(f"{folder} is a folder; give one folder of relaxations, or two files in the same order.")
    first, last = read_frames(initial), read_frames(relaxed)
    if len(first) != len(last):
        raise InvalidPair(
            f"{initial} holds {len(first)} structures and {relaxed} {len(last)}; both need the same, in the same order."
        )
    return [
        (f"structure {k} of {relaxed}", lambda a=a, b=b: (a, b))  # type: ignore[misc]
        for k, (a, b) in enumerate(zip(first, last, strict=True))
    ]


def _of_database(path: Path) -> list[tuple[str, Load]]:
    try:
        matched = _matched(read_rows(path), path)
    except InvalidPair as problem:
        return [(str(path), partial(_refuse, problem))]
    found = []
    for label, named, rows in matched:
        name = f"{label} of {path}"
        found.append((name, partial(_two_rows, name, rows, label if named else name)))
    return found  # type: ignore[return-value]


def _refuse(problem: InvalidPair) -> tuple[Atoms, Atoms]:
    raise problem


def _matched(rows: list[AtomsRow], path: Path) -> list[tuple[str, bool, list[AtomsRow]]]:
    """The rows of each relaxation, with a label and whether the user gave it.

    Rows of one relaxation are told by name, or else by all their keys, or else by their formula.
    """
    marked = [row for row in rows if "relaxed" in row.key_value_pairs]
    if not marked:
        raise InvalidPair(
            f"{path}: none of its {len(rows)} rows has the key relaxed; mark each row with relaxed=False or True."
        )
    if len(marked) < len(rows):
        log.info("%s: left out %d rows, which have no key relaxed.", path, len(rows) - len(marked))
    for key in ("pair", "name"):
        if all(key in row.key_value_pairs for row in marked):
            return [(str(value), True, found) for value, found in _alike(marked, lambda row: row[key]).items()]  # noqa: B023
    for tell in (_other_keys, lambda row: row.formula):
        classes = _alike(marked, tell).values()
        if all(sorted(bool(row["relaxed"]) for row in found) == [False, True] for found in classes):
            return [(f"row {max(row.id for row in found)}", False, found) for found in classes]
    raise InvalidPair(
        f"{path}: which of its rows belong together is not clear; give the two rows of each relaxation "
        "a key pair with the same value."
    )


def _alike(rows: list[AtomsRow], tell: Callable[[AtomsRow], object]) -> dict[object, list[AtomsRow]]:
    found: dict[object, list[AtomsRow]] = {}
    for row in rows:
        found.setdefault(tell(row), []).append(row)
    return found


def _other_keys(row: AtomsRow) -> frozenset[tuple[str, object]]:
    return frozenset(item for item in row.key_value_pairs.items() if item[0] != "relaxed")


def _two_rows(name: str, rows: list[AtomsRow], id: str) -> tuple[Atoms, Atoms]:
    begin, end = ([row for row in rows if bool(row["relaxed"]) is relaxed] for relaxed in (False, True))
    if len(begin) != 1 or len(end) != 1:
        raise InvalidPair(
            f"{name}: {len(begin)} rows have relaxed=False and {len(end)} relaxed=True; a relaxation needs one of each."
        )
    first, last = begin[0].toatoms(), end[0].toatoms()
    last.info.update(end[0].key_value_pairs, id=id)
    return first, last
