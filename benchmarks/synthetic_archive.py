"""An archive of 300 files whose truth is known, and what `read_archive` says of each of them.

    python benchmarks/synthetic_archive.py [--keep FOLDER] [--train]

Outputs of VASP 5.4 and 6.3, pw.x 6.8 and 7.3, FHI-aims and CP2K, in the layouts of custodian, atomate2, doped and plain
folders, are written with a label for each file; then the archive is read, and the labels are compared. With --train the
broken files are taken out, and `ase-bptt train ARCHIVE --potential emt` has to run on the rest without a flag.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from code_outputs import aims, cp2k, cp2k_steps, outcar, poscar, pw, vasprun

from ase_bptt.pairs.chains import Legs
from ase_bptt.pairs.loading import Choices, Reader
from ase_bptt.pairs.survey import Survey, relaxation_files

METALS = ("Cu", "Ag", "Au", "Ni", "Pd", "Pt", "Al")


class Archive:
    """Writes files, and remembers what each of them is."""

    def __init__(self, root: Path):
        self.root, self.truth = root, dict[str, str]()
        self._rng = np.random.default_rng(7)

    def path(self, n: int, steps: int = 4, of: str | None = None) -> list[Atoms]:
        """Frames of the relaxation of a rattled supercell with a vacancy."""
        end = bulk(of or METALS[n % len(METALS)], cubic=True) * (1 + n // 7 % 2, 1, 1)
        del end[n // 14 % len(end)]
        end.positions += 0.02 * self._rng.normal(size=end.positions.shape)
        noise = 0.15 * self._rng.normal(size=end.positions.shape)
        frames = [end.copy() for _ in range(steps)]
        for share, frame in zip(np.linspace(1, 0, steps), frames, strict=True):
            frame.positions += share * noise
        return frames

    def write(self, name: str, text: str, label: str) -> None:
        """One file, compressed where its name says so."""
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        self.truth[name] = label


def fill(a: Archive) -> None:
    """300 files: "used", "copy", "broken", another kind of calculation, or "" for what needs no word."""
    for k in range(6):  # atomate2: each job in a folder of its own, the next one begins where it ended
        frames, place = a.path(k, 6), f"atomate2/job_{k:04d}"
        legs = {"relax_1": frames[:3], "relax_2": frames[2:], "static": frames[-1:]}
        for name, part in legs.items():
            static = name == "static"
            folder = f"{place}/{name}_{k * 37 % 23:02d}"
            text = vasprun(part, NSW=0, IBRION=-1) if static else vasprun(part, left=0.01 + 0.6 * (name == "relax_1"))
            a.write(f"{folder}/vasprun.xml.gz", text, "single-point calculation" if static else "used")
            a.write(f"{folder}/OUTCAR.gz", outcar(part), "")
            a.write(f"{folder}/POSCAR.gz", poscar(part[0]), "")
            a.write(f"{folder}/CONTCAR.gz", poscar(part[-1]), "")
            a.write(f"{folder}/custodian.json", "[]\n", "")
    for k in range(6, 14):  # custodian's double relaxation
        frames = a.path(k, 5)
        for leg, part in ((1, frames[:3]), (2, frames[2:])):
            a.write(f"mp/mp-{100 + k}/OUTCAR.relax{leg}.gz", outcar(part, ISPIN=1), "used")
            a.write(f"mp/mp-{100 + k}/INCAR.relax{leg}.gz", "IBRION = 2\nNSW = 80\n", "")
    for k in range(14, 22):  # doped: distorted starts, then another functional and spin-orbit coupling
        frames, other = a.path(k, 4), a.path(k + 40, 4)
        place = f"defects/v_{frames[0][0].symbol}_{k}_0"
        a.write(f"{place}/Bond_Distortion_-40.0%/OUTCAR", outcar(frames), "used")
        a.write(f"{place}/Bond_Distortion_-40.0%/CONTCAR", poscar(frames[-1]), "")
        a.write(f"{place}/Unperturbed/OUTCAR", outcar(other), "used")
        a.write(f"{place}/vasp_std/vasprun.xml.gz", vasprun([frames[-1], *a.path(k, 3)[1:]], LHFCALC="T", HFSCREEN=0.2),
                "further calculation of a relaxed structure")  # fmt: skip
        a.write(
            f"{place}/vasp_ncl/vasprun.xml.gz", vasprun(frames[-1:], NSW=0, LSORBIT="T"), "single-point calculation"
        )
    for k in range(22, 30):  # plain folders, and a backup of some
        text = outcar(a.path(k))
        a.write(f"runs/{k}/OUTCAR", text, "copy" if k % 4 == 2 else "used")
        a.write(f"runs/{k}/INCAR", "NSW = 80\n", "")
        if k % 4 == 2:
            a.write(f"old/backup/{k}/OUTCAR.gz", text, "used")
    others = {
        "molecular dynamics": {"IBRION": 0, "MDALGO": 2},
        "finite differences": {"IBRION": 6},
        "perturbation theory": {"IBRION": 8},
        "image of a nudged elastic band": {"IMAGES": 3},
        "machine-learned force field": {"ML_LMLFF": "T"},
        "saddle point search": {"ICHAIN": 2},
    }
    for j, (kind, tags) in enumerate(others.items()):
        for k in range(5):
            name = f"other/{kind.split()[0]}/{k:02d}/" + ("OUTCAR" if k % 2 else "vasprun.xml")
            a.write(name, (outcar if k % 2 else vasprun)(a.path(5 * j + k), **tags), kind)
    for k in range(6):
        a.write(f"unfinished/{k}/OUTCAR", outcar(a.path(k + 3), left=0.9), "not converged")
    espresso(a)
    for k in range(6):
        a.write(f"aims/{k}/aims.out", aims(a.path(k + 2)), "used")
        a.write(f"aims/{k}/control.in", "xc pbe\nrelax_geometry bfgs 5e-3\n", "")
        a.write(f"aims/scf_{k}.out", aims(a.path(k)[:1], relaxes=False), "single-point calculation")
    elsewhere = {"log": ("Gaussian", "Entering Gaussian System, Link 0=g16"), "castep": ("CASTEP", "CASTEP 22.1"),
                 "out": ("ORCA", "   O   R   C   A"), "abo": ("ABINIT", ".Version 9.8.3 of ABINIT")}  # fmt: skip
    for k, (end, (code, said)) in enumerate(2 * [*elsewhere.items()]):
        a.write(f"elsewhere/{k}.{end}", f"\n {said}\n", f"output of {code}")
    of_cp2k(a)
    whole = outcar(a.path(5))
    for k in range(4):
        a.write(f"broken/{k}/OUTCAR", whole[: len(whole) * (k + 4) // 9], "broken")
    a.write("broken/4/vasprun.xml", vasprun(a.path(6))[:-4000], "broken")
    a.write("broken/5/relax.out", pw(a.path(6)).replace("JOB DONE", ""), "broken")
    while len(a.truth) < 300:
        a.write(
            f"notes/{len(a.truth)}.{('md', 'txt', 'sh', 'log')[len(a.truth) % 4]}", "srun vasp_std > vasp.out\n", ""
        )


def of_cp2k(a: Archive) -> None:
    steps = "trajectory of CP2K, read with its output"
    for k in range(4):
        frames, place = a.path(k + 30), f"cp2k/geo_{k}"
        a.write(f"{place}/run.out", cp2k(frames, project="geo"), "used")
        a.write(f"{place}/geo-pos-1.xyz", cp2k_steps(frames), steps)
        a.write(f"{place}/geo.inp", "&GLOBAL\n  RUN_TYPE GEO_OPT\n&END\n", "")
    for k in range(2):
        frames, place = a.path(k + 50), f"cp2k/cell_{k}"
        for frame, share in zip(frames, (1.02, 1.01, 1.0, 1.0), strict=True):
            frame.set_cell(frame.cell.array * share, scale_atoms=True)
        a.write(f"{place}/cp2k.log", cp2k(frames, run_type="CELL_OPT"), "used")
        a.write(f"{place}/cp2k-pos-1.xyz", cp2k_steps(frames), steps)
        a.write(f"cp2k/energy_{k}.out", cp2k(a.path(k)[:1], run_type="ENERGY_FORCE"), "single-point calculation")
        a.write(f"cp2k/md_{k}.out", cp2k(a.path(k)[:1], run_type="MD"), "molecular dynamics")
    frames = a.path(37)
    a.write("cp2k/far/cp2k.out", cp2k(frames, left=0.9), "not converged")
    a.write("cp2k/far/cp2k-pos-1.xyz", cp2k_steps(frames), steps)
    a.write("cp2k/lost/cp2k.out", cp2k(a.path(39)), "broken")


def espresso(a: Archive) -> None:
    for k in range(8):
        version = ("6.8", "7.3")[k % 2]
        a.write(f"qe/relax_{k}/pw.{('out', 'log', 'pwo')[k % 3]}", pw(a.path(k + 9), version=version), "used")
        a.write(f"qe/relax_{k}/pw.in", "&CONTROL\n calculation = 'relax'\n/\n", "")
    for k in range(5):
        a.write(f"qe/scf_{k}.out", pw(a.path(k)[:1], said=""), "single-point calculation")
        a.write(
            f"qe/md_{k}.out", pw(a.path(k), said="     Entering Dynamics:    iteration =     1"), "molecular dynamics"
        )
    for k in range(3):
        said = "     Program PHONON v.7.3\n     This program is part of the Quantum ESPRESSO suite\n"
        a.write(f"qe/ph_{k}.out", said, "output of another program of Quantum ESPRESSO")


def said_of(root: Path) -> tuple[dict[str, str], Survey]:
    """What we say of each file; nothing of those that are not named."""
    survey = Survey(root)
    found = Reader(root, survey, Choices(skip_invalid=True)).read(relaxation_files(root))
    said: dict[str, str] = {}
    for source, _ in found:
        for name in source.names if isinstance(source, Legs) else (source.name,):
            said[str(Path(name).relative_to(root))] = "used"
    for kind, names in survey.passed_by.items():
        said |= {name.partition(" with ")[0]: kind for name in names}
    said |= {name.partition(" of ")[0]: "copy" for name in survey.copies}
    said |= {problem.partition(": ")[0].removeprefix(f"{root}/"): "broken" for problem in survey.problems}
    return said, survey


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", type=Path, help="write the archive here, and leave it")
    parser.add_argument("--train", action="store_true", help="train on it for an epoch")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        archive = Archive(arguments.keep or Path(temporary) / "archive")
        fill(archive)
        said, survey = said_of(archive.root)
        both = Counter((label, said.get(name, "")) for name, label in archive.truth.items())
        print(f"{len(archive.truth)} files\n\n{'truth':48} {'we say':48} files")
        for (label, ours), n in sorted(both.items()):
            print(f"{label or '-':48} {ours or '-':48} {n:5}{'' if label == ours else '   WRONG'}")
        wrong = [name for name, label in archive.truth.items() if said.get(name, "") != label]
        print(f"\n{len(wrong)} wrong {wrong[:5]}\n\n{survey.table()}")
        if arguments.train and not wrong:
            for name in (name for name, label in archive.truth.items() if label == "broken"):
                (archive.root / name).unlink()
            words = ["train", archive.root, "--potential", "emt", "--epochs", "1", "--out", Path(temporary) / "run"]
            return subprocess.run([sys.executable, "-m", "ase_bptt", *map(str, words)], check=False).returncode
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
