"""Relaxations of CP2K: the header of an output, and its structures, most of which are in the files beside it.

The output has the first structure, and cell and energy of each step; ``PROJECT-pos-1.xyz`` has the other positions (or
``PROJECT-1.restart`` the last), ``PROJECT-frc-1.xyz`` forces, ``PROJECT-1.cell`` cells with more digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import cellpar_to_cell
from ase.units import Bohr, Hartree

from . import InvalidPair, NotARelaxation
from .calculations import DYNAMICS, ZIPPED, Lines, Run, opened

CP2K = "cp2k-output"
"""Our name of the format: ASE has none."""
BEGINS = b"CP2K| version string"
WORDS = re.compile(
    rb"CP2K\| version string|PROGRAM ENDED AT|GLOBAL\| (?:Run type|Project name)|CP2K\| Input file|DFT\| Charge|"
    rb"FUNCTIONAL\| [A-Za-z][\w-]*:|QS\| Density cutoff|ATOMIC COORDINATES IN|Atomic kind:|"
    rb"GTH Potential info|"
    rb"STARTING .*OPTIMIZATION|OPTIMIZATION COMPLETED|MAXIMUM NUMBER OF OPTIMIZATION STEPS|SCF run|DIMER|"
    rb"Informations at step|OPT\| Step number|Max\. gradient|OPT\| Maximum gradient  "
)
IN_INPUT = re.compile(
    rb"^\s*(EXTERNAL_PRESSURE|KEEP_ANGLES|CONSTRAINT)\b[ \t]+(\S[^\n!#]*?)\s*$", re.IGNORECASE | re.MULTILINE
)
FIXED = re.compile(rb"&FIXED_ATOMS\b(.*?)&END", re.IGNORECASE | re.DOTALL)
IN_FIXED = re.compile(rb"^\s*(LIST|COMPONENTS_TO_FIX)\b[ \t]+(\S[^\n!#]*)", re.IGNORECASE | re.MULTILINE)
STEP = re.compile(rb"\s*i =\s*(\d+),(\s*time =[^,]*,)?\s*E =")


def of_cp2k(lines: Lines) -> Iterator[Run]:
    """The runs that an output of CP2K holds."""
    run, kind = None, ""
    lines.skip(WORDS)
    for line in lines:
        mark = WORDS.search(line)
        found = mark.group() if mark else b""
        last = line.split()[-1:] or [b""]
        if found == BEGINS:
            yield from () if run is None else (run,)
            run = Run("CP2K")
        elif run is None:
            pass
        elif found.startswith((b"GLOBAL", b"DFT", b"CP2K| Input")):
            names = {b"Run": b"run type", b"Project": b"project", b"Input": b"input", b"Charge": b"tot_charge"}
            run.update([(names[found.split()[1]], last[0])])
        elif found.startswith(b"FUNCTIONAL"):
            named = run.tags.get("Exchange-correlation", "").split()
            run.tags["Exchange-correlation"] = " ".join(dict.fromkeys([*named, found[12:-1].decode()]))
        elif found.startswith(b"QS|"):
            # A Hartree is two Rydberg.
            run.tags["kinetic-energy cutoff"] = f"{2 * _number(last[0]):g}"
        elif found.startswith(b"Atomic kind"):
            kind = line.split(b":")[1].split()[0].decode("ascii", "replace")
        elif found.startswith(b"GTH"):
            run.add_potential(f"{kind} {last[0].decode('ascii', 'replace')}".encode())
        elif found.startswith(b"ATOMIC"):
            run.atoms = run.atoms or tuple(b" ".join(row[:3]) for row in _coordinates(lines))
        else:
            _step(run, found, line)
        lines.skip(WORDS)
    if run is not None:
        yield run


def _step(run: Run, found: bytes, line: bytes) -> None:
    """Take over what a line says of a step, or of the end."""
    if found.startswith(b"PROGRAM"):
        run.ended = True
    elif found.startswith(b"STARTING"):
        run.signs |= {"relax"} if b"GEOMETRY" in found or b"CELL" in found else set()
    elif b"COMPLETED" in found:
        run.signs.add("converged")
    elif found.startswith(b"MAXIMUM"):
        run.signs.add("out of steps")
    elif found.startswith(b"SCF run"):
        (run.signs.add if b"NOT" in line else run.signs.discard)("scf failed")
    elif found == b"DIMER":
        run.signs.add("dimer")
    elif b"step" in found.lower():
        run.started = True
        run.counters += [n for n in map(int, re.findall(rb"(\d+)[ -]*$", line.strip())) if n]
    elif b"gradient" in found:
        run.update([(b"gradient", line.split()[-1])])


def inputs_of_cp2k(path: Path, run: Run) -> list[Path]:
    """The restart file and the input that lie beside an output."""
    names = (f"{run.tags.get('project', '')}-1.restart", Path(run.tags.get("input", "")).name)
    return [file for file in map(path.with_name, filter(None, names)) if file.is_file()]


def files_of_cp2k(path: Path, run: Run) -> list[Path]:
    """All files beside an output from which its relaxation is read, too."""
    found = [_beside(path, run, end) for end in ("-pos-1.xyz", "-frc-1.xyz", "-1.cell")]
    return [*inputs_of_cp2k(path, run), *filter(None, found)]


def _beside(path: Path, run: Run, end: str) -> Path | None:
    name = run.tags.get("project", "")
    files = (path.with_name(f"{name}{end}{zipped}") for zipped in ("", *ZIPPED))
    return next((file for file in files if file.is_file()), None) if name else None


def take_input(path: Path, run: Run) -> None:
    """Add what the input says of the cell, its pressure and fixed atoms to a run."""
    for file in inputs_of_cp2k(path, run)[:1]:
        with opened(file) as text:
            whole = text.read().replace(b"\\\n", b" ")
        run.update([(key.upper(), value) for key, value in IN_INPUT.findall(whole)])
        run.held = _held(whole, len(run.atoms))


def frames_of_cp2k(path: Path, runs: Sequence[Run]) -> list[Atoms]:
    """The structures of all runs in an output, in order."""
    with opened(path) as file:
        parts = file.read().split(BEGINS)[1:]
    return [atoms for part, run in zip(parts, runs, strict=True) for atoms in _frames(path, run, part)]


def _frames(path: Path, run: Run, text: bytes) -> list[Atoms]:
    first, cells, energies = _of_output(path, text)
    if not (steps := sorted({*run.counters})):
        return [first]
    exact = _exact_cells(path, run)
    if (file := _beside(path, run, "-pos-1.xyz")) is not None:
        places = _rows_by_step(file, first)
    elif (file := _beside(path, run, "-1.restart")) is not None:
        places, last_cell = _of_restart(file, first)
        exact = last_cell | exact
    else:
        raise InvalidPair(
            f"{path}: its steps are in {run.tags.get('project', 'PROJECT')}-pos-1.xyz, which is not beside it; put it "
            "there, or leave it out."
        )
    if steps[-1] not in places:
        raise InvalidPair(f"{path}: {file.name} has no step {steps[-1]}, its last; copy it again, or leave it out.")
    beside = _beside(path, run, "-frc-1.xyz")
    forces = {k: x * Hartree / Bohr for k, x in _rows_by_step(beside, first).items()} if beside else {}
    moves, frames = run.tags.get("run type") == "CELL_OPT", []
    for step in [0, *(step for step in steps if step in places)]:
        atoms = first.copy()
        if step:
            atoms.positions = places[step]
            atoms.set_cell(exact.get(step, cells.get(step, first.cell.array)) if moves else first.cell)
        known = {"energy": energies.get(step), "forces": forces.get(step)}
        atoms.calc = SinglePointCalculator(atoms, **{name: x for name, x in known.items() if x is not None})
        frames.append(atoms)
    return frames


def refuse_trajectory(path: Path) -> None:
    """Raise NotARelaxation for a trajectory as CP2K writes it, which has no cell."""
    with opened(path) as file:
        file.readline()
        said = file.readline(500)
    if found := STEP.match(said):
        raise NotARelaxation(
            f"{path}: it is a trajectory of CP2K, which has no cell; give its run's output, with this file beside it.",
            DYNAMICS if found[2] else "trajectory of CP2K, read with its output",
        )


def _of_output(path: Path, text: bytes) -> tuple[Atoms, dict[int, np.ndarray], dict[int, float]]:
    """The first structure, and by the number of its step each cell (Å) and energy (eV)."""
    rows: list[list[bytes]] = []
    cells: dict[int, np.ndarray] = {}
    energies: dict[int, float] = {}
    vectors: list[list[float]] = []
    angles: list[float] = []
    start: np.ndarray | None = None
    step, pbc = 0, b"XYZ"
    lines = iter(text.splitlines())
    for line in lines:
        if b"ATOMIC COORDINATES IN" in line and not rows:
            rows = _coordinates(lines)
        elif line.startswith(b" CELL| Vector"):
            # Three digits of each component, but six of the length.
            said = [float(word) for word in re.findall(rb"-?\d+\.\d+", line)]
            vectors = [*([] if b"Vector a" in line else vectors), said]
            angles = [] if b"Vector a" in line else angles
        elif line.startswith(b" CELL| Angle"):
            angles = [*angles, _number(line.split()[-1])]
            if len(angles) == len(vectors) == 3:
                start = _cell(vectors, angles) if start is None else start
                cells[-1] = _cell(vectors, angles)
        elif b" CELL| Periodicity" in line or b"POISSON| Periodicity" in line:
            pbc = line.split()[-1]
        elif b"Informations at step" in line or b"OPT| Step number" in line:
            step = int(re.findall(rb"\d+", line)[-1])
            cells[step] = cells.get(-1, np.zeros((3, 3)))
        elif b"Total Energy  " in line or b"OPT| Total energy" in line:
            energies[step] = _number(line.split()[-1]) * Hartree
    if not rows or start is None:
        raise InvalidPair(
            f"{path}: it has no coordinates, or no cell, of its first structure (PRINT_LEVEL LOW?); leave it out."
        )
    places = np.array([row[-5:-2] for row in rows], float)
    atoms = Atoms([int(row[-6]) for row in rows], positions=places, cell=start, pbc=[x in pbc for x in b"XYZ"])
    return atoms, cells, energies


def _coordinates(lines: Iterator[bytes] | Lines) -> list[list[bytes]]:
    """The rows of the table of coordinates that comes next: number, kind, element, its number, three places, ..."""
    rows: list[list[bytes]] = []
    for line in lines:
        row = line.split()
        if len(row) >= 9 and row[0].isdigit() and row[0] == b"%d" % (len(rows) + 1):
            rows.append(row)
        elif rows:
            break
    return rows


def _number(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _cell(vectors: Sequence[Sequence[float]], angles: Sequence[float]) -> np.ndarray:
    """Vectors of these lengths and angles, along those that are given to three digits."""
    rounded = np.array([vector[:3] for vector in vectors])
    shape = cellpar_to_cell([*(vector[3] for vector in vectors), *angles])
    if not rounded[np.triu_indices(3, 1)].any():
        return shape
    u, _, vt = np.linalg.svd(shape.T @ rounded)
    return shape @ (u @ vt)


def _rows_by_step(file: Path, first: Atoms) -> dict[int, np.ndarray]:
    """Three numbers for each atom, by the number of the step; what is cut at the end is left out."""
    with opened(file) as text:
        lines = text.read().splitlines()
    n = len(first)
    found: dict[int, np.ndarray] = {}
    for at in range(0, len(lines) - n - 1, n + 2):
        step, rows = STEP.match(lines[at + 1]), [line.split() for line in lines[at + 2 : at + 2 + n]]
        if at + n + 2 >= len(lines) and len(rows[-1]) < 4:
            break
        same = [row[0].decode("ascii", "replace").rstrip("0123456789_") for row in rows if len(row) == 4]
        if step is None or lines[at].strip() != b"%d" % n or same != [*first.symbols]:
            raise InvalidPair(
                f"{file}: its atoms are not those of the output beside it; copy both again, or leave them out."
            )
        found[int(step[1])] = np.array([row[1:] for row in rows], float)
    return found


def _of_restart(file: Path, first: Atoms) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Positions and cell of the step after which a restart file was written, by its number."""
    with opened(file) as text:
        whole = text.read()
    run_type = re.search(rb"RUN_TYPE\s+(\w+)", whole)
    step = re.search(rb"&%s\b.*?STEP_START_VAL\s+(\d+)" % (run_type[1] if run_type else b"GEO_OPT"), whole, re.DOTALL)
    vectors = re.findall(rb"^\s*[ABC]\s+(-?\d\S*)\s+(-?\d\S*)\s+(-?\d\S*)\s*$", whole, re.MULTILINE)[:3]
    coordinates = re.search(rb"&COORD\b(.*?)&END", whole, re.DOTALL)
    lines = coordinates[1].splitlines() if coordinates else []
    rows = [row for row in map(bytes.split, lines) if len(row) >= 4]
    same = [row[0].decode("ascii", "replace").rstrip("0123456789_") for row in rows]
    if step is None or len(vectors) != 3 or same != [*first.symbols]:
        raise InvalidPair(f"{file}: its atoms are not those of the output beside it; copy it again or leave it out.")
    return {int(step[1]): np.array([row[1:4] for row in rows], float)}, {int(step[1]): np.array(vectors, float)}


def _exact_cells(path: Path, run: Run) -> dict[int, np.ndarray]:
    if (file := _beside(path, run, "-1.cell")) is None:
        return {}
    with opened(file) as text:
        rows = [line.split() for line in text]
    return {
        int(row[0]): np.array(row[2:11], float).reshape(3, 3) for row in rows if len(row) >= 11 and row[0].isdigit()
    }


def _held(text: bytes, n: int) -> list[bytes]:
    """For each of n atoms the axes along which an input fixes it."""
    held = [b""] * n
    for section in FIXED.findall(text):
        said = [(key.upper(), value) for key, value in IN_FIXED.findall(section)]
        axes = dict(said).get(b"COMPONENTS_TO_FIX", b"XYZ").strip().lower()
        for k in (k for key, value in said if key == b"LIST" for k in _listed(value) if k < n):
            held[k] += axes
    return held


def _listed(value: bytes) -> list[int]:
    """Atoms of a list such as "1..4 7", from zero."""
    words = (word.split(b"..") for word in value.split())
    return [k for word in words for k in range(int(word[0]) - 1, int(word[-1]))]
