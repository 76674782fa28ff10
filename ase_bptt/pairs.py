"""Reading pairs of an initial structure and the structure that a reference relaxation ended in."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read

log = logging.getLogger(__name__)

SUFFIXES = (".extxyz", ".xyz", ".traj", "vasprun.xml", "vasprun.xml.gz", "OUTCAR", ".pwo", ".espresso")
VASP = ("vasprun.xml", "vasprun.xml.gz", "OUTCAR")
"""Files of one VASP run, the preferred first."""
RESIDUAL = 0.05
"""eV/Å: references whose last forces exceed this are named in a warning."""


@dataclass(frozen=True, eq=False)
class RelaxationPair:
    """One reference relaxation.

    Attributes
    ----------
    initial, relaxed : Atoms
        The same atoms in the same order and the same cell.
    id : str
        Names it in tables and messages.
    group : str
        Pairs of one group never stand on both sides of a split.
    """

    initial: Atoms
    relaxed: Atoms
    id: str
    group: str = ""


class InvalidPair(ValueError):
    """A pair that cannot be used, said in one sentence."""


def read_pairs(
    initial: str | Path, relaxed: str | Path | None = None, *, skip_invalid: bool = False
) -> list[RelaxationPair]:
    """Read reference relaxations.

    Parameters
    ----------
    initial : path
        A file of one relaxation in any format that ASE reads frame by frame (the first frame is
        the initial structure, the last the relaxed one), or a folder of such files; with a second
        argument, a file of initial structures.
    relaxed : path, optional
        A file of the relaxed structures, in the same order.
    skip_invalid : bool
        Leave pairs out that cannot be used, with a warning for each, instead of raising.

    Raises
    ------
    FileNotFoundError
        Where there is nothing to read.
    InvalidPair
        Naming the structure, the file and the mend.
    """
    sources = _two_files(Path(initial), Path(relaxed)) if relaxed is not None else _relaxations(Path(initial))
    pairs, problems = [], []
    for name, load in sources:
        try:
            first, last = load()
            check_pair(first, last, name)
            pairs.append(RelaxationPair(first, last, _identity(last, name)))
        except InvalidPair as problem:
            if not skip_invalid:
                raise
            problems.append(str(problem))
    for left_out in problems:
        log.warning("Left out: %s", left_out)
    if not pairs:
        raise InvalidPair(f"None of the {len(problems)} pairs in {initial} can be used; the last: {problems[-1]}")
    return with_groups(pairs)


def check_pair(initial: Atoms, relaxed: Atoms, name: str) -> None:
    """Raise InvalidPair where the two cannot be the ends of one relaxation at a fixed cell."""
    if len(initial) != len(relaxed):
        raise InvalidPair(f"{name}: {len(initial)} atoms begin and {len(relaxed)} end; check the two structures.")
    if not np.array_equal(initial.numbers, relaxed.numbers):
        raise InvalidPair(
            f"{name}: its atoms change from {initial.symbols} to {relaxed.symbols}; "
            "write both structures with their atoms in the same order."
        )
    if not (np.isfinite(initial.positions).all() and np.isfinite(relaxed.positions).all()):
        raise InvalidPair(f"{name}: a position is not a finite number; write the file again.")
    if not np.array_equal(initial.pbc, relaxed.pbc):
        raise InvalidPair(f"{name}: periodic boundaries change from {initial.pbc} to {relaxed.pbc}.")
    change = np.abs(initial.cell.array - relaxed.cell.array).max()
    if not change <= 1e-3:
        raise InvalidPair(
            f"{name}: its cell changes by {change:.3f} Å; only relaxations at a fixed cell can be used so far."
        )
    if "forces" in getattr(relaxed.calc, "results", {}):
        residual = np.linalg.norm(relaxed.get_forces(), axis=1).max()
        if residual > RESIDUAL:
            log.warning("%s: the reference still has a force of %.3f eV/Å; is it relaxed?", name, residual)


def with_groups(pairs: Sequence[RelaxationPair]) -> list[RelaxationPair]:
    """Give every pair without a group one: same composition and same final structure, by `same_structure`."""
    together = classes(len(pairs), lambda a, b: same_structure(pairs[a].relaxed, pairs[b].relaxed))
    names: dict[int, str] = {}
    for pair, first in zip(pairs, together, strict=True):
        names[first] = names.get(first) or pair.group
    return [
        dataclasses.replace(p, group=p.group or names[first] or pairs[first].id)
        for p, first in zip(pairs, together, strict=True)
    ]


def classes(n: int, related: Callable[[int, int], bool]) -> list[int]:
    """For each of n items the first item that it is related to, in one or more steps."""
    first = list(range(n))
    for b in range(n):
        for a in range(b):
            if first[a] != first[b] and related(a, b):
                low, high = sorted((first[a], first[b]))
                first = [low if f == high else f for f in first]
    return first


def same_structure(a: Atoms, b: Atoms, tolerance: float = 0.05) -> bool:
    """Whether two structures are one up to motions, symmetry and the order of their atoms.

    Compares the sorted interatomic distances (nearest images) of each pair of elements: their root
    mean square difference must stay below the tolerance, in Å.
    """
    if sorted(a.numbers) != sorted(b.numbers) or not np.allclose(a.cell.cellpar(), b.cell.cellpar(), atol=0.05):
        return False
    return bool(np.sqrt(np.mean((_distances(a) - _distances(b)) ** 2)) < tolerance) if len(a) > 1 else True


def _distances(atoms: Atoms) -> np.ndarray:
    i, j = np.triu_indices(len(atoms), 1)
    d = atoms.get_all_distances(mic=bool(atoms.pbc.any()))[i, j]
    z = np.sort(atoms.numbers[np.stack((i, j))], axis=0)
    return d[np.lexsort((d, z[1], z[0]))]


Load = Callable[[], tuple[Atoms, Atoms]]


def _relaxations(path: Path) -> list[tuple[str, Load]]:
    """(name, loader) of each relaxation in a file or below a folder."""
    if path.is_file():
        return [(str(path), lambda: _ends(path))]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    if not files:
        raise FileNotFoundError(f"The folder {path} holds no relaxation: no file that ends with {', '.join(SUFFIXES)}.")
    chosen = [file for file in files if not _doubled(file)]
    return [(str(file), lambda file=file: _ends(file)) for file in chosen]  # type: ignore[misc]


def _doubled(file: Path) -> bool:
    """Whether a VASP run's other file, which is preferred, tells the same relaxation."""
    better = VASP[: VASP.index(file.name)] if file.name in VASP else ()
    twin = next((name for name in better if (file.parent / name).is_file()), None)
    if twin is not None:
        log.info("%s: left out, for %s beside it is the same run.", file, twin)
    return twin is not None


def _ends(path: Path) -> tuple[Atoms, Atoms]:
    frames = _read(path)
    if len(frames) < 2:
        raise InvalidPair(
            f"{path}: it holds {len(frames)} structure; a relaxation needs its first and its last frame, "
            "or give initial and relaxed structures as two files."
        )
    return frames[0], frames[-1]


def _two_files(initial: Path, relaxed: Path) -> list[tuple[str, Load]]:
    first, last = _read(initial), _read(relaxed)
    if len(first) != len(last):
        raise InvalidPair(
            f"{initial} holds {len(first)} structures and {relaxed} {len(last)}; both need the same, in the same order."
        )
    return [
        (f"structure {k} of {relaxed}", lambda a=a, b=b: (a, b))  # type: ignore[misc]
        for k, (a, b) in enumerate(zip(first, last, strict=True))
    ]


def _read(path: Path) -> list[Atoms]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        frames: Iterable[Atoms] | Atoms = read(path, index=":", do_not_split_by_at_sign=True)
    except Exception as error:  # ASE's readers raise whatever their parsers do
        raise InvalidPair(f"{path}: ASE cannot read it ({type(error).__name__}: {error}).") from error
    return [frames] if isinstance(frames, Atoms) else list(frames)


def _identity(atoms: Atoms, name: str) -> str:
    known = atoms.info.get("id")
    return str(known) if known is not None else name


def split_by_group(
    pairs: Sequence[RelaxationPair], *, seed: int = 0, fractions: tuple[float, float] = (0.2, 0.2)
) -> dict[str, list[RelaxationPair]]:
    """Split into "train", "valid" and "test" so that no group stands on two sides.

    Parameters
    ----------
    pairs : list of RelaxationPair
    seed : int
        Of the order of the groups.
    fractions : two floats
        Shares of the groups for "valid" and "test"; each gets one at least.
    """
    groups = sorted({p.group for p in pairs})
    if len(groups) < 3:
        raise InvalidPair(
            f"The {len(pairs)} pairs form {len(groups)} group(s) by composition and final structure; "
            "training, validation and test need one each: give more kinds of structures, or name the groups "
            "yourself (--group KEY in the shell, RelaxationPair(group=...) in Python)."
        )
    order = [groups[k] for k in np.random.default_rng(seed).permutation(len(groups))]
    n_valid, n_test = (max(1, round(f * len(groups))) for f in fractions)
    side = {g: "test" if k < n_test else "valid" if k < n_test + n_valid else "train" for k, g in enumerate(order)}
    return {name: [p for p in pairs if side[p.group] == name] for name in ("train", "valid", "test")}


def fingerprint(pairs: Sequence[RelaxationPair]) -> str:
    """A hash of the pairs' atoms, positions and cells."""
    digest = hashlib.sha256()
    for pair in pairs:
        for atoms in (pair.initial, pair.relaxed):
            for array in (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc):
                digest.update(array.tobytes())
    return digest.hexdigest()
