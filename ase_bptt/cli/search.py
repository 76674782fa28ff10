"""ase-bptt search: the minima that structures may relax to, from many starts of each."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ase import Atoms

from ..cells import CellFreedom
from ..report.plots import save
from ..search import EXPLOSION, WAYS, Search, minima_of
from ..search import Starts as ManyStarts
from ..search.picture import picture, write_search_page
from ..steppers import STEPPERS
from ..throughput.journal import relax_shared, run_key
from ..throughput.parts import Parts, remove
from ..throughput.structure_files import StructureFiles
from ..training.distributed import Ranks, together
from ..utils import counted, replacing, without_nan, write_json
from . import messages, run_folder
from .flags import add_output, add_potential, command, flag, potential_of
from .output_file import warn_of_lost_constraints, write_atoms
from .starts import Starts, add_many, shard_of
from .values import count, positive, seed, site

DESCRIPTION = """\
Relax each structure from many starts: as it is, rattled, with bonds around a
site distorted (as ShakeNBreak does), pushed off its symmetry, and from starts
of your own. The ends are grouped into distinct minima and ranked by energy.
--out is a folder: minima.extxyz, minima.csv, minima.png, report.html,
results.json.

examples:
  ase-bptt search vacancy.extxyz --potential tuned
  ase-bptt search */POSCAR --potential tuned -n 40 --site 12
  ase-bptt search defect.cif --potential chgnet --own my_guesses.extxyz
  ase-bptt search --out ase-bptt-search --resume
"""
PARTS = "relaxations.parts"
MINIMA = "minima.extxyz"
RESULTS = "results.json"
KEYS = ("stepper", "fmax", "steps", "n", "ways", "site", "seed")
"""What the ends depend on."""


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands, "search FILE [FILE ...] --potential NAME [options]", (run, stopped),
        "minima that structures may relax to", DESCRIPTION,
    )  # fmt: skip
    parser.add_argument("files", nargs="*", metavar="FILE", type=Path,
                        help="structures in any format that ASE reads, or folders of them")  # fmt: skip
    parser.get_default("flag_defaults")["files"] = []
    add_potential(parser)
    group = parser.add_argument_group("starts")
    flag(group, parser, "-n", "starts of each structure, itself included", 20, type=count, metavar="N")
    flag(group, parser, "--ways", "how starts are made, in turn", list(WAYS), nargs="+", choices=WAYS, metavar="WAY")
    flag(group, parser, "--site", "atom (from 0), or place as X,Y,Z in Å, around which bonds are distorted (default: "
         "atoms of rare elements, or of odd surroundings)", type=site, metavar="SITE")  # fmt: skip
    flag(group, parser, "--own", "files of further starts, each of the atoms of one of the structures", [], nargs="+",
         type=Path, metavar="FILE")  # fmt: skip
    flag(group, parser, "--seed", "of the random displacements", 0, type=seed, metavar="N")
    group = parser.add_argument_group("relaxation")
    flag(group, parser, "--stepper", "update rule", "fire", choices=sorted(STEPPERS))
    flag(group, parser, "--fmax", "converged when all forces are below this, in eV/Å", 0.02, type=positive, metavar="X")
    flag(group, parser, "--steps", "frames at most", 500, type=count, metavar="N")
    add_many(group, parser)
    add_output(parser, "ase-bptt-search", "folder of the minima, the table and the picture", resume=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    ranks, shard, out = together(), shard_of(arguments), arguments.out
    ranks.once(lambda: run_folder.prepare_shared(arguments, shard, RESULTS))
    say = messages.quiet_if(arguments.json)
    if shard[1] > 1 and (out / RESULTS).is_file():
        say(f"The search in {out} is complete: nothing is left to do.")
        return 0
    if arguments.resume:
        run_folder.take_over(arguments)
    if not arguments.files:
        raise ValueError("Give the files of the structures to search from, or --out of a search with --resume.")
    potential = potential_of(arguments)
    cell = CellFreedom.of(arguments.cell, arguments.pressure)
    given = Starts([Path(f) for f in arguments.files], potential, skip_invalid=arguments.skip_invalid, cell=cell)
    structures = list(_named(given))
    own = StructureFiles([Path(f) for f in arguments.own])[:] if arguments.own else []
    place = arguments.site if isinstance(arguments.site, int | None) else tuple(arguments.site)
    starts = ManyStarts(structures, arguments.n, arguments.ways, place, own, arguments.seed)
    settings = {key: getattr(arguments, key) for key in KEYS}
    many = f"{counted(len(structures), 'structure')}, {counted(len(starts), 'start')}"
    say(f"{many}; {arguments.potential}, {arguments.stepper} to {arguments.fmax} eV/Å")
    if arguments.dry_run:
        return _planned(arguments, starts)
    if not arguments.resume:
        ranks.once(lambda: run_folder.begin_shared(arguments, shard))
    key = run_key(potential, [*structures, *own], settings | {"cell": cell.todict() if cell.moves else None})
    sizes = [len(structures[k]) for k in range(len(structures)) for _ in starts.of(k)]
    parts = Parts(out / PARTS, key, starts, sizes, shard=shard, ranks=(ranks.rank, ranks.size), store=ranks.store)
    if parts.n_before:
        say(f"{parts.n_before} of them done before")
    with parts, ranks.warnings_of_all_ranks():
        if not _relaxed(arguments, ranks, potential, starts, parts, cell):
            say(f"Other processes are at work, and the last of them writes {out / RESULTS}.")
            return 0
        found = [minima_of(starts, k, parts.ends) for k in range(len(structures))]
        result = _write(arguments, structures, found)
    remove(out / PARTS)
    print(json.dumps(without_nan(result)) if arguments.json else _text(arguments, structures, found))
    return 0


def stopped(arguments: argparse.Namespace) -> str:
    """The last words after an interrupt."""
    if not any((arguments.out / PARTS).glob("*.traj")):
        return "No start was relaxed yet, and nothing is lost."
    return (
        f"The starts that have finished are kept in {arguments.out}; ase-bptt search --out {arguments.out} --resume "
        "continues with the others."
    )


def _named(given: Starts) -> Iterator[Atoms]:
    """The structures that can be relaxed, with the names of their files."""
    for k in range(len(given)):
        if k not in given.problems:
            try:
                atoms = given.usable(k)
            except ValueError:
                if not given.skip_invalid:
                    raise
                continue
            atoms.info["structure"] = str(atoms.info.get("name", atoms.info.get("id", given.files.name(k))))
            yield atoms


def _relaxed(
    arguments: argparse.Namespace, ranks: Ranks, potential: Any, starts: ManyStarts, parts: Parts, cell: CellFreedom
) -> bool:
    """Do this process's part; whether it is the one that continues."""
    goes_on = relax_shared(
        potential, starts, parts, cells=[cell] * len(starts), progress=None if ranks.writes else False,
        stepper=arguments.stepper, fmax=arguments.fmax, steps=arguments.steps, batch_size=arguments.batch_size,
        memory=arguments.memory, compile=arguments.compile, explosion=EXPLOSION,
    )  # fmt: skip
    return goes_on and parts.complete() and parts.merging()


def _planned(arguments: argparse.Namespace, starts: ManyStarts) -> int:
    if arguments.json:
        print(json.dumps({"dry_run": True, "n": len(starts.structures), "starts": len(starts)}))
    else:
        for k in starts.of(0)[: arguments.n]:
            print(f"  {k}: {starts.start(k).way}")
        print(f"would be written: {arguments.out}\nA dry run: nothing was relaxed, nothing was written.")
    return 0


def _rows(structures: Sequence[Atoms], found: Sequence[Search]) -> list[dict[str, Any]]:
    return [
        {
            "structure": atoms.info["structure"], "minimum": rank, "energy": minimum.energy, "above": minimum.above,
            "count": minimum.count, "starts": list(minimum.starts), "ways": list(minimum.ways),
        }
        for atoms, search in zip(structures, found, strict=True)
        for rank, minimum in enumerate(search.minima)
    ]  # fmt: skip


def _write(arguments: argparse.Namespace, structures: Sequence[Atoms], found: Sequence[Search]) -> dict[str, Any]:
    """Write the minima, the table, the picture and the results; the latter are returned."""
    out, rows, minima = arguments.out, _rows(structures, found), []
    for atoms, search in zip(structures, found, strict=True):
        for rank, minimum in enumerate(search.minima):
            minimum.atoms.info |= {"structure": atoms.info["structure"], "minimum": rank, "above": minimum.above,
                                   "count": minimum.count}  # fmt: skip
            minima.append(minimum.atoms)
    if minima:
        warn_of_lost_constraints(out / MINIMA, "extxyz", minima)
        write_atoms(out / MINIMA, minima, "extxyz")
        save(picture([atoms.info["structure"] for atoms in structures], found), out / "minima.png")
    write_search_page(out / "report.html", structures, found)
    with replacing(out / "minima.csv") as path, path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["structure", "minimum", "energy", "above", "count", "starts", "ways"])
        table.writeheader()
        table.writerows(
            row | {"starts": " ".join(map(str, row["starts"])), "ways": "; ".join(row["ways"])} for row in rows
        )
    counts = [
        {"structure": atoms.info["structure"], "starts": s.n_starts, "minima": len(s.minima),
         "found_lower": s.found_lower, "unconverged": s.unconverged, "exploded": s.exploded, "collapsed": s.collapsed}
        for atoms, s in zip(structures, found, strict=True)
    ]  # fmt: skip
    result = {"n": len(structures), "structures": counts, "minima": rows, "run": str(out)}
    write_json(out / RESULTS, result | {"facts": messages.provenance()})
    return result


def _text(arguments: argparse.Namespace, structures: Sequence[Atoms], found: Sequence[Search]) -> str:
    """The table, at 80 columns."""
    lines = [f"{'structure':28} minimum  above (eV)   found      lowest from"]
    for atoms, search in zip(structures, found, strict=True):
        name = atoms.info["structure"]
        name = name if len(name) <= 28 else "..." + name[-25:]
        for rank, minimum in enumerate(search.minima):
            lines.append(f"{name if not rank else '':28} {rank:7} {minimum.above:11.3f} {minimum.count:4} of "
                         f"{search.n_starts:<3} {minimum.ways[0]}")  # fmt: skip
        lost = search.unconverged + search.exploded + search.collapsed
        if lost:
            why = f"{search.unconverged} out of steps, {search.exploded} exploded, {search.collapsed} collapsed"
            lines.append(f"  {lost} starts in no minimum: {why}")
    return "\n".join(lines) + f"\n\nall minima in {arguments.out / MINIMA}, pictures in {arguments.out / 'report.html'}"
