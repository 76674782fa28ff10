"""The frames of one file, in any format that ASE reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ase import Atoms
from ase.io import read

from .pairs import InvalidPair


def read_frames(path: Path) -> list[Atoms]:
    """All frames of a file, in order."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        frames: Iterable[Atoms] | Atoms = read(path, index=":", do_not_split_by_at_sign=True)
    except Exception as error:  # ASE's readers raise whatever their parsers do
        raise InvalidPair(f"{path}: ASE cannot read it ({type(error).__name__}: {error}).") from error
    return [frames] if isinstance(frames, Atoms) else list(frames)
