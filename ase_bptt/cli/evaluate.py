"""ase-bptt evaluate: where a potential's relaxations end, alone or compared with another's."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from textwrap import fill
from typing import Any

from ..evaluation import BASIN_RULE, Evaluation, Starts, evaluation_of
from ..evaluation.compare import Comparison, compare
from ..pairs import RelaxationPair, fingerprint
from ..pairs.usable import usable
from ..potential import Potential
from ..potentials.model_card import kept_as_it_was
from ..report.page import write_page, write_pictures
from ..report.tables import comparison_text, evaluation_table, group_table, table, write_csv
from ..steppers import STEPPERS
from ..throughput.journal import relax_shared, run_key
from ..throughput.parts import Parts, remove
from ..training.distributed import together
from ..training.results import RESULTS, summary
from ..utils import counted, without_nan, write_json
from . import messages, run_folder
from .flags import WIDTH, add_output, add_potential, add_room, command, flag, potential_of
from .output_file import warn_of_lost_constraints, write_atoms
from .pair_flags import add_pairs, read_grouped
from .starts import add_shard, shard_of
from .values import count, positive, seed

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
PARTS = ("potential.parts", "against.parts")
"""Folders in the run folder, of what the processes have relaxed."""


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
    add_shard(group, parser)
    flag(group, parser, "--seed", "of the bootstrap", 0, type=seed, metavar="N")
    add_output(parser, "ase-bptt-evaluation", "folder for tables, figures and report.html", resume=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    ranks, shard = together(), shard_of(arguments)
    ranks.once(lambda: run_folder.prepare_shared(arguments, shard, RESULTS))
    if arguments.resume:
        run_folder.take_over(arguments)
    say = messages.quiet_if(arguments.json)
    if shard[1] > 1 and (arguments.out / RESULTS).is_file():
        say(f"The evaluation in {arguments.out} is complete: nothing is left to do.")
        return 0
    potential = potential_of(arguments)
    other = potential_of(arguments, arguments.against) if arguments.against else None
    pairs = read_grouped(arguments)
    both = [each for each in (potential, other) if each is not None]
    for each in both:
        pairs = usable(each, pairs, skip_invalid=arguments.skip_invalid)
    kinds = len({p.group for p in pairs})
    if not (arguments.resume or arguments.dry_run):
        ranks.once(lambda: run_folder.begin_shared(arguments, shard))
    many = f"{counted(len(pairs), 'relaxation')} of {counted(kinds, 'kind')}"
    say(f"{many}, by {arguments.stepper} to {arguments.fmax} eV/Å")
    if arguments.dry_run:
        say("A dry run: nothing was relaxed, nothing was written.")
        if arguments.json:
            print(json.dumps({"dry_run": True, "n": len(pairs), "kinds": kinds, "run": str(arguments.out)}))
        return 0
    with ExitStack() as stack:
        stack.enter_context(ranks.warnings_of_all_ranks())
        shared = {"shard": shard, "ranks": (ranks.rank, ranks.size), "store": ranks.store}
        parts = [stack.enter_context(_shared(arguments, each, pairs, name, shared)) for each, name in zip(both, PARTS)]
        goes_on = [_relaxed(arguments, each, pairs, part) for each, part in zip(both, parts, strict=True)]
        if not (all(goes_on) and all(part.complete() for part in parts) and parts[0].merging()):
            say(f"Other processes are at work, and the last of them writes {arguments.out / RESULTS}.")
            return 0
        found, *others = (
            evaluation_of(each, pairs, part.ends, arguments.batch_size) for each, part in zip(both, parts, strict=True)
        )
        reference = others[0] if others else None
        comparison = compare(reference, found, seed=arguments.seed) if reference is not None else None
        result = {
            "test": summary(reference, found),
            "comparison": comparison.todict() if comparison else None,
            "kept_as_it_was": kept_as_it_was(potential.metadata),
            "checkpoint": arguments.potential,
            "against": arguments.against,
            "run": str(arguments.out),
        }
        facts = _facts(arguments, potential) | {"data": fingerprint(pairs)[:16]}
        _write(arguments, result, found, reference, comparison, facts, pairs)
    for name in PARTS:
        remove(arguments.out / name)
    if arguments.json:
        print(json.dumps(without_nan(result)))
    else:
        print(_tables(arguments, found, reference, comparison))
    return 0


def stopped(arguments: argparse.Namespace) -> str:
    """The last words after an interrupt."""
    if not any(journal for name in PARTS for journal in (arguments.out / name).glob("*.traj")):
        return "No structure has finished yet, and nothing is lost."
    return (
        f"The structures that have finished are kept in {arguments.out}; ase-bptt evaluate --out {arguments.out} "
        "--resume continues with the others."
    )


def _shared(
    arguments: argparse.Namespace,
    potential: Potential,
    pairs: list[RelaxationPair],
    name: str,
    shared: dict[str, Any],
) -> Parts:
    """What the processes share of the relaxations with one potential."""
    settings = _settings(arguments) | {"cells": [p.freedom.todict() for p in pairs]}
    key = run_key(potential, fingerprint(pairs), settings)
    return Parts(arguments.out / name, key, Starts(pairs), 2 * [p.n_atoms for p in pairs], **shared)


def _relaxed(arguments: argparse.Namespace, potential: Potential, pairs: list[RelaxationPair], parts: Parts) -> bool:
    """Do this process's part of the relaxations with one potential; whether it continues."""
    return relax_shared(
        potential, Starts(pairs), parts, cells=2 * [p.freedom for p in pairs], batch_size=arguments.batch_size,
        memory=arguments.memory, compile=arguments.compile, progress=None if parts.ranks[0] == 0 else False,
        **_settings(arguments),
    )  # fmt: skip


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("stepper", "fmax", "steps")}


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
    pairs: list[RelaxationPair],
) -> None:
    out: Path = arguments.out
    labels = _labels(arguments)
    first, second = (found, None) if reference is None else (reference, found)
    warn_of_lost_constraints(out / ENDS, "extxyz", found.ends)
    write_atoms(out / ENDS, found.ends, "extxyz")
    write_csv(out / "table.csv", first, second)
    shown = labels if reference is not None else (labels[1], "")
    write_pictures(out, first, second, shown)
    write_page(
        out / "report.html", title="Evaluation", evaluation=first, after=second, labels=shown,
        comparison=comparison, facts=tuple(facts.items()), pairs=pairs,
    )  # fmt: skip
    rows = {"rows_before": reference.todict()["rows"] if reference else None, "rows_after": found.todict()["rows"]}
    write_json(out / RESULTS, result | rows | {"rule": BASIN_RULE, "facts": facts})


def _facts(arguments: argparse.Namespace, potential: Potential) -> dict[str, str]:
    settings = f"{arguments.stepper} to {arguments.fmax} eV/Å, {arguments.steps} frames at most"
    found = {"potential": f"{arguments.potential} ({potential.family})", "relaxation": settings}
    return found | ({"against": arguments.against} if arguments.against else {}) | messages.provenance()
