"""The flags of a training, and the Trainer that they describe."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..adjoints import Adjoint, make_adjoint
from ..losses import LOSSES
from ..steppers import STEPPERS, Stepper, make_stepper
from ..training.resuming import NUMBERS
from ..training.trainer import MOMENTUM, Trainer
from ..tuning.trainable import prepare
from .flags import best_device, between, count, flag, positive, seed
from .inputs import potential_of
from .stopping import held

ARGUMENTS = ("loss", *NUMBERS)
TERMS = {
    "pull": "weight of a pull to the pretrained weights",
    "teacher": "weight of the pretrained energies and forces on probes",
    "reference": "weight of the energies and forces of reference frames",
}


def add_training(parser: argparse.ArgumentParser) -> Any:
    """The numbers of the training, and what is trained; their defaults are the Trainer's own."""
    group = parser.add_argument_group("training")
    default = {name: p.default for name, p in inspect.signature(Trainer).parameters.items()}
    default["epochs"] = inspect.signature(Trainer.fit).parameters["epochs"].default

    def number(name: str, kind: Callable[[str], Any], text: str, metavar: str = "X") -> None:
        flag(group, parser, name, text, default[name.removeprefix("--").replace("-", "_")], type=kind, metavar=metavar)

    number("--epochs", count, "passes over the training pairs", "N")
    number("--steps", count, "frames of an unroll in training (default: 10, or 300 at most where the adjoint needs the "
           "minimum)", "N")  # fmt: skip
    number("--fmax", positive, "eV/Å at which a relaxation stops in training")
    flag(group, parser, "--stepper", "update rule in training (default: gd, or bfgs where the adjoint needs only the "
         "minimum)", choices=sorted(STEPPERS))  # fmt: skip
    flag(group, parser, "--step-size", "of gd, in Å^2/eV, or 'auto' (default: 0.05)", type=step_size, metavar="X")
    flag(group, parser, "--momentum", f"of gd (default: {MOMENTUM})", type=between(0, 1), metavar="X")
    flag(group, parser, "--adjoint", "way to the gradient: replay, replay:N, replay:differences, truncated:N, "
         "guided:N, implicit, one-step or full, with N frames", "replay", type=adjoint, metavar="NAME")  # fmt: skip
    number("--warm", count, "with implicit, guided or one-step: begin where the epoch before ended, and from the "
           "initial structures in every N-th epoch", "N")  # fmt: skip
    flag(group, parser, "--learn", "train these numbers of the stepper, too, such as step_size", [], nargs="+",
         metavar="NAME")  # fmt: skip
    flag(group, parser, "--loss", f"distance that is lowered: {', '.join(LOSSES)}", default["loss"],
         choices=sorted(LOSSES), metavar="NAME")  # fmt: skip
    number("--lr", positive, "learning rate of AdamW at the start")
    number("--batch-size", count, "pairs a step of the optimizer", "N")
    number("--memory", positive, "GiB that may be taken at once; larger batches are computed in parts (default: 80 % "
           "of what is free on a GPU)")  # fmt: skip
    number("--along", between(0, 1), "share of training starts on the way to the reference")
    number("--rattle", between(0, 1), "noise on training starts, in Å")
    number("--patience", count, "stop after so many epochs without a better validation", "N")
    number("--seed", seed, "of the order of pairs, of their starts and of the split", "N")
    _add_weights(parser)
    _add_terms(parser)
    return group


def _add_weights(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is trained (default: all weights)")
    flag(group, parser, "--train", "weights of these names", [], nargs="+", metavar="PATTERN")
    flag(group, parser, "--freeze", "not weights of these names", [], nargs="+", metavar="PATTERN")
    flag(group, parser, "--last", "the last N layers, with the readout", type=count, metavar="N")
    flag(group, parser, "--lora", "low-rank updates of this rank, folded in on saving", type=count, metavar="RANK")


def _add_terms(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("further terms of the loss (default: none)")
    for name, text in TERMS.items():
        flag(group, parser, f"--{name}", text, type=positive, metavar="X")


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
    prepare(potential, train=arguments.train, freeze=arguments.freeze, last=arguments.last, lora=arguments.lora)
    numbers = {name: getattr(arguments, name) for name in ARGUMENTS if getattr(arguments, name, None) is not None}
    terms = [{"name": name, "weight": getattr(arguments, name)} for name in TERMS if getattr(arguments, name)]
    stepper = _stepper(arguments, chosen)
    return Trainer(potential, stepper=stepper, adjoint=chosen, **numbers, terms=terms, out=out)


def resumed_trainer(arguments: argparse.Namespace, out: Path) -> Trainer:
    """The Trainer of a run that was stopped."""
    with held():
        return Trainer.resume(out, device=arguments.device or best_device())


def adjoint(text: str) -> str:
    """The name of an adjoint, with its number of frames."""
    try:
        make_adjoint(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def step_size(text: str) -> float | str:
    """A length of a step, or 'auto'."""
    return text if text == "auto" else positive(text)


def _stepper(arguments: argparse.Namespace, adjoint: Adjoint) -> Stepper:
    name = arguments.stepper or ("gd" if adjoint.through_frames else "bfgs")
    given = {"step_size": arguments.step_size, "momentum": arguments.momentum}
    given = {key: value for key, value in given.items() if value is not None}
    if adjoint.through_frames and not STEPPERS[name].differentiable:
        raise ValueError(f"--stepper {name} cannot be differentiated: take gd or fire, or --adjoint implicit.")
    if name == "gd":
        return make_stepper("gd", **{"momentum": MOMENTUM} | given)
    if given:
        raise ValueError("--step-size and --momentum belong to --stepper gd.")
    return make_stepper(name)
