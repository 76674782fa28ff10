"""What a Trainer leaves behind: the files of its run folder, and how the same Trainer is built from them."""

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
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import __version__
from ..adjoints import ADJOINTS
from ..losses import LOSSES
from ..potential import Potential
from ..potentials import load_potential, quiet, weights_hash
from ..steppers import STEPPERS, make_stepper
from ..terms import TERMS
from ..tuning import describe
from ..tuning import low_rank as lora
from ..utils import UNFINISHED, UNREADABLE, in_short, replacing

if TYPE_CHECKING:
    from .trainer import Trainer

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


STATE = ("epoch", "epochs", "data", "history", "best", "best_loss", "best_epoch", "begun_with")
"""What a Trainer knows beside the states of its parts."""
NUMBERS = (
    "lr", "steps", "fmax", "batch_size", "memory", "clip", "patience", "along", "rattle", "seed", "warm", "learn",
    "rates",
)  # fmt: skip
"""Arguments of a Trainer that are plain numbers and names."""
SETTINGS = {*NUMBERS, "stepper", "adjoint", "loss", "optimizer", "terms"}
"""Without these in settings.json nothing is resumed."""
PARTS = {
    "potential", "form", "lora", "stepper", "frozen", "optimizer", "steps_taken", "base_rates", "terms", "warm_ends",
    "generator", "torch_rng",
}  # fmt: skip
"""Nor without these, and `STATE`, in the checkpoint."""


def settings(trainer: Trainer) -> dict[str, Any]:
    """What `arguments` needs to build the same Trainer, as JSON."""
    loss = trainer.loss
    return {
        "family": trainer.potential.family,
        "stepper": trainer.stepper.todict(),
        "adjoint": trainer.adjoint.todict(),
        "loss": getattr(loss, "__name__", type(loss).__name__),
        "optimizer": type(trainer.optimizer).__name__,
        "terms": [term.todict() for term in trainer.terms],
        **{name: getattr(trainer, name) for name in NUMBERS},
        "epochs": trainer.epochs,
    }


def state(trainer: Trainer, terms: list[dict[str, Any]]) -> dict[str, Any]:
    """All that the next epoch depends on, beside the settings; `terms` are the states of the terms."""
    warm = trainer.warm_starts
    return {
        "potential": trainer.potential.state_dict(),
        "form": trainer.potential.form,
        "lora": lora.settings(trainer.potential),
        "stepper": trainer.stepper.state_dict(),
        "frozen": [name for name, p in trainer.potential.named_parameters() if not p.requires_grad],
        **trainer.updates.state(),
        "terms": terms,
        "warm_ends": warm.ends if warm else {},
        "generator": trainer.order.generator.get_state(),
        "torch_rng": torch.get_rng_state(),
        **{name: getattr(trainer, name) for name in STATE},
    }


def provenance(trainer: Trainer) -> dict[str, Any]:
    """Where the tuned weights come from, for the files that hold them: base, data, settings, versions."""
    base = dict(trainer.potential.metadata) or {"source": f"a {type(trainer.potential).__name__} object"}
    return {
        "base": base | {"family": trainer.potential.family, "weights": weights_hash(trainer.potential)},
        "data": trainer.data,
        "settings": settings(trainer),
        "trained": describe(trainer.potential),
        "versions": _versions(trainer.potential),
    }


def _versions(potential: Potential) -> dict[str, str]:
    """Of ours, of ase, and of the packages that the potential's modules come from: torch, mace-torch, e3nn, ..."""
    modules = {"ase", *(type(module).__module__.partition(".")[0] for module in potential.modules())}
    packages = {package for name, found in packages_distributions().items() if name in modules for package in found}
    return {package: version(package) for package in sorted(packages)} | {"ase_bptt": __version__}


def arguments(
    out: Path, settings: dict[str, Any], state: dict[str, Any], given: dict[str, Any], device: torch.device | str | None
) -> dict[str, Any]:
    """Arguments for the same Trainer; those that are given count.

    Raises
    ------
    ValueError
        Where a part of a person's own was used and is not given again, and for runs of older releases.
    """
    _check_complete(out, settings, state)
    own = given["loss"] is None and settings["loss"] not in LOSSES
    if own:
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
    potential = load_potential(out / "potential", device=device).in_form(state["form"])
    if state["lora"]:
        lora.restore(potential, state["lora"])
    for name, parameter in potential.named_parameters():
        parameter.requires_grad_(name not in state["frozen"])
    kept = {name: settings[name] for name in ("loss", "terms", "adjoint")}
    return {
        "potential": potential,
        **{name: given[name] if given[name] is not None else kept[name] for name in kept},
        "stepper": given["stepper"] or _stepper(settings["stepper"], state["stepper"]),
        "optimizer": given["optimizer"],
        **{name: settings[name] for name in NUMBERS},
    }


def _check_complete(out: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    lacking = (SETTINGS - settings.keys()) | ({*STATE} | PARTS) - state.keys()
    if lacking:
        raise ValueError(
            f"The run in {out} was begun by an older release, which kept no {min(lacking)!r}, and cannot be resumed: "
            "begin again."
        )


def _stepper(saved: dict[str, Any], learnt: dict[str, Any]) -> Any:
    numbers = {k: v for k, v in saved.items() if k != "name"}
    return make_stepper(saved["name"], **numbers | {k: nn.Parameter(v) for k, v in learnt.items()})


def rewind(trainer: Trainer, state: dict[str, Any]) -> None:
    """Bring the best potential and metrics.csv in the run folder back to a checkpoint that is not the last."""
    assert trainer.out is not None
    # The first checkpoint knows no best state yet.
    trainer.potential.load_state_dict(state["best"].get("potential", state["potential"]))
    trainer.ranks.each(lambda: None)  # all have read what is written anew now
    trainer.save(trainer.out / "potential")
    if trainer.ranks.writes:
        write_metrics(trainer.out, state["history"])


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Take up what `state` kept."""
    trainer.potential.load_state_dict(state["potential"])
    trainer.stepper.load_state_dict(state["stepper"])
    trainer.updates.load(state)
    trainer.order.generator.set_state(state["generator"])
    torch.set_rng_state(state["torch_rng"])
    for name in STATE:
        setattr(trainer, name, state[name])
    if trainer.warm_starts:
        trainer.warm_starts.ends = state["warm_ends"]
    for term, kept in zip(trainer.terms, state["terms"], strict=True):
        term.load(kept)
