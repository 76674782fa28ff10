"""Pictures of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..evaluation import Evaluation
from ..files import replacing
from .tables import change

BLUE, ORANGE, GREY = "#1f5f99", "#d9762b", "#8a8a8a"


def plot_before_after(before: Evaluation, after: Evaluation, path: Path) -> None:
    """Delta-Q after against before, a point for each held-out structure."""
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    x, y = ([max(row.delta_q, 1e-3) for row in e.rows] for e in (before, after))
    low, high = 0.7 * min(*x, *y), 1.4 * max(*x, *y)
    axes.plot([low, high], [low, high], color=GREY, linewidth=1)
    axes.fill_between([low, high], [low, low], [low, high], color=BLUE, alpha=0.07, linewidth=0)
    for right, marker, label in ((True, "o", "right basin after"), (False, "X", "other basin after")):
        chosen = [k for k, row in enumerate(after.rows) if row.right_basin is right]
        axes.scatter(
            [x[k] for k in chosen], [y[k] for k in chosen], marker=marker, s=42,
            color=BLUE if right else ORANGE, label=label, zorder=3,
        )  # fmt: skip
    for k in sorted(range(len(y)), key=lambda k: -y[k])[:3]:
        axes.annotate(after.rows[k].id, (x[k], y[k]), (-7, -3), textcoords="offset points", fontsize=7, ha="right")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_xlabel("Delta-Q before fine-tuning (amu$^{1/2}$ Å)")
    axes.set_ylabel("Delta-Q after (amu$^{1/2}$ Å)")
    axes.set_title(
        f"{len(x)} held-out structures: mean {before.mean:.2f} to {after.mean:.2f}, "
        f"{change(before.mean, after.mean)}", fontsize=10,
    )  # fmt: skip
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    _save(figure, path)


def plot_learning_curve(history: Sequence[dict[str, float]], path: Path) -> None:
    """Training loss and validation Delta-Q over the epochs."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    epochs = [row["epoch"] for row in history]
    for name, label, colour in (
        ("train_loss", "training loss", GREY),
        ("valid_delta_q", "validation: mean Delta-Q, relaxed", BLUE),
    ):
        axes.plot(epochs, [row[name] for row in history], "o-", color=colour, label=label, markersize=4)
    axes.set(xlabel="epoch", ylabel="Delta-Q in amu$^{1/2}$ Å; loss in its own unit", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    # Not pyplot: no window, no global state, no backend to choose.
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
