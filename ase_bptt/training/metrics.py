"""What is measured beside the training: progress, the validation score, and what a run will cost."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..losses import SCALE, delta_q
from ..pairs import RelaxationPair
from ..potential import Potential
from ..relaxation import relax
from ..throughput import relax_all
from .distributed import Ranks

if TYPE_CHECKING:
    from .trainer import Trainer

log = logging.getLogger(__name__)


class Progress:
    """Counts pairs over all epochs.

    Parameters
    ----------
    epochs, pairs : int
        How many there will be, and pairs in each epoch.
    done : int
        Epochs that an earlier run finished.
    bar : bool or None
        None: if standard error is a terminal.
    """

    def __init__(self, epochs: int, pairs: int, *, done: int = 0, bar: bool | None = None):
        self.epochs = epochs
        shown = sys.stderr.isatty() if bar is None else bar
        self._bar = tqdm(total=epochs * pairs, initial=done * pairs, unit="pair", disable=not shown, leave=False)

    def advance(self, pairs: int, losses: Sequence[float]) -> None:
        """Count pairs that were trained on."""
        self._bar.update(pairs)
        if losses:
            self._bar.set_postfix_str(f"loss {sum(losses) / len(losses):.3f}", refresh=False)

    def epoch(self, row: dict[str, float]) -> None:
        """Say how an epoch ended."""
        line = (
            f"epoch {row['epoch']:>3.0f}/{self.epochs}  train {row['train_loss']:.3f}  "
            f"valid {row['valid_delta_q']:.3f} amu^1/2 Å  skipped {row['skipped']:.0f}  {row['seconds']:.0f} s"
        )
        if self._bar.disable:
            log.info(line)
        else:
            self._bar.write(line, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def validate(
    potential: Potential, pairs: Sequence[RelaxationPair], ranks: Ranks, memory: float | None = None
) -> dict[str, float]:
    """Relax from the initial structures by FIRE, each rank its share, and compare the ends with the references.

    Parameters
    ----------
    potential : Potential
    pairs : sequence of RelaxationPair
    ranks : Ranks
    memory : float or None
        GiB that may be taken at once, as for `relax_all`.

    Returns
    -------
    dict
        "valid_score", the mean of log(1 + Delta-Q / 0.1 amu^1/2 Å), and "valid_delta_q", the mean Delta-Q in
        amu^1/2 Å; NaN without pairs. One structure in a far basin must not decide for all, so the score is
        what epochs are judged by.
    """
    if not pairs:
        return {"valid_score": float("nan"), "valid_delta_q": float("nan")}
    distances = ranks.dealt(pairs, [p.n_atoms for p in pairs], partial(_distances, potential, memory))
    return {"valid_score": fmean(math.log1p(d / SCALE) for d in distances), "valid_delta_q": fmean(distances)}


def _distances(potential: Potential, memory: float | None, pairs: list[RelaxationPair]) -> list[float]:
    starts = [p.initial for p in pairs]
    ends = dict(relax_all(potential, starts, stepper="fire", fmax=0.02, steps=200, memory=memory))
    found: list[float] = delta_q([ends[k].atoms for k in range(len(pairs))], [p.relaxed for p in pairs]).tolist()
    return found


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
