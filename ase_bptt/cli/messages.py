"""What the commands print; of several processes, only rank 0 prints."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
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
from ..pairs.groups import too_few
from ..report import change
from ..report.drift_report import force_sentences
from ..report.tables import comparison_text, table
from ..terms.labels import Labels
from ..training import Trainer
from ..training.cost import Estimate
from ..training.distributed import Ranks, leave
from ..training.results import CAUTION, DRIFT_PICTURE, DRIFT_REPORT, RunResults
from ..training.settings import NUMBERS
from ..tuning import describe
from ..utils import as_device, counted
from .flags import WIDTH

log = logging.getLogger(__name__)


def quiet_if(json_alone: bool) -> Callable[[str], None]:
    """Print, or with --json nothing."""
    return (lambda text: None) if json_alone else (lambda text: print(text, flush=True))


def introduction(
    trainer: Trainer, arguments: argparse.Namespace, splits: Mapping[str, Sequence[RelaxationPair]]
) -> str:
    """What will be trained, and on what."""
    sizes = ", ".join(f"{len(v)} {k} ({counted(len({p.group for p in v}), 'kind')})" for k, v in splits.items())
    again = f", on from epoch {trainer.epoch}" if arguments.resume and trainer.epoch else ""
    few = not trainer.adjoint.needs_minimum
    tail = getattr(trainer.adjoint, "tail", None)
    movers = trainer.stepper.name + (f" and {tail.name}" if tail else "")
    frames = f"{counted(trainer.relaxation.steps, 'frame')} of {movers}" + ("" if few else " at most")
    many = f", shared by {trainer.ranks.size} processes" if trainer.ranks.size > 1 else ""
    first = min(trainer.pair_loss.first, arguments.epochs)
    rest = arguments.epochs - first
    how = f"{'through' if few else 'at minima, after'} {frames}, gradient by {arguments.adjoint}, "
    stages = [f"by zero force at the references, {counted(first, 'epoch')}"] if first else []
    stages += [how + counted(rest, "epoch")] if rest else []
    return (
        f"{arguments.potential}, fine-tuned {', then '.join(stages)}{again}{many}\n"
        f"{describe(trainer.potential)}\n"
        + "".join(f"labels: {term}\n" for term in trainer.terms if isinstance(term, Labels))
        + f"relaxations: {sizes}; kinds are never split\n"
        f"run folder: {arguments.out}"
    )


def planned(
    arguments: argparse.Namespace, splits: Mapping[str, Sequence[RelaxationPair]], found: Estimate, *, runs: float
) -> int:
    """Print the plan of a dry run that takes so many times the estimate, and return the exit code."""
    found = replace(found, seconds=runs * found.seconds)
    if arguments.json:
        kinds = {name: {"n": len(v), "kinds": len({p.group for p in v})} for name, v in splits.items()}
        print(json.dumps({"dry_run": True, "splits": kinds, "run": str(arguments.out),
                          "estimate": found.todict()}))  # fmt: skip
        return 0
    device = as_device(arguments.device)
    where = f"this machine, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    for name, pairs in splits.items():
        print(f"  {name}: {', '.join(p.id for p in pairs)}")
    last = "" if runs == 1 else ", with the last training, on all pairs"
    print(f"estimated time and memory: {found}{last}, on {where}")
    print(f"would be written: {arguments.out}/ with potential/, checkpoint.pt, results.json, table.csv, report.html")
    print("A dry run: nothing was trained, nothing was written.")
    return 0


def facts(arguments: argparse.Namespace, trainer: Trainer) -> dict[str, str]:
    """For the head of the page: what was run, and with what."""
    potential = trainer.potential
    settings = trainer.settings()
    # In a resumed run, the stepper's hyperparameters may have changed already.
    initial = trainer.record.initial_hyperparameters
    stepper = {name: initial.get(name, value) for name, value in settings["stepper"].items()}
    terms = [f"{term['weight']:g} {term['name']}" for term in settings["terms"]]
    numbers = {name: settings[name] for name in NUMBERS if settings[name] not in (None, [], {})}
    found = {
        "potential": f"{arguments.potential} ({potential.family}, {describe(potential)}, "
        f"{str(potential.dtype).removeprefix('torch.')}, {potential.device})",
        "stepper": ", ".join(f"{k} {v}" for k, v in stepper.items()),
        "loss": f"{' + '.join([settings['loss'], *terms])}, gradient by {trainer.adjoint}",
        "training": ", ".join(f"{name} {_plain(v)}" for name, v in numbers.items()) + f", epochs {arguments.epochs}",
    }
    return found | provenance()


def caution(*splits: Mapping[str, Sequence[RelaxationPair]], warn: bool) -> dict[str, str]:
    """As a further fact, with `warn` logged at once: that these hold too few kinds of structure. Otherwise nothing."""
    found = too_few(*splits)
    if found and warn:
        log.warning(found)
    return {CAUTION: found} if found else {}


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


def conclude(arguments: argparse.Namespace, results: RunResults) -> None:
    """Print the result, in words or as JSON."""
    print(json.dumps(results.todict()) if arguments.json else conclusion(results))


def conclusion(results: RunResults) -> str:
    """The tables, and where everything is."""
    before, after = results.before_bfgs, results.after_bfgs
    kept = ""
    if results.best_epoch and not results.folds:
        word = "Measured" if results.rejected else "Kept"
        kept = (
            f"\n{word}: epoch {results.best_epoch} of {results.epochs}, the last as good as the best on the validation "
            "structures (mean logarithm of Delta-Q).\n"
        )
    if results.on_all_pairs:
        kept += f"\n{fill(results.trained_on, WIDTH, break_long_words=False, break_on_hyphens=False)}\n"
    if results.kept_as_it_was:
        kept = f"{kept}\n{fill(f'Warning: {results.no_gain}', WIDTH)}\n"
    # An untuned potential is not compared with itself.
    compared = comparison_text(results.comparison) + "\n" if results.best_epoch or results.folds else ""
    return (
        f"{kept}\nHeld out, relaxed by FIRE to fmax 0.02 eV/Å\n{table(results.before, results.after)}\n"
        f"{fill(BASIN_RULE, WIDTH)}\n\n"
        f"{compared}"
        f"relaxed by BFGS instead: mean {before.mean:.2f} before, {after.mean:.2f} after, "
        f"{change(before.mean, after.mean)}\n\n{_what_else_changed(results)}"
        f"{results.seconds:.0f} s; {'untuned' if results.kept_as_it_was else 'tuned'} potential in "
        f"{results.out / 'potential'}, all figures and pictures in {results.out / 'report.html'}"
    )


def _what_else_changed(results: RunResults) -> str:
    """Warnings of the drift report, by how much forces and energies have changed, and where all of it is."""
    report = results.drift_report
    if report is None:
        return ""
    drift = report.drift()
    over_folds = ", mean over the folds" if results.folds else ""
    of = " of the tuned potential, which is not handed back," if results.rejected else ""
    # Of a potential that is not handed back they would warn of what the user does not have.
    lines = [] if results.kept_as_it_was else [f"Warning: {warning}" for warning in report.warnings()]
    if drift.n:
        lines.append(
            f"Drift{of} on {drift.n} structures that were not trained on (root mean square{over_folds}): forces "
            f"changed by {drift.force:.3f} eV/Å (their size was {drift.size:.3f} eV/Å), energies by "
            f"{1000 * drift.energy:.1f} meV/atom."
        )
    lines += force_sentences(report)
    lines.append(f"Drift report: {results.out / DRIFT_PICTURE} and {results.out / DRIFT_REPORT}.")
    return "\n".join(fill(line, WIDTH, break_long_words=False, break_on_hyphens=False) for line in lines) + "\n\n"


GOODBYE = 5.0
"""Seconds within which all processes end, if none of them has died."""
SILENCE = 20.0
"""Seconds after which rank 0 is not expected to print any more; torchrun kills after 30."""


class Console:
    """Standard output and standard error of the processes of a command, of which only rank 0 prints.

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
        """Only rank 0 prints to standard output and, with `errors`, to standard error."""
        if self.ranks.writes:
            yield
            return
        with ExitStack() as stack:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            if errors:
                stack.enter_context(redirect_stderr(nowhere))
            yield

    def print_error(self, sentence: str, *, for_all: bool = False) -> None:
        """Print to standard error, once, however many processes ask for it.

        Parameters
        ----------
        sentence : str
        for_all : bool
            Whether the sentence speaks for all processes, and is not printed if rank 0 has printed one already.
            Otherwise each process prints its own sentence.
        """
        if not for_all:
            leave()  # other processes may wait for this one
        self._end()
        if self._my_turn(sentence, for_all):
            print(f"ase-bptt: {sentence}", file=sys.stderr, flush=True)
        if self.ranks.store is not None and self.ranks.writes:
            with suppress(RuntimeError):
                self.ranks.store.set("printed", "")
            if not for_all:
                self.all_ended()  # torchrun would end the others with this one

    def all_ended(self) -> bool:
        """Whether all processes have ended by themselves; otherwise one of them has died."""
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
            printed = _soon(lambda store: store.check(["printed"]), store, GOODBYE if for_all else SILENCE)
            if printed and for_all:
                return False
        try:
            return store.add(sentence, 1) == 1
        except RuntimeError:
            return self.ranks.writes


def _soon(condition: Callable[[dist.Store], bool], store: dist.Store, patience: float) -> bool:
    """Whether a condition becomes true within so many seconds; False where the store is out of reach."""
    until = time.monotonic() + patience
    with suppress(RuntimeError):
        while time.monotonic() < until:
            if condition(store):
                return True
            time.sleep(0.05)
    return False
