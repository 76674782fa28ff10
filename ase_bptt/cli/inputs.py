"""What the flags name: pairs and potentials."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

from ..loading import load_potential
from ..pairs import InvalidPair, RelaxationPair
from ..potential import Potential
from ..reading import read_pairs
from .flags import best_device
from .stopping import held

log = logging.getLogger(__name__)


def read_grouped(arguments: argparse.Namespace) -> list[RelaxationPair]:
    """The pairs of PAIRS, with --skip-invalid and --group."""
    paths = [Path(path) for path in arguments.pairs]
    if not 1 <= len(paths) <= 2:
        raise ValueError("Give one file or folder of relaxations, or two files: initial and relaxed structures.")
    pairs = read_pairs(*paths, skip_invalid=arguments.skip_invalid)
    if not arguments.group:
        return pairs
    named, problems = [], []
    for pair in pairs:
        try:
            named.append(dataclasses.replace(pair, group=_group(pair, arguments.group, paths[0])))
        except InvalidPair as problem:
            if not arguments.skip_invalid:
                raise
            problems.append(problem)
            log.warning("Left out: %s", problem)
    if not named:
        raise InvalidPair(f"None of the {len(pairs)} pairs can be grouped; the last: {problems[-1]}")
    return named


def potential_of(arguments: argparse.Namespace, spec: str | None = None) -> Potential:
    """The potential of --potential (or another spec), with --device, --dtype and --trust."""
    with held():
        return load_potential(
            spec or arguments.potential,
            device=arguments.device or best_device(),
            dtype=arguments.dtype,
            trust=arguments.trust,
        )


def _group(pair: RelaxationPair, key: str, root: Path) -> str:
    if key in pair.relaxed.info:
        return str(pair.relaxed.info[key])
    if key == "folder":
        # Ids are paths below the one that was given; behind one that was not the only one stands its path.
        first = Path(pair.id.removesuffix(")").rpartition(" (")[2]).parts[0]
        if (root / first).is_dir():
            return first
        raise InvalidPair(f"{pair.id}: it lies in no folder below {root} to group by.")
    there = ", ".join(pair.relaxed.info) or "nothing"
    raise InvalidPair(f"{pair.id}: its info has no {key!r} to group by; it has {there} ('folder' takes the folders).")
