"""The formats that relaxations come in, and which files of a folder are relaxations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read

from ..threads import quiet
from . import InvalidPair
from .calculations import CUT, SCANS, Run, check_finished, runs_in

log = logging.getLogger(__name__)
NAMES = {
    "vasprun.xml": "vasp-xml",
    "vasprun.xml.gz": "vasp-xml",
    "OUTCAR": "vasp-out",
    "OUTCAR.gz": "vasp-out",
    "POSCAR": "vasp",
    "CONTCAR": "vasp",
    ".pwo": "espresso-out",
    ".espresso": "espresso-out",
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".traj": "traj",
}
"""How a file's name ends, and ASE's name of its format; ASE guesses all others."""
KEPT = ("energy", "free_energy", "forces", "stress", "magmom", "magmoms")
"""Results that stay with a frame: eigenvalues of thousands of frames would fill the memory."""
VASP = ("vasprun.xml", "vasprun.xml.gz", "OUTCAR", "OUTCAR.gz", "CONTCAR")
"""Files of one VASP run, the preferred first; a CONTCAR counts where a POSCAR is beside it."""
SUFFIXES = (*VASP[:-1], "POSCAR and CONTCAR", ".pwo", ".espresso", ".out", ".extxyz", ".xyz", ".traj", ".db")
"""What a folder is searched for; of the .out files only those of pw.x."""


def read_frames(path: Path, runs: Sequence[Run] | None = None) -> list[Atoms]:
    """All frames of a file, in order, with energies and forces where the file holds them; one at least.

    The runs are those that `examined` found there; without them the file is examined first.

    Raises
    ------
    FileNotFoundError
    InvalidPair
        Where the file is empty, cut, of a run that did not finish, or not readable by ASE.
    """
    runs = examined(path) if runs is None else runs
    kind = format_of(path)
    if kind in SCANS:
        check_finished(path, runs)
    with readable(path, finished=bool(runs)):
        if kind in WHOLE:
            WHOLE[kind](path)
        # Without a step, ASE calls an OUTCAR incomplete.
        stepped = not runs or any(run.begun for run in runs)
        found = read(path, index=":", format=kind, do_not_split_by_at_sign=True) if stepped else []
    frames = [found] if isinstance(found, Atoms) else list(found)
    if not frames:
        raise InvalidPair(f"{path}: it holds 0 structures; its run ended before its first step: leave it out.")
    for frame in frames:
        if frame.calc is not None:
            kept = {name: value for name, value in frame.calc.results.items() if name in KEPT}
            frame.calc = SinglePointCalculator(frame, **kept)
    return frames


def examined(path: Path) -> list[Run]:
    """The runs that a file of VASP or pw.x holds, as their headers describe them; none of another format.

    Raises
    ------
    FileNotFoundError
    InvalidPair
        Where the file is empty or cannot be decompressed.
    """
    check_content(path)
    with readable(path):
        return runs_in(path, format_of(path))


def format_of(path: Path) -> str | None:
    """ASE's name of the format; None leaves it to ASE to guess."""
    known = next((kind for end, kind in NAMES.items() if path.name.endswith(end)), None)
    if known is None and path.suffix == ".out":
        # Many programs write such names; pw.x prints its own name first.
        with open(path, "rb") as file:
            return "espresso-out" if b"Program PWSCF" in file.read(50_000) else None
    return known


def check_content(path: Path) -> None:
    """Raise FileNotFoundError or InvalidPair where there is nothing in a file."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise InvalidPair(
            f"{path}: it is empty; its run died before it wrote a structure: run it again or leave it out."
        )


@contextmanager
def readable(path: Path, *, finished: bool = False) -> Iterator[None]:
    """Turn any error of ASE's readers into an InvalidPair of one sentence, and silence their warnings.

    What is known to be the output of a finished run is not said to be cut.
    """
    try:
        with quiet():
            yield
    except InvalidPair:
        raise
    except EOFError as error:
        raise InvalidPair(f"{path}: {CUT}.") from error
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        if finished:
            raise InvalidPair(
                f"{path}: its run has finished, but ASE's reader fails on it ({said}); convert it with another "
                "program, or leave it out."
            ) from error
        raise InvalidPair(
            f"{path}: ASE cannot read it ({said}), so it is cut or of another format; write or copy it again."
        ) from error


def _check_xyz(path: Path) -> None:
    """Raise InvalidPair where a structure has fewer lines than atoms, or ASE would stop at an empty line."""
    lines = path.read_text().splitlines(keepends=True)
    at = structures = 0
    while at < len(lines) and lines[at].strip():
        end = at + 2 + int(lines[at])
        if end > len(lines) or (end == len(lines) and _is_cut(lines)):
            raise InvalidPair(f"{path}: it is cut within structure {structures}; copy or write it again.")
        at, structures = end, structures + 1
        while at < len(lines) and lines[at].lstrip().startswith("VEC"):
            at += 1
    if any(line.strip() for line in lines[at:]):
        raise InvalidPair(f"{path}: line {at + 1} is empty and ASE would read no further; remove the line.")


def _check_poscar(path: Path) -> None:
    """Raise InvalidPair where there are fewer whole lines of positions than atoms."""
    lines = path.read_text().splitlines(keepends=True)
    words = [line.split() for line in lines]
    counts = 5 if len(words) > 5 and words[5] and words[5][0].isdigit() else 6
    if len(lines) > counts + 1:
        n_atoms = sum(int(word) for word in takewhile(str.isdigit, words[counts]))
        first = counts + 2 + (words[counts + 1][:1] != [] and words[counts + 1][0][0] in "sS")
        rows = words[first : first + n_atoms]
        whole = len(lines) > first + n_atoms or not _is_cut(lines)
        if whole and len(rows) == n_atoms and all(len(row) >= 3 for row in rows):
            return
    raise InvalidPair(f"{path}: it is cut: it holds fewer positions than atoms; copy it again or leave it out.")


def _is_cut(lines: list[str]) -> bool:
    """Whether the last line has no end, and is shorter than the line before: its last number may be half a number."""
    return not lines[-1].endswith("\n") and len(lines[-1].rstrip()) < len(lines[-2].rstrip())


WHOLE: dict[str, Callable[[Path], None]] = {"extxyz": _check_xyz, "vasp": _check_poscar}
"""Formats in which ASE does not notice every truncated file."""


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
    """Whether a preferred file of the same VASP run is beside this one."""
    kind = next((name for name in VASP if file.name.endswith(name)), None)
    if kind is None:
        return False
    better = [file.with_name(file.name.removesuffix(kind) + name) for name in VASP[: VASP.index(kind)]]
    twin = next((other for other in better if other.is_file()), None)
    if twin is not None:
        log.debug("%s: left out, for %s is the same run.", file, twin)
    return twin is not None
