"""ase-bptt info: what a potential is, whether fine-tuning would help, and whether gradients can be trusted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..diagnostics import diagnose
from ..diagnostics.gradient_report import GradientReport, diagnose_gradients
from ..losses import delta_q
from ..pairs.charges import warn_of_contradictions
from ..pairs.usable import usable
from ..potential import Potential, symbols
from ..relaxation import relax
from ..steppers import GradientDescent
from ..training.settings import MOMENTUM
from ..utils import without_nan
from .flags import add_potential, command, flag, potential_of
from .pair_flags import add_pairs, read_grouped
from .starts import Starts
from .values import count, seed

FRAMES, FMAX = 40, 0.01
"""The most frames that a training unrolls, and eV/Å at which it stops."""

DESCRIPTION = """\
Describe a potential; with --pairs, estimate whether fine-tuning it on these
relaxations is likely to help, and why; with --relax, diagnose the gradients
through relaxations of these structures. Nothing is written.

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
    group = parser.add_argument_group("suitability")
    flag(group, parser, "--sample", "pairs from which settings for training are derived", 8, type=count, metavar="N")
    flag(group, parser, "--seed", "random seed of the sample and of the rattling", 0, type=seed, metavar="N")
    group = parser.add_argument_group("gradient diagnostics")
    flag(group, parser, "--relax", "relax every frame of these files as in training, without references", nargs="+",
         metavar="FILE", type=Path)  # fmt: skip
    flag(group, parser, "--steps", "frames that are run", FRAMES, type=count, metavar="N")
    group = parser.add_argument_group("output")
    flag(group, parser, "--json", "print JSON, and nothing else, on standard output", False, action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    potential = potential_of(arguments)
    facts = _facts(arguments, potential)
    suitability = None
    if arguments.pairs:
        pairs = usable(potential, read_grouped(arguments, show=True), skip_invalid=arguments.skip_invalid)
        warn_of_contradictions(pairs, potential.inputs)
        with tqdm(disable=None, leave=False) as bar:

            def progress(done: int, total: int, what: str) -> None:
                bar.total, bar.n = total, done
                bar.set_description_str(what)

            suitability = diagnose(potential, pairs, seed=arguments.seed, sample=arguments.sample, progress=progress)
    report = _gradients(arguments, potential) if arguments.relax else None
    if arguments.json:
        parts = {"suitability": suitability and suitability.todict(), "gradients": report and report.todict()}
        print(json.dumps(without_nan(facts | parts)))
        return 0
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):20} {value}")
    if suitability:
        print(f"\n{suitability.text()}")
    if report:
        print(f"\n{report.text()}")
    return 0


def stopped(arguments: argparse.Namespace) -> str:
    """The last words after an interrupt."""
    return "This command writes nothing."


def _gradients(arguments: argparse.Namespace, potential: Potential) -> GradientReport:
    """Diagnostics of the paper's map, for the gradient of the distance that the structures move."""
    starts = Starts(arguments.relax, potential, skip_invalid=arguments.skip_invalid)
    structures = starts.check()
    relaxation = relax(potential, structures, stepper=GradientDescent(momentum=MOMENTUM), fmax=FMAX,
                       steps=arguments.steps)  # fmt: skip
    delta_q(relaxation, structures).sum().backward()
    return diagnose_gradients(relaxation)


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
