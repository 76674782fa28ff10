"""How long a training run would take and how much memory, from one batch and one relaxation."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..pairs import RelaxationPair
from ..relaxation import relax
from .ranks import Ranks
from .trainer import Trainer

FRAMES = 80
"""Of a relaxation by FIRE or BFGS to 0.02 eV/Å, roughly."""
PROBED = 5
"""Frames of the relaxation that is timed."""
MEASUREMENTS = 8
"""Before and after, by FIRE and by BFGS, from the initial and the reference structures."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of an epoch and of the whole run, and bytes at the peak (None where the system does not tell)."""

    seconds_per_epoch: float
    seconds: float
    peak_bytes: int | None

    def todict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def __str__(self) -> str:
        memory = "" if self.peak_bytes is None else f", {self.peak_bytes / 2**30:.1f} GiB of memory at the peak"
        return f"about {_duration(self.seconds)} ({_duration(self.seconds_per_epoch)} an epoch){memory}"


def estimate(
    trainer: Trainer,
    train: Sequence[RelaxationPair],
    valid: Sequence[RelaxationPair],
    test: Sequence[RelaxationPair],
    *,
    epochs: int,
) -> Estimate:
    """Run the largest training batch forward and backward once, and a few frames; nothing is changed or written.

    Times grow in proportion to the atoms; a relaxation is taken to need `FRAMES` frames.
    """
    largest = sorted(train, key=lambda p: -p.n_atoms)[: trainer.batch_size]
    _reset_peak(trainer.potential.device)
    # A copy: what warm starts keep, and what is counted of an epoch, stays as it is.
    loss = replace(trainer._pairs, warm=None, ranks=Ranks())
    loss.backward(largest[:1])  # what is compiled or allocated at first use
    clock = time.perf_counter()
    loss.backward(largest)
    step = (time.perf_counter() - clock) / _atoms(largest)
    trainer.optimizer.zero_grad(set_to_none=True)
    clock = time.perf_counter()
    with torch.no_grad():
        relax(trainer.potential, [p.initial for p in largest], stepper="fire", fmax=0.0, steps=PROBED)
    frame = (time.perf_counter() - clock) / (PROBED + 1) / _atoms(largest)
    epoch = (step * _atoms(train) + frame * FRAMES * _atoms(valid)) / trainer.ranks.size
    return Estimate(
        seconds_per_epoch=epoch,
        seconds=epochs * epoch + MEASUREMENTS * frame * FRAMES * _atoms(test) / trainer.ranks.size,
        peak_bytes=_peak(trainer.potential.device),
    )


def _atoms(pairs: Sequence[RelaxationPair]) -> int:
    return sum(p.n_atoms for p in pairs)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
