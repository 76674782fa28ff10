"""The header of an output of FHI-aims: its settings, its kind of calculation and its last words."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .calculations import Lines, Run

AIMS = re.compile(
    rb"Invoking FHI-aims|Have a nice day|Begin self-consistency|Geometry relaxation:|Molecular dynamics|MD_run|"
    rb"relax_unit_cell|per-atom spin analysis|Relaxation step number|XC: +Using|\| Number of atoms|Charge ="
)
INPUT = re.compile(
    rb"^\s*(atom|atom_frac|initial_moment|default_initial_moment|constrain_relaxation)\s+(\S+)", re.MULTILINE
)
"""Lines of geometry.in and control.in, which an output repeats before its first step."""
HEADER = re.compile(AIMS.pattern + rb"|" + INPUT.pattern, re.MULTILINE)
SPIN = re.compile(rb"\s*\|\s+\d+\s+(-?\d+\.\d+)")


def of_aims(lines: Lines) -> Iterator[Run]:
    """The runs that such a file holds."""
    run, moments = None, list[bytes]()
    lines.skip(AIMS)
    for line in lines:
        mark = AIMS.search(line)
        found = mark.group() if mark and not line.lstrip().startswith(b"#") else b""
        if found.startswith(b"Invoking"):
            if run is not None:
                yield run
            run, moments = Run("FHI-aims"), []
        elif run is None:
            pass
        elif found.startswith(b"Begin"):
            run.started = True
            if any(moments):
                default = run.tags.get("default_initial_moment", "0").encode()
                run.update([(b"ISPIN", b"2"), (b"MAGMOM", b" ".join(word or default for word in moments))])
        elif found.startswith(b"per-atom"):
            # Two lines of a header come first.
            rows = [SPIN.match(row) for row, _ in zip(lines, range(2 + len(moments)), strict=False)]
            run.tags["final moments"] = b" ".join(row[1] for row in rows if row).decode()
        elif found:
            _setting(run, found, line)
        elif not run.started and (said := INPUT.match(line)):
            if said[1].startswith(b"atom"):
                moments.append(b"")
                run.held.append(b"")
            elif said[1] == b"constrain_relaxation":
                # In geometry.in it follows an atom or a lattice vector; only axes and .true. fix something.
                fixed = said[2].lower()
                if run.held and fixed in (b".true.", b"x", b"y", b"z"):
                    run.held[-1] += b"xyz" if fixed == b".true." else fixed
            elif said[1] == b"initial_moment" and moments:
                moments[-1] = said[2]
            else:
                run.update([(said[1], said[2])])
        lines.skip(AIMS if run is None or run.started else HEADER)
    if run is not None:
        yield run


def _setting(run: Run, found: bytes, line: bytes) -> None:
    """Take over what another line says."""
    if found.startswith(b"Have"):
        run.ended = True
    elif found.startswith(b"Relaxation"):
        run.counters += map(int, re.findall(rb"number\s+(\d+)", line))
    elif found.startswith(b"Geometry"):
        run.signs.add("relax")
    elif found in (b"Molecular dynamics", b"MD_run"):
        run.signs.add("md")
    elif found == b"relax_unit_cell" and b"none" not in line:
        run.signs.add("cell moves")
    elif b"Number" in found:
        run.atoms = (*run.atoms, line.strip())
    elif found.startswith(b"XC") and (words := line.partition(b"Using")[2].split()):
        run.update([(b"Exchange-correlation", words[0])])
    elif found.startswith(b"Charge"):
        run.update([(b"tot_charge", line.partition(b"=")[2].partition(b":")[0].strip())])
