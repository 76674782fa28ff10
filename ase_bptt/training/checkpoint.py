"""The files of a training run: settings.json, metrics.csv, checkpoint.pt."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import UNFINISHED, replacing
from ..loading import UNREADABLE, in_short
from ..potentials import quiet


def write(out: Path, settings: dict[str, Any], history: Sequence[dict[str, float]], state: dict[str, Any]) -> None:
    """Write all three, each whole or not at all, the checkpoint last."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "settings.json") as path:
        path.write_text(json.dumps(settings, indent=1) + "\n")
    with replacing(out / "metrics.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]) if history else ["epoch"])
        writer.writeheader()
        writer.writerows(history)
    with replacing(out / "checkpoint.pt") as path:
        torch.save(state, path)


def read(out: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and state of a run that was stopped; what it left half-written is swept away."""
    out = Path(out)
    try:
        settings = json.loads((out / "settings.json").read_text())
        # torch warns of pickles that it then refuses.
        with quiet():
            state = torch.load(out / "checkpoint.pt", weights_only=True, map_location="cpu")
    except UNREADABLE as error:
        raise ValueError(f"The folder {out} holds no run that can be resumed ({in_short(error)}).") from error
    for unfinished in out.rglob(UNFINISHED):
        unfinished.unlink()
    return settings, state
