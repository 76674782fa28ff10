"""What a reference was computed with: functional, +U, cutoff, pseudopotentials, charge and moments."""

from __future__ import annotations

import re

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian

from .calculations import Run

GGA = {
    "PE": "PBE", "PS": "PBEsol", "RP": "RPBE", "RE": "revPBE", "91": "PW91", "AM": "AM05", "CA": "LDA", "PZ": "LDA",
    "BF": "BEEF", "MK": "optB86b", "BO": "optB88", "OR": "optPBE", "ML": "rPW86",
}  # fmt: skip
"""VASP's names of functionals (https://www.vasp.at/wiki/index.php/GGA)."""
OF_PW = {"SLA PW PBE PBE": "PBE", "SLA PW PBX PBC": "PBE", "SLA PW PSX PSC": "PBEsol", "SLA PZ NOGX NOGC": "LDA"}
"""What pw.x calls them (Modules/funct.f90)."""
FUNCTIONAL, SPIN_ORBIT, CHARGE = "functional", "spin-orbit coupling", "charge"
CUTOFF, POTENTIAL, U = "cutoff", "pseudopotential of ", "U (eV) of "
MINOR = (CUTOFF, POTENTIAL, CHARGE)
"""Legs of one relaxation may differ in the first two. A charge is reported where it leads somewhere else."""


def settings_of(run: Run, atoms: Atoms) -> dict[str, str]:
    """What has to be the same for references that do not contradict each other, as words; {} where nothing is known."""
    found = {FUNCTIONAL: _functional_of_vasp(run) if run.code == "VASP" else _functional_named(run)}
    if "LSORBIT" in run.tags:
        found[SPIN_ORBIT] = "yes" if run.true("LSORBIT") else "no"
    cutoff = run.tags.get("kinetic-energy cutoff") or run.tags.get("ENCUT") or run.tags.get("ENMAX", "")
    if number := re.match(r"[\d.]+", cutoff):
        found[CUTOFF] = f"{float(number[0]):g} {'Ry' if run.code in ('pw.x', 'CP2K') else 'eV'}"
    for title in run.potentials:
        if element := re.search(r"(?:^|\s)([A-Z][a-z]?)(?=[\s_.\-]|$)", title):
            found[f"{POTENTIAL}{element[1]}"] = title
    values = _hubbard(run)
    if values or found[FUNCTIONAL]:
        found |= {f"{U}{symbol}": f"{values.get(symbol, 0):g}" for symbol in sorted(set(atoms.symbols))}
    if (q := charge_of(run, atoms)) is not None:
        found[CHARGE] = f"{q:+g}" if q else "0"
    return {name: value for name, value in found.items() if value}


def contradict(a: dict[str, str], b: dict[str, str]) -> bool:
    """Whether two references are of two methods, as far as both are known: functional, +U, spin-orbit coupling."""
    return any(a[name] != b[name] for name in a.keys() & b.keys() if not name.startswith(MINOR))


def charge_of(run: Run, atoms: Atoms) -> float | None:
    """The charge of the cell in elementary charges: the valence electrons of all atoms minus those that are there."""
    if (given := run.number("tot_charge")) is not None:
        return given
    electrons = run.number("number of electrons" if run.code == "pw.x" else "NELECT")
    if electrons is None or not run.valences.keys() >= set(atoms.symbols):
        return None
    # Written with two to four digits; adding zero makes -0 a plain zero.
    return round(sum(run.valences[symbol] for symbol in atoms.symbols) - electrons, 2) + 0.0


def symmetry_of(*runs: Run) -> str | None:
    """Whether runs kept the space group of their start, "keep" or "free"; None where they do not all say so."""
    said = {_symmetry_of(run) for run in runs}
    return "free" if "free" in said else said.pop() if len(said) == 1 else None


def _symmetry_of(run: Run) -> str | None:
    if run.code == "VASP":
        found = run.whole("ISYM")
        return None if found is None else "keep" if found > 0 else "free"
    if "symmetry" in run.signs:
        return "free" if run.true("nosym") else "keep"
    return "free" if "no symmetry" in run.signs else None


def describe(frames: list[Atoms], run: Run) -> None:
    """Give frames their charge, ``info["charge"]``, the first one the moments that the run began with, and the last
    one those that it ended with; all of them the constraints that the run was done with, if not VASP's.
    """
    if any(run.held) and len(run.held) == len(frames[0]):
        for frame in frames:
            frame.set_constraint(_constraints(run.held))
    if (charge := charge_of(run, frames[0])) is not None:
        for frame in frames:
            frame.info["charge"] = charge
    moments = _expanded(run.tags.get("MAGMOM", ""))
    polarized = run.tags.get("ISPIN") == "2" and not run.true("LSORBIT")
    if polarized and len(moments) == len(frames[0]) and not frames[0].has("initial_magmoms"):
        frames[0].set_initial_magnetic_moments(moments)
    ended, calc = _expanded(run.tags.get("final moments", "")), frames[-1].calc
    if calc is not None and len(ended) == len(frames[-1]):
        calc.results["magmoms"] = ended


def _constraints(held: list[bytes]) -> list[FixAtoms | FixCartesian]:
    """Those that fix each atom along these axes."""
    found: list[FixAtoms | FixCartesian] = []
    for axes in sorted({*held} - {b""}):
        atoms, mask = [k for k, x in enumerate(held) if x == axes], [x in axes for x in b"xyz"]
        found.append(FixAtoms(atoms) if all(mask) else FixCartesian(atoms, mask))
    return found


def _expanded(text: str) -> np.ndarray:
    """VASP's list of numbers, in which 3*2.0 stands for three of them."""
    try:
        words = [word.rpartition("*") for word in text.split()]
        return np.array([float(value) for times, _, value in words for _ in range(int(times or 1))])
    except ValueError:
        return np.array([])


def _functional_of_vasp(run: Run) -> str:
    said = run.tags.get("GGA", "--")
    if said.strip("-") == "":
        said = run.tags.get("LEXCH", "")
    by_title = "PBE" if any(title.startswith("PAW_PBE") for title in run.potentials) else ""
    name = GGA.get(said.upper(), said) or by_title
    meta = run.tags.get("METAGGA", "").strip("- ").upper()
    if meta not in ("", "F", "NONE", ".FALSE."):
        name = meta.replace("R2SCA", "R2SCAN").replace("SCANN", "SCAN")
    if run.true("LHFCALC"):
        share, screening = run.number("AEXX"), run.number("HFSCREEN")
        share = 0.25 if share is None else share
        if share == 0.25 and name in ("PBE", "") and screening is not None:
            named = "PBE0" if screening == 0 else "HSE06" if 0.19 < screening < 0.21 else ""
        else:
            named = ""
        name = named or f"hybrid of {name} (AEXX {share:g}, HFSCREEN {screening or 0:g})"
    if run.whole("IVDW"):
        name += f" + dispersion (IVDW {run.whole('IVDW')})"
    return name + " + vdW-DF" * run.true("LUSE_VDW")


def _functional_named(run: Run) -> str:
    name = " ".join(run.tags.get("Exchange-correlation", "").split())
    return OF_PW.get(name.upper(), name)


def _hubbard(run: Run) -> dict[str, float]:
    """U minus J in eV of the elements that have one."""
    if run.code == "pw.x":
        words = run.tags.get("U", "").split()
        return {symbol: float(value) for symbol, value in zip(words[::2], words[1::2], strict=False)}
    shells, u, j = (run.tags.get(name, "").split() for name in ("LDAUL", "LDAUU", "LDAUJ"))
    if run.tags.get("LDAU", "T").strip(".").upper().startswith("F"):
        return {}
    try:
        return {
            symbol: float(value) - float(minus)
            for symbol, shell, value, minus in zip(run.elements, shells, u, j, strict=False)
            if int(float(shell)) >= 0
        }
    except ValueError:
        return {}
