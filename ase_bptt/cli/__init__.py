"""The command line: ase-bptt demo, train, relax, evaluate, info."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .. import __version__
from ..datasets import DEMO_FOLD, FOLDS, pbesol_crystals, si_defects
from ..pairs import RelaxationPair
from ..potential import Potential
from ..training.distributed import Lost, Ranks, leave, together
from . import evaluate, info, merge, relax, search, train
from .flags import Formatter, Parser, add_output, add_potential, command, completed, flag
from .messages import Console
from .run_folder import Terminated, terminable
from .train import add_training, launch, stopped

DEMO = """\
Fine-tune the embedded potential on the embedded DFT relaxations of silicon
defects: offline, in minutes on two cores. Held-out Delta-Q before and after,
pictures, a page and the tuned checkpoint go into the run folder.

With --crystals cells move: CHGNet, which learnt PBE, is tuned on small crystals
relaxed with PBEsol, by their structures alone, without a force of the
reference; held-out volume error and strain before and after are printed.
"""
CRYSTALS = {"potential": "chgnet", "first": "zero-force:12", "epochs": 21, "reference": 0}
"""What is chosen otherwise with --crystals, unless the flags say it: stages, as benchmarks/crystals.py has them."""


def add_demo(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands, "demo [options]", (run_demo, stopped), "fine-tune the embedded potential on embedded data", DEMO
    )
    flag(parser, parser, "--fold", f"which fifth of the kinds is held out, 0 to {FOLDS - 1}", DEMO_FOLD, type=int,
         choices=range(FOLDS), metavar="N")  # fmt: skip
    flag(parser, parser, "--crystals", "crystals whose cells move, and other defaults: "
         + " ".join(f"--{name} {value}" for name, value in CRYSTALS.items()), False, action="store_true")  # fmt: skip
    add_potential(parser, default="mace-si", dtype="float32")
    add_training(parser)
    add_output(parser, "ase-bptt-demo", "run folder", resume=True)


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the command."""
    # Cells of nine atoms gain nothing from threads, which wait for each other on a machine that has other work.
    torch.set_num_threads(1)
    if arguments.crystals:
        vars(arguments).update({name: value for name, value in CRYSTALS.items() if name not in arguments.given})
    return launch(arguments, _embedded)


def _embedded(arguments: argparse.Namespace, _: Potential) -> dict[str, list[RelaxationPair]]:
    read = pbesol_crystals if arguments.crystals else si_defects
    return {name: read(name, fold=arguments.fold) for name in ("train", "valid", "test")}


COMMANDS = (add_demo, train.add, relax.add, search.add, merge.add, evaluate.add, info.add)
SHARED = ("demo", "train", "relax", "evaluate", "search")
"""Commands that several processes can share."""
INTRODUCTION = """\
Relax structures with machine-learning interatomic potentials, and fine-tune
the potential by differentiating through the relaxation.

one evening with a folder of VASP runs:
  ase-bptt info chgnet --pairs runs/                   will it help?
  ase-bptt train runs/ --potential chgnet --dry-run    what would be done
  ase-bptt train runs/ --potential chgnet --out tuned  fine-tune and measure
  ase-bptt relax new.extxyz --potential tuned          use it
  ase-bptt demo                                        see all of it first
"""
CODES = """\
exit codes:
    0  done
    1  an error of ase_bptt itself: please report it, with its traceback
    2  the input cannot be used; one sentence says why and what to do
    3  relax: done, but some structures did not converge or were left out
  130  stopped by Ctrl-C, 143 by SIGTERM or where one of several processes has
       died; --resume continues
"""
USABLE = (ValueError, OSError, ImportError, NotImplementedError)
"""What bad input raises: one sentence is printed. Anything else is our own mistake, and shows its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of the shell, and return its exit code (see `CODES`)."""
    ranks = together()
    console = Console(ranks)
    try:
        with terminable(once=not console.alone), console.silenced(errors=True):
            arguments = completed(build_parser(), argv)
    except SystemExit:
        console.all_ended()
        raise
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if ranks.writes:
        logging.getLogger("ase_bptt").setLevel(logging.INFO)
    try:
        with terminable(once=not console.alone), console.silenced(errors=False):
            _refuse_many(ranks, arguments)
            code = arguments.run(arguments)
        leave()
        return code
    except USABLE as error:
        code, why = 2, str(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        less = "there is not enough memory for it: give a smaller --batch-size, --dtype float32, or fewer --steps."
        code, why = 2, str(error) if isinstance(error, MemoryError) and error.args else less
    except KeyboardInterrupt:
        code, why = 130, ""
    except (Terminated, Lost):
        code, why = 143, ""
    # Not above: an error that is being handled holds on to the connections, which may have to be closed.
    if why:
        console.print_error(why)
    else:
        why = "stopped." if console.all_ended() else "stopped, for one of its processes has died."
        console.print_error(f"{why} {arguments.stopped(arguments)}", for_all=True)
    return code


def _refuse_many(ranks: Ranks, arguments: argparse.Namespace) -> None:
    if ranks.size > 1 and arguments.command not in SHARED:
        raise ValueError(
            f"{arguments.command} runs in one process, and torchrun began {ranks.size}: call it without torchrun."
        )


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="ase-bptt", description=INTRODUCTION, epilog=CODES, formatter_class=Formatter)
    parser.add_argument("--version", action="version", version=f"ase_bptt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add in COMMANDS:
        add(commands)
    return parser
