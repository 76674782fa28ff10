"""ase-bptt train: fine-tuning on a person's own relaxations."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..adjoints import ADJOINTS
from ..checks import usable
from ..estimate import estimate
from ..finetune import cross_validate, finetune
from ..groups import split_by_group, split_into_folds
from ..losses import LOSSES
from ..outcome import RESULTS, Outcome
from ..pairs import RelaxationPair
from ..potential import Potential
from ..resuming import NUMBERS
from ..steppers import STEPPERS, Stepper, make_stepper
from ..trainer import MOMENTUM, Trainer
from . import runfolder, words
from .flags import add_output, add_pairs, add_potential, best_device, between, command, count, flag, positive, seed
from .inputs import potential_of, read_grouped
from .stopping import held

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
DIFFERENTIABLE = sorted(name for name, stepper in STEPPERS.items() if stepper.differentiable)
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


def add_training(parser: argparse.ArgumentParser) -> Any:
    """The numbers of the training; their defaults are the Trainer's own."""
    group = parser.add_argument_group("training")
    default = {name: p.default for name, p in inspect.signature(Trainer).parameters.items()}
    default["epochs"] = inspect.signature(Trainer.fit).parameters["epochs"].default

    def number(name: str, kind: Callable[[str], Any], text: str, metavar: str = "X") -> None:
        flag(group, parser, name, text, default[name.removeprefix("--").replace("-", "_")], type=kind, metavar=metavar)

    number("--epochs", count, "passes over the training pairs", "N")
    number("--steps", count, "frames of an unroll in training", "N")
    number("--fmax", positive, "eV/Å at which a relaxation stops in training")
    flag(group, parser, "--stepper", "update rule in training", "gd", choices=DIFFERENTIABLE)
    flag(group, parser, "--step-size", "of gd, in Å^2/eV (default: 0.05)", type=positive, metavar="X")
    flag(group, parser, "--momentum", f"of gd (default: {MOMENTUM})", type=between(0, 1), metavar="X")
    flag(group, parser, "--adjoint", "way to the gradient", "replay", choices=sorted(ADJOINTS))
    flag(group, parser, "--loss", f"distance that is lowered: {', '.join(LOSSES)}", default["loss"],
         choices=sorted(LOSSES), metavar="NAME")  # fmt: skip
    number("--lr", positive, "learning rate of AdamW at the start")
    number("--batch-size", count, "pairs a step of the optimizer", "N")
    number("--along", between(0, 1), "share of training starts on the way to the reference")
    number("--rattle", between(0, 1), "noise on training starts, in Å")
    number("--patience", count, "stop after so many epochs without a better validation", "N")
    number("--seed", seed, "of the order of pairs, of their starts and of the split", "N")
    return group


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
    if arguments.resume:
        runfolder.take_over(arguments)
        if (arguments.out / RESULTS).is_file():
            return _tell_again(arguments)
        trainer = _resumed(arguments, arguments.out)
    else:
        runfolder.refuse_if_there(arguments)
        trainer = _new(arguments, arguments.out)
    splits = read(arguments, trainer.potential)
    runfolder.same_data(arguments, [pair for split in splits.values() for pair in split])
    # What cannot be trained on must not cost the last run.
    trainer.check(*splits.values(), epochs=arguments.epochs)
    if not (arguments.resume or arguments.dry_run):
        runfolder.prepare(arguments)
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
    if arguments.resume:
        runfolder.take_over(arguments)
        if (arguments.out / RESULTS).is_file():
            return _tell_again(arguments)
    else:
        runfolder.refuse_if_there(arguments)
    trainer = _new(arguments, None)
    pairs = _pairs(arguments, trainer.potential)
    runfolder.same_data(arguments, pairs)
    splits = split_into_folds(pairs, arguments.folds, seed=arguments.seed)
    for split in splits:
        trainer.check(*split.values(), epochs=arguments.epochs)
    if not (arguments.resume or arguments.dry_run):
        runfolder.prepare(arguments)
    say = words.quiet_if(arguments.json)
    say(words.introduction(trainer, arguments, {"held out in turn": pairs}))
    if arguments.dry_run:
        found = estimate(trainer, *splits[0].values(), epochs=arguments.epochs)
        return words.planned(arguments, splits[0], found)
    outcome = cross_validate(
        partial(_new, arguments), pairs, arguments.out, folds=arguments.folds, epochs=arguments.epochs,
        seed=arguments.seed, facts=words.facts(arguments, trainer),
        resume=partial(_resumed, arguments),
    )  # fmt: skip
    words.conclude(arguments, outcome)
    return 0


def _splits(arguments: argparse.Namespace, potential: Potential) -> Splits:
    return split_by_group(_pairs(arguments, potential), seed=arguments.seed)


def _pairs(arguments: argparse.Namespace, potential: Potential) -> list[RelaxationPair]:
    return usable(potential, read_grouped(arguments), skip_invalid=arguments.skip_invalid)


def _new(arguments: argparse.Namespace, out: Path | None) -> Trainer:
    names = [name for name in ("adjoint", "loss", *NUMBERS) if hasattr(arguments, name)]
    numbers = {name: getattr(arguments, name) for name in names}
    return Trainer(potential_of(arguments), stepper=_stepper(arguments), **numbers, out=out)


def _resumed(arguments: argparse.Namespace, out: Path) -> Trainer:
    with held():
        return Trainer.resume(out, device=arguments.device or best_device())


def _stepper(arguments: argparse.Namespace) -> Stepper:
    given = {"step_size": arguments.step_size, "momentum": arguments.momentum}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.stepper == "gd":
        return make_stepper("gd", **{"momentum": MOMENTUM} | given)
    if given:
        raise ValueError("--step-size and --momentum belong to --stepper gd.")
    return make_stepper(arguments.stepper)
