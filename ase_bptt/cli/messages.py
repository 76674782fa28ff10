"""What the commands print, and which of several processes prints it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import datetime
from pathlib import Path
from textwrap import fill
from typing import Any

import ase
import torch
from torch import distributed as dist

from .. import __version__
from ..evaluation import BASIN_RULE
from ..pairs import RelaxationPair
from ..report import change
from ..report.tables import comparison_text, table
from ..training import Trainer
from ..training.checkpoint import NUMBERS
from ..training.distributed import Ranks, leave
from ..training.metrics import Estimate
from ..training.results import CARD, CARD_PICTURE, Outcome
from ..tuning import describe
from .flags import WIDTH


def quiet_if(json_alone: bool) -> Callable[[str], None]:
    """Print, or with --json nothing."""
    return (lambda text: None) if json_alone else (lambda text: print(text, flush=True))


def introduction(trainer: Trainer, arguments: argparse.Namespace, splits: dict[str, list[RelaxationPair]]) -> str:
    """What will be trained on what."""
    sizes = ", ".join(f"{len(v)} {k} ({len({p.group for p in v})} kinds)" for k, v in splits.items())
    again = f", on from epoch {trainer.epoch}" if arguments.resume and trainer.epoch else ""
    few = not trainer.adjoint.needs_minimum
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
        f"{kept}\nHeld out, relaxed by FIRE to fmax 0.02 eV/Å\n{table(outcome.before, outcome.after)}\n"
        f"{fill(BASIN_RULE, WIDTH)}\n\n"
        f"{comparison_text(outcome.comparison)}\n"
        f"relaxed by BFGS instead: mean {before.mean:.2f} before, {after.mean:.2f} after, "
        f"{change(before.mean, after.mean)}\n\n{_kept_or_lost(outcome)}"
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


GOODBYE = 5.0
"""Seconds in which all processes come to their end, if none of them has died."""
SILENCE = 20.0
"""Seconds after which the process that speaks will say nothing; torchrun kills after 30."""


class Voice:
    """The voice of the processes of a command, of which one speaks for all.

    Parameters
    ----------
    ranks : Ranks
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._ended = False

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.ranks.store is None

    @contextmanager
    def silenced(self, *, errors: bool) -> Iterator[None]:
        """Nothing goes to standard output, or to standard error, but from the process that speaks."""
        if self.ranks.writes:
            yield
            return
        with ExitStack() as stack:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            if errors:
                stack.enter_context(redirect_stderr(nowhere))
            yield

    def say(self, sentence: str, *, for_all: bool = False) -> None:
        """To standard error, once, however many processes come to say it.

        Parameters
        ----------
        sentence : str
        for_all : bool
            Whether all is said where the process that speaks has said anything; otherwise each says what is its own.
        """
        if not for_all:
            leave()  # the others may wait for this process
        self._end()
        if self._my_turn(sentence, for_all):
            print(f"ase-bptt: {sentence}", file=sys.stderr, flush=True)
        if self.ranks.store is not None and self.ranks.writes:
            with suppress(RuntimeError):
                self.ranks.store.set("spoken", "")
            if not for_all:
                self.all_ended()  # torchrun would end the others with this one

    def all_ended(self) -> bool:
        """Whether all processes have come to their end by themselves; otherwise one of them has died."""
        if self.ranks.store is None:
            return True
        self._end()
        return _soon(lambda store: store.add("ended", 0) == self.ranks.size, self.ranks.store, GOODBYE)

    def _end(self) -> None:
        if self.ranks.store is None or self._ended:
            return
        self._ended = True
        with suppress(RuntimeError):
            self.ranks.store.add("ended", 1)

    def _my_turn(self, sentence: str, for_all: bool) -> bool:
        store = self.ranks.store
        if store is None:
            return True
        if not self.ranks.writes:
            heard = _soon(lambda store: store.check(["spoken"]), store, GOODBYE if for_all else SILENCE)
            if heard and for_all:
                return False
        try:
            return store.add(sentence, 1) == 1
        except RuntimeError:
            return self.ranks.writes


def _soon(asked: Callable[[dist.Store], bool], store: dist.Store, patience: float) -> bool:
    """Whether the answer is yes within so many seconds; no where nobody answers."""
    until = time.monotonic() + patience
    with suppress(RuntimeError):
        while time.monotonic() < until:
            if asked(store):
                return True
            time.sleep(0.05)
    return False
