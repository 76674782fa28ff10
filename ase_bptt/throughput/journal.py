"""A file to which relaxed structures are added as they finish, so that a stopped run can continue."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import Trajectory
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..iterated_map import Status
from ..pairs import add_to_hash
from ..potential import Potential
from ..utils import replacing
from . import Relaxed, relax_all

KEYS = ("_index", "_status", "_nsteps", "_run")
RESULTS = ("energy", "forces", "stress")
BEGIN = b"- of Ulm"
"""Of every trajectory file of ASE's."""


class Journal:
    """An ASE trajectory of relaxed structures, each with its index, to be read with any tool of ASE.

    Parameters
    ----------
    path : Path
    run : str
        A hash of all that the results depend on, from `run_key`; a journal of another run is refused.
    """

    def __init__(self, path: Path, run: str):
        self.path, self.run = path, run

    def read(self, sources: Sequence[Atoms]) -> dict[int, Relaxed]:
        """The ends that are there, by index; a last one that was cut off is left out.

        Raises
        ------
        ValueError
            For a journal of other structures, of another potential or of other settings, and for another file.
        """
        ends: dict[int, Relaxed] = {}
        if not self.path.is_file():
            return ends
        with self.path.open("rb") as file:
            begin = file.read(len(BEGIN))
        if not BEGIN.startswith(begin):
            raise ValueError(f"{self.path} is no ASE trajectory of ours: move it away, or --overwrite.")
        with ExitStack() as stack:
            # ulm raises whatever its parsers do where a file was cut off.
            try:
                frames = stack.enter_context(Trajectory(self.path))
            except Exception:
                return ends
            for k in range(len(frames)):
                try:
                    found = frames[k]
                except Exception:
                    break
                if found.info.get("_run") != self.run:
                    raise ValueError(
                        f"{self.path} belongs to a run on other structures, with another potential or with other "
                        "settings: give those again, or --overwrite."
                    )
                index = int(found.info["_index"])
                ends[index] = _end(found, sources[index])
        return ends

    def add(self, index: int, end: Relaxed) -> None:
        """Append one end.

        Raises
        ------
        OSError
            Where the disk is full or the place is not writable, naming the file; the ends in it stay.
        """
        try:
            self._append(self.path, {index: end})
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written ({error.strerror}): make room there; what had finished is kept in "
                "it, and --resume continues."
            ) from error

    def rewrite(self, ends: dict[int, Relaxed]) -> None:
        """Replace the file by one with these ends, so that nothing is appended behind a frame that was cut off."""
        if not ends:
            self.remove()
            return
        with replacing(self.path) as path:
            self._append(path, ends)

    def _append(self, path: Path, ends: dict[int, Relaxed]) -> None:
        with Trajectory(path, "a") as frames:
            for index, end in ends.items():
                frames.properties = [name for name in RESULTS if name in end.atoms.calc.results]
                found = end.atoms.copy()
                found.constraints = []
                found.info = dict(zip(KEYS, (index, end.status.value, end.nsteps, self.run), strict=True))
                found.calc = end.atoms.calc
                frames.write(found)

    def remove(self) -> None:
        """Delete the file, when it is no longer needed."""
        self.path.unlink(missing_ok=True)


def relax_kept(
    potential: Potential,
    structures: Sequence[Atoms],
    *,
    journal: Journal | None = None,
    progress: bool | None = False,
    report: Callable[[int, Relaxed], None] | None = None,
    **settings: Any,
) -> list[Relaxed]:
    """`relax_all`, with each result kept in a journal as it is found; those in it already are not computed again.

    Parameters
    ----------
    journal : Journal or None
    progress : bool or None
        Whether to show a bar on standard error; None does so where that is a terminal.
    report : callable
        ``report(index, end)`` is called for each new result.
    **settings
        As for `relax_all`.
    """
    ends = journal.read(structures) if journal else {}
    if journal:
        journal.rewrite(ends)
    waiting = [k for k in range(len(structures)) if k not in ends]
    shown = sys.stderr.isatty() if progress is None else progress
    bar = tqdm(total=len(structures), initial=len(ends), unit="structure", disable=not shown, leave=False)
    with bar, logging_redirect_tqdm() if shown else nullcontext():
        for member, end in relax_all(potential, [structures[k] for k in waiting], **settings):
            ends[waiting[member]] = end
            if journal:
                journal.add(waiting[member], end)
            if report:
                report(waiting[member], end)
            bar.update()
    return [ends[k] for k in range(len(structures))]


def _end(found: Atoms, source: Atoms) -> Relaxed:
    """The stored result with all other properties of the structure that was relaxed."""
    atoms = source.copy()
    atoms.set_cell(found.cell)
    atoms.positions = found.positions
    atoms.calc = SinglePointCalculator(atoms, **found.calc.results)
    return Relaxed(atoms, Status(found.info["_status"]), int(found.info["_nsteps"]))


def run_key(potential: Potential, structures: Sequence[Atoms], settings: dict[str, Any]) -> str:
    """A hash of everything that the results of a run depend on."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in potential.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for atoms in structures:
        add_to_hash(digest, atoms)
    return digest.hexdigest()[:16]
