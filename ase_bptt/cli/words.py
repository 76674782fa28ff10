"""What train and demo say on standard output."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from textwrap import fill
from typing import Any

import ase
import torch

from .. import report
from ..evaluation import BASIN_RULE
from ..pairs import RelaxationPair
from ..training.estimate import Estimate
from ..training.outcome import CARD, CARD_PICTURE, Outcome
from ..training.resuming import NUMBERS
from ..training.trainer import Trainer
from ..tuning.trainable import describe
from ..version import __version__
from .flags import WIDTH


def quiet_if(json_alone: bool) -> Callable[[str], None]:
    """Print, or with --json nothing."""
    return (lambda text: None) if json_alone else (lambda text: print(text, flush=True))


def introduction(trainer: Trainer, arguments: argparse.Namespace, splits: dict[str, list[RelaxationPair]]) -> str:
    """What will be trained on what."""
    sizes = ", ".join(f"{len(v)} {k} ({len({p.group for p in v})} kinds)" for k, v in splits.items())
    again = f", on from epoch {trainer.epoch}" if arguments.resume and trainer.epoch else ""
    few = not trainer.adjoint.to_the_end
    tail = getattr(trainer.adjoint, "tail", None)
    movers = trainer.stepper.name + (f" and {tail.name}" if tail else "")
    frames = f"{trainer.steps} frames of {movers}" + ("" if few else " at most")
    many = f", shared by {trainer.ranks.size} processes" if trainer.ranks.size > 1 else ""
    return (
        f"{arguments.potential}, fine-tuned {'through' if few else 'at minima, after'} {frames}, gradient by "
        f"{arguments.adjoint}, {arguments.epochs} epochs{again}{many}\n"
        f"{describe(trainer.potential)}\n"
        f"relaxations: {sizes}; kinds are never split\n"
        f"run folder: {arguments.out}"
    )


def planned(arguments: argparse.Namespace, splits: dict[str, list[RelaxationPair]], found: Estimate) -> int:
    """The end of a dry run."""
    runs = arguments.__dict__.get("folds") or 1
    seconds = runs * found.seconds
    if arguments.json:
        kinds = {name: {"n": len(v), "kinds": len({p.group for p in v})} for name, v in splits.items()}
        print(json.dumps({"dry_run": True, "splits": kinds, "run": str(arguments.out),
                          "estimate": found.todict() | {"seconds": seconds}}))  # fmt: skip
        return 0
    where = torch.get_num_threads()
    for name, pairs in splits.items():
        print(f"  {name}: {', '.join(p.id for p in pairs)}")
    times = "" if runs == 1 else f" for each of {runs} folds"
    print(f"estimated time and memory: {found}{times}, on {arguments.device or f'this machine, {where} threads'}")
    print(f"would be written: {arguments.out}/ with potential/, checkpoint.pt, results.json, table.csv, report.html")
    print("A dry run: nothing was trained, nothing was written.")
    return 0


def facts(arguments: argparse.Namespace, trainer: Trainer) -> dict[str, str]:
    """For the head of the page: what was run, and with what."""
    potential = trainer.potential
    settings = trainer.settings()
    # In a run that goes on, the stepper's numbers may have moved already.
    begun = {name: trainer.begun_with.get(name, value) for name, value in settings["stepper"].items()}
    terms = [f"{term['weight']:g} {term['name']}" for term in settings["terms"]]
    numbers = {name: settings[name] for name in NUMBERS if settings[name] not in (None, [], {})}
    found = {
        "potential": f"{arguments.potential} ({potential.family}, {describe(potential)}, "
        f"{str(potential.dtype).removeprefix('torch.')}, {potential.device})",
        "stepper": ", ".join(f"{k} {v}" for k, v in begun.items()),
        "loss": f"{' + '.join([settings['loss'], *terms])}, gradient by {trainer.adjoint}",
        "training": ", ".join(f"{name} {_plain(v)}" for name, v in numbers.items()) + f", epochs {arguments.epochs}",
    }
    return found | provenance()


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def provenance() -> dict[str, str]:
    """What the figures depend on, and when and how they were made."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": f"ase_bptt {__version__}, ase {ase.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }


def conclude(arguments: argparse.Namespace, outcome: Outcome) -> None:
    """Print the result, in words or as JSON."""
    print(json.dumps(outcome.todict()) if arguments.json else conclusion(outcome))


def conclusion(outcome: Outcome) -> str:
    """The tables, and where everything is."""
    before, after = outcome.before_bfgs, outcome.after_bfgs
    place = f"{outcome.out}/fold_*/potential" if outcome.folds else f"{outcome.out / 'potential'}"
    kept = ""
    if outcome.best_epoch is not None:
        what = f"the weights after epoch {outcome.best_epoch}" if outcome.best_epoch else "the untuned weights"
        kept = (
            f"\nkept: {what} of {len(outcome.history)} epochs, the best by the mean logarithm on the validation pairs\n"
        )
    return (
        f"{kept}\nHeld out, relaxed by FIRE to fmax 0.02 eV/Å\n{report.table(outcome.before, outcome.after)}\n"
        f"{fill(BASIN_RULE, WIDTH)}\n\n"
        f"{report.comparison_text(outcome.comparison)}\n"
        f"relaxed by BFGS instead: mean {before.mean:.2f} before, {after.mean:.2f} after, "
        f"{report.change(before.mean, after.mean)}\n\n{_kept_or_lost(outcome)}"
        f"{outcome.seconds:.0f} s; tuned potential in {place}, all figures and pictures in "
        f"{outcome.out / 'report.html'}"
    )


def _kept_or_lost(outcome: Outcome) -> str:
    """Of the card, the warnings and how far forces have moved; and where all of it is."""
    card = outcome.card
    if card is None:
        return ""
    drift = card.drift()
    over_folds = ", mean over the folds" if outcome.folds else ""
    said = [f"Warning: {warning}" for warning in card.warnings()]
    if drift.n:
        said.append(
            f"What else has changed, on {drift.n} other structures: forces of {drift.size:.3f} eV/Å by "
            f"{drift.force:.3f}, and energies by {1000 * drift.energy:.1f} meV/atom (root mean square{over_folds})."
        )
    said.append(f"More of this in {outcome.out / CARD_PICTURE} and {outcome.out / CARD}.")
    return "\n".join(fill(line, WIDTH, break_long_words=False, break_on_hyphens=False) for line in said) + "\n\n"
