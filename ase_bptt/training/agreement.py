"""That all processes of a run begin alike."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch

from . import resuming
from .meeting import UNLIKE

if TYPE_CHECKING:
    from .trainer import Trainer


def align(trainer: Trainer) -> None:
    """Take over weights, numbers of the stepper, optimizer and order from the rank that writes.

    Raises
    ------
    ValueError
        Where the ranks were given other settings or other pairs, or stand at unlike epochs.
    """
    ranks = trainer.ranks
    if ranks.size == 1:
        return
    told = ranks.each(lambda: (resuming.settings(trainer), trainer.data, trainer.epoch))
    if any(other != told[0] for other in told):
        raise ValueError(UNLIKE)
    # On the host, whatever device each of them has.
    state = torch.load(io.BytesIO(ranks.once(lambda: _packed(trainer))), weights_only=True, map_location="cpu")
    trainer.potential.load_state_dict(state["potential"])
    trainer.stepper.load_state_dict(state["stepper"])
    trainer.updates.load(state["updates"])
    trainer.order.generator.set_state(state["generator"])


def _packed(trainer: Trainer) -> bytes:
    state: dict[str, Any] = {
        "potential": trainer.potential.state_dict(),
        "stepper": trainer.stepper.state_dict(),
        "updates": trainer.updates.state(),
        "generator": trainer.order.generator.get_state(),
    }
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()
