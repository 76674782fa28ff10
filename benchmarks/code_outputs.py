"""Outputs of VASP, pw.x, FHI-aims and CP2K as these programs write them, as far as a reader looks at them."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.units import Bohr, Hartree, Rydberg

ZVAL = {"Cu": 11.0, "Ag": 11.0, "Au": 11.0, "Ni": 10.0, "Pd": 10.0, "Pt": 10.0, "Al": 3.0}
RELAX = {"IBRION": 2, "NSW": 80, "ISIF": 2, "ENCUT": 420}


def forces(frames: list[Atoms], k: int, left: float) -> np.ndarray:
    """What is left at the end, and more before."""
    found = np.zeros((len(frames[k]), 3))
    found[0, 1] = left + 0.3 * (len(frames) - 1 - k)
    return found


def rows(array: np.ndarray, kind: str = "14.8f") -> list[str]:
    return ["".join(format(x, kind) for x in row) for row in array]


def outcar(frames: list[Atoms], left: float = 0.01, **tags: object) -> str:
    atoms = frames[0]
    symbol, zval = atoms[0].symbol, ZVAL[atoms[0].symbol]
    tags = RELAX | {"NELECT": zval * len(atoms)} | tags
    head = [
        " vasp.5.4.4.18Apr17-6-g9f103f2a35 (build Jun 11 2021 10:21:35) complex", " executed on  LinuxIFC",
        " INCAR:", f" POTCAR:    PAW_PBE {symbol} 06Sep2000", f" POTCAR:    PAW_PBE {symbol} 06Sep2000",
        f"   VRHFIN ={symbol}: s1p1", "   LEXCH  = PE", f"   TITEL  = PAW_PBE {symbol} 06Sep2000",
        "   k-points           NKPTS =      1   k-points in BZ     NKDIM =      1   number of bands    NBANDS=     24",
        f"   ions per type =            {len(atoms):4d}", "   ISPIN  =      1    spin polarized calculation?",
        *(f"   {name:6} = {value!s:>8}    setting" for name, value in tags.items()), "   ZVAL   = " + f"{zval:6.2f}",
        " k-points in reciprocal lattice and weights: K", "   0.00000000  0.00000000  0.00000000       1.000", "",
    ]  # fmt: skip
    for k, frame in enumerate(frames):
        cell = np.hstack([frame.cell.array, frame.cell.reciprocal().array])
        block = np.hstack([frame.positions, forces(frames, k, left)])
        head += [
            f"----------------------------------------- Iteration {k + 1:4d}(   1)  ---------------------", "",
            "  in kB       0.00000     0.00000     0.00000     0.00000     0.00000     0.00000", "",
            "      direct lattice vectors                 reciprocal lattice vectors", *rows(cell, "15.9f"), "",
            " POSITION                                       TOTAL-FORCE (eV/Angst)", " " + "-" * 83,
            *rows(block, "14.6f"), " " + "-" * 83, "",
            "  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)", "  " + "-" * 51,
            f"  free  energy   TOTEN  = {-3.0 * len(frame):18.8f} eV", "",
            f"  energy  without entropy= {-3.0 * len(frame):18.8f}  energy(sigma->0) = {-3.0 * len(frame):18.8f}", "",
        ]  # fmt: skip
    return "\n".join([*head, " General timing and accounting informations for this job:", ""]) + "\n"


def varray(name: str, array: np.ndarray) -> str:
    return f'<varray name="{name}" >\n' + "".join(f"<v>{row} </v>\n" for row in rows(array, "17.10f")) + "</varray>\n"


def vasprun(frames: list[Atoms], left: float = 0.01, **tags: object) -> str:
    atoms, symbol = frames[0], frames[0][0].symbol
    tags = RELAX | {"NELECT": ZVAL[symbol] * len(atoms), "GGA": "PE"} | tags
    settings = "".join(f' <i name="{name}">{value}</i>\n' for name, value in tags.items())
    sites = "".join(f"<rc><c>{symbol:2}</c><c>   1</c></rc>\n" for _ in atoms)

    def structure(frame: Atoms, name: str = "") -> str:
        place = varray("positions", frame.get_scaled_positions(wrap=False))
        named = f' name="{name}"' if name else ""
        basis = varray("basis", frame.cell.array)
        return f"<structure{named}>\n<crystal>\n{basis}</crystal>\n{place}</structure>\n"

    energy = "".join(f'<i name="{n}">{-3.0 * len(atoms)}</i>\n' for n in ("e_fr_energy", "e_wo_entrp", "e_0_energy"))
    steps = "".join(
        f"<calculation>\n<scstep>\n<energy>\n{energy}</energy>\n</scstep>\n{structure(frame)}"
        f"{varray('forces', forces(frames, k, left))}{varray('stress', np.zeros((3, 3)))}"
        f"<energy>\n{energy}</energy>\n</calculation>\n" for k, frame in enumerate(frames)
    )  # fmt: skip
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<modeling>\n<generator>\n'
        '<i name="program" type="string">vasp</i>\n<i name="version" type="string">6.3.0</i>\n'
        '</generator>\n<incar>\n <i name="PREC">accurate</i>\n</incar>\n'
        f"<kpoints>\n{varray('kpointlist', np.zeros((1, 3)))}{varray('weights', np.ones((1, 1)))}</kpoints>\n"
        f"<parameters>\n{settings}</parameters>\n<atominfo>\n<atoms>{len(atoms)}</atoms>\n<types>1</types>\n"
        f'<array name="atoms">\n<set>\n{sites}</set>\n</array>\n<array name="atomtypes">\n<set>\n'
        f"<rc><c>{len(atoms)}</c>"
        f"<c>{symbol:2}</c><c>50.0</c><c>{ZVAL[symbol]}</c><c>PAW_PBE {symbol} 06Sep2000</c></rc>\n</set>\n</array>\n"
        f"</atominfo>\n{structure(atoms, 'initialpos')}{steps}{structure(frames[-1], 'finalpos')}</modeling>\n"
    )


def pw(
    frames: list[Atoms], left: float = 0.01, said: str = "     BFGS Geometry Optimization", version: str = "7.3"
) -> str:
    atoms = frames[0]
    alat = round(atoms.cell.lengths()[0] / Bohr, 4)
    text = [
        "slurm: job 881 on node17", "", f"     Program PWSCF v.{version} starts on 11Feb2024 at 10:12:13", "",
        f"     lattice parameter (alat)  = {alat:11.4f}  a.u.", f"     number of atoms/cell      = {len(atoms):11d}",
        "     number of atomic types    =           1",
        f"     number of electrons       = {ZVAL[atoms[0].symbol] * len(atoms):11.2f}",
        "     kinetic-energy cutoff     =      45.0000  Ry", "     Exchange-correlation= PBE", "",
        f"     celldm(1)= {alat:10.6f}  celldm(2)=   0.000000  celldm(3)=   0.000000", "",
        "     crystal axes: (cart. coord. in units of alat)",
        *(f"               a({k + 1}) = ({row}  )  " for k, row in enumerate(rows(atoms.cell.array / alat / Bohr))), "",
        "   Cartesian axes", "", "     site n.     atom                  positions (alat units)",
        *(f"     {k + 1:5d}           {a.symbol:2}  tau({k + 1:4d}) = ({row}  )"
          for k, (a, row) in enumerate(zip(atoms, rows(atoms.positions / alat / Bohr), strict=True))), "",
        "     number of k points=     1", "                       cart. coord. in units 2pi/alat",
        "        k(    1) = (   0.0000000   0.0000000   0.0000000), wk =   2.0000000", "", said,
    ]  # fmt: skip
    for k, frame in enumerate(frames):
        after = frames[min(k + 1, len(frames) - 1)]
        text += [
            "     End of self-consistent calculation", "",
            "          k = 0.0000 0.0000 0.0000 (   500 PWs)   bands (ev):", "", "    -5.5000   6.1000", "",
            "     highest occupied level (ev):     6.1000", "",
            f"!    total energy              = {-3.0 * len(frame) / Rydberg:16.8f} Ry", "",
            "     Forces acting on atoms (cartesian axes, Ry/au):", "",
            *(f"     atom {j + 1:4d} type  1   force = {row}"
              for j, row in enumerate(rows(forces(frames, k, left) * Bohr / Rydberg))), "",
            *([f"     bfgs converged in {k + 1:3d} scf cycles"] if k == len(frames) - 1 and "Geometry" in said else []),
            *([f"     number of scf cycles    = {k + 1:3d}"] if k + 1 < len(frames) else []), "",
            "ATOMIC_POSITIONS (angstrom)",
            *(f"{a.symbol:2} {row}" for a, row in zip(after, rows(after.positions, "18.10f"), strict=True)), "",
        ]  # fmt: skip
    return "\n".join([*text, "", "   JOB DONE.", ""]) + "\n"


def aims(frames: list[Atoms], left: float = 0.01, relaxes: bool = True) -> str:
    def geometry(atoms: Atoms) -> list[str]:
        vectors = [f"  lattice_vector {row}" for row in rows(atoms.cell.array)]
        return [
            *vectors,
            *(f"            atom {r}  {a.symbol}" for r, a in zip(rows(atoms.positions), atoms, strict=True)),
        ]

    atoms = frames[0]
    text = [
        "------------------------------------------------------------", "          Invoking FHI-aims ...",
        "          Version 221103", "  XC: Using PBE gradient-corrected functionals.",
        "  Charge =   0.000000E+00: Neutral system requested explicitly.",
        *(["  Geometry relaxation: Textbook BFGS (simple quadratic extrapolation)."] if relaxes else []),
        f"  | Number of atoms                   : {len(atoms):8d}", "  | Number of spin channels           :        1",
        "  | Number of Kohn-Sham states (occupied + empty):       40",
        f"  The structure contains {len(atoms)} atoms, and a total of {11.0 * len(atoms):.3f} electrons.",
        "  | Unit cell:", *(f"  |  {row}" for row in rows(atoms.cell.array)), "  | Atomic structure:",
        "  |       Atom                x [A]            y [A]            z [A]",
        *(f"  |{k + 1:5d}: Species {a.symbol:10}{row}"
          for k, (a, row) in enumerate(zip(atoms, rows(atoms.positions, "17.8f"), strict=True))),
        "  Begin self-consistency iteration #    1", "",
    ]  # fmt: skip
    for k, frame in enumerate(frames):
        text += [
            f"  | Total energy uncorrected      : {-3.0 * len(frame):20.10f} eV",
            f"  | Electronic free energy        : {-3.0 * len(frame):20.10f} eV",
            "  Total atomic forces (unitary) [eV/Ang]:",
            *(f"  |{j + 1:5d} {row}" for j, row in enumerate(rows(forces(frames, k, left), "24.12f"))),
            *(["  Geometry optimization: Attempting to predict improved coordinates."] if relaxes else []),
            *([f"  Relaxation step number {k + 1:6d}: Predicting new coordinates."] if k + 1 < len(frames) else []),
            *(["  Updated atomic structure:", *geometry(frames[k + 1]),
               '  Writing the current geometry to file "geometry.in.next_step".',
               "  Begin self-consistency loop: Re-initialization."] if k + 1 < len(frames) else []),
        ]  # fmt: skip
    return "\n".join([*text, "  Present geometry is converged.", "", "          Have a nice day.", "-" * 60]) + "\n"


def cp2k(frames: list[Atoms], left: float = 0.01, run_type: str = "GEO_OPT", project: str = "cp2k") -> str:
    """The output; its steps are in `cp2k_steps`."""
    atoms = frames[0]

    def cell(frame: Atoms, label: str) -> list[str]:
        vectors = zip("abc", rows(frame.cell.array, "10.3f"), frame.cell.lengths(), strict=True)
        names = zip(("(b,c), alpha", "(a,c), beta ", "(a,b), gamma"), frame.cell.angles(), strict=True)
        return [
            f" {label}| Volume [angstrom^3]: {frame.get_volume():58.6f}",
            *(f" {label}| Vector {x} [angstrom]:  {vector}   |{x}| = {length:11.6f}" for x, vector, length in vectors),
            *(f" {label}| Angle {name} [degree]: {angle:45.6f}" for name, angle in names),
        ]

    text = [
        "  **** **** ******  **  PROGRAM STARTED AT               2022-02-03 09:01:00.123", "",
        " CP2K| version string:                                       CP2K version 2022.1",
        f" CP2K| Input file name {project + '.inp':>58}", "", f" GLOBAL| Project name {project:>59}",
        f" GLOBAL| Run type {run_type:>63}", "", *cell(atoms, "CELL_TOP"), *cell(atoms, "CELL"), "",
        " DFT| Multiplicity                                                             1",
        " DFT| Charge                                                                   0",
        " FUNCTIONAL| PBE:", " QS| Density cutoff [a.u.]:                                                250.0", "",
        f"  1. Atomic kind: {atoms[0].symbol:4} Number of atoms: {len(atoms):7d}",
        "     GTH Potential information for                       GTH-PBE-q11", "",
        " MODULE QUICKSTEP:  ATOMIC COORDINATES IN angstrom", "",
        "  Atom  Kind  Element       X           Y           Z          Z(eff)       Mass", "",
        *(f"{k:7d}    1 {a.symbol:2} {a.number:4d}{row}{11:13.4f}{a.mass:12.4f}"
          for k, (a, row) in enumerate(zip(atoms, rows(atoms.positions, "13.6f"), strict=True), 1)), "", "",
    ]  # fmt: skip
    if run_type.endswith("OPT"):
        text += [" ***                     STARTING GEOMETRY OPTIMIZATION                      ***", ""]
    for k, frame in enumerate(frames):
        text += [
            *(cell(frame, "CELL") if run_type == "CELL_OPT" else []), "  *** SCF run converged in    10 steps ***", "",
            f" --------  Informations at step = {k:5d} ------------",
            "  Optimization Method        =                 BFGS",
            f"  Total Energy               = {-3.0 * len(frame) / Hartree:20.10f}",
            *([f"  Max. gradient              = {forces(frames, k, left).max() * Bohr / Hartree:20.10f}"] if k else []),
            " ---------------------------------------------------", "",
        ]  # fmt: skip
    return "\n".join([
        *text, " ***                    GEOMETRY OPTIMIZATION COMPLETED                      ***", "",
        "  **** **** ******  **  PROGRAM ENDED AT                 2022-02-03 09:11:00.123", "",
    ])  # fmt: skip


def cp2k_steps(frames: list[Atoms]) -> str:
    """PROJECT-pos-1.xyz."""
    return "".join(
        f"{len(frame):8d}\n i = {k:8d}, E = {-3.0 * len(frame) / Hartree:19.10f}\n"
        + "".join(f"{a.symbol:>3}{row}\n" for a, row in zip(frame, rows(frame.positions, "20.10f"), strict=True))
        for k, frame in enumerate(frames) if k
    )  # fmt: skip


def poscar(atoms: Atoms) -> str:
    body = rows(atoms.get_scaled_positions(wrap=False), "20.16f")
    return "\n".join(["made up", "1.0", *rows(atoms.cell.array, "20.16f"), atoms[0].symbol, str(len(atoms)), "Direct",
                      *body]) + "\n"  # fmt: skip
