"""Reading pairs from files and folders."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ase import Atoms

from .formats import read_frames
from .groups import with_groups
from .pairs import InvalidPair, RelaxationPair, check_pair

log = logging.getLogger(__name__)

SUFFIXES = (".extxyz", ".xyz", ".traj", "vasprun.xml", "vasprun.xml.gz", "OUTCAR", ".pwo", ".espresso")
VASP = ("vasprun.xml", "vasprun.xml.gz", "OUTCAR")
"""Files of one VASP run, the preferred first."""


def read_pairs(
    initial: str | Path, relaxed: str | Path | None = None, *, skip_invalid: bool = False
) -> list[RelaxationPair]:
    """Read reference relaxations.

    Parameters
    ----------
    initial : path
        A file of one relaxation in any format that ASE reads frame by frame (the first frame is
        the initial structure, the last the relaxed one), or a folder of such files; with a second
        argument, a file of initial structures.
    relaxed : path, optional
        A file of the relaxed structures, in the same order.
    skip_invalid : bool
        Leave pairs out that cannot be used, with a warning for each, instead of raising.

    Raises
    ------
    FileNotFoundError
        Where there is nothing to read.
    InvalidPair
        Naming the structure, the file and the mend.
    """
    sources = _two_files(Path(initial), Path(relaxed)) if relaxed is not None else _relaxations(Path(initial))
    pairs, problems = [], []
    for name, load in sources:
        try:
            first, last = load()
            check_pair(first, last, name)
            pairs.append(RelaxationPair(first, last, _identity(last, name)))
        except InvalidPair as problem:
            if not skip_invalid:
                raise
            problems.append(str(problem))
    for left_out in problems:
        log.warning("Left out: %s", left_out)
    if not pairs:
        raise InvalidPair(f"None of the {len(problems)} pairs in {initial} can be used; the last: {problems[-1]}")
    return with_groups(pairs)


Load = Callable[[], tuple[Atoms, Atoms]]


def _relaxations(path: Path) -> list[tuple[str, Load]]:
    """(name, loader) of each relaxation in a file or below a folder."""
    if path.is_file():
        return [(str(path), lambda: _ends(path))]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    if not files:
        raise FileNotFoundError(f"The folder {path} holds no relaxation: no file that ends with {', '.join(SUFFIXES)}.")
    chosen = [file for file in files if not _doubled(file)]
    return [(str(file), lambda file=file: _ends(file)) for file in chosen]  # type: ignore[misc]


def _doubled(file: Path) -> bool:
    """Whether a VASP run's other file, which is preferred, tells the same relaxation."""
    better = VASP[: VASP.index(file.name)] if file.name in VASP else ()
    twin = next((name for name in better if (file.parent / name).is_file()), None)
    if twin is not None:
        log.info("%s: left out, for %s beside it is the same run.", file, twin)
    return twin is not None


def _ends(path: Path) -> tuple[Atoms, Atoms]:
    frames = read_frames(path)
    if len(frames) < 2:
        raise InvalidPair(
            f"{path}: it holds {len(frames)} structure; a relaxation needs its first and its last frame, "
            "or give initial and relaxed structures as two files."
        )
    return frames[0], frames[-1]


def _two_files(initial: Path, relaxed: Path) -> list[tuple[str, Load]]:
    first, last = read_frames(initial), read_frames(relaxed)
    if len(first) != len(last):
        raise InvalidPair(
            f"{initial} holds {len(first)} structures and {relaxed} {len(last)}; both need the same, in the same order."
        )
    return [
        (f"structure {k} of {relaxed}", lambda a=a, b=b: (a, b))  # type: ignore[misc]
        for k, (a, b) in enumerate(zip(first, last, strict=True))
    ]


def _identity(atoms: Atoms, name: str) -> str:
    known = atoms.info.get("id")
    return str(known) if known is not None else name
