"""What kind of calculation an output of VASP or pw.x is of, by its header, and whether it was finished."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from . import InvalidPair, NotARelaxation

CUT = "the run did not finish or the file is cut; let it run to its end, copy it again, or leave it out"
STATIC = "single-point calculation"
ZIPPED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Compressed files that ASE reads, by the end of their names."""
TAGS = rb"IBRION|NSW|ISIF|MDALGO|ML_LMLFF|IMAGES|ICHAIN"
IN_XML = re.compile(rb'name="(' + TAGS + rb')"[^>]*>\s*([^<\s]+)')
IN_OUTCAR = re.compile(rb"(?:^|[\s;,])(" + TAGS + rb")(?:\s*=\s*|\s+)([-\w.]+)")
BY_IBRION = {
    -1: STATIC,
    0: "molecular dynamics",
    5: "finite differences",
    6: "finite differences",
    7: "perturbation theory",
    8: "perturbation theory",
    40: "reaction path",
    44: "saddle point search",
}
"""What else than a relaxation VASP does, by IBRION (https://www.vasp.at/wiki/index.php/IBRION)."""


@dataclass(eq=False)
class Run:
    """One run of a program; a file may hold several, one appended to the other.

    Attributes
    ----------
    tags : dict
        VASP's settings, by name, as written.
    signs : set of str
        What pw.x says of its kind of calculation: "relax", "md".
    atoms : tuple of bytes
        The lines of the header that name the atoms.
    selective : bool
        Whether the OUTCAR says that the POSCAR holds selective dynamics.
    started, ended : bool
        Whether VASP did a first step, and whether the program's last words are there.
    """

    tags: dict[str, str] = field(default_factory=dict)
    signs: set[str] = field(default_factory=set)
    atoms: tuple[bytes, ...] = ()
    selective: bool = False
    started: bool = False
    ended: bool = False

    def whole(self, name: str) -> int | None:
        """A setting as a whole number; None where it was not found."""
        value = self.tags.get(name, "")
        return int(value) if re.fullmatch(r"-?\d+", value) else None


def opened(path: Path) -> IO[bytes]:
    """The content of a file, decompressed."""
    return ZIPPED.get(path.suffix, open)(path, "rb")  # type: ignore[call-arg]


def runs_in(path: Path, format: str | None) -> list[Run]:
    """The runs that a file of this format (ASE's name) holds, in order; none of what is not VASP's or pw.x's."""
    scan = SCANS.get(format or "")
    if scan is None:
        return []
    with opened(path) as file:
        return list(scan(file))


def check_finished(path: Path, runs: Sequence[Run]) -> None:
    """Raise InvalidPair unless the last run was finished, and all are of the same atoms."""
    if not runs or not runs[-1].ended:
        raise InvalidPair(f"{path}: {CUT}.")
    if any(run.atoms != runs[0].atoms for run in runs):
        raise InvalidPair(
            f"{path}: {len(runs)} runs of different atoms are appended to each other; give each run a file of its own."
        )


def check_kind(path: Path, runs: Sequence[Run]) -> None:
    """Raise NotARelaxation where a run is of another kind of calculation."""
    for run in runs:
        if found := _another_kind(run):
            kind, sign = found
            raise NotARelaxation(f"{path}: it is no relaxation ({kind}, {sign}); leave it out.", kind)


def check_length(path: Path, runs: Sequence[Run], n: int) -> None:
    """Raise NotARelaxation where a finished run has a single ionic step."""
    if n != 1 or not (runs and runs[-1].ended):
        return
    relaxes = "relax" in runs[-1].signs or runs[-1].whole("NSW") not in (None, 0)
    kind = "relaxation of a single step" if relaxes else STATIC
    raise NotARelaxation(
        f"{path}: it holds 1 structure ({kind}); a relaxation needs its first and its last frame.", kind
    )


def run_of_incar(path: Path) -> Run:
    """The run that an INCAR asks for."""
    with opened(path) as file:
        lines = (line.partition(b"#")[0].partition(b"!")[0] for line in file)
        return Run({k.decode(): v.decode() for line in lines for k, v in IN_OUTCAR.findall(line.upper())})


def _another_kind(run: Run) -> tuple[str, str] | None:
    """The kind of a calculation that is no relaxation, and the sign of it."""
    if "md" in run.signs:
        return BY_IBRION[0], "pw.x says so"
    images, chain, ibrion = run.whole("IMAGES"), run.whole("ICHAIN"), run.whole("IBRION")
    if images:
        return "image of a nudged elastic band", f"IMAGES = {images}"
    if "springs" in run.signs and images is None:
        return "image of a nudged elastic band", "NEB: SPRING"
    if chain:
        return "saddle point search", f"ICHAIN = {chain}"
    if run.whole("NSW") == 0:
        return STATIC, "NSW = 0"
    if ibrion in BY_IBRION:
        return BY_IBRION[ibrion], f"IBRION = {ibrion}"
    if run.tags.get("ML_LMLFF", "F").strip(".").upper().startswith("T"):
        return "machine-learned force field", "ML_LMLFF = T"
    return None


def _of_vasprun(file: IO[bytes]) -> Iterator[Run]:
    run = None
    for line in file:
        if b"<modeling>" in line:
            if run is not None:
                yield run
            run = Run()
        if run is None:
            continue
        if not run.started:
            # The settings in effect come after those of the INCAR, and replace them.
            run.tags.update((k.decode(), v.decode()) for k, v in IN_XML.findall(line))
            run.started = b"<calculation" in line
        run.ended = run.ended or b"</modeling>" in line
    if run is not None:
        yield run


HEADER = re.compile(
    rb"POTCAR:|^ vasp\.\d|ions per type|General timing and accounting|Iteration|selective dynamics|NEB: "
)
OUTCAR_ENDS = (b"General timing", b"POTCAR:", b" vasp.")
"""What may follow the first step of a run, of what the regular expression looks for: most lines are steps."""


def _of_outcar(file: IO[bytes]) -> Iterator[Run]:
    run, titled = None, False
    for line in file:
        if run is not None and (run.started or run.ended) and not any(word in line for word in OUTCAR_ENDS):
            continue
        mark = HEADER.search(line)
        found = mark.group() if mark else b""
        if found.startswith(b" vasp.") or (found == b"POTCAR:" and (run is None or run.started or run.ended)):
            if run is not None and titled:
                yield run
                run = None
            run = run or Run()
            titled = False
        if run is None:
            continue
        if found in (b"POTCAR:", b"ions per type") and not run.started:
            titled = titled or found == b"POTCAR:"
            run.atoms = (*run.atoms, line.strip())
        elif found == b"Iteration":
            run.started = True
        elif found.startswith(b"General"):
            run.ended = titled
        elif found == b"selective dynamics" and b"using" in line:
            run.selective = True
        elif found == b"NEB: " and b"SPRING" in line:
            run.signs.add("springs")
        if not (run.started or run.ended):
            run.tags.update((k.decode(), v.decode()) for k, v in IN_OUTCAR.findall(line))
    if run is not None:
        yield run


PW = re.compile(
    rb"Program PWSCF|JOB DONE|number of atoms/cell|number of atomic types|Geometry Optimization|bfgs|Damped|"
    rb"Molecular Dynamics Calculation|Entering Dynamics|Langevin Dynamics"
)
PW_SIGNS = {b"Geometry Optimization": "relax", b"bfgs": "relax", b"Damped": "relax"}


def _of_pw(file: IO[bytes]) -> Iterator[Run]:
    run = None
    for line in file:
        mark = PW.search(line)
        if mark is None:
            continue
        found = mark.group()
        if found == b"Program PWSCF":
            if run is not None:
                yield _told(run)
            run = Run()
        elif run is not None and found == b"JOB DONE":
            run.ended = True
        elif run is not None and found.startswith(b"number"):
            run.atoms = (*run.atoms, line.strip())
        elif run is not None:
            run.signs.add(PW_SIGNS.get(found, "md"))
    if run is not None:
        yield _told(run)


def _told(run: Run) -> Run:
    """Damped dynamics, which ends in a minimum, is a relaxation."""
    return Run(
        run.tags, run.signs - {"md"} if "relax" in run.signs else run.signs, run.atoms, started=True, ended=run.ended
    )


SCANS = {"vasp-xml": _of_vasprun, "vasp-out": _of_outcar, "espresso-out": _of_pw}
