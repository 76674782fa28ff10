"""``train --charges each``: a run for each charge, in a folder of its own below --out, and all of them resumed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..pairs.charges import ALL, EACH, charges_in
from . import messages, run_folder
from .pair_flags import read_grouped

PATTERN = "charge_*"


def asked_for(arguments: argparse.Namespace) -> bool:
    """Whether each charge is to have a run, or the runs of each are to be resumed."""
    resumed = arguments.resume and not (arguments.out / run_folder.COMMAND).is_file()
    return arguments.charges == EACH or (resumed and bool(started(arguments.out)))


def started(out: Path) -> list[Path]:
    """The folders of the runs that were started."""
    return [path.parent for path in sorted(out.glob(f"{PATTERN}/{run_folder.COMMAND}"))]


def run_each(arguments: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    """Run each charge; those that were not started before are started with the settings of the others."""
    out, folders = arguments.out, started(arguments.out)
    common = argparse.Namespace(**vars(arguments))
    if arguments.resume:
        common.out = folders[0] if folders else out
        common.charges = run_folder.saved(common.out)["charges"]
        run_folder.take_over(common)
        # Each has pairs of its own.
        vars(common).pop("data", None)
    common.charges = ALL
    charges = charges_in(read_grouped(common))
    arguments.each = True
    for charge in charges:
        own = argparse.Namespace(**vars(common))
        own.charges, own.out = charge, out / (f"charge_{charge:+g}" if charge else "charge_0")
        own.resume = arguments.resume and own.out in folders
        messages.quiet_if(arguments.json)(f"charge {charge:+g}: {own.out}" if charge else f"charge 0: {own.out}")
        run(own)
    return 0
