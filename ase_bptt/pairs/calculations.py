"""What kind of calculation an output of VASP, pw.x, FHI-aims or CP2K is of, and whether it was finished."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from . import InvalidPair, NotARelaxation

ZIPPED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Compressed files that ASE reads, by the end of their names."""
BLOCK = 2**20
"""Bytes that are read at once."""

CUT = "the run did not finish or the file is cut; let it run to its end, copy it again, or leave it out"
STATIC = "single-point calculation"
DYNAMICS = "molecular dynamics"
BY_IBRION = {
    -1: STATIC,
    0: DYNAMICS,
    5: "finite differences",
    6: "finite differences",
    7: "perturbation theory",
    8: "perturbation theory",
    40: "reaction path",
    44: "saddle point search",
}
"""What else than a relaxation VASP does, by IBRION (https://www.vasp.at/wiki/index.php/IBRION)."""
BY_CALCULATION = {"scf": STATIC, "nscf": STATIC, "bands": STATIC, "md": DYNAMICS, "vc-md": DYNAMICS}
"""Likewise of pw.x, by ``calculation`` (https://www.quantum-espresso.org/Doc/INPUT_PW.html)."""

BY_RUN_TYPE = {
    "ENERGY": STATIC,
    "ENERGY_FORCE": STATIC,
    "MD": DYNAMICS,
    "BAND": "image of a nudged elastic band",
    "VIBRATIONAL_ANALYSIS": "finite differences",
    "NORMAL_MODES": "finite differences",
    "LINEAR_RESPONSE": "perturbation theory",
}
"""Likewise of CP2K, by RUN_TYPE (https://manual.cp2k.org/trunk/CP2K_INPUT/GLOBAL.html)."""


@dataclass(eq=False)
class Run:
    """One run of a program; a file may hold several, one appended to the other.

    Attributes
    ----------
    code : str
        "VASP", "pw.x", "FHI-aims" or "CP2K".
    tags : dict
        Settings, by name, as written.
    signs : set of str
        What the output says of its kind of calculation: "relax", "bfgs", "md", "springs"; and of how it
        ended: "scf failed", "out of steps".
    atoms : tuple of bytes
        The lines of the header that name the atoms.
    potentials : tuple of str
        Titles of the pseudopotentials, in the order of the elements.
    elements : tuple of str
        Of VASP's kinds of atoms, in order; one may come twice.
    valences : dict of str to float
        Valence electrons of an atom, by element.
    labels, moments : dict of bytes to float
        Valence electrons and initial magnetic moments (μB) of an atom, by pw.x's name of its species.
    held : list of bytes
        For each atom the axes along which it is fixed, as b"xyz", where pw.x, FHI-aims or CP2K say so.
    first, final : ndarray, shape (n_atoms, 3), or None
        Fractions at which this run began, and at which the next one would begin, where the file has them.
    counters : list of int
        The numbers of its ionic steps, as it counts them.
    selective : bool
        Whether the OUTCAR says that the POSCAR holds selective dynamics.
    started, ended : bool
        Whether a first step was done, and whether the program's last words are there.
    """

    code: str = "VASP"
    tags: dict[str, str] = field(default_factory=dict)
    signs: set[str] = field(default_factory=set)
    atoms: tuple[bytes, ...] = ()
    potentials: tuple[str, ...] = ()
    elements: tuple[str, ...] = ()
    valences: dict[str, float] = field(default_factory=dict)
    labels: dict[bytes, float] = field(default_factory=dict)
    moments: dict[bytes, float] = field(default_factory=dict)
    held: list[bytes] = field(default_factory=list)
    final: np.ndarray | None = None
    counters: list[int] = field(default_factory=list)
    first: np.ndarray | None = None
    selective: bool = False
    started: bool = False
    ended: bool = False

    def whole(self, name: str) -> int | None:
        """A setting as a whole number; None where it was not found."""
        value = self.tags.get(name, "")
        return int(value) if re.fullmatch(r"-?\d+", value) else None

    def number(self, name: str) -> float | None:
        """A setting as a number; None where it was not found."""
        try:
            return float(self.tags[name])
        except (KeyError, ValueError):
            return None

    def true(self, name: str) -> bool:
        """Whether a setting is switched on."""
        return self.tags.get(name, "F").strip(".").upper().startswith("T")

    def add_potential(self, title: bytes) -> None:
        """Take the title of a pseudopotential over."""
        text = title.decode("ascii", "replace").strip()
        self.potentials = (*self.potentials, *([text] if text not in self.potentials else []))

    def update(self, found: list[tuple[bytes, bytes]]) -> None:
        """Take settings over; the later ones count."""
        self.tags.update((name.decode(), value.decode("ascii", "replace")) for name, value in found)


def opened(path: Path) -> IO[bytes]:
    """The content of a file, decompressed."""
    return ZIPPED.get(path.suffix, open)(path, "rb")  # type: ignore[call-arg]


class Lines:
    """The lines of a file one by one, and steps over many at once: most of an output are steps."""

    def __init__(self, file: IO[bytes]):
        self._file, self._block, self._at = file, b"", 0
        self._known: dict[bytes, int] = {}

    def __iter__(self) -> Iterator[bytes]:
        while self._filled():
            end = self._block.find(b"\n", self._at) + 1 or len(self._block)
            line, self._at = self._block[self._at : end], end
            yield line

    def skip(self, pattern: re.Pattern[bytes] | tuple[bytes, ...]) -> None:
        """Continue with the line in which the pattern, or the first of these words, comes next."""
        while self._filled():
            if isinstance(pattern, tuple):
                # Much faster than a pattern, where there are few words and they are rare.
                at = min((k for word in pattern if (k := self._next(word)) >= 0), default=-1)
            else:
                at = found.start() if (found := pattern.search(self._block, self._at)) else -1
            if at >= 0:
                self._at = max(self._at, self._block.rfind(b"\n", 0, at) + 1)
                return
            self._at = len(self._block)

    def _next(self, word: bytes) -> int:
        """Where a word comes next in the block; -1 where it does not. It is looked for once."""
        known = self._known.get(word, -2)
        if known != -1 and known < self._at:
            known = self._known[word] = self._block.find(word, self._at)
        return known

    def _filled(self) -> bool:
        if self._at >= len(self._block):
            # A line is never divided; what comes without any end of line is no output of a program.
            self._block, self._at = self._file.read(BLOCK) + self._file.readline(64 * BLOCK), 0
            self._known = {}
        return bool(self._block)


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
    run = runs[-1]
    relaxes = "relax" in run.signs or run.whole("NSW") not in (None, 0) or run.tags.get("calculation") == "relax"
    kind = "relaxation of a single step" if relaxes else STATIC
    raise NotARelaxation(
        f"{path}: it holds 1 structure ({kind}); a relaxation needs its first and its last frame.", kind
    )


def check_steps(path: Path, runs: Sequence[Run], n: int) -> None:
    """Raise InvalidPair where the ionic steps that were read are not those that the runs have counted."""
    if not runs or not all(run.counters for run in runs):
        return
    if any(_lost(run) for run in runs) or not _agree(runs, n):
        raise InvalidPair(f"{path}: some of its ionic steps are lost or damaged; copy it again, or leave it out.")


def _lost(run: Run) -> bool:
    """Whether the numbers of its steps are not in order; of VASP one comes again for each electronic step."""
    jumps = {b - a for a, b in zip(run.counters, run.counters[1:], strict=False)}
    # A run of pw.x may continue to count those of another; files of VASP are cut down by leaving steps out.
    return (run.code not in ("pw.x", "CP2K") and run.counters[0] != 1) or (
        min(jumps, default=0) < 0 if run.code == "VASP" else not jumps <= {1}
    )


def _agree(runs: Sequence[Run], n: int) -> bool:
    """Whether so many steps were counted."""
    if runs[0].code == "VASP":
        return n == sum(len(set(run.counters)) for run in runs)
    if len(runs) > 1 or runs[0].code == "CP2K":
        return True
    last, said = runs[0].counters[-1], runs[0].whole("scf cycles")
    if runs[0].code == "pw.x":
        if said is None:
            return "bfgs" not in runs[0].signs or "out of steps" in runs[0].signs
        return runs[0].counters[0] != 1 or "cell moves" in runs[0].signs or n == said
    return n in (last, last + 1)


def _another_kind(run: Run) -> tuple[str, str] | None:
    """The kind of a calculation that is no relaxation, and the sign of it."""
    if run.code == "VASP":
        return _of_vasp(run)
    if "md" in run.signs:
        return DYNAMICS, f"{run.code} says so"
    if run.code == "pw.x":
        return _of_pw(run)
    if run.code == "CP2K":
        return _of_cp2k(run)
    return None if "relax" in run.signs else (STATIC, "no relax_geometry")


def _of_pw(run: Run) -> tuple[str, str] | None:
    # What the output says of itself counts more than an input that lies beside it.
    calculation = "" if "relax" in run.signs else run.tags.get("calculation", "")
    if calculation in BY_CALCULATION:
        return BY_CALCULATION[calculation], f"calculation = {calculation}"
    return (STATIC, "nstep = 0") if calculation and run.whole("nstep") == 0 else None


def _of_cp2k(run: Run) -> tuple[str, str] | None:
    kind = run.tags.get("run type", "GEO_OPT")
    if "dimer" in run.signs:
        return "saddle point search", "DIMER"
    return None if kind in ("GEO_OPT", "CELL_OPT") else (BY_RUN_TYPE.get(kind, kind), f"RUN_TYPE {kind}")


def _of_vasp(run: Run) -> tuple[str, str] | None:
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
    if run.true("ML_LMLFF"):
        return "machine-learned force field", "ML_LMLFF = T"
    return None
