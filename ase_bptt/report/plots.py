"""Plots of evaluations and of training, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..evaluation import Evaluation
from ..evaluation.compare import FLOOR, check_same
from ..utils import replacing
from . import LABELS, change, plural, shorten
from .tables import sorted_groups

BLUE, ORANGE, GREY = "#1f5f99", "#d9762b", "#949494"
"""Distinct also to colour-blind readers and in grey print; shape or place always carries the meaning, too."""
WIDTH = 4.8
"""Inches; for a width of 480 pixels on the page."""
DPI = 200
UNIT = "amu$^{1/2}$ Å"
"""Of Delta-Q."""
NAME_WIDTH, LABEL_WIDTH = 18, 24
MOST_GROUPS, MOST_ATOMS = 40, 24


def new_figure(height: float) -> Figure:
    """An empty figure, so many inches high."""
    # Not pyplot: no window, no global state, no backend to choose.
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_logarithms(axis: Axis, low: float, high: float) -> None:
    """Plain numbers, which do not overlap, on a logarithmic axis from low to high."""
    steps = (1.0, 2.0, 5.0) if high / low < 500 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis around these values, at least a factor of four apart."""
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    margin = max(1.4, 2 * (low / high) ** 0.5)
    return low / margin, high * margin


def before_after(before: Evaluation, after: Evaluation, labels: tuple[str, str] = LABELS) -> Figure:
    """Delta-Q after against before, a point for each structure.

    Raises
    ------
    ValueError
        Where the two are not of the same structures.
    """
    check_same(before, after)
    labels = _short(labels)
    figure = new_figure(4.6)
    axes = figure.add_subplot()
    shown = [
        (_drawn(b.delta_q), _drawn(a.delta_q), a)
        for b, a in zip(before.rows, after.rows, strict=True)
        if math.isfinite(b.delta_q) and math.isfinite(a.delta_q)
    ]
    low, high = limits([v for x, y, _ in shown for v in (x, y)])
    axes.plot([low, high], [low, high], color=GREY, linewidth=1)
    axes.fill_between([low, high], [low, low], [low, high], color=BLUE, alpha=0.07, linewidth=0)
    for right, marker, colour in ((True, "o", BLUE), (False, "X", ORANGE)):
        chosen = [(x, y) for x, y, row in shown if row.right_basin is right]
        x, y = ([point[k] for point in chosen] for k in (0, 1))
        label = f"{'right' if right else 'other'} basin ({labels[1]})"
        if chosen:
            axes.scatter(x, y, marker=marker, s=48, color=colour, label=label, zorder=3)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    plain_logarithms(axes.xaxis, low, high)
    plain_logarithms(axes.yaxis, low, high)
    _name_the_worst(axes, [(x, y, row.id) for x, y, row in shown])
    axes.set_xlabel(f"Delta-Q {labels[0]} ({UNIT})")
    axes.set_ylabel(f"Delta-Q {labels[1]} ({UNIT})")
    said = change(before.geometric_mean, after.geometric_mean)
    axes.set_title(f"{plural(len(shown), 'structure')}{f', geometric mean {said}' if said else ''}", fontsize=10)
    if shown:
        # Outside the axes, for a point may lie anywhere.
        _legend(figure, axes)
    return figure


def by_group(evaluation: Evaluation, after: Evaluation | None = None, labels: tuple[str, str] = LABELS) -> Figure:
    """Delta-Q of all structures by group, a line for each group, the farthest first; a bar marks each mean.

    The farthest 40 groups, if there are more.

    Raises
    ------
    ValueError
        Where the two are not of the same structures.
    """
    labels = _short(labels)
    groups = list(sorted_groups(evaluation, after).items())[:MOST_GROUPS]
    total = len(evaluation.by_group())
    figure = new_figure(1.3 + (0.26 if after is None else 0.34) * len(groups))
    axes = figure.add_subplot()
    if after is None:
        _dots(axes, [first for _, (first, _) in groups], 0, BLUE, "o")
    else:
        _dots(axes, [first for _, (first, _) in groups], -0.17, GREY, "s", labels[0])
        _dots(axes, [last for _, (_, last) in groups if last], 0.17, BLUE, "o", labels[1])
    axes.set_yticks(range(len(groups)), shorten([name for name, _ in groups], NAME_WIDTH), fontsize=9)
    low, high = limits([_drawn(row.delta_q) for _, pair in groups for e in pair if e
                        for row in e.rows if math.isfinite(row.delta_q)])  # fmt: skip
    axes.set(xscale="log", xlim=(low, high), ylim=(len(groups) - 0.5, -0.5), xlabel=f"Delta-Q ({UNIT})")
    plain_logarithms(axes.xaxis, low, high)
    axes.grid(axis="y", color=GREY, alpha=0.2)
    if total > len(groups):
        axes.set_title(f"the farthest {len(groups)} of {total} groups", fontsize=10)
    if after is not None:
        _legend(figure, axes)
    return figure


def _dots(
    axes: Axes, groups: Sequence[Evaluation], shift: float, colour: str, marker: str, label: str | None = None
) -> None:
    rows = [(row.delta_q, y + shift) for y, e in enumerate(groups) for row in e.rows if math.isfinite(row.delta_q)]
    axes.scatter([_drawn(q) for q, _ in rows], [y for _, y in rows], marker=marker, s=26, color=colour, alpha=0.8,
                 linewidth=0, label=label)  # fmt: skip
    means = [(e.mean, y + shift) for y, e in enumerate(groups) if math.isfinite(e.mean)]
    axes.scatter([_drawn(q) for q, _ in means], [y for _, y in means], marker="|", s=150, color=colour, linewidth=1.8)


def atom_displacements(
    evaluation: Evaluation, after: Evaluation | None = None, labels: tuple[str, str] = LABELS, *, most: int = 3
) -> Figure:
    """Displacement from the reference of each atom, of the structures whose Delta-Q is largest (at last).

    Of a structure of more than 24 atoms the 24 that are farthest, in falling order.

    Parameters
    ----------
    most : int
        Structures.

    Raises
    ------
    ValueError
        Where the two are not of the same structures.
    """
    if after is not None:
        check_same(evaluation, after)
    labels = _short(labels)
    last = after or evaluation
    finite = [k for k, row in enumerate(last.rows) if math.isfinite(row.delta_q)]
    worst = sorted(finite, key=lambda k: -last.rows[k].delta_q)[:most]
    figure = new_figure(0.7 + 1.75 * max(1, len(worst)))
    names = shorten([row.id for row in last.rows], 30)
    panels = figure.subplots(max(1, len(worst)), squeeze=False)[:, 0]
    for axes, k in zip(panels, worst):
        _bars(axes, k, evaluation, after, labels)
        axes.set_title(f"{names[k]}, Delta-Q {last.rows[k].delta_q:.2f}", fontsize=10, loc="left")
    panels[-1].set_xlabel("atom (counted from 0)")
    figure.supylabel("displacement (Å)", fontsize=10)
    if after is not None and worst:
        _legend(figure, panels[0])
    return figure


def _bars(axes: Axes, k: int, evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str]) -> None:
    ends = evaluation.ends or (after.ends if after else ())
    distances = (after or evaluation).rows[k].displacements
    atoms = list(range(len(distances)))
    if len(atoms) > MOST_ATOMS:
        atoms = sorted(atoms, key=lambda atom: -distances[atom])[:MOST_ATOMS]
        said = f"{MOST_ATOMS} farthest of {len(distances)} atoms"
        axes.text(0.98, 0.9, said, transform=axes.transAxes, ha="right", va="top", fontsize=9)
    series: list[tuple[Evaluation, float, float, str, str | None]] = [(evaluation, 0.0, 0.7, BLUE, None)]
    if after is not None:
        series = [(evaluation, -0.2, 0.4, GREY, labels[0]), (after, 0.2, 0.4, BLUE, labels[1])]
    for found, shift, width, colour, label in series:
        heights = [found.rows[k].displacements[atom] for atom in atoms]
        axes.bar([x + shift for x in range(len(atoms))], heights, width, color=colour, label=label)
    symbols = [ends[k][atom].symbol + "\n" for atom in atoms] if ends else [""] * len(atoms)
    axes.set_xticks(range(len(atoms)), [f"{s}{atom}" for s, atom in zip(symbols, atoms, strict=True)], fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _short(labels: tuple[str, str]) -> tuple[str, str]:
    first, last = shorten(labels, LABEL_WIDTH)
    return first, last


def _drawn(value: float) -> float:
    return max(value, FLOOR)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    columns = 2 if sum(map(len, names)) < 48 else 1
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def _name_the_worst(axes: Axes, points: Sequence[tuple[float, float, str]], most: int = 3) -> None:
    """Names beside the highest points, on the side where there is room, and not over each other."""
    worst = sorted(points, key=lambda point: -point[1])[:most]
    names = shorten([name for _, _, name in points], NAME_WIDTH)
    short = dict(zip((name for _, _, name in points), names, strict=True))
    last = math.inf
    for x, y, name in worst:
        right, height = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        if last - height < 0.04:
            continue
        last = height
        offset, align = ((-8, -3), "right") if right > 0.5 else ((8, -3), "left")
        axes.annotate(short[name], (x, y), offset, textcoords="offset points", fontsize=8, ha=align, zorder=4,
                      path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip


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
        panels[0].set_title("no epoch was better than the untuned weights", fontsize=10)
        return
    for axes in panels:
        axes.axvline(best, color=ORANGE, linewidth=1, linestyle="--", zorder=0)
    panels[1].plot([best], [found[best]], "*", color=ORANGE, markersize=14, zorder=3)
    panels[0].set_title(f"chosen: epoch {best:.0f}", fontsize=10)


def save(figure: Figure, path: str | Path) -> None:
    """Write a picture, whole or not at all, in the format that its name ends in (.png, .svg, .pdf)."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format=Path(path).suffix.removeprefix(".") or "png")


def png(figure: Figure) -> bytes:
    """The picture as a PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()
