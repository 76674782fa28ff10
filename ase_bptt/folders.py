"""Which files in a folder are relaxations, one a run."""

from __future__ import annotations

import logging
from pathlib import Path

from .formats import format_of

log = logging.getLogger(__name__)

VASP = ("vasprun.xml", "vasprun.xml.gz", "OUTCAR", "OUTCAR.gz", "CONTCAR")
"""Files of one VASP run, the preferred first; a CONTCAR counts where a POSCAR is beside it."""
SUFFIXES = (*VASP[:-1], "POSCAR and CONTCAR", ".pwo", ".espresso", ".out", ".extxyz", ".xyz", ".traj", ".db")
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
            folder, len(files) - len(chosen), ", ".join(sorted({f.name for f in {*files} - {*chosen}})),
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
