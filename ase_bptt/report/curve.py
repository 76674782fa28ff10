"""The picture of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figures import BLUE, GREY, ORANGE, UNIT, new_figure


def learning_curve(history: Sequence[dict[str, float]], best_epoch: int | None = None) -> Figure:
    """Training loss and, below it, validation Delta-Q over the epochs; the best epoch is marked.

    Parameters
    ----------
    history : sequence of dict
        With "epoch", "train_loss", "valid_score" and "valid_delta_q".
    best_epoch : int, optional
        That whose weights were kept, 0 for those before training. Where it is not given, the one
        whose "valid_score" is lowest; none if nothing was validated.
    """
    validated = [row for row in history if math.isfinite(row["valid_delta_q"])]
    figure = new_figure(4.4 if validated else 2.6)
    panels = figure.subplots(2 if validated else 1, sharex=True, squeeze=False)[:, 0]
    epochs = [row["epoch"] for row in history]
    panels[0].plot(epochs, [row["train_loss"] for row in history], "s-", color=GREY, markersize=4)
    panels[0].set_ylabel("training loss\n(unit of the loss)")
    if validated:
        x, y = ([row[name] for row in validated] for name in ("epoch", "valid_delta_q"))
        panels[1].plot(x, y, "o-", color=BLUE, markersize=4)
        panels[1].set_ylabel(f"validation: mean\nDelta-Q ({UNIT})")
        best = min(validated, key=lambda row: row["valid_score"])["epoch"] if best_epoch is None else best_epoch
        _mark(list(panels), best, dict(zip(x, y, strict=True)))
    for axes in panels:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _mark(panels: Sequence[Axes], best: float, found: dict[float, float]) -> None:
    if best not in found:
        panels[0].set_title("best: the weights before training", fontsize=10)
        return
    for axes in panels:
        axes.axvline(best, color=ORANGE, linewidth=1, linestyle="--", zorder=0)
    panels[1].plot([best], [found[best]], "*", color=ORANGE, markersize=14, zorder=3)
    panels[0].set_title(f"best: epoch {best:.0f}", fontsize=10)
