"""The header of an output of FHI-aims: its settings, its kind of calculation and its last words."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .calculations import Lines, Run

AIMS = re.compile(
    rb"Invoking FHI-aims|Have a nice day|Begin self-consistency|Geometry relaxation:|Molecular dynamics|MD_run|"
    rb"relax_unit_cell|Relaxation step number|XC: +Using|\| Number of atoms|Charge ="
)


def of_aims(lines: Lines) -> Iterator[Run]:
    """The runs that such a file holds."""
    run = None
    lines.skip(AIMS)
    for line in lines:
        mark = AIMS.search(line)
        found = mark.group() if mark and not line.lstrip().startswith(b"#") else b""
        if found.startswith(b"Invoking"):
            if run is not None:
                yield run
            run = Run("FHI-aims")
        elif run is None:
            pass
        elif found.startswith(b"Have"):
            run.ended = True
        elif found.startswith(b"Begin"):
            run.started = True
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
        lines.skip(AIMS)
    if run is not None:
        yield run
