"""Which files of a folder may be relaxations."""

from __future__ import annotations

import logging
from pathlib import Path

from .calculations import ZIPPED
from .formats import NAMES, VASP, VaspFile, format_of

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
        p for p in every if not (ours & set(p.parents)) and not p.name.endswith(".part.traj") and _is_relaxation(p)
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
    if plain.endswith(".out"):
        return format_of(file) is not None
    return plain.endswith(tuple(NAMES)) or file.suffix == ".db"


def _preference(file: Path) -> tuple[int, int]:
    """Lower for the better of several files of a run: by its name, then not compressed."""
    vasp = VaspFile.named(file)
    return (list(VASP).index(vasp.kind) if vasp else 0, int(file.suffix in ZIPPED))
