"""What the flags name: pairs and potentials."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..loading import load_potential
from ..pairs import RelaxationPair
from ..potential import Potential
from ..reading import read_pairs
from .flags import best_device
from .stopping import held


def read_grouped(arguments: argparse.Namespace) -> list[RelaxationPair]:
    """The pairs of PAIRS, with --skip-invalid, --group and --lazy."""
    paths = [Path(path) for path in arguments.pairs]
    if not 1 <= len(paths) <= 2:
        raise ValueError("Give one file or folder of relaxations, or two files: initial and relaxed structures.")
    return read_pairs(*paths, skip_invalid=arguments.skip_invalid, group=arguments.group, lazy=arguments.lazy)


def potential_of(arguments: argparse.Namespace, spec: str | None = None) -> Potential:
    """The potential of --potential (or another spec), with --device, --dtype and --trust."""
    with held():
        return load_potential(
            spec or arguments.potential,
            device=arguments.device or best_device(),
            dtype=arguments.dtype,
            trust=arguments.trust,
        )
