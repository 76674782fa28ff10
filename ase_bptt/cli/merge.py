"""ase-bptt merge: one file of what many processes have relaxed."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..throughput.parts import Parts, about_run
from ..throughput.structure_files import StructureFiles
from . import messages
from .flags import command, flag
from .output_file import format_of
from .relax import conclude, merge

DESCRIPTION = """\
Write what the processes of a relaxation have kept in FOLDER (the name of its
output with .parts) into one file, in the order of the input. The last process
does so by itself; this is for runs that were stopped, and says how far a run
is that is going.

examples:
  ase-bptt merge relaxed.extxyz.parts
  ase-bptt merge relaxed.extxyz.parts --partial --out so_far.extxyz
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands, "merge FOLDER [options]", (run, stopped), "one file of what many processes have relaxed", DESCRIPTION
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="of a run of ase-bptt relax, as relaxed.extxyz.parts"
    )
    group = parser.add_argument_group("output")
    flag(group, parser, "--out", "file of the relaxed structures (default: that of the run)", type=Path, metavar="PATH")
    flag(group, parser, "--partial", "write what has finished though others have not, and keep FOLDER", False,
         action="store_true")  # fmt: skip
    flag(group, parser, "--overwrite", "replace what is there", False, action="store_true")
    flag(group, parser, "--json", "print JSON, and nothing else, on standard output", False, action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    clock, about = time.monotonic(), about_run(arguments.folder)
    if not {"run", "files", "out", "content"} <= set(about):
        raise ValueError(f"{arguments.folder} holds no run of ase-bptt relax: give a folder as relaxed.extxyz.parts.")
    arguments.out = out = arguments.out or Path(about["out"])
    files = StructureFiles([Path(path) for path in about["files"]], refused=lambda problem: None)
    if files.digest != about["content"]:
        raise ValueError(
            f"{arguments.folder}: the files of its structures have changed, {', '.join(about['files'])}; put back what "
            "they were."
        )
    if out.exists() and not arguments.overwrite:
        raise FileExistsError(f"{out} is there already: --overwrite, or another --out.")
    format = format_of(out, len(files))
    with Parts(arguments.folder, about["run"], files, files.sizes) as parts:
        finished = parts.finished()
        if not parts.complete():
            if not arguments.partial:
                raise ValueError(
                    f"{finished} of {len(files)} structures have finished: repeat the command of the run with --resume "
                    "for the others, or give --partial and --out."
                )
            messages.quiet_if(arguments.json)(f"{len(parts.ends.places)} of {len(files)} structures have finished")
        elif not parts.merging():
            raise ValueError(f"Another process writes {about['out']} just now: wait for it.")
        rows = merge(out, format, files, parts, partial=arguments.partial)
    return conclude(arguments, rows, len(parts.left_out), time.monotonic() - clock)


def stopped(arguments: argparse.Namespace) -> str:
    """What is left after an interrupt."""
    return "Nothing was written, and all that has finished is kept."
