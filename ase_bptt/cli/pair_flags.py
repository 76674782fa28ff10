"""The pairs of a command: flags that say which they are, and reading them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..pairs import MAX_REFERENCE_FORCE, InvalidPair, RelaxationPair
from ..pairs.charges import ALL, EACH, of_charge
from ..pairs.loading import Choices, n_cores
from ..pairs.reading import read_archive
from ..pairs.symmetry import SYMMETRIES
from ..pairs.targets import read_targets
from ..training.distributed import together
from .flags import add_cell, flag
from .values import charges, positive


def add_pairs(parser: argparse.ArgumentParser, nargs: str = "+", option: str | None = None) -> None:
    """PAIRS (or an option of this name), --group, --skip-invalid and --lazy."""
    group = parser.add_argument_group("reference relaxations")
    text = (
        "a file or folder of relaxations (vasprun.xml, OUTCAR, POSCAR + CONTCAR, Espresso output, extxyz, .traj, "
        "ase.db), or two files of initial and of relaxed structures in the same order"
    )
    if option:
        flag(group, parser, option, text, nargs=nargs, metavar="PAIRS", type=Path)
    else:
        group.add_argument("pairs", nargs=nargs, metavar="PAIRS", help=text, type=Path)
        parser.get_default("flag_defaults")["pairs"] = []
    flag(group, parser, "--group", "key of atoms.info that names the kind of each pair; a kind is never "
         "divided between training, validation and test. 'folder': the folders directly below PAIRS name the kinds "
         "(default: pairs of the same composition that end in the same structure are one kind)",
         metavar="KEY")  # fmt: skip
    flag(group, parser, "--skip-invalid", "leave out pairs that cannot be used, and list them", False,
         action="store_true")  # fmt: skip
    flag(group, parser, "--max-reference-force", "eV/Å: what is left with a larger force is no reference and left out",
         MAX_REFERENCE_FORCE, type=positive, metavar="X")  # fmt: skip
    flag(group, parser, "--charges", "which pairs, by info['charge'] of their structures: neutral, all, one charge as "
         "-1, or in training each charge by itself", ALL, type=charges, metavar="Q")  # fmt: skip
    flag(group, parser, "--targets", "PAIRS are relaxed structures alone (CIF, POSCAR, extxyz, ase.db), for which each "
         "epoch draws starts, strained by 2 % and rattled", False, action="store_true")  # fmt: skip
    add_cell(group, parser, "what of the cells was relaxed (default: what the runs say, or else the cells show)", None)
    flag(group, parser, "--symmetry", "of starts: keep it (FixSymmetry), break it by a small rattle, or leave it free "
         "(default: keep it where the reference did: ISYM of VASP, nosym of pw.x)",
         choices=SYMMETRIES)  # fmt: skip
    flag(group, parser, "--lazy", "for a folder or a .db: check all pairs once, then read each when it is needed, "
         "so that they need not fit in memory", False, action="store_true")  # fmt: skip


def read_grouped(arguments: argparse.Namespace, *, show: bool = False) -> list[RelaxationPair]:
    """The pairs of PAIRS, with --skip-invalid, --group and --lazy; with `show`, what else is in a folder is printed."""
    paths = [Path(path) for path in arguments.pairs]
    if arguments.targets:
        return _targets(arguments, paths)
    if not 1 <= len(paths) <= 2:
        raise ValueError("Give one file or folder of relaxations, or two files: initial and relaxed structures.")
    choices = Choices(
        arguments.skip_invalid, arguments.group, arguments.max_reference_force, arguments.cell, arguments.pressure,
        arguments.symmetry,
    )  # fmt: skip
    processes = max(1, n_cores() // together().size)
    show = show and paths[0].is_dir() and not arguments.json
    with tqdm(desc="reading", unit=" files", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            pairs, survey = read_archive(
                paths[0], *paths[1:], choices=choices, lazy=arguments.lazy, processes=processes, progress=progress
            )
        except InvalidPair as problem:
            if show and problem.survey is not None and problem.survey.tells_more():
                print(problem.survey.table(), flush=True)
            raise
    if show and survey.tells_more():
        print(f"{survey.table()}\n", flush=True)
        survey.warn()
    else:
        survey.report()
    return _of_charge(pairs, arguments.charges)


def _targets(arguments: argparse.Namespace, paths: Sequence[Path]) -> list[RelaxationPair]:
    if not paths or arguments.lazy or arguments.group:
        raise ValueError("--targets takes files or folders of relaxed structures, without --lazy and --group.")
    targets = read_targets(
        paths, skip_invalid=arguments.skip_invalid, cell=arguments.cell, pressure=arguments.pressure,
        max_reference_force=arguments.max_reference_force, symmetry=arguments.symmetry,
    )  # fmt: skip
    return _of_charge(targets, arguments.charges)


def _of_charge(pairs: list[RelaxationPair], choice: str | float) -> list[RelaxationPair]:
    if choice == EACH:
        raise ValueError("--charges each belongs to train: give neutral, all or one charge.")
    return of_charge(pairs, choice)
