"""ase-bptt demo: fine-tuning on what the package carries."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..datasets import DEMO_FOLD, FOLDS, si_defects
from .flags import add_output, add_potential, command, flag
from .train import launch, stopped
from .training import add_training

__all__ = ["add", "run", "stopped"]
DESCRIPTION = """\
Fine-tune the embedded potential on the embedded DFT relaxations of silicon
defects: offline, in minutes on two cores. Held-out Delta-Q before and after,
pictures, a page and the tuned checkpoint go into the run folder.
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands, "demo [options]", (run, stopped), "fine-tune the embedded potential on embedded data", DESCRIPTION
    )
    flag(parser, parser, "--fold", f"which fifth of the kinds is held out, 0 to {FOLDS - 1}", DEMO_FOLD, type=int,
         choices=range(FOLDS), metavar="N")  # fmt: skip
    add_potential(parser, dtype="float32")
    add_training(parser)
    add_output(parser, "ase-bptt-demo", "run folder", resume=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    # Cells of nine atoms gain nothing from threads, which wait for each other on a machine that has other work.
    torch.set_num_threads(1)
    return launch(arguments, lambda a, _: {name: si_defects(name, fold=a.fold) for name in ("train", "valid", "test")})
