"""The run folder of a Trainer: its files, and how the same Trainer is rebuilt from them."""

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
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..adjoints import ADJOINTS
from ..losses import LOSSES
from ..potential import Potential
from ..potentials import load_potential, save_potential, weights_hash
from ..steppers import STEPPERS, make_stepper
from ..terms import TERMS
from ..threads import quiet
from ..tuning import describe, low_rank
from ..utils import UNFINISHED, UNREADABLE, discard, in_short, replacing
from .distributed import Ranks
from .settings import NUMBERS
from .state import TrainerState

log = logging.getLogger(__name__)
LAST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
DAMAGED = (*UNREADABLE, zipfile.BadZipFile, zlib.error, struct.error)
"""What an archive raises whose bytes are not those that were written."""
SETTINGS = {*NUMBERS, "stepper", "adjoint", "loss", "optimizer", "terms"}
"""What settings.json must hold for a run to be resumed."""


def write(out: Path, settings: dict[str, Any], state: TrainerState, potential: Potential | None = None) -> None:
    """Write the run folder, each file whole or not at all, the checkpoint last; the one before it is kept.

    Parameters
    ----------
    out : Path
    settings : dict
    state : TrainerState
    potential : Potential, optional
        A new best one.
    """
    if potential is not None:
        save_potential(potential, out / "potential")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "settings.json") as path:
        path.write_text(json.dumps(settings, indent=1) + "\n")
    write_metrics(out, state.rows)
    with replacing(out / LAST) as path:
        torch.save(state.to_dict(), path)
        if state.best:
            _keep_last(out)
        else:
            # A new run has no checkpoint before this one; a file of that name is another run's.
            (out / PREVIOUS).unlink(missing_ok=True)


def write_metrics(out: Path, rows: Sequence[dict[str, float]]) -> None:
    """Write metrics.csv, a row for each epoch and one for the untuned potential."""
    with replacing(out / "metrics.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[-1]) if rows else ["epoch"])
        writer.writeheader()
        writer.writerows(rows)


def read(out: str | Path) -> tuple[dict[str, Any], TrainerState, bool]:
    """Settings and state of a run that was stopped; files that it left unfinished are deleted.

    Returns
    -------
    settings : dict
    state : TrainerState
    rewound : bool
        Whether the state is that of the checkpoint before the last, which cannot be read; a warning says so.

    Raises
    ------
    ValueError
        Where neither checkpoint can be read, and for runs of older releases.
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
    lacking = (SETTINGS - settings.keys()) | ({*TrainerState.names()} - state.keys())
    if lacking:
        raise ValueError(
            f"The run in {out} was started by an older release, which kept no {min(lacking)!r}, and cannot be resumed: "
            "start again."
        )
    for unfinished in out.rglob(UNFINISHED):
        discard(unfinished)
    return settings, TrainerState.from_dict(state), rewound


def _keep_last(out: Path) -> None:
    """Keep the last checkpoint as the one before, too, so that a whole one has a name at every moment."""
    last = out / LAST
    # A damaged one must not replace the whole one from which the run was resumed.
    if not _is_whole(last):
        return
    with replacing(out / PREVIOUS) as path:
        try:
            os.link(last, path)
        except OSError:
            shutil.copyfile(last, path)  # not every file system has links


def _is_whole(path: Path) -> bool:
    """Whether all bytes match the checksums, which torch writes and does not check when it loads."""
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
        "%s cannot be read (%s): the run continues from %s, after epoch %s.",
        out / LAST, in_short(damage), out / PREVIOUS, state.get("epoch"),
    )  # fmt: skip
    return state


def rewind(out: Path, potential: Potential, state: TrainerState, ranks: Ranks) -> None:
    """Bring the best potential and metrics.csv in a run folder back to a checkpoint that is not the last."""
    # The first checkpoint has no best state yet.
    potential.load_state_dict(state.best.get("potential", state.potential))
    ranks.each(lambda: None)  # all have read the files that are written now
    if ranks.writes:
        save_potential(potential, out / "potential")
        write_metrics(out, state.rows)


def rebuild(
    out: Path, settings: dict[str, Any], state: TrainerState, given: dict[str, Any], device: torch.device | str | None
) -> dict[str, Any]:
    """Keywords that build the same Trainer again; objects that are given replace those of the run.

    Raises
    ------
    ValueError
        Where the run used an object of the user's own that is not given again.
    """
    if given["loss"] is None and settings["loss"] not in LOSSES:
        raise ValueError(f"The run in {out} used its own loss {settings['loss']!r}: give it to resume again.")
    if given["optimizer"] is None and settings["optimizer"] != "AdamW":
        raise ValueError(f"The run in {out} used {settings['optimizer']}: give its factory to resume again.")
    for part, known in (("stepper", STEPPERS), ("adjoint", ADJOINTS)):
        name = settings[part]["name"]
        if given[part] is None and name not in known:
            raise ValueError(f"The run in {out} used its own {part} {name!r}: give it to resume again.")
    terms = [term["name"] for term in settings["terms"]]
    unknown = [name for name in terms if name not in TERMS]
    if given["terms"] is None and unknown:
        raise ValueError(f"The run in {out} used its own term {unknown[0]!r}: give all terms to resume again.")
    if given["terms"] is not None and [term.name for term in given["terms"]] != terms:
        raise ValueError(f"The run in {out} had the terms {', '.join(terms) or 'none'}: give those to resume again.")
    potential = load_potential(out / "potential", device=device).in_form(state.form)
    if state.lora:
        low_rank.restore(potential, state.lora)
    for name, parameter in potential.named_parameters():
        parameter.requires_grad_(name not in state.frozen)
    kept = {name: settings[name] for name in ("loss", "terms", "adjoint")}
    return {
        "potential": potential,
        **{name: given[name] if given[name] is not None else kept[name] for name in kept},
        "stepper": given["stepper"] or _stepper(settings["stepper"], state.stepper),
        "optimizer": given["optimizer"],
        **{name: settings[name] for name in NUMBERS},
    }


def _stepper(saved: dict[str, Any], learnt: dict[str, Any]) -> Any:
    numbers = {k: v for k, v in saved.items() if k != "name"}
    return make_stepper(saved["name"], **numbers | {k: nn.Parameter(v) for k, v in learnt.items()})


def provenance(potential: Potential, fingerprint: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Where the tuned weights come from, for the files that hold them: base, data, settings, versions."""
    base = dict(potential.metadata) or {"source": f"a {type(potential).__name__} object"}
    return {
        "base": base | {"family": potential.family, "weights": weights_hash(potential)},
        "data": fingerprint,
        "settings": settings,
        "trained": describe(potential),
        "versions": _versions(potential),
    }


def _versions(potential: Potential) -> dict[str, str]:
    """Of ours, of ase, and of the packages that the potential's modules come from: torch, mace-torch, e3nn, ..."""
    modules = {"ase", *(type(module).__module__.partition(".")[0] for module in potential.modules())}
    packages = {package for name, found in packages_distributions().items() if name in modules for package in found}
    return {package: version(package) for package in sorted(packages)} | {"ase_bptt": __version__}
