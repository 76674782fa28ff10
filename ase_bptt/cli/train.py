"""ase-bptt train: its flags, the Trainer that they describe, and the run."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..adjoints import Adjoint, make_adjoint
from ..losses import LOSSES
from ..pairs import RelaxationPair
from ..pairs.groups import split_into_folds, unwarned_split
from ..pairs.usable import usable
from ..potential import Potential
from ..steppers import STEPPERS, Stepper, make_stepper
from ..training import Trainer
from ..training.distributed import together
from ..training.fine_tune import cross_validate, finetune
from ..training.results import RESULTS, RunResults
from ..training.settings import EPOCHS, MOMENTUM, NUMBERS, first_stage
from ..training.training_data import combined_hash
from . import each_charge, messages, run_folder
from .flags import add_output, add_potential, command, flag, potential_of
from .pair_flags import add_pairs, read_grouped
from .run_folder import signals_deferred
from .values import count, positive, seed

DESCRIPTION = """\
Fine-tune a potential on reference relaxations, so that its own relaxations
end in the same structures. The kinds of structures are divided: a fifth to
measure the gain, a tenth to choose the epoch by, the others to train on. If
there is a gain, the potential is then trained once more, on all of them.

examples:
  ase-bptt train runs/ --potential chgnet --out tuned
      a folder of VASP or Espresso runs, extxyz, .traj or POSCAR + CONTCAR
  ase-bptt train initial.extxyz relaxed.extxyz --potential my.model --trust
      two files in the same order, and a native MACE checkpoint
  ase-bptt train runs/ --potential chgnet --out tuned --dry-run
      what would be read, trained and written, and how long it would take
  ase-bptt train --out tuned --resume
      continue after the last complete epoch
  ase-bptt train runs/ --potential chgnet --out check --folds 5
      cross-validate: each kind is held out once
"""
Splits = dict[str, list[RelaxationPair]]


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "train [PAIRS [RELAXED]] --potential NAME [options]",
        (run, stopped),
        "fine-tune a potential on your relaxations",
        DESCRIPTION,
    )
    add_pairs(parser, nargs="*")
    add_potential(parser)
    group = add_training(parser)
    flag(group, parser, "--folds", "cross-validate: K folds of the kinds, each with a run folder", type=count,
         metavar="K")  # fmt: skip
    flag(group, parser, "--no-refit", "hand back the potential that was measured, which has not seen the held-out "
         "pairs, instead of one trained once more on all", False, action="store_true")  # fmt: skip
    add_output(parser, "ase-bptt-run", "run folder", resume=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    _settle_epochs(arguments)
    if each_charge.asked_for(arguments):
        return each_charge.run_each(arguments, run)
    if arguments.resume and not arguments.folds:
        arguments.folds = run_folder.saved(arguments.out).get("folds")
    if arguments.folds:
        return _cross_validate(arguments)
    return launch(arguments, _splits, refit=not arguments.no_refit)


def stopped(arguments: argparse.Namespace) -> str:
    """What is left after an interrupt."""
    out = arguments.out
    # Before the folder was prepared, what is in it is another run.
    each = hasattr(arguments, "each") and bool(each_charge.started(out))
    ours = each or (hasattr(arguments, "data") and (arguments.resume or run_folder.holds(arguments)))
    if not ours or not any(out.glob("**/checkpoint.pt")):
        again = " Start again with --overwrite." if ours else ""
        return f"Nothing was trained yet, and nothing is lost.{again}"
    where = "/".join([str(out), *[each_charge.PATTERN] * each, *["fold_*"] * bool(arguments.__dict__.get("folds"))])
    return (
        f"The state after the last complete epoch is in {where}/checkpoint.pt, the best potential so far in "
        f"{where}/potential; ase-bptt {arguments.command} --out {out} --resume continues."
    )


def launch(
    arguments: argparse.Namespace, read: Callable[[argparse.Namespace, Potential], Splits], *, refit: bool = False
) -> int:
    """One fine-tuning run, with `refit` and another on all pairs after it: new or resumed, or only described."""
    _settle_epochs(arguments)
    if _complete(arguments):
        return _report_again(arguments)
    make = resumed_trainer if arguments.resume else new_trainer
    trainer = make(arguments, arguments.out)
    # What cannot be trained on must not cost the last run.
    data = trainer.check(**read(arguments, trainer.potential))
    run_folder.same_data(arguments, combined_hash([data.fingerprint, data.held_out]))
    _announce(arguments, trainer, data.splits())
    caution = messages.caution(data.splits(), warn=trainer.ranks.writes)
    if arguments.dry_run:
        left = arguments.epochs - trainer.epoch
        n, again = len(data.train), sum(map(len, data.splits().values())) if refit else 0
        return messages.planned(arguments, data.splits(), trainer.estimate(data, epochs=left), runs=1 + again / n)
    results = finetune(
        trainer, data, arguments.out, epochs=arguments.epochs, facts=messages.facts(arguments, trainer) | caution,
        make=partial(new_trainer, arguments) if refit else None, resume=partial(resumed_trainer, arguments),
    )  # fmt: skip
    messages.conclude(arguments, results)
    return 0


def _settle_epochs(arguments: argparse.Namespace) -> None:
    if arguments.epochs is None:
        arguments.epochs = EPOCHS + first_stage(arguments.first)


def _cross_validate(arguments: argparse.Namespace) -> int:
    if _complete(arguments):
        return _report_again(arguments)
    trainer = new_trainer(arguments, None)
    pairs = _pairs(arguments, trainer.potential)
    folds = [trainer.check(**split) for split in split_into_folds(pairs, arguments.folds, seed=arguments.seed)]
    run_folder.same_data(arguments, combined_hash([fold.held_out for fold in folds]))
    _announce(arguments, trainer, {"held out in turn": pairs})
    caution = messages.caution(*(fold.splits() for fold in folds), warn=trainer.ranks.writes)
    if arguments.dry_run:
        estimate = trainer.estimate(folds[0], epochs=arguments.epochs)
        return messages.planned(arguments, folds[0].splits(), estimate, runs=1 + arguments.folds)
    results = cross_validate(
        partial(new_trainer, arguments), pairs, arguments.out, folds=folds, epochs=arguments.epochs,
        facts=messages.facts(arguments, trainer) | caution, resume=partial(resumed_trainer, arguments),
    )  # fmt: skip
    messages.conclude(arguments, results)
    return 0


def _complete(arguments: argparse.Namespace) -> bool:
    """Take over the arguments of a run that is resumed, or refuse to overwrite one; whether there is nothing to do."""
    ranks = together()
    if not arguments.resume:
        ranks.once(partial(run_folder.refuse_if_there, arguments))
        return False
    run_folder.take_over(arguments)
    return ranks.once((arguments.out / RESULTS).is_file)


def _report_again(arguments: argparse.Namespace) -> int:
    """Print the results of a run that is complete."""
    messages.quiet_if(arguments.json)(f"The run in {arguments.out} is complete.")
    messages.conclude(arguments, RunResults.load(arguments.out))
    return 0


def _announce(arguments: argparse.Namespace, trainer: Trainer, splits: Mapping[str, Sequence[RelaxationPair]]) -> None:
    """Make the folder of a new run, and print what will be trained on what."""
    if not (arguments.resume or arguments.dry_run):
        together().once(partial(run_folder.prepare, arguments))
    messages.quiet_if(arguments.json)(messages.introduction(trainer, arguments, splits))


def _splits(arguments: argparse.Namespace, potential: Potential) -> Splits:
    return unwarned_split(_pairs(arguments, potential), seed=arguments.seed)


def _pairs(arguments: argparse.Namespace, potential: Potential) -> list[RelaxationPair]:
    if arguments.lazy and together().size > 1:
        # One process makes the index; the others need not read all files again.
        together().once(lambda: read_grouped(arguments) and None)
    pairs = read_grouped(arguments, show=True)
    # Otherwise the Trainer refuses what it cannot use.
    return usable(potential, pairs, skip_invalid=True) if arguments.skip_invalid else pairs


ARGUMENTS = ("loss", *NUMBERS)
TERMS = {
    "teacher": "weight of the distillation of pretrained energies and forces on probes",
    "reference": "weight of the energy and force labels of the reference frames (default: 1 where there are any)",
}


def add_training(parser: argparse.ArgumentParser) -> Any:
    """Add the flags of a training; their defaults are those of `Trainer`."""
    group = parser.add_argument_group("training")
    default = {name: p.default for name, p in inspect.signature(Trainer).parameters.items()}

    def number(name: str, kind: Callable[[str], Any], text: str, metavar: str = "X") -> None:
        flag(group, parser, name, text, default[name.removeprefix("--").replace("-", "_")], type=kind, metavar=metavar)

    flag(group, parser, "--epochs", f"passes over the training pairs, at most (default: {EPOCHS}, after those "
         "of --first)", type=count, metavar="N")  # fmt: skip
    number("--steps", count, "frames that are unrolled in training (default: 10, or at most 300 where the adjoint "
           "needs the minimum)", "N")  # fmt: skip
    flag(group, parser, "--first", "zero-force or zero-force:N: in the first N epochs (8 without a number) nothing is "
         "relaxed: the forces at the references are lowered, and the stresses where the cell moves, beside further "
         "terms as --reference; validation decides what is trained on", type=first, metavar="STAGE")  # fmt: skip
    number("--fmax", positive, "a relaxation in training stops below this force, in eV/Å")
    flag(group, parser, "--stepper", "update rule in training (default: gd, or bfgs where the adjoint needs only the "
         "minimum)", choices=sorted(STEPPERS))  # fmt: skip
    flag(group, parser, "--step-size", "step size of gd in Å^2/eV, or 'auto' (default: 0.05)", type=step_size,
         metavar="X")  # fmt: skip
    flag(group, parser, "--adjoint", "how the gradient is taken: replay, replay:N, replay:differences, truncated:N, "
         "guided:N, implicit, one-step or full, with N frames", "replay", type=adjoint, metavar="NAME")  # fmt: skip
    flag(group, parser, "--loss", f"loss to minimise, a distance to the reference: {', '.join(LOSSES)}",
         default["loss"], choices=sorted(LOSSES), metavar="NAME")  # fmt: skip
    number("--lr", positive, "initial learning rate of AdamW (default: 2e-3 for up to 500,000 weights, else 1e-3)")
    number("--batch-size", count, "pairs in each step of the optimizer", "N")
    number("--memory", positive, "limit of memory in GiB; larger batches are computed in parts (default: 80 % "
           "of what is free on a GPU)")  # fmt: skip
    number("--seed", seed, "random seed of the split, the order of pairs and their starts", "N")
    terms = parser.add_argument_group("further terms of the loss")
    for name, text in TERMS.items():
        flag(terms, parser, f"--{name}", text, type=weight, metavar="X")
    return group


def new_trainer(arguments: argparse.Namespace, out: Path | None) -> Trainer:
    """What the flags ask for.

    Raises
    ------
    ValueError
        For flags that do not go together.
    """
    chosen = make_adjoint(arguments.adjoint)
    assert chosen is not None
    potential = potential_of(arguments)
    numbers = {name: getattr(arguments, name) for name in ARGUMENTS if getattr(arguments, name, None) is not None}
    terms: list[dict[str, Any]]
    terms = [{"name": name, "weight": getattr(arguments, name)} for name in TERMS if getattr(arguments, name)]
    if arguments.reference is None:
        terms.append({"name": "reference", "required": False})
    stepper = _stepper(arguments, chosen)
    return Trainer(potential, stepper=stepper, adjoint=chosen, **numbers, terms=terms, out=out)


def resumed_trainer(arguments: argparse.Namespace, out: Path) -> Trainer:
    """The Trainer of a run that was stopped."""
    with signals_deferred():
        return Trainer.resume(out, device=arguments.device)


def adjoint(text: str) -> str:
    """The name of an adjoint, with its number of frames."""
    try:
        make_adjoint(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text.lower()


def first(text: str) -> str:
    """A first stage, with its number of epochs."""
    try:
        first_stage(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text.lower()


def weight(text: str) -> float:
    """Zero or a positive number."""
    return 0.0 if text.strip() in ("0", "0.0") else positive(text)


def step_size(text: str) -> float | str:
    """A length of a step, or 'auto'."""
    return text if text == "auto" else positive(text)


def _stepper(arguments: argparse.Namespace, adjoint: Adjoint) -> Stepper:
    name = arguments.stepper or ("gd" if adjoint.through_frames else "bfgs")
    given = {} if arguments.step_size is None else {"step_size": arguments.step_size}
    if adjoint.through_frames and not STEPPERS[name].differentiable:
        raise ValueError(f"--stepper {name} cannot be differentiated: take gd or fire, or --adjoint implicit.")
    if name == "gd":
        return make_stepper("gd", momentum=MOMENTUM, **given)
    if given:
        raise ValueError("--step-size belongs to --stepper gd.")
    return make_stepper(name)
