"""Where the processes of a run wait for each other before they exchange anything."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

ASKED = ("sum", "each", "once")
"""What the processes of a run do together."""
GLANCE = 5e-4
"""Seconds between two looks whether all are there."""
UNREACHABLE = ("gloo/transport", "connect", "timed out", "timeout")
"""In what gloo says where it cannot reach another process; it has no class of its own for it."""
UNLIKE = (
    "The processes of this run were given unlike settings or pairs, or do not all go on from the same epoch: build or "
    "resume the Trainer alike on each."
)


class Lost(RuntimeError):
    """Another process of the run has died, or is out of reach."""


@contextmanager
def all_there(asked: str) -> Iterator[None]:
    """Wait until all ranks are here, as a process that hears signals: in torch's own waiting it would be deaf.

    Parameters
    ----------
    asked : str
        One of `ASKED`, which they are about to do.

    Raises
    ------
    Lost
        Where one cannot be reached, now or while they do it.
    ValueError
        Where they are about to do unlike things, for which they would wait without end.
    """
    here = torch.zeros(len(ASKED), device="cpu" if "cpu:" in dist.get_backend_config() else "cuda")
    here[ASKED.index(asked)] = 1
    try:
        met = dist.all_reduce(here, async_op=True)
        while not met.is_completed():
            time.sleep(GLANCE)
        met.wait()
        if here.count_nonzero() > 1:
            raise ValueError(UNLIKE)
        yield
    except RuntimeError as error:
        if not _unreachable(error):
            raise
        raise Lost("Another process of the run has died or is out of reach.") from error


def _unreachable(error: RuntimeError) -> bool:
    # Memory that ran out has a class of its own; what has none is told by its words.
    if isinstance(error, dist.DistError) or type(error) is not RuntimeError:
        return isinstance(error, dist.DistError)
    return any(word in str(error).lower() for word in UNREACHABLE)
