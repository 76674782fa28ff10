"""What the flags name: pairs and potentials."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..loading import load_potential
from ..pairs import InvalidPair, RelaxationPair
from ..potential import Potential
from ..reading import read_pairs
from .flags import best_device


def read_grouped(arguments: argparse.Namespace) -> list[RelaxationPair]:
    """The pairs of PAIRS, with --skip-invalid and --group."""
    paths = [Path(path) for path in arguments.pairs]
    if not 1 <= len(paths) <= 2:
        raise ValueError("Give one file or folder of relaxations, or two files: initial and relaxed structures.")
    pairs = read_pairs(*paths, skip_invalid=arguments.skip_invalid)
    if arguments.group:
        pairs = [dataclasses.replace(p, group=_group(p, arguments.group)) for p in pairs]
    return pairs


def potential_of(arguments: argparse.Namespace, spec: str | None = None) -> Potential:
    """The potential of --potential (or another spec), with --device, --dtype and --trust."""
    return load_potential(
        spec or arguments.potential,
        device=arguments.device or best_device(),
        dtype=arguments.dtype,
        trust=arguments.trust,
    )


def _group(pair: RelaxationPair, key: str) -> str:
    if key not in pair.relaxed.info:
        there = ", ".join(pair.relaxed.info) or "nothing"
        raise InvalidPair(f"{pair.id}: its info has no {key!r} to group by; it has {there}.")
    return str(pair.relaxed.info[key])
