"""The metrics of an epoch, and the progress of a training."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType

from tqdm import tqdm

from ..steppers import Stepper
from ..terms import Term

log = logging.getLogger(__name__)


class EpochMetrics:
    """Collects the losses and gradients of an epoch.

    Parameters
    ----------
    n_pairs : int
        Training pairs.
    terms : sequence of Term
        Further terms of the loss.

    Attributes
    ----------
    losses : list of float
        Of the pairs that counted so far.
    """

    def __init__(self, n_pairs: int, terms: Sequence[Term]):
        self.losses: list[float] = []
        self._n_pairs = n_pairs
        self._norms: list[float] = []
        self._terms: dict[str, list[float]] = {term.name: [] for term in terms}

    def add(self, losses: Sequence[float], norm: float, terms: Mapping[str, float]) -> None:
        """Add a step: the losses of its pairs, the norm of its gradient, and its further terms."""
        self.losses += losses
        self._norms.append(norm)
        for name, value in terms.items():
            self._terms[name].append(value)

    def row(self, epoch: int, lr: float, counts: Mapping[str, float], stepper: Stepper) -> dict[str, float]:
        """The epoch as a row of metrics.csv, with the hyperparameters of the stepper where some are learnt."""
        return {
            "epoch": epoch,
            "train_loss": _mean(self.losses),
            "gradient_norm": _mean(self._norms),
            "skipped": self._n_pairs - len(self.losses),
            "lr": lr,
            **counts,
            **{f"term_{name}": _mean(values) for name, values in self._terms.items()},
            **(stepper.hyperparameters() if any(p.requires_grad for p in stepper.parameters()) else {}),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _validation(row: Mapping[str, float]) -> str:
    found = row.get("valid_delta_q", math.nan)
    return "" if math.isnan(found) else f"valid {found:.3f} amu^1/2 Å  "


class Progress:
    """A bar of all epochs on a terminal, or a line in the log for each epoch.

    Parameters
    ----------
    epochs, pairs : int
        Epochs in all, and training pairs in each of them.
    done : int
        Epochs that were complete before.
    bar : bool or None
        None: if standard error is a terminal.
    """

    def __init__(self, epochs: int, pairs: int, *, done: int = 0, bar: bool | None = None):
        self.epochs = epochs
        shown = sys.stderr.isatty() if bar is None else bar
        self._done: float = done * pairs
        self._bar = tqdm(total=epochs * pairs, initial=done * pairs, unit="pair", disable=not shown, leave=False)

    def advance(self, pairs: float, losses: Sequence[float]) -> None:
        """Count pairs of a step, and show the mean of the losses so far."""
        self._done += pairs
        self._bar.update(round(self._done) - self._bar.n)
        if losses:
            self._bar.set_postfix_str(f"loss {sum(losses) / len(losses):.3f}", refresh=False)

    def untuned(self, row: Mapping[str, float]) -> None:
        """Report the validation of the untuned potential, epoch 0, if there was one."""
        if row:
            self._write(f"epoch   0/{self.epochs}  untuned  {_validation(row)}".rstrip())

    def epoch(self, row: Mapping[str, float]) -> None:
        """Report a finished epoch, given its row of metrics.csv."""
        self._write(
            f"epoch {row['epoch']:>3.0f}/{self.epochs}  train {row['train_loss']:.3f}  {_validation(row)}"
            f"skipped {row['skipped']:.0f}  {row['seconds']:.0f} s"
        )

    def _write(self, line: str) -> None:
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
