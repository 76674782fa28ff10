"""The formats that relaxations come in, how their files are called, and how they are read."""

from __future__ import annotations

import logging
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import takewhile
from pathlib import Path
from typing import ClassVar

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read

from ..threads import quiet
from . import InvalidPair
from .calculations import CUT, ZIPPED, Run, check_finished, opened
from .cp2k import BEGINS, CP2K, frames_of_cp2k
from .scans import SCANS, runs_in

log = logging.getLogger(__name__)
NAMES = {
    ".pwo": "espresso-out",
    ".espresso": "espresso-out",
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".traj": "traj",
}
"""How a file's name ends, and ASE's name of its format; VASP's are known by `VaspFile`, others by what they hold."""
VASP = {"vasprun": "vasp-xml", "OUTCAR": "vasp-out", "CONTCAR": "vasp", "POSCAR": "vasp"}
"""VASP's names, the preferred first, and ASE's of their formats."""
FIRST_WORDS = {"vasp-xml": (b"<modeling>", b"<?xml"), "vasp-out": (b"POTCAR:", b" vasp.", b"INCAR:"), "vasp": (b"\n",)}
"""One of these stands near the beginning of a file of VASP."""
NAMED = {"espresso-out": b"Program PWSCF", "aims-output": b"Invoking FHI-aims", CP2K: BEGINS}
"""What these programs say of themselves."""
BEFORE_VELOCITIES = re.compile("cart|direct|lattice", re.IGNORECASE)
"""What may stand between positions and velocities in a POSCAR, if no empty line does."""
ARRAY = re.compile(rb'"ndarray": \[\[([\d, ]*)\], "\w+", (\d+)\]')
"""An array in the description of a frame of a .traj: its shape, and where it begins."""
HEAVIEST, FAR = 118, 1e5
"""The last element, and Å: a position farther from the origin is a mistake."""
KEPT = ("energy", "free_energy", "forces", "stress", "magmom", "magmoms")
"""Results that stay with a frame: eigenvalues of thousands of frames would fill the memory."""


@dataclass(frozen=True)
class VaspFile:
    """A name that VASP gave a file, with what archives add to it: ``run1.vasprun.xml``, ``OUTCAR.relax2.gz``.

    Attributes
    ----------
    path : Path
    before, kind, tag : str
        Parts of the name: a prefix, one of `VASP`, and what follows it, without .xml and without .gz.
    """

    path: Path
    before: str
    kind: str
    tag: str

    PATTERN: ClassVar = re.compile(
        r"(?P<before>.*?)(?P<kind>vasprun|OUTCAR|CONTCAR|POSCAR)(?P<tag>(?:[._-].+?)??)(?:\.gz|\.bz2|\.xz)?"
    )

    @classmethod
    def named(cls, path: Path) -> VaspFile | None:
        """The parts of a file's name, or None for another name."""
        found = cls.PATTERN.fullmatch(path.name)
        if found is None or (found["kind"] == "vasprun" and ".xml" not in found["tag"]):
            return None
        return cls(path, found["before"], found["kind"], found["tag"].replace(".xml", "", 1))

    @property
    def run(self) -> tuple[Path, str, str]:
        """What it shares with the other files of its run."""
        return self.path.parent, self.before, self.tag

    def other(self, kind: str, tag: str | None = None) -> Path | None:
        """Another file of the same run, zipped or not, or of the run with another tag."""
        name = f"{self.before}{kind}{'.xml' * (kind == 'vasprun')}{self.tag if tag is None else tag}"
        paths = (self.path.with_name(name + zipped) for zipped in ("", *ZIPPED))
        return next((path for path in paths if path.is_file()), None)


def read_frames(
    path: Path, runs: Sequence[Run] | None = None, *, ends_only: bool = False, limit: float = FAR
) -> list[Atoms]:
    """All frames of a file, in order, with energies and forces where the file holds them; one at least.

    The runs are those that `examined` found there; without them the file is examined first. Results that are not `KEPT`
    are taken from all frames, or from both ends where only these are wanted. Places beyond the limit, in Å, are damage.

    FileNotFoundError, or InvalidPair where it is empty, cut, of a run that did not finish, or not readable by ASE.
    """
    runs = examined(path) if runs is None else runs
    kind = format_of(path)
    if kind in SCANS:
        check_finished(path, runs)
    with readable(path, finished=bool(runs)):
        if kind in WHOLE:
            WHOLE[kind](path)
        # Without a step, ASE calls an OUTCAR incomplete.
        stepped = not runs or any(run.started for run in runs)
        found = _read(path, kind, runs) if stepped else []
    frames = [found] if isinstance(found, Atoms) else list(found)
    if not frames:
        why = "its run ended before its first step: " * bool(runs)
        raise InvalidPair(f"{path}: it holds 0 structures; {why}leave it out.")
    for k, frame in enumerate((frames[0], frames[-1]) if ends_only else frames):
        # ASE takes what a damaged file says.
        far = np.isfinite(frame.positions) & (np.abs(frame.positions) > limit)
        forces = getattr(frame.calc, "results", {}).get("forces")
        shaped = forces is None or np.shape(forces) == frame.positions.shape
        if far.any() or not shaped or not ((frame.numbers >= 0) & (frame.numbers <= HEAVIEST)).all():
            raise InvalidPair(
                f"{path}: an element, a place or a force in structure {k} is not possible; copy it again."
            )
        if frame.calc is not None:
            known = {name: value for name, value in frame.calc.results.items() if value is not None}
            kept = {name: value for name, value in known.items() if name in KEPT}
            frame.calc = SinglePointCalculator(frame, **kept)
    return frames


def _read(path: Path, kind: str | None, runs: Sequence[Run]) -> Atoms | list[Atoms]:
    if kind == CP2K:
        return frames_of_cp2k(path, runs)
    if kind == "vasp-xml":
        with opened(path) as file:
            return read(BytesIO(_without_bands(file.read())), index=":", format=kind)
    return read(path, index=":", format=kind, do_not_split_by_at_sign=True)


def examined(path: Path) -> list[Run]:
    """The runs that a file of VASP or pw.x holds, as their headers describe them; none of another format.

    FileNotFoundError or InvalidPair where there is none, it is empty, or cannot be decompressed.
    """
    check_content(path)
    with readable(path):
        return runs_in(path, format_of(path))


def format_of(path: Path) -> str | None:
    """ASE's name of the format; None leaves it to ASE to guess."""
    vasp, zipped = VaspFile.named(path), path.suffix in ZIPPED
    if vasp is not None and not vasp.tag:
        return VASP[vasp.kind]
    plain = path.name.removesuffix(path.suffix) if zipped else path.name
    known = next((kind for end, kind in NAMES.items() if plain.endswith(end)), None)
    return known or (_format_by_content(path, vasp) if path.is_file() else None)


def _format_by_content(path: Path, vasp: VaspFile | None) -> str | None:
    """Known by what VASP or pw.x writes first; of pw.x, lines of the machine may stand before."""
    try:
        with opened(path) as file:
            text = file.read(2**16)
            for kind in (VASP[vasp.kind],) if vasp else ("vasp-xml", "vasp-out"):
                words = FIRST_WORDS[kind] if vasp else FIRST_WORDS[kind][:1]
                if any(word in text[:4096] for word in words):
                    return kind
            while text:
                for kind, word in NAMED.items():
                    if word in text:
                        return kind
                text = text[-64:] + more if (more := file.read(2**20)) else b""
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        pass  # what cannot be decompressed is refused where it is read
    return None


def _without_bands(text: bytes) -> bytes:
    """A vasprun.xml without eigenvalues, projections and densities of states: most of it, and none is `KEPT`."""
    for name in (b"projected", b"eigenvalues", b"dos"):
        begins, ends, parts, at = b"<%s>" % name, b"</%s>" % name, list[bytes](), 0
        while (begin := text.find(begins, at)) >= 0 and (end := text.find(ends, begin)) >= 0:
            if text.find(b"<calculation", begin, end) >= 0:
                # One end is lost; what comes next must not be lost with it.
                break
            parts.append(text[at:begin])
            at = end + len(ends)
        text = b"".join([*parts, text[at:]])
    return text


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
    lines = _lines(path)
    at = structures = 0
    while at < len(lines) and lines[at].strip():
        end = at + 2 + int(lines[at])
        if end > len(lines) or (end == len(lines) and _is_cut(lines)):
            raise InvalidPair(f"{path}: it is cut within structure {structures}; copy or write it again.")
        columns = re.search(r"Properties=[\"']?([\w:]+)", lines[at + 1])
        if columns and sum(map(int, re.findall(r":(\d+)", columns[1]))) > len(lines[end - 1].split()):
            raise InvalidPair(f"{path}: structure {structures} has fewer columns than it names; write it again.")
        at, structures = end, structures + 1
        while at < len(lines) and lines[at].lstrip().startswith("VEC"):
            at += 1
    if any(line.strip() for line in lines[at:]):
        raise InvalidPair(f"{path}: line {at + 1} is empty and ASE would read no further; remove the line.")


def _check_poscar(path: Path) -> None:
    """Raise InvalidPair where there are fewer whole lines of positions than atoms."""
    lines = _lines(path)
    words = [line.split() for line in lines]
    counts = 5 if len(words) > 5 and words[5] and words[5][0].isdigit() else 6
    if len(lines) > counts + 1:
        n_atoms = sum(int(word) for word in takewhile(str.isdigit, words[counts]))
        first = counts + 2 + (words[counts + 1][:1] != [] and words[counts + 1][0][0] in "sS")
        rows = words[first : first + n_atoms]
        whole = len(lines) > first + n_atoms or not _is_cut(lines)
        if whole and len(rows) == n_atoms and all(len(row) >= 3 for row in rows):
            follows = " ".join(words[first + n_atoms]) if len(words) > first + n_atoms else ""
            if follows and not BEFORE_VELOCITIES.match(follows):
                raise InvalidPair(f"{path}: it holds more positions than atoms; copy it again or leave it out.")
            return
    raise InvalidPair(f"{path}: it is cut: it holds fewer positions than atoms; copy it again or leave it out.")


def _check_traj(path: Path) -> None:
    """Raise InvalidPair where a .traj says that it holds more than its bytes: ASE would ask for as much memory."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(48)
        n, place = np.frombuffer(head[32:48].ljust(16, b"\0"), "<i8").tolist()
        whole = head[:8] == b"- of Ulm" and 0 <= n <= size and 0 <= place <= size - 8 * n
        file.seek(place if whole else 0)
        for offset in np.frombuffer(file.read(8 * n), "<i8").tolist() if whole else ():
            file.seek(max(0, min(offset, size)))
            length = int.from_bytes(file.read(8).ljust(8, b"\0"), "little", signed=True)
            whole = whole and 0 <= offset < size and 0 <= length < size
            for shape, begin in ARRAY.findall(file.read(length) if whole else b""):
                bytes_at_least = math.prod(map(int, shape.split(b","))) if shape else 1
                whole = whole and int(begin) + bytes_at_least <= size
    if not whole:
        raise InvalidPair(f"{path}: it is cut or damaged; copy or write it again.")


def _lines(path: Path) -> list[str]:
    with opened(path) as file:
        return file.read().decode().splitlines(keepends=True)


def _is_cut(lines: list[str]) -> bool:
    """Whether the last line has no end, and is shorter than the line before: its last number may be half a number."""
    return not lines[-1].endswith("\n") and len(lines[-1].rstrip()) < len(lines[-2].rstrip())


WHOLE: dict[str, Callable[[Path], None]] = {"extxyz": _check_xyz, "vasp": _check_poscar, "traj": _check_traj}
"""Formats in which ASE does not notice every truncated file."""
