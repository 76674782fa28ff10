"""Telling a person how far a training run is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

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
