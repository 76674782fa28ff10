"""Flags that the commands share, and the potentials that they name."""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..potential import Potential
from ..potentials import load_potential
from ..suggestions import nearest, unknown_name
from .run_folder import signals_deferred
from .values import cell, count, device, one_of, positive, pressure

log = logging.getLogger(__name__)
WIDTH = 80
FLAG = re.compile(r"--?[A-Za-z]")
"""How a flag begins, which a negative number does not."""
PYTHON_ONLY = {
    **{f"--{name}": f"Trainer({name}=...)" for name in ("learn", "patience", "rattle")},
    "--along": "Trainer(interpolate=...)",
    "--warm": "Trainer(warm_start_every=...)",
    **{f"--{name}": f"ase_bptt.tuning.prepare(potential, {name}=...)" for name in ("freeze", "last", "lora", "train")},
    "--momentum": "Trainer(stepper=GradientDescent(momentum=...))",
    "--pull": "Trainer(terms=[WeightAnchor(...)])",
}
"""Choices that hardly any training needs, by the flags that they might have: what gives them in Python."""
Actions = tuple[Callable[[argparse.Namespace], int], Callable[[argparse.Namespace], str]]


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help at 80 columns at most, whatever the terminal."""

    def __init__(self, prog: str):
        width = min(WIDTH, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=24, width=width)


class Parser(argparse.ArgumentParser):
    """Takes flags by their whole names only, and answers an unknown flag or command with the nearest that it has."""

    def __init__(self, **how: Any):
        super().__init__(**how | {"allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but an unknown flag is answered first, and by the command's parser: its usage is shown."""
        words = list(sys.argv[1:] if args is None else args)
        commands = next((a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
        # The flags after a command are the command's.
        own = words if commands is None else list(takewhile(lambda word: word.startswith("-"), words))
        for word in takewhile(lambda word: word != "--", own):
            name = word.partition("=")[0]
            if FLAG.match(name) and name not in self._option_string_actions:
                self.error(
                    self._unknown(name) if commands is None else f"{name} stands before the command: give it after."
                )
        if commands is not None and len(own) < len(words) and words[len(own)] not in commands:
            self.error(str(unknown_name("command", words[len(own)], commands)))
        return super().parse_known_args(words, namespace)

    def _unknown(self, name: str) -> str:
        if name in PYTHON_ONLY:
            return f"There is no flag {name} in the shell; Python has it: {PYTHON_ONLY[name]}."
        flags = [known for known in self._option_string_actions if known.startswith("--")]
        positional = [str(action.metavar) for action in self._actions if not action.option_strings]
        near = nearest(name, [*flags, *positional])
        if near in positional:
            return f"There is no flag {name}: {near} is given without a flag."
        if near:
            return f"There is no flag {name}: did you mean {near}?"
        return f"There is no flag {name}; {self.prog} --help lists them."


def command(commands: Any, usage: str, actions: Actions, summary: str, description: str) -> argparse.ArgumentParser:
    """A parser for the command that the usage begins with.

    Of its actions the first runs it, and the second says what an interrupt has left.
    """
    run, stopped = actions
    name = usage.split()[0]
    parser = commands.add_parser(
        name,
        usage=f"ase-bptt {usage}",
        help=summary,
        description=description,
        formatter_class=Formatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(command=name, run=run, stopped=stopped, flag_defaults={})
    return parser


def flag(group: Any, parser: argparse.ArgumentParser, name: str, text: str, default: Any = None, **how: Any) -> None:
    """Add a flag; its default is set afterwards, by `completed`, to distinguish it from the same value given."""
    said = "" if default is None or default is False or default == [] else f" (default: {default})"
    if "choices" in how and "type" not in how:
        how["type"] = one_of(name.lstrip("-"), how["choices"])
    action = group.add_argument(name, help=(text + said).replace("%", "%%"), default=argparse.SUPPRESS, **how)
    parser.get_default("flag_defaults")[action.dest] = default


def completed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments with defaults filled in; `given` holds the names of those that were typed."""
    found = vars(parser.parse_args(argv))
    defaults = found.pop("flag_defaults", {})
    given = frozenset(found) - {"command", "run", "stopped"}
    return argparse.Namespace(**(defaults | found), given=given)


def add_room(group: Any, parser: argparse.ArgumentParser) -> None:
    """How many structures are relaxed together, and whether their forces are compiled."""
    flag(group, parser, "--batch-size", "structures relaxed together (default: as many as fit into the memory of a "
         "GPU, or 256 atoms on a CPU)", type=count, metavar="N")  # fmt: skip
    flag(group, parser, "--memory", "GiB that they may take (default: 80 % of what is free on a GPU)", type=positive,
         metavar="X")  # fmt: skip
    flag(group, parser, "--compile", "compute forces by code that is compiled first; takes minutes on a CPU, and pays "
         "from some thousand frames of 256 atoms on", False, action="store_true")  # fmt: skip


def add_potential(
    parser: argparse.ArgumentParser, *, positional: bool = False, default: str | None = None, dtype: str | None = None
) -> Any:
    """--potential --trust --device --dtype, as one group."""
    group = parser.add_argument_group("potential")
    text = "a name (mace-si, chgnet, chgnet:r2scan, mace:medium), a run folder of ours, or a native checkpoint"
    if positional:
        group.add_argument("potential", metavar="POTENTIAL", help=text)
    else:
        flag(group, parser, "--potential", text, default, metavar="NAME")
    flag(group, parser, "--trust", "allow a native checkpoint: a pickle, which can run any code", False,
         action="store_true")  # fmt: skip
    flag(group, parser, "--device", "cpu, cuda, ... (default: the GPU where there is one, else cpu)", type=device)
    said = "" if dtype else " (default: the potential's own)"
    flag(group, parser, "--dtype", f"precision{said}", dtype, choices=("float32", "float64"))
    return group


def add_cell(group: Any, parser: argparse.ArgumentParser, text: str, default: str | None) -> None:
    """--cell and --pressure."""
    flag(group, parser, "--cell", f"{text}: fixed, full, hydrostatic, constant-volume, or a mask as 1,1,0,0,0,1 for "
         "xx,yy,zz,yz,xz,xy", default, type=cell, metavar="CELL")  # fmt: skip
    flag(group, parser, "--pressure", "GPa (1 GPa is 0.00624 eV/Å^3) on cells that move, with --cell", 0.0,
         type=pressure, metavar="GPA")  # fmt: skip


def add_output(parser: argparse.ArgumentParser, out: str, text: str, *, resume: bool) -> None:
    """--out --overwrite --resume --dry-run --json, as one group."""
    group = parser.add_argument_group("output")
    flag(group, parser, "--out", text, Path(out), type=Path, metavar="PATH")
    flag(group, parser, "--overwrite", "replace what is there", False, action="store_true")
    if resume:
        flag(group, parser, "--resume", "continue the run that was stopped", False, action="store_true")
    flag(group, parser, "--dry-run", "check the input, print what would be done, and write nothing", False,
         action="store_true")  # fmt: skip
    flag(group, parser, "--json", "print JSON, and nothing else, on standard output", False, action="store_true")


def potential_of(arguments: argparse.Namespace, spec: str | None = None) -> Potential:
    """The potential of --potential (or another spec), with --device, --dtype and --trust."""
    given = spec or arguments.potential
    if given is None:
        raise ValueError(
            f"{arguments.command} needs a potential: give --potential with a name (chgnet, mace:medium), a run folder "
            "of ours, or a native checkpoint with --trust."
        )
    with signals_deferred():
        return load_potential(given, device=arguments.device, dtype=arguments.dtype, trust=arguments.trust)
