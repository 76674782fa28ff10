"""What the flags name: pairs and potentials."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ase import Atoms

from ..checks import check_structure
from ..formats import read_frames
from ..loading import load_potential
from ..pairs import InvalidPair, RelaxationPair
from ..potential import Potential
from ..reading import read_pairs
from .flags import best_device
from .stopping import held

log = logging.getLogger(__name__)


def read_grouped(arguments: argparse.Namespace) -> list[RelaxationPair]:
    """The pairs of PAIRS, with --skip-invalid, --group and --lazy."""
    paths = [Path(path) for path in arguments.pairs]
    if not 1 <= len(paths) <= 2:
        raise ValueError("Give one file or folder of relaxations, or two files: initial and relaxed structures.")
    return read_pairs(*paths, skip_invalid=arguments.skip_invalid, group=arguments.group, lazy=arguments.lazy)


def read_structures(
    files: Sequence[Path], potential: Potential, *, skip_invalid: bool
) -> tuple[list[str], list[Atoms], int]:
    """Names and structures of every frame of all files, and how many were left out."""
    names, structures, problems = [], [], []
    for path in files:
        if path.is_dir():
            raise InvalidPair(f"{path} is a folder: name the files in it, as {path}/*.extxyz or {path}/*/POSCAR.")
        try:
            frames = read_frames(path)
        except InvalidPair as problem:
            if not skip_invalid:
                raise
            problems.append(str(problem))
            continue
        for k, atoms in enumerate(frames):
            name = str(path) if len(frames) == 1 else f"structure {k} of {path}"
            try:
                check_structure(potential, atoms, name)
            except (InvalidPair, NotImplementedError) as problem:
                if not skip_invalid:
                    raise
                problems.append(str(problem))
                continue
            names.append(name)
            structures.append(atoms)
    for left_out in problems:
        log.warning("Left out: %s", left_out)
    if not structures:
        raise InvalidPair(f"None of the structures can be relaxed; the last: {problems[-1]}")
    return names, structures, len(problems)


def potential_of(arguments: argparse.Namespace, spec: str | None = None) -> Potential:
    """The potential of --potential (or another spec), with --device, --dtype and --trust."""
    with held():
        return load_potential(
            spec or arguments.potential,
            device=arguments.device or best_device(),
            dtype=arguments.dtype,
            trust=arguments.trust,
        )
