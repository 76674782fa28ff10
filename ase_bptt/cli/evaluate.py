"""ase-bptt evaluate: where a potential's relaxations end, alone or compared with another's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from textwrap import fill
from typing import Any

from ase.io import write

from ..evaluation import BASIN_RULE, Evaluation, evaluate
from ..evaluation.compare import Comparison, compare
from ..pairs import RelaxationPair, fingerprint
from ..pairs.groups import usable
from ..potential import Potential
from ..report.page import write_page, write_pictures
from ..report.tables import comparison_text, evaluation_table, group_table, table, write_csv
from ..steppers import STEPPERS
from ..throughput.journal import Journal, run_key
from ..training.results import RESULTS, summary
from ..utils import replacing, without_nan, write_json
from . import messages, run_folder
from .flags import (
    WIDTH,
    add_output,
    add_pairs,
    add_potential,
    add_room,
    command,
    count,
    flag,
    positive,
    potential_of,
    read_grouped,
    seed,
)
from .relax import warn_of_lost_constraints

DESCRIPTION = """\
Relax from each initial structure, and measure how far from the reference it
ends: Delta-Q, RMSD, largest displacement, right basins, residual force at the
reference, space group kept or lost. With --against a second potential is
evaluated as well, and the two are compared with intervals and a paired test.

examples:
  ase-bptt evaluate held_out/ --potential tuned --against chgnet
  ase-bptt evaluate runs/ --potential mace-si --group kind --out base
  ase-bptt evaluate --out base --resume
      continue with the structures that were not finished
"""
ENDS = "relaxed.extxyz"
JOURNALS = ("potential.part.traj", "against.part.traj")


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "evaluate [PAIRS [RELAXED]] --potential NAME [options]",
        (run, stopped),
        "measure a potential, or two, on relaxations",
        DESCRIPTION,
    )
    add_pairs(parser, nargs="*")
    group = add_potential(parser)
    flag(group, parser, "--against", "a second potential to compare with", metavar="NAME")
    group = parser.add_argument_group("relaxation")
    flag(group, parser, "--stepper", "update rule", "fire", choices=sorted(STEPPERS))
    flag(group, parser, "--fmax", "converged when all forces are below this, in eV/Å", 0.02, type=positive, metavar="X")
    flag(group, parser, "--steps", "frames at most", 500, type=count, metavar="N")
    add_room(group, parser)
    flag(group, parser, "--seed", "of the bootstrap", 0, type=seed, metavar="N")
    add_output(parser, "ase-bptt-evaluation", "folder for tables, figures and report.html", resume=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.resume:
        run_folder.take_over(arguments)
        if (arguments.out / RESULTS).is_file():
            raise FileExistsError(f"The evaluation in {arguments.out} is complete: nothing is left to resume.")
    else:
        run_folder.refuse_if_there(arguments)
    potential = potential_of(arguments)
    other = potential_of(arguments, arguments.against) if arguments.against else None
    pairs = read_grouped(arguments)
    for each in (potential, other):
        if each is not None:
            pairs = usable(each, pairs, skip_invalid=arguments.skip_invalid)
    if not (arguments.resume or arguments.dry_run):
        run_folder.prepare(arguments)
    say = messages.quiet_if(arguments.json)
    kinds = len({p.group for p in pairs})
    say(f"{len(pairs)} relaxations of {kinds} kinds, by {arguments.stepper} to {arguments.fmax} eV/Å")
    if arguments.dry_run:
        say("A dry run: nothing was relaxed, nothing was written.")
        if arguments.json:
            print(json.dumps({"dry_run": True, "n": len(pairs), "kinds": kinds, "run": str(arguments.out)}))
        return 0
    found = _evaluated(arguments, potential, pairs, JOURNALS[0])
    reference = _evaluated(arguments, other, pairs, JOURNALS[1]) if other is not None else None
    comparison = compare(reference, found, seed=arguments.seed) if reference is not None else None
    result = {
        "test": summary(reference, found),
        "comparison": comparison.todict() if comparison else None,
        "checkpoint": arguments.potential,
        "against": arguments.against,
        "run": str(arguments.out),
    }
    facts = _facts(arguments, potential) | {"data": fingerprint(pairs)[:16]}
    _write(arguments, result, found, reference, comparison, facts)
    for name in JOURNALS:
        (arguments.out / name).unlink(missing_ok=True)
    if arguments.json:
        print(json.dumps(without_nan(result)))
    else:
        print(_tables(arguments, found, reference, comparison))
    return 0


def stopped(arguments: argparse.Namespace) -> str:
    """The last words after an interrupt."""
    if not any((arguments.out / name).is_file() for name in JOURNALS):
        return "No structure has finished yet, and nothing is lost."
    return (
        f"The structures that have finished are kept in {arguments.out}; ase-bptt evaluate --out {arguments.out} "
        "--resume continues with the others."
    )


def _evaluated(
    arguments: argparse.Namespace, potential: Potential, pairs: list[RelaxationPair], name: str
) -> Evaluation:
    settings = {name: getattr(arguments, name) for name in ("stepper", "fmax", "steps")}
    room = {name: getattr(arguments, name) for name in ("batch_size", "memory")}
    structures = [p.initial for p in pairs] + [p.relaxed for p in pairs]
    cells = [p.freedom.todict() for p in pairs]
    journal = Journal(arguments.out / name, run_key(potential, structures, settings | {"cells": cells}))
    return evaluate(potential, pairs, **settings, **room, journal=journal, progress=None)


def _labels(arguments: argparse.Namespace) -> tuple[str, str]:
    labels = (arguments.against or "", arguments.potential)
    return labels if labels[0] != labels[1] else (f"{labels[0]} (1)", f"{labels[1]} (2)")


def _tables(
    arguments: argparse.Namespace, found: Evaluation, reference: Evaluation | None, comparison: Comparison | None
) -> str:
    labels = _labels(arguments)
    if reference is None or comparison is None:
        tables = f"{evaluation_table(found)}\n\n{group_table(found)}"
    else:
        tables = "\n\n".join(
            (
                table(reference, found, labels),
                group_table(reference, found, labels),
                comparison_text(comparison, labels),
            )
        )
    return f"\n{tables}\n{fill(BASIN_RULE, WIDTH)}\n\nall figures and pictures in {arguments.out / 'report.html'}"


def _write(
    arguments: argparse.Namespace,
    result: dict[str, Any],
    found: Evaluation,
    reference: Evaluation | None,
    comparison: Comparison | None,
    facts: dict[str, str],
) -> None:
    out: Path = arguments.out
    labels = _labels(arguments)
    first, second = (found, None) if reference is None else (reference, found)
    warn_of_lost_constraints(out / ENDS, "extxyz", found.ends)
    with replacing(out / ENDS) as path:
        write(path, list(found.ends), format="extxyz")
    write_csv(out / "table.csv", first, second)
    shown = labels if reference is not None else (labels[1], "")
    write_pictures(out, first, second, shown)
    write_page(
        out / "report.html", title="Evaluation", evaluation=first, after=second, labels=shown,
        comparison=comparison, facts=tuple(facts.items()),
    )  # fmt: skip
    rows = {"rows_before": reference.todict()["rows"] if reference else None, "rows_after": found.todict()["rows"]}
    write_json(out / RESULTS, result | rows | {"rule": BASIN_RULE, "facts": facts})


def _facts(arguments: argparse.Namespace, potential: Potential) -> dict[str, str]:
    settings = f"{arguments.stepper} to {arguments.fmax} eV/Å, {arguments.steps} frames at most"
    found = {"potential": f"{arguments.potential} ({potential.family})", "relaxation": settings}
    return found | ({"against": arguments.against} if arguments.against else {}) | messages.provenance()
