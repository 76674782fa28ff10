"""A picture of the minima of each structure: how far above the lowest, and how often each was found."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..report.plots import BLUE, ORANGE, new_figure
from . import Search

MOST = 40
"""Structures that are drawn."""
NAME_WIDTH = 24


def picture(names: Sequence[str], found: Sequence[Search]) -> Figure:
    """A row for each structure; a disc for each minimum, whose area is the share of the starts that ended there."""
    n = min(len(found), MOST)
    figure = new_figure(0.9 + 0.32 * n)
    axes = figure.add_subplot()
    for row, search in enumerate(found[:n]):
        for minimum in search.minima:
            size = 15 + 250 * minimum.count / search.n_starts
            color = ORANGE if 0 in minimum.starts else BLUE
            axes.scatter([minimum.above], [row], s=size, color=color, alpha=0.6, linewidths=0)
    axes.set_yticks(range(n), [name if len(name) <= NAME_WIDTH else "…" + name[1 - NAME_WIDTH :] for name in names[:n]])
    axes.set_ylim(n - 0.5, -0.5)
    axes.set_xlabel("eV above the lowest minimum")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title("minima found; orange: also from the structure as given", fontsize=10)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
    return figure
