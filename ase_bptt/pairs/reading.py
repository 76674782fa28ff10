"""Reading pairs from files, folders and databases."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import MAX_REFERENCE_FORCE, InvalidPair, RelaxationPair
from .groups import joined, warn_of_equal_starts, with_groups
from .lazy import DESCRIPTORS, Index, PairTable, lazy_pairs
from .loading import Choices, Progress, Reader
from .sources import Source, short
from .structure_matching import Equals, composition, find_duplicates
from .survey import Survey, relaxation_files
from .symmetry import check_symmetry

log = logging.getLogger(__name__)


def read_pairs(
    initial: str | Path,
    relaxed: str | Path | None = None,
    *,
    skip_invalid: bool = False,
    group: str | None = None,
    lazy: bool = False,
    index: str | Path | None = None,
    max_reference_force: float | None = MAX_REFERENCE_FORCE,
    cell: str | Sequence[int] | None = None,
    pressure: float = 0.0,
    symmetry: str | None = None,
    processes: int = 1,
) -> list[RelaxationPair]:
    """Read reference relaxations.

    Parameters
    ----------
    initial : path
        A file of one relaxation in any format that ASE reads frame by frame (the first frame is
        the initial structure, the last the relaxed one), or a folder of such files; a CONTCAR with
        a POSCAR beside it; or a database of ase.db whose rows have the key ``relaxed``, False or
        True. With a second argument, a file of initial structures.
    relaxed : path, optional
        A file of the relaxed structures, in the same order.
    skip_invalid : bool
        Leave pairs out that cannot be used, with a warning for each, instead of raising.
    group : str, optional
        Key of the relaxed structures' info that names the groups; for "folder", where info has no such key, the
        folders directly below the one that was given do. By default what has one composition and ends in one
        structure is a group (`with_groups`).
    lazy : bool
        Read all structures once, to check them, but keep none: each is read again on access. For a folder or a .db of
        more pairs than fit in memory. Changes that are made to a structure in place are lost.
    index : path, optional
        With `lazy`, the folder in which an index of all pairs is kept, so that the next start reads no structure;
        ``ase_bptt`` in the user's cache folder by default. It is rebuilt where a file has changed.
    max_reference_force : float or None
        eV/Å: relaxed structures with a larger force left, as where the steps ran out, are no references: a folder's are
        passed by with a count. Forces along constraints do not count. None takes all.
    cell, pressure : str or mask, float
        What of the cells was relaxed, and at which pressure (eV/Å^3), as for `relax`, in place of what the runs say
        (ISIF and PSTRESS, vc-relax) or, where they do not, what the first and the last cell show.
    symmetry : str, optional
        "keep", "break" or "free": what becomes of the symmetry of the starts (`with_symmetry`). By default it is kept
        where the run kept it (VASP's ISYM above 0, symmetry operations of pw.x).
    processes : int
        How many read the files of a large folder at once. They are spawned, so a script that asks for several needs
        ``if __name__ == "__main__":`` around what it does.

    Returns
    -------
    list of RelaxationPair
        Relaxed positions are at the periodic images nearest to the initial ones. The id is
        ``info["id"]`` where the relaxed structure has one, else the path below the one that was given,
        without VASP's own file names.

    Raises
    ------
    FileNotFoundError
        Where there is nothing to read.
    InvalidPair
        Naming the structure, the file and what to do.
    ValueError
        For an unknown name of a symmetry.

    Examples
    --------
    >>> from ase_bptt import datasets, read_pairs
    >>> pairs = read_pairs(datasets.FOLDER / "V_00.extxyz")
    >>> pairs[0].id, len(pairs[0].frames)
    ('V_00', 12)
    """
    check_symmetry(symmetry)
    chosen = cell if cell is None or isinstance(cell, str) else tuple(cell)
    choices = Choices(skip_invalid, group, max_reference_force, chosen, pressure, symmetry)
    pairs, survey = read_archive(initial, relaxed, choices=choices, lazy=lazy, index=index, processes=processes)
    survey.report()
    return pairs


def read_archive(
    initial: str | Path,
    relaxed: str | Path | None = None,
    *,
    choices: Choices = Choices(),  # noqa: B008 (it is frozen)
    lazy: bool = False,
    index: str | Path | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> tuple[list[RelaxationPair], Survey]:
    """`read_pairs`, with what else was found there.

    An InvalidPair that stops it has the survey, of the whole archive, as ``survey``.
    """
    root = Path(initial)
    if choices.pressure and choices.cell is None:
        raise ValueError(
            "A pressure is given, and not what moves of the cells: give --cell (cell= in Python), too, or leave both "
            "to the runs."
        )
    if lazy:
        return _read_lazily(root, relaxed, choices, index, processes, progress)
    survey = Survey(initial)
    reader = Reader(root if relaxed is None else Path(relaxed), survey, choices, processes, progress)
    pairs, names = [], []
    for source, pair in reader.read(relaxation_files(root)) if relaxed is None else reader.read_two(root):
        pairs.append(pair)
        names.append(short(source.name, reader.root))
    ids = _distinct([p.id for p in pairs], names)
    named = [p if p.id == id else dataclasses.replace(p, id=id) for p, id in zip(pairs, ids, strict=True)]
    return named if choices.group else with_groups(named), survey


def _read_lazily(
    root: Path,
    relaxed: str | Path | None,
    choices: Choices,
    folder: str | Path | None,
    processes: int,
    progress: Progress | None,
) -> tuple[list[RelaxationPair], Survey]:
    """From the index, or else from reading all of them once."""
    if relaxed is not None or root.suffix == ".json":
        raise InvalidPair(
            f"{relaxed or root} holds many structures and is read whole: give a folder of relaxations or a database "
            "(.db, as 'ase db all.json --insert-into all.db' makes it), or do not ask for lazy reading."
        )
    files = relaxation_files(root)
    index = Index(root, files, choices, folder)
    found = index.read()
    if found is not None:
        table, survey = found
        if survey.problems and not choices.skip_invalid:
            problem = InvalidPair(survey.problems[0])
            problem.survey = survey
            raise problem
        for sentence in survey.problems:
            log.warning("Left out: %s", sentence)
        survey.check()
        return lazy_pairs(table), survey
    survey, table = Survey(root), PairTable(root, choices)
    seen = Equals()
    names, compositions = [], []
    places: list[tuple[int, int]] = []

    def row(source: Source, pair: RelaxationPair) -> tuple[Any, ...]:
        """What is kept of a pair while the others are read."""
        known = source, pair.id, pair.group, pair.n_atoms, pair.kind, pair.digest()
        # Only groups that are not named are looked for.
        both = (0, 0) if choices.group else (seen.add(pair.initial), seen.add(pair.relaxed))
        return known, composition(pair.relaxed), both

    for source, (known, elements, both) in Reader(root, survey, choices, processes, progress, row).read(files):
        table.add(*known)
        names.append(short(source.name, root))
        compositions.append(elements)
        places.append(both)
    table.ids = _distinct(table.ids, names)
    if not choices.group:
        ends = find_duplicates(compositions, lambda k: table.read(k).relaxed, keep=DESCRIPTORS)
        warn_of_equal_starts(table.ids, [start for start, _ in places], ends, lambda k: table.read(k).relaxed)
        table.groups = [table.ids[k] for k in joined(places, ends)]
    index.write(table, survey)
    return lazy_pairs(table), survey


def _distinct(ids: Sequence[str], names: Sequence[str]) -> list[str]:
    """The ids, followed by the path where several are the same."""
    count = Counter(ids)
    return [id if count[id] == 1 or id == name else f"{id} ({name})" for id, name in zip(ids, names, strict=True)]
