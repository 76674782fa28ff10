"""Run folders: what is in them already, and how a run is stopped without losing it."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..potentials import EMBEDDED, families
from ..throughput.locks import create
from ..utils import UNFINISHED, check_writable, replacing

COMMAND = "command.json"
OURS = (
    COMMAND, "settings.json", "metrics.csv", "checkpoint.pt", "checkpoint.previous.pt", "potential", "measured",
    "all_pairs", "fold_*",
    "before.json", "after.json", "results.json", "table.csv", "report.html", "relaxed.extxyz", "*.parts",
    "before_after.png", "by_group.png", "displacements.png", "learning_curve.png", "snapshot_before.json",
    "snapshot_after.json", "drift_report.json", "drift_report.png", "minima.extxyz", "minima.csv", "minima.png",
)  # fmt: skip
"""Patterns of what the commands write into a run folder: --overwrite deletes nothing else."""
PASSING = frozenset(
    {
        "out",
        "overwrite",
        "resume",
        "dry_run",
        "json",
        "device",
        "trust",
        "skip_invalid",
        "lazy",
        "pairs",
        "shard",
        "compile",
    }
)
"""What may be given otherwise when a run is resumed; other pairs are noticed by `same_data`."""


def refuse_if_there(arguments: argparse.Namespace) -> None:
    """Raise FileExistsError where something would be written over that was not to be, before any work."""
    out = arguments.out
    if out.is_file():
        raise FileExistsError(f"{out} is a file, and a folder is to be made: take another --out.")
    if not out.exists() or not any(out.iterdir()):
        return
    if not arguments.overwrite:
        resume = "--resume, " if hasattr(arguments, "resume") else ""
        raise FileExistsError(f"The folder {out} is there already: {resume}--overwrite, or another --out.")
    made_by = _made_by(out)
    if made_by is None:
        raise FileExistsError(f"The folder {out} is not one of our run folders, so it is not overwritten.")
    if made_by != arguments.command:
        raise FileExistsError(
            f"The folder {out} holds a run of ase-bptt {made_by}, which is not overwritten by {arguments.command}: "
            "take another --out."
        )
    _refuse_own_input(arguments)


def _made_by(out: Path) -> str | None:
    """Which command made a run folder; None for any other folder."""
    try:
        found = json.loads((out / COMMAND).read_text())
    except (OSError, ValueError):
        return None
    return found.get("command") if isinstance(found, dict) else None


def _refuse_own_input(arguments: argparse.Namespace) -> None:
    given = (getattr(arguments, "potential", None), getattr(arguments, "against", None))
    for used in (*given, *getattr(arguments, "pairs", ()), *getattr(arguments, "files", ())):
        if used and Path(used).exists() and Path(used).resolve().is_relative_to(arguments.out.resolve()):
            raise FileExistsError(f"{used} lies in {arguments.out}, which would be replaced: take another --out.")


def prepare(arguments: argparse.Namespace) -> None:
    """Make the folder, or delete what we wrote in it, and write the command; fails early where it is not writable."""
    refuse_if_there(arguments)
    # What cannot be replaced is not deleted, nor is what somebody else put there.
    check_writable(arguments.out)
    for path in [path for pattern in OURS for path in arguments.out.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    with replacing(arguments.out / COMMAND) as path:
        path.write_text(_command(arguments))


def _command(arguments: argparse.Namespace) -> str:
    return json.dumps(described(arguments), indent=1) + "\n"


def prepare_shared(arguments: argparse.Namespace, shard: tuple[int, int], results: str) -> None:
    """Refuse a run folder that is there already, unless this is one of several processes."""
    if shard[1] > 1:
        if arguments.overwrite:
            raise ValueError(f"--overwrite is not for one of several processes: delete {arguments.out} first.")
    elif arguments.resume:
        if (arguments.out / results).is_file():
            what = {"evaluate": "evaluation"}.get(arguments.command, arguments.command)
            raise FileExistsError(f"The {what} in {arguments.out} is complete: nothing is left to resume.")
    else:
        refuse_if_there(arguments)


def begin_shared(arguments: argparse.Namespace, shard: tuple[int, int]) -> None:
    """Make the run folder; one of several processes joins the run of these very arguments that is in it.

    Several may be here at once, as in a Slurm array: nothing is deleted, and one of them writes the command.
    """
    out: Path = arguments.out
    if shard[1] == 1:
        prepare(arguments)
        return
    if out.is_dir() and any(not path.match(UNFINISHED) for path in out.iterdir()) and not holds(arguments):
        refuse_if_there(arguments)
    check_writable(out)
    if not create(out / COMMAND, _command(arguments)) and not holds(arguments):
        refuse_if_there(arguments)


def holds(arguments: argparse.Namespace) -> bool:
    """Whether the folder holds the run of these very arguments."""
    return _made_by(arguments.out) is not None and saved(arguments.out) == json.loads(json.dumps(described(arguments)))


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments as JSON."""
    found = {
        name: _plain(value)
        for name, value in sorted(vars(arguments).items())
        if name not in ("run", "stopped", "given", "shard")
    }
    # A resumed run may be called from another folder.
    found |= {name: _lasting(found[name]) for name in ("potential", "against") if found.get(name)}
    for name in ("files", "own"):
        if name in found:
            found[name] = [str(Path(path).absolute()) for path in found[name]]
    return found | {"pairs": [str(Path(path).absolute()) for path in found.get("pairs", ())]}


def saved(out: Path) -> dict[str, Any]:
    """The arguments with which a run was started.

    Raises
    ------
    ValueError
        Where the folder holds no run.
    """
    if _made_by(out) is None:
        raise ValueError(f"The folder {out} holds no run that can be resumed (no {COMMAND} of ours in it).")
    return json.loads((out / COMMAND).read_text())


def take_over(arguments: argparse.Namespace) -> None:
    """Continue with the arguments with which the run was started.

    Raises
    ------
    ValueError
        Where another one was given: that would be another run.
    """
    started = saved(arguments.out)
    if started["command"] != arguments.command:
        raise ValueError(f"{arguments.out} was started by ase-bptt {started['command']}, not by {arguments.command}.")
    now = described(arguments)
    for name, value in started.items():
        if name in PASSING:
            continue
        if name in arguments.given and now[name] != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"The run in {arguments.out} was started {_given(flag, value)}, not {now[name]}: "
                "leave the flag out to continue, or start a new run with another --out."
            )
        setattr(arguments, name, value)
    # Other pairs are noticed later; without any, those of the run are read again.
    arguments.pairs = getattr(arguments, "pairs", None) or started.get("pairs", [])
    for name in ("skip_invalid", "lazy"):
        setattr(arguments, name, getattr(arguments, name, False) or started.get(name, False))


def same_data(arguments: argparse.Namespace, fingerprint: str) -> None:
    """Note in the arguments which pairs a new run is on, by their hash.

    Raises
    ------
    ValueError
        Where a resumed run was started with other pairs.
    """
    data = fingerprint[:16]
    if getattr(arguments, "data", data) != data:
        before, now = (" ".join(map(str, paths)) for paths in (saved(arguments.out)["pairs"], arguments.pairs))
        raise ValueError(
            f"The run in {arguments.out} was started with other pairs, those of {before}, than {now} holds now: give "
            "those again, or start a new run with another --out."
        )
    arguments.data = data


def _given(flag: str, value: Any) -> str:
    return f"without {flag}" if value in (None, []) else f"with {flag} {value}"


def _lasting(spec: str) -> str:
    """A potential's name, or the whole path of its file or folder."""
    named = spec in EMBEDDED or spec.partition(":")[0] in families()
    path = Path(spec).expanduser()
    return spec if named or not path.exists() else str(path.absolute())


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, (Path, torch.device)) else value


class Terminated(BaseException):
    """SIGTERM came: what a queueing system sends before it kills."""


@contextmanager
def terminable(*, once: bool = False) -> Iterator[None]:
    """Raise Terminated where SIGTERM comes within the block.

    Parameters
    ----------
    once : bool
        Ignore it afterwards: where one of several processes ends, the others are sent it at any time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def raise_terminated(*_: Any) -> None:
        if once:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if once else before)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM until the end of the block.

    While a model is compiled and loaded, other people's code catches every exception, and one that
    is to end the command would be lost there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda sent, _: came.append(sent)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if came:
        raise Terminated if signal.SIGTERM in came else KeyboardInterrupt
