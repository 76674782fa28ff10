"""What a run of VASP, pw.x or CP2K relaxed of its cell, and at what pressure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units
from ase.constraints import FixAtoms

from ..cells import CellFreedom
from . import InvalidPair
from .calculations import Run


class CellOfRun(NamedTuple):
    """What a run relaxed of its cell; `fixed_fractions` where the atoms kept their fractional coordinates."""

    freedom: CellFreedom
    fixed_fractions: bool = False


BY_ISIF = {
    **dict.fromkeys((0, 1, 2), ("fixed", False)),
    3: ("full", False),
    4: ("constant-volume", False),
    5: ("constant-volume", True),
    6: ("full", True),
    7: ("hydrostatic", True),
    8: ("hydrostatic", False),
}
"""What of the cell VASP relaxes by ISIF, and whether fractions stay (https://www.vasp.at/wiki/index.php/ISIF)."""
BY_DOFREE: dict[str, Any] = {
    "all": "full",
    "volume": "hydrostatic",
    "shape": "constant-volume",
    "xyz": (1, 1, 1, 0, 0, 0),
    "x": (1, 0, 0, 0, 0, 0),
    "y": (0, 1, 0, 0, 0, 0),
    "z": (0, 0, 1, 0, 0, 0),
    "xy": (1, 1, 0, 0, 0, 0),
    "xz": (1, 0, 1, 0, 0, 0),
    "yz": (0, 1, 1, 0, 0, 0),
    "2Dxy": (1, 1, 0, 0, 0, 1),
}
"""Likewise of pw.x, by ``cell_dofree``."""
KBAR = 0.1 * units.GPa
"""VASP's kB and pw.x's kbar in eV/Å^3."""


def _cell_of(path: Path, run: Run) -> CellOfRun | None:
    """What the run relaxed of its cell, and at what pressure; None where its output does not say."""
    isif = run.whole("ISIF")
    if run.code == "VASP":
        if isif not in BY_ISIF:
            return None
        cell, fractions = BY_ISIF[isif]
        pressure = (run.number("PSTRESS") or 0.0) * KBAR if cell not in ("fixed", "constant-volume") else 0.0
        return CellOfRun(CellFreedom.of(cell, pressure), fractions)
    if run.code == "CP2K":
        return _cell_of_cp2k(path, run)
    calculation = run.tags.get("calculation", "")
    if calculation != "vc-relax" and "cell moves" not in run.signs:
        return CellOfRun(CellFreedom.of("fixed")) if calculation == "relax" else None
    free = run.tags.get("cell_dofree", "all").strip("'\" ,")
    if free not in BY_DOFREE:
        raise InvalidPair(
            f"{path}: its cell was relaxed with cell_dofree = {free!r}, which is not known here: give what moved by "
            "--cell (RelaxationPair(cell=...) in Python), or leave it out."
        )
    return CellOfRun(CellFreedom.of(BY_DOFREE[free], (run.number("press") or 0.0) * KBAR))


def _cell_of_cp2k(path: Path, run: Run) -> CellOfRun:
    """By RUN_TYPE, and CONSTRAINT, KEEP_ANGLES and EXTERNAL_PRESSURE (in bar) of its input."""
    if run.tags.get("run type") != "CELL_OPT":
        return CellOfRun(CellFreedom.of("fixed"))
    fixed, said = run.tags.get("CONSTRAINT", "NONE").upper(), run.tags.get("EXTERNAL_PRESSURE", "0").split()
    axes = [int(x not in fixed) for x in "XYZ"] if fixed != "NONE" else [1, 1, 1]
    angles = run.tags.get("KEEP_ANGLES", "F").strip(".").upper()
    keeps_angles = angles.startswith("T") or not angles
    shears = [0 if keeps_angles else axes[a] * axes[b] for a, b in ((1, 2), (0, 2), (0, 1))]
    try:
        pressures = [float(word) for word in said if not word.startswith("[")]
        # One number, or the nine of a tensor, of which only an isotropic one is a pressure.
        isotropic = len(pressures) == 1 or np.array_equal(pressures, pressures[0] * np.eye(3).ravel())
    except ValueError:
        isotropic = False
    if not isotropic or any(word.startswith("[") and word.lower() != "[bar]" for word in said):
        raise InvalidPair(
            f"{path}: its EXTERNAL_PRESSURE {' '.join(said)} is not one number of bar: give --cell and --pressure, or "
            "leave it out."
        )
    mask: Any = (*axes, *shears)
    return CellOfRun(CellFreedom.of("full" if all(mask) else mask, pressures[0] * 1e-3 * KBAR))


def freedom_of(ends: Sequence[Atoms], path: Path, run: Run) -> CellFreedom | None:
    """What the run relaxed of the cell of these structures; atoms that kept their fractions in it are fixed.

    Raises
    ------
    InvalidPair
        For a choice of pw.x that has no counterpart here.
    """
    found = _cell_of(path, run)
    if found is not None and found.fixed_fractions:
        for atoms in ends:
            atoms.set_constraint(FixAtoms(range(len(atoms))))
    return None if found is None else found.freedom
