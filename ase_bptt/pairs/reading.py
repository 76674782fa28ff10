"""Reading pairs from files, folders and databases."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from . import MAX_REFERENCE_FORCE, InvalidPair, RelaxationPair, check_converged, check_pair, unwrapped, warn_of_moves
from .folders import Survey, relaxation_files
from .groups import joined, warn_of_equal_starts, with_groups
from .lazy import DESCRIPTORS, Index, PairTable, lazy_pairs
from .sources import File, Legs, Source, loaded, short, sources_in, two_files
from .structure_matching import Equals, composition, find_duplicates

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

    Examples
    --------
    >>> from ase_bptt import datasets, read_pairs
    >>> pairs = read_pairs(datasets.FOLDER / "V_00.extxyz")
    >>> pairs[0].id, len(pairs[0].frames)
    ('V_00', 12)
    """
    root = Path(initial)
    if lazy:
        return lazy_pairs(_table(root, relaxed, skip_invalid, group, index, max_reference_force))
    if relaxed is None:
        sources: Iterable[Source] = sources_in(relaxation_files(root))
    else:
        sources, root = two_files(root, Path(relaxed)), Path(relaxed)
    survey = Survey(initial)
    pairs, names = [], []
    for source, pair in _checked(sources, root, group, survey, skip_invalid, max_reference_force):
        pairs.append(pair)
        names.append(short(source.name, root))
    survey.report()
    ids = _distinct([p.id for p in pairs], names)
    named = [p if p.id == id else dataclasses.replace(p, id=id) for p, id in zip(pairs, ids, strict=True)]
    return named if group else with_groups(named)


def _table(
    root: Path,
    relaxed: str | Path | None,
    skip_invalid: bool,
    group: str | None,
    folder: str | Path | None,
    max_reference_force: float | None,
) -> PairTable:
    """The table of all pairs: from the index, or else from reading all of them once."""
    if relaxed is not None or root.suffix == ".json":
        raise InvalidPair(
            f"{relaxed or root} holds many structures and is read whole: give a folder of relaxations or a database "
            "(.db, as 'ase db all.json --insert-into all.db' makes it), or do not ask for lazy reading."
        )
    files = relaxation_files(root)
    index = Index(root, files, (group, max_reference_force), folder)
    found = index.read()
    if found is None:
        survey = Survey(root)
        table = PairTable(root)
        names, compositions = [], []
        seen, starts = Equals(), []
        for source, pair in _checked(sources_in(files), root, group, survey, skip_invalid, max_reference_force):
            table.add(source, pair.id, pair.group, pair.n_atoms, pair.kind, pair.digest())
            names.append(short(source.name, root))
            compositions.append(composition(pair.relaxed))
            starts.append(seen.add(pair.initial))
        survey.report()
        table.ids = _distinct(table.ids, names)
        if not group:
            ends = find_duplicates(compositions, lambda k: table.read(k).relaxed, keep=DESCRIPTORS)
            warn_of_equal_starts(table.ids, starts, ends, lambda k: table.read(k).relaxed)
            table.groups = [table.ids[k] for k in joined(starts, ends)]
        index.write(table, survey)
        return table
    table, survey = found
    if survey.problems and not skip_invalid:
        raise InvalidPair(survey.problems[0])
    for problem in survey.problems:
        log.warning("Left out: %s", problem)
    survey.report()
    return table


def _checked(
    sources: Iterable[Source],
    root: Path,
    group: str | None,
    survey: Survey,
    skip_invalid: bool,
    max_force: float | None,
) -> Iterator[tuple[Source, RelaxationPair]]:
    """Each pair that can be used, with its source; the survey counts them, and what cannot be used.

    A file that holds the same relaxation as one before it is a copy, and does not count.
    """
    seen, names = Equals(), list[str]()
    for source in sources:
        try:
            pair = _pair(source, root, group, max_force)
        except InvalidPair as problem:
            if survey.passes_by(problem, source.name):
                continue
            if not skip_invalid:
                raise
            survey.leave_out(problem)
            continue
        if isinstance(source, File | Legs):
            energy = getattr(pair.relaxed.calc, "results", {}).get("energy", 0.0)
            names.append(source.name)
            first = names[seen.add(pair.initial, pair.relaxed, number=energy)]
            if first != source.name:
                survey.note_copy(source.name, first)
                continue
        survey.used += 1
        yield source, pair


PASSING = {"role", "stage", "status", "comment", "time", "timestamp", "date"}
"""Keys of info that may change along a relaxation."""


def _check_one(pair: RelaxationPair, name: str) -> None:
    """Raise InvalidPair where the info of the first and the last frame is of two structures."""
    if not pair.frames:
        return
    begin, end = pair.initial.info, pair.relaxed.info
    for key in sorted((begin.keys() & end.keys()) - PASSING):
        if isinstance(begin[key], str) and isinstance(end[key], str) and begin[key] != end[key]:
            raise InvalidPair(
                f"{name}: {key} of its first frame is {begin[key]} and of its last {end[key]}, so it is not one "
                "relaxation; give two files, or each frame a pair_id and a role (initial or relaxed)."
            )


def _pair(source: Source, root: Path, group: str | None, max_force: float | None) -> RelaxationPair:
    found = loaded(source, root)
    _check_one(found, source.name)
    check_converged(found.relaxed, source.name, max_force)
    check_pair(found.initial, found.relaxed, source.name)
    relaxed = unwrapped(found.initial, found.relaxed)
    warn_of_moves(found.initial, relaxed, source.name)
    named = "" if not group else _group(found, group, short(source.name, root), root)
    return dataclasses.replace(found, relaxed=relaxed, group=named)


def _group(pair: RelaxationPair, key: str, name: str, root: Path) -> str:
    if key in pair.relaxed.info:
        return str(pair.relaxed.info[key])
    if key == "folder":
        first = Path(name).parts[0]
        if (root / first).is_dir():
            return first
        raise InvalidPair(f"{pair.id}: it lies in no folder below {root} to group by.")
    there = ", ".join(pair.relaxed.info) or "nothing"
    raise InvalidPair(f"{pair.id}: its info has no {key!r} to group by; it has {there} ('folder' takes the folders).")


def _distinct(ids: Sequence[str], names: Sequence[str]) -> list[str]:
    """The ids, followed by the path where several are the same."""
    count = Counter(ids)
    return [id if count[id] == 1 or id == name else f"{id} ({name})" for id, name in zip(ids, names, strict=True)]
