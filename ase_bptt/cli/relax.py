"""ase-bptt relax: many structures, written as they finish."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..cells import CellFreedom
from ..iterated_map import Status
from ..pairs import InvalidPair
from ..steppers import STEPPERS, make_stepper
from ..throughput import Relaxed
from ..throughput.journal import relax_shared, run_key
from ..throughput.parts import Parts, remove
from ..throughput.structure_files import StructureFiles
from ..training.distributed import together
from ..utils import check_writable, counted, without_nan
from . import messages
from .flags import add_output, add_potential, command, flag, potential_of
from .output_file import format_of, warn_of_lost_constraints, write_ends
from .starts import Starts, add_many, shard_of
from .values import count, positive

log = logging.getLogger(__name__)

DESCRIPTION = """\
Relax all structures of one or more files, many at once; --cell moves cells.
Structures are kept as they finish, and --resume continues a stopped run.
Constraints of the structures are obeyed.

examples:
  ase-bptt relax starts.extxyz --potential chgnet --out relaxed.extxyz
  ase-bptt relax */POSCAR --potential tuned --out relaxed.traj --fmax 0.01
  ase-bptt relax */CONTCAR --potential tuned --cell full --pressure 10
  ase-bptt relax starts.extxyz --potential tuned --resume
  torchrun --standalone --nproc-per-node 4 -m ase_bptt relax starts.extxyz
      --potential tuned                          four processes, four GPUs
"""
NOT_DONE = 3
"""Exit code where structures did not converge or were left out."""


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "relax FILE [FILE ...] --potential NAME [options]",
        (run, stopped),
        "relax the structures of files",
        DESCRIPTION,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path,
                        help="structures in any format that ASE reads, or folders of them; every frame is "
                        "relaxed")  # fmt: skip
    add_potential(parser)
    group = parser.add_argument_group("relaxation")
    flag(group, parser, "--stepper", "update rule", "fire", choices=sorted(STEPPERS))
    flag(group, parser, "--step-size", "step size of gd in Å^2/eV (default: 0.05)", type=positive, metavar="X")
    flag(group, parser, "--fmax", "converged when all forces are below this, in eV/Å", 0.05, type=positive, metavar="X")
    flag(group, parser, "--steps", "frames at most", 500, type=count, metavar="N")
    add_many(group, parser)
    add_output(parser, "relaxed.extxyz", "file of the relaxed structures, in any format that ASE writes", resume=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    clock = time.monotonic()
    out, ranks, shard = arguments.out, together(), shard_of(arguments)
    format_of(out, 1)
    ranks.once(lambda: _prepare(arguments, shard))
    if shard[1] > 1 and out.exists() and not _parts(out).exists():
        return _nothing_left(arguments)
    potential = potential_of(arguments)
    settings = {name: getattr(arguments, name) for name in ("stepper", "step_size", "fmax", "steps")}
    stepper, of_cell = _stepper(arguments), CellFreedom.of(arguments.cell, arguments.pressure)
    settings |= {"cell": of_cell.todict()} if of_cell.moves else {}
    starts = Starts(arguments.files, potential, skip_invalid=arguments.skip_invalid, cell=of_cell)
    checked = starts.check()
    format = format_of(out, len(starts))
    warn_of_lost_constraints(out, format, checked)
    say = messages.quiet_if(arguments.json)
    if arguments.dry_run:
        _introduce(arguments, starts, 0)
        return _planned(arguments, starts)
    parts = Parts(
        _parts(out), run_key(potential, starts.files.digest, settings), starts.files, starts.files.sizes,
        shard=shard, ranks=(ranks.rank, ranks.size), store=ranks.store,
        facts={"files": [str(path.absolute()) for path in arguments.files], "out": str(out.absolute()),
               "content": starts.files.digest},
    )  # fmt: skip
    if parts.is_new and out.exists() and not arguments.overwrite:
        # Others have finished, and deleted theirs, while this process loaded the potential.
        parts.remove()
        return _nothing_left(arguments)
    _introduce(arguments, starts, len(parts.ends.places))
    with parts, ranks.warnings_of_all_ranks():
        goes_on = relax_shared(
            potential, starts.files, parts, usable=starts.usable, skip_invalid=arguments.skip_invalid,
            progress=None if ranks.writes else False, report=partial(_report, starts), stepper=stepper,
            fmax=arguments.fmax, steps=arguments.steps, cells=[of_cell] * len(starts), batch_size=arguments.batch_size,
            memory=arguments.memory, compile=arguments.compile,
        )  # fmt: skip
        if not (goes_on and parts.complete() and parts.merging()):
            n = parts.n_mine
            say(f"{counted(n, 'structure')} by this process; others are at work, and the last of them writes {out}.")
            return 0
        rows = merge(out, format, starts.files, parts)
    return conclude(arguments, rows, len(starts.problems | parts.left_out) + starts.unread, time.monotonic() - clock)


def stopped(arguments: argparse.Namespace) -> str:
    """What is left after an interrupt."""
    folder = _parts(arguments.out)
    if not any(folder.glob("*.traj")):
        return "Nothing was relaxed yet, and nothing is lost."
    return (
        f"The structures that have finished are in {folder} (ASE trajectories); the same command with --resume "
        "continues with the others."
    )


def merge(
    out: Path, format: str, files: StructureFiles, parts: Parts, *, partial: bool = False
) -> list[dict[str, Any]]:
    """Write the ends of a complete run in the order of the input, delete its parts, and report how each ended.

    Of one that is not complete (`partial`), those that there are, and its parts are kept.
    """
    rows: list[dict[str, Any]] = []

    def each() -> Iterator[Relaxed]:
        for k in range(len(files)):
            if k in parts.left_out or (partial and k not in parts.ends.places):
                continue
            end = parts.ends[k]
            rows.append({
                "name": files.name(k), "status": end.status.value, "nsteps": end.nsteps,
                "energy": float(end.atoms.calc.results["energy"]),
                "fmax": float(np.linalg.norm(end.atoms.get_forces(), axis=1).max(initial=0.0)),
            })  # fmt: skip
            yield end

    if len(parts.left_out) == len(files):
        raise InvalidPair(f"None of the structures can be relaxed; the last: {parts.left_out[len(files) - 1]}")
    if partial and not parts.ends.places:
        raise ValueError("No structure has finished yet.")
    write_ends(out, each(), format)
    if not partial:
        parts.remove()
    return rows


def conclude(arguments: argparse.Namespace, rows: list[dict[str, Any]], left_out: int, seconds: float) -> int:
    """Print how the structures have ended, and return the exit code."""
    converged = sum(row["status"] == Status.CONVERGED.value for row in rows)
    if arguments.json:
        found = {"n": len(rows), "converged": converged, "left_out": left_out, "out": str(arguments.out),
                 "seconds": round(seconds, 1), "structures": rows}  # fmt: skip
        print(json.dumps(without_nan(found)))
    else:
        print(f"{converged} of {len(rows)} converged, {left_out} left out; {seconds:.0f} s; {arguments.out}")
    return 0 if converged == len(rows) and not left_out else NOT_DONE


def _parts(out: Path) -> Path:
    return out.with_name(out.name + ".parts")


def _prepare(arguments: argparse.Namespace, shard: tuple[int, int]) -> None:
    """Refuse what is there already, or remove it if that was asked for; check that there is room."""
    out, parts = arguments.out, _parts(arguments.out)
    if shard[1] > 1:
        if arguments.overwrite:
            raise ValueError(f"--overwrite is not for one of several processes: delete {out} and {parts} first.")
    elif arguments.resume:
        if out.exists() and not parts.exists():
            raise FileExistsError(f"{out} is there already and complete: nothing is left to resume.")
    elif not arguments.overwrite:
        for path in (out, parts):
            if path.exists():
                raise FileExistsError(f"{path} is there already: --resume, --overwrite, or another --out.")
    if arguments.dry_run:
        return
    check_writable(out.parent)
    if arguments.overwrite and not arguments.resume:
        remove(parts)


def _nothing_left(arguments: argparse.Namespace) -> int:
    messages.quiet_if(arguments.json)(f"{arguments.out} is there already and complete: nothing is left to do.")
    return 0


def _introduce(arguments: argparse.Namespace, starts: Starts, done: int) -> None:
    say = messages.quiet_if(arguments.json)
    again = f", {done} of them done before" if done else ""
    n = len(starts) - len(starts.problems)
    say(f"{counted(n, 'structure')}{again}; {arguments.potential}, {arguments.stepper} to {arguments.fmax} eV/Å")
    if len(starts) + starts.unread > len(arguments.files):
        say("Every structure of a file is relaxed; ase convert -n -1 FILE last.extxyz writes the last alone.")


def _stepper(arguments: argparse.Namespace) -> Any:
    if arguments.step_size is not None and arguments.stepper != "gd":
        raise ValueError("--step-size belongs to --stepper gd.")
    return make_stepper(arguments.stepper, **({"step_size": arguments.step_size} if arguments.step_size else {}))


def _report(starts: Starts, k: int, end: Relaxed) -> None:
    if end.status is not Status.CONVERGED:
        log.warning("%s: %s after %d frames. %s", starts.files.name(k), end.status.value, end.nsteps,
                    end.status.sentence)  # fmt: skip


def _planned(arguments: argparse.Namespace, starts: Starts) -> int:
    if arguments.json:
        n, left_out = len(starts) - len(starts.problems), len(starts.problems) + starts.unread
        print(json.dumps({"dry_run": True, "n": n, "left_out": left_out, "out": str(arguments.out)}))
    else:
        print(f"would be written: {arguments.out}\nA dry run: nothing was relaxed, nothing was written.")
    return 0
