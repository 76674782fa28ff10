"""Relaxations as VASP, pw.x and ase.db write them, as far as readers look at them."""

from __future__ import annotations

import gzip
import pickle
from itertools import groupby
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import write
from ase.stress import voigt_6_to_full_3x3_stress

from ase_bptt import RelaxationPair

from .structures import rattled, silicon

RYDBERG, BOHR = units.create_units("2006")["Ry"], units.create_units("2006")["Bohr"]


def three_frames(seed: int = 1, symbol: str = "Si", id: str | None = None) -> list[Atoms]:
    """A relaxation of silicon with an atom of another element."""
    last = silicon(seed)
    last.symbols[0] = symbol
    if id is not None:
        last.info["id"] = id
    return [rattled(last, 0.2, seed), rattled(last, 0.1, seed), last]


def computed_frames(seed: int = 1, symbol: str = "Si", largest: float = 0.01) -> list[Atoms]:
    """`three_frames` with energies and forces, of which this one is the largest."""
    frames = three_frames(seed, symbol)
    for frame in frames:
        forces = np.zeros((len(frame), 3))
        forces[2, 1] = largest
        frame.calc = SinglePointCalculator(frame, energy=-1.0, forces=forces)
    return frames


def spoilt(spoil) -> list[Atoms]:
    """Three frames with a fault, which this function makes."""
    frames = three_frames(symbol="P")
    spoil(frames)
    return frames


def changed_cell(frames):
    frames[-1].set_cell(frames[-1].cell.array[[1, 0, 2]])


def unread(pairs: list[RelaxationPair]) -> list[RelaxationPair]:
    """Lazy pairs as another process gets them: none of their structures is in memory."""
    return pickle.loads(pickle.dumps(pairs))


def write_vasprun(path: Path, frames: list[Atoms], **tags: object) -> None:
    """A vasprun.xml, compressed where the name ends with .gz, with these settings of VASP."""
    types = _types(frames[0])
    settings = "".join(f'  <i type="int" name="{name}">{value:>6}</i>\n' for name, value in tags.items())
    atoms = "".join(
        f"   <rc><c>{symbol:<2} </c><c>{k:4d} </c></rc>\n" for k, (symbol, n) in enumerate(types, 1) for _ in range(n)
    )
    text = (
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<modeling>\n'
        ' <generator>\n  <i name="program" type="string">vasp </i>\n  <i name="version" type="string">6.4.2 </i>\n'
        " </generator>\n <kpoints>\n"
        f"{_varray('kpointlist', [[0, 0, 0]])}{_varray('weights', [[1]])}"
        ' </kpoints>\n <parameters>\n  <i name="PSTRESS">0.0</i>\n'
        f"{settings} </parameters>\n"
        f" <atominfo>\n  <atoms>{len(frames[0]):8d} </atoms>\n  <types>{len(types):8d} </types>\n"
        '  <array name="atoms">\n   <dimension dim="1">ion</dimension>\n   <field type="string">element</field>\n'
        f'   <field type="int">atomtype</field>\n   <set>\n{atoms}   </set>\n  </array>\n </atominfo>\n'
        f"{_structure(frames[0], 'initialpos')}"
        f"{''.join(_calculation(frame) for frame in frames)}"
        f"{_structure(frames[-1], 'finalpos')}</modeling>\n"
    )
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(text)


def _calculation(frame: Atoms) -> str:
    energy = frame.get_potential_energy()
    energies = (
        "  <energy>\n"
        + "".join(f'   <i name="{n}">{energy:16.8f} </i>\n' for n in ("e_fr_energy", "e_wo_entrp", "e_0_energy"))
        + "  </energy>\n"
    )
    return (
        f" <calculation>\n  <scstep>\n{energies}  </scstep>\n{_structure(frame)}"
        f"{_varray('forces', frame.get_forces())}{_varray('stress', _kilobar(frame))}{energies} </calculation>\n"
    )


def _kilobar(frame: Atoms) -> np.ndarray:
    """The stress as VASP writes it, with the opposite sign; zero where there is none."""
    stress = frame.calc.results.get("stress", np.zeros(6))
    return -voigt_6_to_full_3x3_stress(stress) / (0.1 * units.GPa)


def _structure(atoms: Atoms, name: str | None = None) -> str:
    tag = f' name="{name}" ' if name else ""
    return (
        f" <structure{tag}>\n  <crystal>\n{_varray('basis', atoms.cell.array)}"
        f"  </crystal>\n{_varray('positions', atoms.get_scaled_positions(wrap=False))} </structure>\n"
    )


def _varray(name: str, rows) -> str:
    lines = "".join(f"   <v> {_columns(row, '16.8f')} </v>\n" for row in rows)
    return f'  <varray name="{name}" >\n{lines}  </varray>\n'


def write_outcar(path: Path, frames: list[Atoms], said: str = "", **tags: object) -> None:
    """An OUTCAR as of VASP 6, compressed where the name ends with .gz, with these settings, and further lines."""
    types = _types(frames[0])
    settings = "".join(f"   {name:6} = {value:>6}    a setting\n" for name, value in tags.items())
    potentials = "".join(f" POTCAR:    PAW_PBE {symbol} 05Jan2001\n" for symbol, _ in types)
    text = (
        f" vasp.6.4.2 20Jul23 complex\n{potentials}{potentials}"
        "   k-points           NKPTS =      1   k-points in BZ     NKDIM =      1   number of bands    NBANDS=     16\n"
        f"   ions per type =            {_columns([n for _, n in types], '4d')}\n"
        f"   ISPIN  =      1    spin polarized calculation?\n{settings}{said}\n"
        " k-points in reciprocal lattice and weights: Gamma\n   0.00000000  0.00000000  0.00000000       1.000\n\n"
        f"{''.join(_ionic_step(k, frame) for k, frame in enumerate(frames, 1))}"
        " General timing and accounting informations for this job:\n"
        " ========================================================\n\n"
        "                  Total CPU time used (sec):      100.000\n"
        "                Voluntary context switches:           10\n"
    )
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(text)


def _ionic_step(k: int, frame: Atoms) -> str:
    line = " " + 83 * "-" + "\n"
    inverse = frame.cell.reciprocal().array
    cell = "".join(f"   {_columns([*a, *b], '13.9f')}\n" for a, b in zip(frame.cell.array, inverse, strict=True))
    rows = "".join(
        f" {_columns(x, '13.5f')}   {_columns(f, '14.6f')}\n"
        for x, f in zip(frame.positions, frame.get_forces(), strict=True)
    )
    energy = frame.get_potential_energy()
    return (
        f"----------------------------------------- Iteration {k:6d}(   1)  ------------------------------------\n\n"
        f"  in kB  {_columns(np.zeros(6), '12.5f')}\n\n"
        f"      direct lattice vectors                 reciprocal lattice vectors\n{cell}\n"
        f" POSITION                                       TOTAL-FORCE (eV/Angst)\n{line}{rows}{line}\n"
        "  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)\n"
        "  ---------------------------------------------------\n"
        f"  free  energy   TOTEN  = {energy:18.8f} eV\n\n"
        f"  energy  without entropy= {energy:18.8f}  energy(sigma->0) = {energy:18.8f}\n\n"
    )


def write_espresso(path: Path, frames: list[Atoms], said: str = "", end: str = "bfgs converged in") -> None:
    """The output of pw.x for calculation='relax', with further lines after its header."""
    first = frames[0]
    alat = round(first.cell.lengths()[0] / BOHR, 6)
    length = alat * BOHR
    axes = "".join(
        f"               a({k}) = ({_columns(row / length, '11.6f')} )  \n" for k, row in enumerate(first.cell.array, 1)
    )
    sites = "".join(
        f"     {k:5d}           {symbol:<2}  tau({k:4d}) = ({_columns(x / length, '12.7f')}  )\n"
        for k, (symbol, x) in enumerate(zip(first.symbols, first.positions, strict=True), 1)
    )
    steps = [_self_consistency(frame) for frame in frames]
    moves = [_atomic_positions(frame) for frame in [*frames[1:], frames[-1]]]
    moves[-1] = f"     {end} {len(frames):3d} scf cycles\nBegin final coordinates\n{moves[-1]}End final coordinates\n\n"
    path.write_text(
        "\n     Program PWSCF v.7.2 starts on  1Jan2024 at 12: 0: 0 \n\n"
        f"     lattice parameter (alat)  = {alat:12.4f}  a.u.\n     number of atoms/cell      = {len(first):12d}\n"
        f"     number of atomic types    = {len(set(first.symbols)):12d}\n\n"
        f"     celldm(1)= {alat:10.6f}  celldm(2)=   0.000000  celldm(3)=   0.000000\n\n"
        f"     crystal axes: (cart. coord. in units of alat)\n{axes}\n"
        f"   Cartesian axes\n\n     site n.     atom                  positions (alat units)\n{sites}\n"
        "     number of k points=     1\n                       cart. coord. in units 2pi/alat\n"
        f"        k(    1) = (   0.0000000   0.0000000   0.0000000), wk =   2.0000000\n\n{said}"
        f"{''.join(step + move for step, move in zip(steps, moves, strict=True))}"
        "=------------------------------------------------------------------------------=\n"
        "   JOB DONE.\n"
        "=------------------------------------------------------------------------------=\n"
    )


def _self_consistency(frame: Atoms) -> str:
    forces = "".join(
        f"     atom {k:4d} type  1   force = {_columns(f, '14.8f')}\n"
        for k, f in enumerate(frame.get_forces() * BOHR / RYDBERG, 1)
    )
    return (
        "     End of self-consistent calculation\n\n"
        "          k = 0.0000 0.0000 0.0000 (   500 PWs)   bands (ev):\n\n    -5.5000   6.1000\n\n"
        "     highest occupied level (ev):     6.1000\n\n"
        f"!    total energy              = {frame.get_potential_energy() / RYDBERG:16.8f} Ry\n\n"
        f"     Forces acting on atoms (cartesian axes, Ry/au):\n\n{forces}\n"
    )


def _atomic_positions(frame: Atoms) -> str:
    rows = "".join(f"{s:<2} {_columns(x, '18.10f')}\n" for s, x in zip(frame.symbols, frame.positions, strict=True))
    return f"ATOMIC_POSITIONS (angstrom)\n{rows}\n"


def write_aims(path: Path, frames: list[Atoms], said: str = "  Geometry relaxation: Textbook BFGS.\n") -> None:
    """The output of FHI-aims, with these lines in its header: a relaxation unless they say otherwise."""
    first, relaxes = frames[0], "Geometry relaxation" in said
    cell = "".join(f"  | {_columns(row, '16.8f')}\n" for row in first.cell.array)
    sites = "".join(
        f"  |{k:5d}: Species {symbol:10} {_columns(x, '16.8f')}\n"
        for k, (symbol, x) in enumerate(zip(first.symbols, first.positions, strict=True), 1)
    )
    text = (
        f"          Invoking FHI-aims ...\n  XC: Using PBE gradient-corrected functionals.\n{said}"
        f"  | Number of atoms                   : {len(first):8d}\n  | Number of spin channels           :        1\n"
        "  | Number of Kohn-Sham states (occupied + empty):       40\n"
        f"  The structure contains {len(first)} atoms, and a total of 112.000 electrons.\n"
        f"  | Unit cell:\n{cell}  | Atomic structure:\n  |       Atom    x [A]   y [A]    z [A]\n{sites}"
        "  Begin self-consistency iteration #    1\n\n"
    )
    for k, frame in enumerate(frames):
        energy = frame.get_potential_energy()
        rows = "".join(f"  |{j:5d} {_columns(f, '20.12f')}\n" for j, f in enumerate(frame.get_forces(), 1))
        text += (
            f"  | Total energy uncorrected      : {energy:20.10f} eV\n"
            f"  | Electronic free energy        : {energy:20.10f} eV\n  Total atomic forces (unitary) [eV/Ang]:\n{rows}"
        )
        if relaxes:
            text += "  Geometry optimization: Attempting to predict improved coordinates.\n"
        if k + 1 < len(frames):
            after = frames[k + 1]
            vectors = "".join(f"  lattice_vector   {_columns(row, '16.8f')}\n" for row in after.cell.array)
            atoms = "".join(f"  atom   {_columns(a.position, '16.8f')}  {a.symbol}\n" for a in after)
            text += (
                f"  Updated atomic structure:\n{vectors}{atoms}"
                '  Writing the current geometry to file "geometry.in.next_step".\n'
                "  Begin self-consistency loop: Re-initialization.\n"
            )
    path.write_text(f"{text}\n          Have a nice day.\n------------------------\n")


def write_cp2k(
    path: Path,
    frames: list[Atoms],
    said: str = "",
    *,
    run_type: str = "GEO_OPT",
    end: str = "GEOMETRY OPTIMIZATION COMPLETED",
    gradient: float = 1e-4,
    new: bool = True,
    forces: bool = True,
) -> None:
    """The output of CP2K 9 or (new) 2025, and beside it the positions and forces of its steps."""
    project = path.name.partition(".")[0]
    first = frames[0]
    electrons = dict.fromkeys(sorted(set(first.symbols)), 4)
    rows = "".join(
        f"{k:7d} {1 + list(electrons).index(a.symbol):4d} {a.symbol:2} {a.number:4d} {_columns(a.position, '13.6f')}"
        f" {4:8.4f} {a.mass:8.4f}\n"
        for k, a in enumerate(first, 1)
    )
    pbc = "".join(x for x, periodic in zip("XYZ", first.pbc, strict=True) if periodic) or "NONE"
    kinds = "".join(
        f"  {k}. Atomic kind: {symbol}     Number of atoms:   1\n"
        f"     GTH Potential information for                               GTH-PBE-Q4\n"
        for k, symbol in enumerate(electrons, 1)
    )
    text = (
        "  **** **** ******  **  PROGRAM STARTED AT               2025-01-22 10:22:17.809\n\n"
        " CP2K| version string:                                       CP2K version 2025.1\n"
        f" CP2K| Input file name                                                 {project}.inp\n"
        f" GLOBAL| Project name                                                  {project}\n"
        f" GLOBAL| Run type                                                  {run_type}\n\n"
        f"{_cp2k_cell(first, 'CELL_TOP')}{_cp2k_cell(first)} CELL| Periodicity    {pbc}\n"
        " DFT| Multiplicity                                                             1\n"
        f"{said or ' DFT| Charge                                                                   0' + chr(10)}"
        " FUNCTIONAL| PBE:\n QS| Density cutoff [a.u.]:                                                300.0\n\n"
        f"{kinds}\n MODULE QUICKSTEP: ATOMIC COORDINATES IN ANGSTROM\n\n"
        f"   Atom Kind Element         X             Y             Z       Z(eff)     Mass\n{rows}\n\n"
    )
    if run_type.endswith("OPT"):
        what = "GEOMETRY" if run_type == "GEO_OPT" else "  CELL  "
        text += f" ***                     STARTING {what} OPTIMIZATION   ***\n"
    places = pulls = ""
    for k, frame in enumerate(frames):
        energy = frame.get_potential_energy() / units.Ha
        cell = _cp2k_cell(frame) if run_type == "CELL_OPT" else ""
        text += f"{cell}\n  *** SCF run converged in    10 steps ***\n\n"
        step, total, pull = (
            (" OPT| Step number", " OPT| Total energy [hartree]", " OPT| Maximum gradient   ")
            if new
            else (" --------  Informations at step =", "  Total Energy               =", "  Max. gradient   =")
        )
        text += f"{step} {k:5d} {'' if new else '------------'}\n{total} {energy:20.10f}\n"
        if k:
            text += f"{pull} {gradient:20.10f}\n"
            head = f"{len(frame):8d}\n i = {k:8d}, E = {energy:19.10f}\n"
            places += head + _cp2k_rows(frame, frame.positions)
            pulls += head + _cp2k_rows(frame, frame.get_forces() * units.Bohr / units.Ha)
    text += (
        f"\n ***   {end}   ***\n\n  **** **** ******  **  PROGRAM ENDED AT                 2025-01-22 10:23:13.882\n"
    )
    path.write_text(text)
    path.with_name(f"{project}-pos-1.xyz").write_text(places)
    if forces:
        path.with_name(f"{project}-frc-1.xyz").write_text(pulls)


def _cp2k_rows(frame: Atoms, rows) -> str:
    return "".join(f"  {symbol:2} {_columns(row, '20.10f')}\n" for symbol, row in zip(frame.symbols, rows, strict=True))


def _cp2k_cell(atoms: Atoms, label: str = "CELL") -> str:
    """Vectors with three digits, lengths and angles with six, as CP2K writes them."""
    lengths, angles = atoms.cell.lengths(), atoms.cell.angles()
    rows = "".join(
        f" {label}| Vector {x} [angstrom]: {_columns(vector, '9.3f')}   |{x}| = {length:11.6f}\n"
        for x, vector, length in zip("abc", atoms.cell.array, lengths, strict=True)
    )
    names = ("(b,c), alpha", "(a,c), beta ", "(a,b), gamma")
    return rows + "".join(
        f" {label}| Angle {name} [degree]: {angle:40.6f}\n" for name, angle in zip(names, angles, strict=True)
    )


def write_poscar_and_contcar(folder: Path, frames: list[Atoms]) -> None:
    """The first frame as POSCAR, the last, wrapped into the cell, as CONTCAR."""
    for name, atoms, wrap in (("POSCAR", frames[0], False), ("CONTCAR", frames[-1], True)):
        types = _types(atoms)
        cell = "".join(f" {_columns(row, '21.16f')}\n" for row in atoms.cell.array)
        rows = "".join(f" {_columns(row, '19.16f')}\n" for row in atoms.get_scaled_positions(wrap=wrap))
        still = "".join("  0.00000000E+00  0.00000000E+00  0.00000000E+00\n" for _ in atoms) if wrap else ""
        (folder / name).write_text(
            f"a relaxation\n   1.00000000000000\n{cell}   {'    '.join(symbol for symbol, _ in types)}\n"
            f"  {_columns([n for _, n in types], '4d')}\nDirect\n{rows}\n{still}"
        )


def write_database(path: Path, relaxations: dict[str, list[Atoms]], **keys: dict[str, object]) -> None:
    """A database of ase.db with two rows for each relaxation; keys[name] go to both of them."""
    with connect(path) as database:
        for name, frames in relaxations.items():
            for relaxed, atoms in ((False, frames[0]), (True, frames[-1])):
                database.write(atoms, relaxed=relaxed, **keys.get(name, {"name": name}))


WRITERS = {
    "vasprun.xml": write_vasprun,
    "vasprun.xml.gz": write_vasprun,
    "OUTCAR": write_outcar,
    "OUTCAR.gz": write_outcar,
    "relax.pwo": write_espresso,
    "relax.out": write_espresso,
    "aims.out": write_aims,
    "cp2k.out": write_cp2k,
    "relax.extxyz": write,
    "relax.traj": write,
    "CONTCAR": lambda path, frames: write_poscar_and_contcar(path.parent, frames),
}
"""A file's name, and what writes a relaxation to its path."""


def _types(atoms: Atoms) -> list[tuple[str, int]]:
    """Equal neighbours counted, as in a POSCAR: an element may come again."""
    return [(symbol, len(list(same))) for symbol, same in groupby(atoms.symbols)]


def _columns(values, kind: str) -> str:
    return " ".join(format(value, kind) for value in values)
