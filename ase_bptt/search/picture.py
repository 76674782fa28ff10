"""Pictures of the minima of each structure: how far above the lowest, how often each was found, and what they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..report import plural
from ..report.document import Picture, Section, picture_of, write_document
from ..report.plots import BLUE, ORANGE, WIDTH, new_figure
from ..report.structure_pictures import MOVED, draw, elements, plain, shifts, view_of
from . import Minimum, Search

MOST = 40
"""Structures whose minima are counted."""
MOST_DRAWN, SIDE_BY_SIDE = 6, 4
"""Structures whose atoms are drawn, and minima of each."""
TERMS = (
    ("Minimum", "A structure to which starts relax, up to translations, the choice of the lattice vectors, the order "
     "of like atoms and symmetry. Energies are those of the potential."),
    ("Found", "How many of the starts ended there. A minimum that was found once may have others beside it that were "
     "not found."),
    ("Pictures of structures", "Filled discs: the minimum. Outlines: the structure as it was given, where atoms are "
     f"more than {MOVED} Å apart, with arrows to the minimum; the other atoms are pale. Drift of the whole structure "
     "is removed, and minimum images are used."),
)  # fmt: skip
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
    short = [name if len(name) <= NAME_WIDTH else "…" + name[1 - NAME_WIDTH :] for name in names[:n]]
    axes.set_yticks(range(n), [plain(name) for name in short])
    axes.set_ylim(n - 0.5, -0.5)
    axes.set_xlabel("eV above the lowest minimum")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    figure.suptitle("minima found; orange: also from the structure as given", fontsize=10)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
    return figure


def write_search_page(path: Path, structures: Sequence[Atoms], found: Sequence[Search]) -> None:
    """Write the page of a search: the picture of all minima, and the lowest of a few structures side by side.

    The structures are as they were given, with their names in ``info["structure"]``.
    """
    names = [atoms.info["structure"] for atoms in structures]
    lower = [name for name, search in zip(names, found, strict=True) if search.found_lower]
    headline = (
        f"Minima that were found: {sum(len(search.minima) for search in found)}, of "
        f"{plural(len(found), 'structure')}; of {len(lower)} the lowest is below that of the structure as given."
    )
    caption = (
        "A disc is a minimum; its area is the share of the starts that ended there. Orange: also from the structure as "
        "given."
    )
    counted = picture_of(picture(names, found), headline, caption)
    drawn = sorted(zip(structures, found, strict=True), key=lambda pair: -(pair[1].found_lower or 0.0))
    pictures = [_side_by_side(atoms, search) for atoms, search in drawn if search.minima][:MOST_DRAWN]
    sections = [
        Section("Minima of each structure", pictures=[counted]),
        Section("The lowest minima", pictures=pictures),
    ]
    write_document(path, "Search for minima", headline, sections, TERMS)


def _side_by_side(given: Atoms, search: Search) -> Picture:
    """The lowest minima of one structure, seen from the same side."""
    name, minima = given.info["structure"], search.minima[:SIDE_BY_SIDE]
    moves = [_moves(minimum, given) for minimum in minima]
    view = view_of(given, [d for d in moves if d is not None] or [np.zeros((len(given), 3))])
    columns = min(len(minima), 2)
    rows = -(-len(minima) // columns)
    figure = new_figure(rows * (WIDTH / columns * view.ratio + 0.3) + 0.8)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, minimum, d in zip(panels, minima, moves):
        if d is None:
            alone = view_of(minimum.atoms, [np.zeros((len(given), 3))])
            draw(axes, alone, np.zeros((len(given), 3)))
        else:
            draw(axes, view, d)
        axes.set_title(f"+{minimum.above:.3f} eV, {minimum.count} of {search.n_starts}", fontsize=9)
    for axes in panels[len(minima) :]:
        axes.set_axis_off()
    figure.suptitle(plain(name), fontsize=10)
    figure.legend(handles=elements(view.atoms, ""), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    said = ", ".join(f"{m.above:.3f} eV above the lowest, found {m.count} of {search.n_starts} times" for m in minima)
    more = len(search.minima) - len(minima)
    rest = {0: "", 1: " One more is higher."}.get(more, f" {more} more are higher.")
    return picture_of(figure, f"The lowest minima of {name}: {said}.", f"{name}, seen nearly along {view.along}.{rest}")


def _moves(minimum: Minimum, given: Atoms) -> np.ndarray | None:
    """Displacements from the structure as given; None where a start of one's own has other atoms at their places."""
    if minimum.ways[0] == "your own" or (minimum.atoms.numbers != given.numbers).any():
        return None
    return shifts(minimum.atoms, given)
