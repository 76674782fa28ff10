"""The files of a training run: settings.json, metrics.csv, checkpoint.pt and the checkpoint before it."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import UNFINISHED, UNREADABLE, in_short, replacing
from ..potentials import quiet

log = logging.getLogger(__name__)
LAST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
DAMAGED = (*UNREADABLE, zipfile.BadZipFile, zlib.error, struct.error)
"""What an archive raises whose bytes are not those that were written."""


def write(out: Path, settings: dict[str, Any], history: Sequence[dict[str, float]], state: dict[str, Any]) -> None:
    """Write all three, each whole or not at all, the checkpoint last; keep the one before it."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "settings.json") as path:
        path.write_text(json.dumps(settings, indent=1) + "\n")
    write_metrics(out, history)
    with replacing(out / LAST) as path:
        torch.save(state, path)
        if state["best"]:
            _keep_last(out)
        else:
            # A run that begins here has none before; what is there is another's.
            (out / PREVIOUS).unlink(missing_ok=True)


def write_metrics(out: Path, history: Sequence[dict[str, float]]) -> None:
    """Write metrics.csv, a row for each epoch."""
    with replacing(out / "metrics.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]) if history else ["epoch"])
        writer.writeheader()
        writer.writerows(history)


def read(out: str | Path) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Settings and state of a run that was stopped; what it left half-written is swept away.

    Returns
    -------
    settings, state : dict
    rewound : bool
        Whether the last checkpoint cannot be read, which a warning tells, so that the state is of the one before it.

    Raises
    ------
    ValueError
        Where neither can be read.
    """
    out = Path(out)
    rewound = False
    try:
        settings = json.loads((out / "settings.json").read_text())
        try:
            state = _load(out / LAST)
        except DAMAGED as error:
            state, rewound = _before_last(out, error), True
    except DAMAGED as error:
        raise ValueError(f"The folder {out} holds no run that can be resumed ({in_short(error)}).") from error
    for unfinished in out.rglob(UNFINISHED):
        unfinished.unlink()
    return settings, state, rewound


def _keep_last(out: Path) -> None:
    """Give the last checkpoint the name of the one before it, too, so that at every moment a whole one has a name."""
    last = out / LAST
    # A damaged one must not take the place of the whole one that the run was resumed from.
    if not _is_whole(last):
        return
    with replacing(out / PREVIOUS) as path:
        try:
            os.link(last, path)
        except OSError:
            shutil.copyfile(last, path)  # not every file system has links


def _is_whole(path: Path) -> bool:
    """Whether all bytes have their checksums, which torch writes and does not look at when it loads."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except DAMAGED:
        return False


def _load(path: Path) -> dict[str, Any]:
    if path.exists() and not _is_whole(path):
        raise ValueError(f"{path.name} was cut or changed")
    # torch warns of pickles that it then refuses.
    with quiet():
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def _before_last(out: Path, damage: Exception) -> dict[str, Any]:
    try:
        state = _load(out / PREVIOUS)
    except DAMAGED:
        raise damage from None
    log.warning(
        "%s cannot be read (%s): the run goes on from %s, after epoch %s.",
        out / LAST, in_short(damage), out / PREVIOUS, state.get("epoch"),
    )  # fmt: skip
    return state
