"""ase-bptt train: fine-tuning on a person's own relaxations."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from ..checks import usable
from ..groups import split_by_group, split_into_folds
from ..pairs import RelaxationPair
from ..potential import Potential
from ..training.estimate import estimate
from ..training.finetune import cross_validate, finetune
from ..training.outcome import RESULTS, Outcome
from ..training.ranks import together
from . import runfolder, words
from .flags import add_output, add_pairs, add_potential, command, count, flag
from .inputs import read_grouped
from .training import add_training, new_trainer, resumed_trainer

DESCRIPTION = """\
Fine-tune a potential on reference relaxations, so that its own relaxations
end where theirs do. The kinds of structures are split: most to train on, a
fifth to choose the best epoch by, a fifth held out to measure the gain.

examples:
  ase-bptt train runs/ --potential chgnet --out tuned
      a folder of VASP or Espresso runs, extxyz, .traj or POSCAR + CONTCAR
  ase-bptt train initial.extxyz relaxed.extxyz --potential my.model --trust
      two files in the same order, and a native MACE checkpoint
  ase-bptt train runs/ --potential chgnet --out tuned --dry-run
      what would be read, trained and written, and how long it would take
  ase-bptt train --out tuned --resume
      go on after the last complete epoch
  ase-bptt train runs/ --potential chgnet --out check --folds 5
      cross-validate: each kind is held out once
"""
Splits = dict[str, list[RelaxationPair]]


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "train [PAIRS [RELAXED]] [options]",
        (run, stopped),
        "fine-tune a potential on your relaxations",
        DESCRIPTION,
    )
    add_pairs(parser, nargs="*")
    add_potential(parser)
    group = add_training(parser)
    flag(group, parser, "--folds", "cross-validate over so many folds of the kinds, a run folder each", type=count,
         metavar="K")  # fmt: skip
    add_output(parser, "ase-bptt-run", "run folder", resume=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.resume and not arguments.folds:
        arguments.folds = runfolder.saved(arguments.out).get("folds")
    if arguments.folds:
        return _cross_validate(arguments)
    return launch(arguments, _splits)


def stopped(arguments: argparse.Namespace) -> str:
    """What is left after an interrupt."""
    out = arguments.out
    # Before the folder was made anew, what is there is another run.
    ours = hasattr(arguments, "data") and (arguments.resume or runfolder.holds(arguments))
    if not ours or not any(out.glob("**/checkpoint.pt")):
        again = " Begin again with --overwrite." if ours else ""
        return f"Nothing was trained yet, and nothing is lost.{again}"
    where = f"{out}/fold_*" if arguments.__dict__.get("folds") else out
    return (
        f"The state after the last complete epoch is in {where}/checkpoint.pt, the best potential so far in "
        f"{where}/potential; ase-bptt {arguments.command} --out {out} --resume goes on."
    )


def launch(arguments: argparse.Namespace, read: Callable[[argparse.Namespace, Potential], Splits]) -> int:
    """One fine-tuning run: new or resumed, or only described."""
    ranks = together()
    if arguments.resume:
        runfolder.take_over(arguments)
        if ranks.once((arguments.out / RESULTS).is_file):
            return _tell_again(arguments)
        trainer = resumed_trainer(arguments, arguments.out)
    else:
        ranks.once(partial(runfolder.refuse_if_there, arguments))
        trainer = new_trainer(arguments, arguments.out)
    splits = read(arguments, trainer.potential)
    runfolder.same_data(arguments, [pair for split in splits.values() for pair in split])
    # What cannot be trained on must not cost the last run.
    trainer.check(*splits.values(), epochs=arguments.epochs)
    if not (arguments.resume or arguments.dry_run):
        ranks.once(partial(runfolder.prepare, arguments))
    say = words.quiet_if(arguments.json)
    say(words.introduction(trainer, arguments, splits))
    if arguments.dry_run:
        left = arguments.epochs - trainer.epoch
        return words.planned(arguments, splits, estimate(trainer, *splits.values(), epochs=left))
    outcome = finetune(trainer, splits, arguments.out, epochs=arguments.epochs, facts=words.facts(arguments, trainer))
    words.conclude(arguments, outcome)
    return 0


def _tell_again(arguments: argparse.Namespace) -> int:
    """The result of a run that is complete."""
    words.quiet_if(arguments.json)(f"The run in {arguments.out} is complete.")
    words.conclude(arguments, Outcome.load(arguments.out))
    return 0


def _cross_validate(arguments: argparse.Namespace) -> int:
    ranks = together()
    if arguments.resume:
        runfolder.take_over(arguments)
        if ranks.once((arguments.out / RESULTS).is_file):
            return _tell_again(arguments)
    else:
        ranks.once(partial(runfolder.refuse_if_there, arguments))
    trainer = new_trainer(arguments, None)
    pairs = _pairs(arguments, trainer.potential)
    runfolder.same_data(arguments, pairs)
    splits = split_into_folds(pairs, arguments.folds, seed=arguments.seed)
    for split in splits:
        trainer.check(*split.values(), epochs=arguments.epochs)
    if not (arguments.resume or arguments.dry_run):
        ranks.once(partial(runfolder.prepare, arguments))
    say = words.quiet_if(arguments.json)
    say(words.introduction(trainer, arguments, {"held out in turn": pairs}))
    if arguments.dry_run:
        found = estimate(trainer, *splits[0].values(), epochs=arguments.epochs)
        return words.planned(arguments, splits[0], found)
    outcome = cross_validate(
        partial(new_trainer, arguments), pairs, arguments.out, folds=arguments.folds, epochs=arguments.epochs,
        seed=arguments.seed, facts=words.facts(arguments, trainer),
        resume=partial(resumed_trainer, arguments),
    )  # fmt: skip
    words.conclude(arguments, outcome)
    return 0


def _splits(arguments: argparse.Namespace, potential: Potential) -> Splits:
    return split_by_group(_pairs(arguments, potential), seed=arguments.seed)


def _pairs(arguments: argparse.Namespace, potential: Potential) -> list[RelaxationPair]:
    if arguments.lazy and together().size > 1:
        # One makes the index, and the others need not look through all files again.
        together().once(lambda: read_grouped(arguments) and None)
    return usable(potential, read_grouped(arguments), skip_invalid=arguments.skip_invalid)
