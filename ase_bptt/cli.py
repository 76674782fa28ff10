"""The command line: ase-bptt demo, ase-bptt train."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, report
from .adjoints import ADJOINTS
from .datasets import DEMO_FOLD, FOLDS, si_defects
from .evaluation import BASIN_RULE
from .finetune import Outcome, finetune
from .groups import split_by_group
from .loading import load_potential
from .losses import LOSSES
from .pairs import RelaxationPair
from .reading import read_pairs
from .steppers import STEPPERS, make_stepper
from .trainer import MOMENTUM, NUMBERS, Trainer

EXAMPLES = """examples:
  ase-bptt demo
      fine-tune the embedded potential on the embedded DFT relaxations (minutes, offline)
  ase-bptt train my_relaxations/ --potential chgnet --out my_run
      fine-tune CHGNet on a folder of relaxations (extxyz, .traj, vasprun.xml, OUTCAR, ...)
  ase-bptt train initial.extxyz relaxed.extxyz --potential mace.model --trust --out my_run
      two files in the same order, and a native MACE checkpoint
  ase-bptt train my_relaxations/ --potential chgnet --out my_run --resume
      go on after the last complete epoch
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 2 the input cannot be used (one sentence says why), 130 interrupted."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ase_bptt").setLevel(logging.INFO)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"ase-bptt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ase-bptt: stopped; --resume goes on after the last complete epoch.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ase-bptt",
        description="Fine-tune interatomic potentials by differentiating through relaxations.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ase_bptt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="fine-tune the embedded potential on the embedded DFT relaxations")
    demo.set_defaults(run=_demo)
    demo.add_argument("--fold", type=int, choices=range(FOLDS), default=DEMO_FOLD,
                      help="which fifth of the kinds is held out (default: %(default)s)")  # fmt: skip
    _add_training(demo, out="ase-bptt-demo", potential="mace-si", dtype="float32")
    train = commands.add_parser("train", help="fine-tune a potential on your relaxations")
    train.set_defaults(run=_train)
    train.add_argument("pairs", nargs="+", metavar="PAIRS",
                       help="file or folder of relaxations, or files of initial and of relaxed structures")  # fmt: skip
    train.add_argument("--skip-invalid", action="store_true", help="leave bad pairs out with a warning")
    train.add_argument("--group", metavar="KEY",
                       help="split by this key of the info instead of by composition and structure")  # fmt: skip
    _add_training(train, out="ase-bptt-run", potential="mace-si", dtype=None)
    return parser


def _add_training(parser: argparse.ArgumentParser, *, out: str, potential: str, dtype: str | None) -> None:
    add = parser.add_argument
    # The numbers' defaults are the Trainer's own.
    default = {name: p.default for name, p in inspect.signature(Trainer).parameters.items()}
    default["epochs"] = inspect.signature(Trainer.fit).parameters["epochs"].default

    def number(flag: str, kind: Callable[[str], Any], text: str) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        add(flag, type=kind, default=default[name], help=f"{text} (default: %(default)s)")

    add("--potential", default=potential, help="name, folder or file (default: %(default)s)")
    add("--trust", action="store_true", help="allow a native checkpoint: a pickle, which can run any code")
    add("--device", type=_device, help="cpu, cuda, ... (default: where the potential is)")
    add("--dtype", choices=("float32", "float64"), default=dtype, help="precision (default: %(default)s)")
    number("--epochs", _positive, "passes over the training pairs")
    number("--steps", _positive, "frames of an unroll in training")
    number("--fmax", float, "eV/Å at which a relaxation stops in training")
    add("--stepper", choices=sorted(STEPPERS), default="gd", help="update rule in training (default: %(default)s)")
    add("--step-size", type=float, help="of gd, in Å^2/eV (default: 0.05)")
    add("--momentum", type=float, help=f"of gd (default: {MOMENTUM})")
    add("--adjoint", choices=sorted(ADJOINTS), default="replay", help="default: %(default)s")
    number("--loss", str, f"one of {', '.join(LOSSES)}")
    number("--lr", float, "learning rate of AdamW at the start")
    number("--batch-size", _positive, "pairs a step of the optimizer")
    number("--along", float, "share of training starts on the way to the reference")
    number("--rattle", float, "noise on training starts, in Å")
    number("--patience", _positive, "stop after so many epochs without a better validation")
    number("--seed", int, "of the order of pairs, of their starts and of the split")
    add("--out", type=Path, default=Path(out), help="run folder (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace the run folder if it is there")
    add("--resume", action="store_true", help="go on with the run in the run folder")
    add("--dry-run", action="store_true", help="check everything, say what would be done, and write nothing")
    add("--json", action="store_true", help="print the result as JSON and nothing else on standard output")


def _demo(arguments: argparse.Namespace) -> None:
    splits = {name: si_defects(name, fold=arguments.fold) for name in ("train", "valid", "test")}
    _run(arguments, splits)


def _train(arguments: argparse.Namespace) -> None:
    if len(arguments.pairs) > 2:
        raise ValueError("Give one file or folder of relaxations, or two files: initial and relaxed structures.")
    pairs = read_pairs(*arguments.pairs, skip_invalid=arguments.skip_invalid)
    if arguments.group:
        pairs = [RelaxationPair(p.initial, p.relaxed, p.id, _group(p, arguments.group)) for p in pairs]
    _run(arguments, split_by_group(pairs, seed=arguments.seed))


def _run(arguments: argparse.Namespace, splits: dict[str, list[RelaxationPair]]) -> None:
    trainer = Trainer.resume(arguments.out, device=arguments.device) if arguments.resume else _new_trainer(arguments)
    # What cannot be trained on must not cost the last run.
    trainer.check(*splits.values(), epochs=arguments.epochs)
    if not arguments.resume and not arguments.dry_run:
        _prepare(arguments.out, arguments.overwrite)
    say = _silent if arguments.json else print
    say(_introduction(trainer, arguments, splits))
    if arguments.dry_run:
        say("A dry run: nothing was trained, nothing was written.")
        return
    outcome = finetune(trainer, splits, arguments.out, epochs=arguments.epochs)
    if arguments.json:
        print(json.dumps(outcome.todict()))
    else:
        print(_conclusion(outcome))


def _new_trainer(arguments: argparse.Namespace) -> Trainer:
    potential = load_potential(
        arguments.potential, device=arguments.device, dtype=arguments.dtype, trust=arguments.trust
    )
    given = {"step_size": arguments.step_size, "momentum": arguments.momentum}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.stepper == "gd":
        stepper = make_stepper("gd", **{"momentum": MOMENTUM} | given)
    elif given:
        raise ValueError("--step-size and --momentum belong to --stepper gd.")
    else:
        stepper = make_stepper(arguments.stepper)
    names = [name for name in ("adjoint", "loss", *NUMBERS, "out") if hasattr(arguments, name)]
    return Trainer(potential, stepper=stepper, **{name: getattr(arguments, name) for name in names})


def _prepare(out: Path, overwrite: bool) -> None:
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise FileExistsError(f"The folder {out} is there already: --overwrite, --resume, or another --out.")
        if not (out / "settings.json").is_file():
            raise FileExistsError(f"The folder {out} is not one of our run folders, so it is not overwritten.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


def _introduction(trainer: Trainer, arguments: argparse.Namespace, splits: dict[str, list[RelaxationPair]]) -> str:
    sizes = ", ".join(f"{len(v)} {k} ({len({p.group for p in v})} kinds)" for k, v in splits.items())
    return (
        f"{trainer.potential.family if arguments.resume else arguments.potential}, fine-tuned through "
        f"{trainer.steps} frames of {trainer.stepper.name}\n"
        f"relaxations: {sizes}; kinds are never split\n"
        f"run folder: {arguments.out}"
    )


def _conclusion(outcome: Outcome) -> str:
    before, after = outcome.before_bfgs, outcome.after_bfgs
    return (
        f"\nHeld out, relaxed by FIRE to fmax 0.02 eV/Å\n{report.table(outcome.before, outcome.after)}\n"
        f"({BASIN_RULE})\n"
        f"relaxed by BFGS instead: mean {before.mean:.2f} before, {after.mean:.2f} after, "
        f"{report.change(before.mean, after.mean)}\n\n"
        f"{outcome.seconds:.0f} s; tuned potential in {outcome.out / 'potential'}, picture in "
        f"{outcome.out / 'before_after.png'}"
    )


def _group(pair: RelaxationPair, key: str) -> str:
    if key not in pair.relaxed.info:
        raise ValueError(f"{pair.id}: its info has no {key!r} to group by; it has {', '.join(pair.relaxed.info)}.")
    return str(pair.relaxed.info[key])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here") from error


def _silent(*_: Any) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
