"""The header of an output of VASP or pw.x: its settings, its kind of calculation and its last words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np

from .aims import of_aims
from .calculations import BLOCK, ZIPPED, Lines, Run, opened
from .cp2k import CP2K, of_cp2k, take_input

TAGS = (
    rb"IBRION|NSW|ISIF|MDALGO|ML_LMLFF|IMAGES|ICHAIN|PSTRESS|ISYM|GGA|METAGGA|LEXCH|LHFCALC|AEXX|HFSCREEN|IVDW|LUSE_VDW|"
    rb"LSORBIT|ISPIN|NELECT|ENCUT|ENMAX|LDAU|LDAUL|LDAUU|LDAUJ|ZVAL|MAGMOM"
)
IN_XML = re.compile(rb'name="(' + TAGS + rb')"[^>]*>\s*([^<]*?)\s*<')
TYPE_IN_XML = re.compile(
    rb"<rc>\s*<c>[^<]*</c>\s*<c>\s*(\w+)\s*</c>\s*<c>[^<]*</c>\s*<c>\s*([\d.]+)\s*</c>\s*<c>([^<]*)</c>\s*</rc>"
)
IN_OUTCAR = re.compile(rb"(?:^|[\s;,])(" + TAGS + rb")(?:\s*=\s*|\s+)([-\w.*+]+)")
LIST_IN_OUTCAR = re.compile(rb"(?:^\s*|for each species )(MAGMOM|LDAU[LUJ]|ZVAL)\s*=((?:\s*[-+\d.*]+)+)")


def runs_in(path: Path, format: str | None) -> list[Run]:
    """The runs that a file of this format (ASE's name) holds, in order; none of what has no header that is known."""
    scan = SCANS.get(format or "")
    if scan is None:
        return []
    with opened(path) as file:
        runs = list(scan(Lines(file)))
    if scan is _of_pw:
        asked = _asked_of_pw(path)
        for run in runs:
            run.tags = asked | run.tags
    elif scan is of_cp2k:
        for run in runs:
            take_input(path, run)
    return runs


def inputs_of_pw(path: Path) -> list[Path]:
    """The inputs of pw.x that lie beside an output, as relax.in beside relax.out."""
    name = path.name.removesuffix(path.suffix) if path.suffix in ZIPPED else path.name
    stem = name.rpartition(".")[0] or name
    files = (path.with_name(stem + end) for end in (".in", ".pwi", ".inp"))
    return [file for file in files if file.is_file() and file != path]


def _asked_of_pw(path: Path) -> dict[str, str]:
    """The settings of the input beside an output."""
    run = Run("pw.x")
    for file in inputs_of_pw(path)[:1]:
        with opened(file) as text:
            run.update([found for line in text for found in IN_PW.findall(line.partition(b"!")[0])])
    return run.tags


def run_of_incar(path: Path) -> Run:
    """The run that an INCAR asks for."""
    run = Run()
    with opened(path) as file:
        for line in file:
            said = line.partition(b"#")[0].partition(b"!")[0].upper()
            run.update(IN_OUTCAR.findall(said))
            run.update(LIST_IN_OUTCAR.findall(said))
    return run


FIRST_IN_XML, LAST_IN_XML = b'name="initialpos"', b'name="finalpos"'
IN_BODY_OF_XML = (b"<calculation", b'name="finalpos"', b"</modeling>", b"<modeling>")


def _of_vasprun(lines: Lines) -> Iterator[Run]:
    run = None
    for line in lines:
        if b"<modeling>" in line:
            if run is not None:
                yield run
            run = Run()
        if run is None:
            continue
        if not run.started:
            # The settings in effect come after those of the INCAR, and replace them.
            run.update(IN_XML.findall(line))
            for element, valence, title in TYPE_IN_XML.findall(line):
                run.add_potential(title)
                run.elements = (*run.elements, element.decode())
                run.valences[element.decode()] = float(valence)
            if FIRST_IN_XML in line:
                line = _structure(line, lines, FIRST_IN_XML)
                run.first = _positions(line, FIRST_IN_XML)
        run.counters += range(len(run.counters) + 1, len(run.counters) + 1 + line.count(b"<calculation"))
        run.started = bool(run.counters)
        if LAST_IN_XML in line:
            line = _structure(line, lines, LAST_IN_XML)
            run.final = _positions(line, LAST_IN_XML)
        run.ended = run.ended or b"</modeling>" in line
        if run.started:
            lines.skip(IN_BODY_OF_XML)
    if run is not None:
        yield run


def _structure(line: bytes, lines: Lines, name: bytes) -> bytes:
    """This line and those that follow, to the end of the structure of this name."""
    text = line
    for more in () if b"</structure>" in line[line.index(name) :] else lines:
        text += more
        if any(end in more for end in (b"</structure>", b"<calculation", b"</modeling>")) or len(text) > 64 * BLOCK:
            break
    return text


def _positions(text: bytes, name: bytes) -> np.ndarray | None:
    """The fractions of the structure of this name; None where they are no numbers."""
    text = text[text.index(name) :].partition(b'name="positions"')[2].partition(b"</varray>")[0]
    try:
        return np.array([row.split() for row in re.findall(rb"<v>([^<]*)</v>", text)], float).reshape(-1, 3)
    except ValueError:
        return None


HEADER = re.compile(
    rb"POTCAR:|^ vasp\.\d|ions per type|General timing and accounting|Iteration|selective dynamics|NEB: "
)
VRHFIN = re.compile(rb"VRHFIN\s*=\s*([A-Z][a-z]?)")
ITERATION = re.compile(rb"Iteration\s+(\d+)\(")
IN_BODY_OF_OUTCAR = (b"Iteration", b"General timing", b"POTCAR:", b" vasp.")


def _of_outcar(lines: Lines) -> Iterator[Run]:
    run, titled = None, False
    for line in lines:
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
            if found == b"POTCAR:":
                run.add_potential(line.partition(b"POTCAR:")[2])
        elif found == b"Iteration":
            run.started = True
            run.counters += [int(number[1])] if (number := ITERATION.search(line)) else []
        elif found.startswith(b"General"):
            run.ended = titled
        elif found == b"selective dynamics" and b"using" in line:
            run.selective = True
        elif found == b"NEB: " and b"SPRING" in line:
            run.signs.add("springs")
        if run.started or run.ended:
            lines.skip(IN_BODY_OF_OUTCAR)
        else:
            run.update(IN_OUTCAR.findall(line))
            run.update(LIST_IN_OUTCAR.findall(line))
            if element := VRHFIN.search(line):
                run.elements = (*run.elements, element[1].decode())
            elif b"  ZVAL " in line and line.lstrip().startswith(b"ZVAL"):
                run.valences = dict(zip(run.elements, _numbers(line.partition(b"=")[2]), strict=False))
    if run is not None:
        yield run


def _numbers(text: bytes) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split()))
    except ValueError:
        return ()


PW = re.compile(
    rb"Program PWSCF|JOB DONE|number of atoms/cell|number of atomic types|Geometry Optimization|bfgs|Damped|"
    rb"Molecular Dynamics Calculation|Entering Dynamics|Langevin Dynamics|maximum number of steps|"
    rb"convergence NOT achieved|"
    rb"self-consistent calc|number of scf cycles|number of electrons|Exchange-correlation|"
    rb"kinetic-energy cutoff|U\([A-Z]|Hubbard U|spin-orbit|"
    rb"atomic species   (?:valence|magnetization)|site n\.|Magnetic moment per site|PseudoPot\. #|CELL_PARAMETERS|"
    rb"ATOMIC_POSITIONS|"
    rb"Sym\. ?Ops|No symmetry found|(?:calculation|nstep|tot_charge|cell_dofree|press|nosym)\s*="
)
PW_SIGNS = {b"Geometry Optimization": "relax", b"bfgs": "relax", b"Damped": "relax"}
IN_PW = re.compile(
    rb"(calculation|nstep|tot_charge|cell_dofree|press|nosym|"
    rb"Exchange-correlation|kinetic-energy cutoff|number of electrons)"
    rb"\s*=\s*['\"]?([-\w.+ ]*\w)"
)
SPECIES_OF_PW = re.compile(rb"\s+(([A-Z][a-z]?)\S*)\s+(\d+\.\d+)\s+\d+\.\d+\s+[A-Za-z]")
MOMENT_OF_PW = re.compile(rb"\s+([A-Z]\S*)\s+(-?\d+\.\d+)\s*$")
MOMENT_OF_SITE = re.compile(rb"\s+atom.*magn[:=]\s*(-?\d+\.\d+)")
PLACE_OF_PW = re.compile(rb"\s*[A-Z]\S*(?:\s+-?\d+\.\d+){3}(?:\s+([01])\s+([01])\s+([01]))?\s*$")
AXES = (b"x", b"y", b"z")
SITE_OF_PW = re.compile(rb"\s+\d+\s+([A-Z]\S*)\s+tau\(")
U_OF_PW = re.compile(rb"U\((\w+)[-\w]*\)\s*=\s*([\d.]+)")


def _of_pw(lines: Lines) -> Iterator[Run]:
    run, echoed = None, Run("pw.x")
    lines.skip(PW)
    for line in lines:
        mark = PW.search(line)
        found = mark.group() if mark else b""
        if found == b"Program PWSCF":
            if run is not None:
                yield _started(run)
            # What stands before is an input that a script has copied there.
            run = Run("pw.x", dict(echoed.tags))
        into = run or echoed
        if found == b"JOB DONE":
            into.ended = True
        elif found.startswith(b"number of atom"):
            into.atoms = (*into.atoms, line.strip())
        elif found in PW_SIGNS or b"Dynamics" in found:
            into.signs |= {PW_SIGNS.get(found, "md"), *(["bfgs"] if b"BFGS" in line else [])}
            into.update([(b"scf cycles", n) for n in re.findall(rb"converged in\s+(\d+) scf", line)])
        elif found == b"maximum number of steps":
            into.signs.add("out of steps")
        elif found == b"No symmetry found" or found.startswith(b"Sym."):
            into.signs.add("no symmetry" if found.startswith(b"No") else "symmetry")
        elif found == b"CELL_PARAMETERS":
            into.signs.add("cell moves")
        elif found == b"ATOMIC_POSITIONS":
            if run is not None and not run.held:
                rows = _table(PLACE_OF_PW, lines)
                run.held = [
                    b"".join(x for x, free in zip(AXES, row.groups(), strict=True) if free == b"0") for row in rows
                ]
        elif found == b"convergence NOT achieved":
            into.signs.add("scf failed")
        elif found == b"number of scf cycles":
            into.counters += map(int, re.findall(rb"=\s*(\d+)", line))
        elif found.startswith(b"self-consistent"):
            # Of several it is the last that counts.
            into.signs.discard("scf failed")
        elif found:
            _header_of_pw(into, found, line, lines)
        lines.skip(PW)
    if run is not None:
        yield _started(run)


def _header_of_pw(run: Run, found: bytes, line: bytes, lines: Lines) -> None:
    """Take settings over from a line of the header, and from those that follow it."""
    run.update(IN_PW.findall(line))
    if found == b"PseudoPot. #":
        run.add_potential(next(iter(lines), b"").split(b"/")[-1])
    elif found == b"atomic species   valence":
        for row in _table(SPECIES_OF_PW, lines):
            run.labels[row[1]] = float(row[3])
            run.valences[row[2].decode()] = float(row[3])
    elif found == b"atomic species   magnetization":
        # As a share of the valence electrons.
        run.moments = {row[1]: float(row[2]) * run.labels.get(row[1], 0.0) for row in _table(MOMENT_OF_PW, lines)}
    elif found == b"Magnetic moment per site":
        # ASE takes the last column, which is a constraint in older versions.
        run.tags["final moments"] = b" ".join(row[1] for row in _table(MOMENT_OF_SITE, lines)).decode()
    elif found == b"site n.":
        sites = [row[1] for row in _table(SITE_OF_PW, lines)]
        if run.moments and "MAGMOM" not in run.tags:
            run.update([(b"ISPIN", b"2"), (b"MAGMOM", b" ".join(b"%.4f" % run.moments.get(x, 0.0) for x in sites))])
    elif found == b"spin-orbit":
        run.tags["LSORBIT"] = "T" if b"without" not in line else "F"
    for element, value in U_OF_PW.findall(line):
        run.tags["U"] = " ".join(filter(None, [run.tags.get("U"), f"{element.decode()} {float(value):g}"]))


def _table(pattern: re.Pattern[bytes], lines: Lines) -> list[re.Match[bytes]]:
    """The rows that come next, as far as they are of this pattern."""
    return [row for row in takewhile(bool, map(pattern.match, lines)) if row]


def _started(run: Run) -> Run:
    """The run, whose kind is known now: damped dynamics, which ends in a minimum, is a relaxation."""
    if "relax" in run.signs:
        run.signs.discard("md")
    run.started = True
    return run


SCANS: dict[str, Callable[[Lines], Iterator[Run]]] = {
    "vasp-xml": _of_vasprun,
    "vasp-out": _of_outcar,
    "espresso-out": _of_pw,
    "aims-output": of_aims,
    CP2K: of_cp2k,
}
