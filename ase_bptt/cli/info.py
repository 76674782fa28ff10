"""ase-bptt info: what a potential is, whether fine-tuning would help, and whether gradients are to be trusted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..diagnostics import diagnose
from ..diagnostics.gradient_report import Health, health
from ..losses import delta_q
from ..pairs.groups import usable
from ..potential import Potential, symbols
from ..relaxation import relax
from ..steppers import GradientDescent
from ..training.settings import MOMENTUM
from ..utils import without_nan
from .flags import add_pairs, add_potential, command, count, flag, potential_of, read_grouped, read_structures, seed

FRAMES, FMAX = 40, 0.01
"""As many frames as a training unrolls at most, and where it stops."""

DESCRIPTION = """\
Tell what a potential is; with --pairs, whether fine-tuning it on these
relaxations is likely to help, and why; with --relax, whether gradients through
relaxations of these structures are to be trusted. Nothing is written.

examples:
  ase-bptt info chgnet:r2scan
  ase-bptt info chgnet --pairs runs/
  ase-bptt info chgnet --relax starts.extxyz --steps 40
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "info POTENTIAL [--pairs PAIRS] [--relax FILE] [options]",
        (run, stopped),
        "what a potential is, and whether training helps",
        DESCRIPTION,
    )
    add_potential(parser, positional=True)
    add_pairs(parser, option="--pairs")
    group = parser.add_argument_group("diagnosis")
    flag(group, parser, "--sample", "pairs whose surroundings are explored", 8, type=count, metavar="N")
    flag(group, parser, "--seed", "of the sample and of the noise", 0, type=seed, metavar="N")
    group = parser.add_argument_group("health of a gradient")
    flag(group, parser, "--relax", "relax every frame of these files as in training, without references", nargs="+",
         metavar="FILE", type=Path)  # fmt: skip
    flag(group, parser, "--steps", "frames of it", FRAMES, type=count, metavar="N")
    group = parser.add_argument_group("output")
    flag(group, parser, "--json", "print JSON, and nothing else, on standard output", False, action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    potential = potential_of(arguments)
    facts = _facts(arguments, potential)
    diagnosis = None
    if arguments.pairs:
        pairs = usable(potential, read_grouped(arguments), skip_invalid=arguments.skip_invalid)
        with tqdm(disable=None, leave=False) as bar:

            def progress(done: int, total: int, what: str) -> None:
                bar.total, bar.n = total, done
                bar.set_description_str(what)

            diagnosis = diagnose(potential, pairs, seed=arguments.seed, sample=arguments.sample, progress=progress)
    found = _health(arguments, potential) if arguments.relax else None
    if arguments.json:
        parts = {"diagnosis": diagnosis and diagnosis.todict(), "health": found and found.todict()}
        print(json.dumps(without_nan(facts | parts)))
        return 0
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):20} {value}")
    if diagnosis:
        print(f"\n{diagnosis.text()}")
    if found:
        print(f"\n{found.text()}")
    return 0


def stopped(arguments: argparse.Namespace) -> str:
    """What is left after an interrupt."""
    return "Nothing was to be written."


def _health(arguments: argparse.Namespace, potential: Potential) -> Health:
    """Of the paper's map, and of the gradient of how far the structures move."""
    _, structures, _ = read_structures(arguments.relax, potential, skip_invalid=arguments.skip_invalid)
    relaxation = relax(potential, structures, stepper=GradientDescent(momentum=MOMENTUM), fmax=FMAX,
                       steps=arguments.steps)  # fmt: skip
    delta_q(relaxation, structures).sum().backward()
    return health(relaxation)


def _facts(arguments: argparse.Namespace, potential: Potential) -> dict[str, Any]:
    known = potential.atomic_numbers
    return {
        "potential": arguments.potential,
        "family": potential.family,
        "elements": "all" if known is None else symbols(known),
        "weights": sum(p.numel() for p in potential.parameters()),
        "cutoff_angstrom": float(potential.cutoff),
        "dtype": str(potential.dtype).removeprefix("torch."),
        "device": str(potential.device),
        "native_checkpoint": potential.native_name or "none",
    }
