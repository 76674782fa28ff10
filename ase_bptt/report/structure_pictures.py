"""Pictures of structures: a reference, and over it where relaxations started and ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from ase.geometry import complete_cell
from ase.neighborlist import natural_cutoffs, neighbor_list
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from ..displacements import displacements, known_part
from ..evaluation import Evaluation
from ..pairs import RelaxationPair
from . import LABELS, number, shorten
from .document import Picture, Section, picture_of
from .plots import BLUE, GREY, LABEL_WIDTH, ORANGE, UNIT, WIDTH, new_figure

MOVED = 0.1
"""Å: atoms that are nearer to their place in the reference are pale, without arrow and outlines."""
EACH = 2
"""Structures of either end of the ranking."""
MOST_ATOMS = 250
"""Of a larger structure, those nearest to the atom that is farthest from its place."""
NAME_WIDTH = 40
SIZE, BOND, TILT = 0.45, 1.15, (0.10, 0.07)
"""Radii of discs and lengths of bonds over covalent radii; radians by which the view is off an axis."""
MARGIN, EMPTY, SCALE = 1.0, 2.5, 2
"""Å around the atoms, of the empty part of a cell that is drawn, and of the scale bar."""
FRONT = 1000
BLACK, RED, DASHED = "#1c1f23", "#b3261e", (0, (2, 1))
ARROW = {"arrowstyle": "-|>", "color": RED, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}


def structures_section(
    evaluation: Evaluation,
    after: Evaluation | None = None,
    labels: tuple[str, str] = LABELS,
    pairs: Sequence[RelaxationPair] = (),
) -> Section | None:
    """Pictures of the structures that are farthest from their references, and of the best ones.

    The pairs may be in any order. None where they or the ends are not at hand, as after reading an evaluation from its
    file.
    """
    last = after or evaluation
    of = {pair.id: pair for pair in pairs}
    chosen = [(k, why) for k, why in _chosen(evaluation, after) if last.rows[k].id in of] if last.ends else []
    pictures = [_picture(of[last.rows[k].id], k, why, evaluation, after, labels) for k, why in chosen]
    return Section("The farthest and the best structures", pictures=pictures) if pictures else None


def _chosen(evaluation: Evaluation, after: Evaluation | None) -> list[tuple[int, str]]:
    """The rows that are drawn and why: the farthest, and those that gained most or, of one evaluation, are nearest."""
    first, last = ([row.delta_q for row in e.rows] for e in (evaluation, after or evaluation))
    finite = [k for k, value in enumerate(last) if math.isfinite(value)]
    farthest = sorted(finite, key=lambda k: -last[k])[:EACH]
    rest = [k for k in finite if k not in farthest and (after is None or last[k] < first[k])]
    best = sorted(rest, key=lambda k: last[k] if after is None else last[k] - first[k])[:EACH]
    why = "among the nearest to their references" if after is None else "among those whose Delta-Q fell most"
    return [(k, "among the farthest from their references") for k in farthest] + [(k, why) for k in best]


def _picture(
    pair: RelaxationPair, k: int, why: str, evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str]
) -> Picture:
    """The picture of one structure, the k-th row."""
    both = [(e, label) for e, label in zip((evaluation, after), labels, strict=True) if e is not None]
    values = [number(e.rows[k].delta_q, 2) for e, _ in both]
    sound = [(e, label) for e, label in both if e.ends and math.isfinite(e.rows[k].delta_q)]
    ends = {label: shifts(e.ends[k], pair.relaxed) for e, label in sound}
    title = f"{plain(shorten([pair.id], NAME_WIDTH)[0])}\nDelta-Q {' → '.join(values)} {UNIT}"
    figure, view = overlay(pair.relaxed, shifts(pair.initial, pair.relaxed), ends, title)
    n = int((np.linalg.norm(ends[both[-1][1]], axis=1) > MOVED).sum())
    found = f"{pair.id}, {why}: {n} of {pair.n_atoms} atoms end more than {MOVED} Å from their place in the reference"
    caption = f"{found}. Pale: nearer than that. Seen nearly along {view.along}."
    if pair.freedom.moves:
        caption += " The cell was relaxed; all is drawn in that of the reference."
    if len(view.shown) < pair.n_atoms:
        caption += f" The {len(view.shown)} atoms around the one that is farthest off are shown."
    return picture_of(figure, f"Picture of {found}; Delta-Q {' to '.join(values)} amu^1/2 Å.", caption)


def plain(text: str) -> str:
    """In one line, and nothing of it a formula."""
    return " ".join(text.split()).replace("$", r"\$")


def shifts(end: Atoms, reference: Atoms) -> np.ndarray:
    """Displacement of each atom from the reference in Å, as Delta-Q counts it, shape (n_atoms, 3)."""
    return displacements(end, known_part(end, reference), align=True).detach().cpu().numpy()


@dataclass(frozen=True)
class View:
    """A direction to look along, and what is seen of a structure.

    Attributes
    ----------
    atoms : Atoms
        The structure, of each atom the periodic image in the cell about the origin.
    axes : array, shape (3, 3)
        Rows: to the right, up, and towards the viewer.
    along : str
        What the direction is, in words.
    shown : array of int
        Atoms that are drawn, the rearmost first.
    """

    atoms: Atoms
    axes: np.ndarray
    along: str
    shown: np.ndarray

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """To the right and up, as seen from here, shape (n, 2)."""
        found: np.ndarray = vectors @ self.axes[:2].T
        return found

    def edges(self) -> list[np.ndarray]:
        """The edges of the cell along its periodic directions, as pairs of points."""
        periodic = self.atoms.cell[self.atoms.pbc]
        corners = [np.array(c) for c in product((-0.5, 0.5), repeat=len(periodic))]
        return [np.array([a, b]) @ periodic for a, b in combinations(corners, 2) if (a != b).sum() == 1]

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """The lower left and the upper right of what is drawn; empty space in the cell is cut off."""
        points = self(self.atoms.positions[self.shown])
        low, high = points.min(0) - MARGIN, points.max(0) + MARGIN
        corners = [self(edge) for edge in self.edges()]
        if corners:
            ends = np.concatenate(corners)
            low, high = np.clip(ends.min(0) - 0.2, low - EMPTY, low), np.clip(ends.max(0) + 0.2, high, high + EMPTY)
        return low - np.array([0.0, 0.7]), high

    @property
    def ratio(self) -> float:
        """Height over width, within reason."""
        low, high = self.limits()
        width, height = high - low
        return min(max(height / width, 0.4), 1.2)


def view_of(atoms: Atoms, moves: Sequence[np.ndarray]) -> View:
    """A view in which these displacements are seen, along a cell vector or a principal axis of a molecule.

    The displacements from the structure are in Å, shape (n_atoms, 3) each.
    """
    atoms = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    farthest = int(np.max([np.linalg.norm(d, axis=1) for d in moves], axis=0).argmax())
    # The atom that is farthest from its place is in the middle of the cell, and what is around it is not cut apart.
    cell = complete_cell(atoms.cell)
    inside = (atoms.positions - atoms.positions[farthest]) @ np.linalg.inv(cell)
    inside -= np.where(atoms.pbc, np.floor(inside + 0.5), (inside.min(0) + inside.max(0)) / 2)
    atoms.set_positions(inside @ cell)
    crystal = bool(atoms.pbc.any())
    directions = cell if crystal else np.linalg.svd(atoms.positions, full_matrices=True)[2]
    names = [f"the cell vector {name}" for name in "abc"] if crystal else ["a principal axis of the molecule"] * 3
    views = [(_axes(directions, k), names[k]) for k in (2, 1, 0)]
    axes, along = max(views, key=lambda view: _seen(view[0], atoms.positions, moves))
    near = np.argsort(np.linalg.norm(atoms.positions - atoms.positions[farthest], axis=1), kind="stable")[:MOST_ATOMS]
    return View(atoms, axes, along, near[np.argsort(atoms.positions[near] @ axes[2], kind="stable")])


def _axes(directions: np.ndarray, k: int) -> np.ndarray:
    """Rows to the right, up and towards the viewer, looking nearly along one of the directions."""
    forward = directions[k] / np.linalg.norm(directions[k])
    # Exactly along an axis the atoms of a crystal hide each other.
    up = _normal_part(directions[1 if k == 2 else 2], forward)
    tilted = forward + TILT[0] * np.cross(up, forward) + TILT[1] * up
    forward = tilted / np.linalg.norm(tilted)
    up = _normal_part(up, forward)
    return np.array([np.cross(up, forward), up, forward])


def _normal_part(vector: np.ndarray, to: np.ndarray) -> np.ndarray:
    rest = vector - (vector @ to) * to
    found: np.ndarray = rest / np.linalg.norm(rest)
    return found


def _seen(axes: np.ndarray, positions: np.ndarray, moves: Sequence[np.ndarray]) -> float:
    """The share of the squared displacements that is seen from there, and, with less weight, that of the extent."""
    seen = 0.0
    for weight, vectors in ((1.0, np.concatenate(list(moves))), (0.3, positions - positions.mean(0))):
        squares = ((vectors @ axes.T) ** 2).sum(0)
        seen += weight * float(squares[:2].sum() / max(squares.sum(), 1e-12))
    return seen


def overlay(reference: Atoms, initial: np.ndarray, ends: Mapping[str, np.ndarray], title: str) -> tuple[Figure, View]:
    """Initial structure and ends over the reference, and how it is looked at.

    Both are displacements from it in Å, shape (n_atoms, 3), the ends by what they are called: the last is drawn as
    filled discs, one before it as dashed outlines.
    """
    *before, end = ends.values()
    view = view_of(reference, [initial, *ends.values()])
    *outlined, filled = map(plain, shorten(list(ends), LABEL_WIDTH))
    handles = [*elements(view.atoms, filled), _handle("reference", "o", BLACK, "none")]
    handles += [Line2D([], [], color=ORANGE, linestyle=DASHED, label=name) for name in outlined]
    handles += [_handle("initial", "x", BLUE, BLUE), _handle(f"off by > {MOVED} Å", r"$\rightarrow$", RED, RED)]
    columns = 2 if len(filled) > 8 else 3
    figure = new_figure(0.95 * WIDTH * view.ratio + 0.65 + 0.19 * math.ceil(len(handles) / columns))
    draw(figure.add_subplot(), view, end, before=before[0] if before else None, initial=initial)
    figure.suptitle(title, fontsize=10)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure, view


def elements(atoms: Atoms, name: str) -> list[Line2D]:
    """Of the legend: a disc for each element."""
    symbols = dict(zip(atoms.symbols, atoms.numbers, strict=True))
    return [_handle(f"{symbol} {name}".strip(), "o", GREY, jmol_colors[z]) for symbol, z in symbols.items()]


def _handle(label: str, marker: str, edge: str, face: Any) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, markersize=9, markeredgecolor=edge, markerfacecolor=face,
                  label=label)  # fmt: skip


def draw(
    axes: Axes, view: View, end: np.ndarray, *, before: np.ndarray | None = None, initial: np.ndarray | None = None
) -> None:
    """Draw the structure of a view as outlines, and ends over it.

    All are displacements in Å, shape (n_atoms, 3): `end` is drawn as filled discs, `before` as dashed outlines, and
    `initial` as crosses.
    """
    places = view.atoms.positions
    started, stopped, middle = (view(places + d) for d in (end if initial is None else initial, end, 0 * end))
    moved = np.linalg.norm(end, axis=1) > MOVED
    shown = moved if before is None else moved | (np.linalg.norm(before, axis=1) > MOVED)
    radii, colours = SIZE * covalent_radii[view.atoms.numbers], jmol_colors[view.atoms.numbers]
    _draw_cell_and_bonds(axes, view, end)
    for rank, k in enumerate(view.shown):
        paleness = 0.25 * (1 - rank / len(view.shown)) if shown[k] else 0.6
        colour = paleness + (1 - paleness) * colours[k]
        # Those that moved are in front, for they are what the picture is about.
        _circle(axes, stopped[k], radii[k], rank + FRONT * shown[k], facecolor=colour, edgecolor=GREY, linewidth=0.4)
        if shown[k]:
            _circle(axes, middle[k], radii[k], 2 * FRONT, fill=False, edgecolor=BLACK, linewidth=1.2)
            if before is not None:
                place = view(places[k] + before[k])
                _circle(axes, place, radii[k], 2 * FRONT, fill=False, edgecolor=ORANGE, linestyle=DASHED, linewidth=1.4)
    if initial is not None:
        far = started[[k for k in view.shown if shown[k] or np.linalg.norm(initial[k]) > MOVED]]
        axes.scatter(far[:, 0], far[:, 1], s=16, color=BLUE, marker="x", linewidths=1.1, zorder=2 * FRONT + 4)
    for k in view.shown[moved[view.shown]]:
        axes.annotate("", stopped[k], middle[k], arrowprops=ARROW, zorder=2 * FRONT + 5)
    low, high = view.limits()
    low, high = np.minimum(low, stopped[view.shown].min(0) - 0.5), np.maximum(high, stopped[view.shown].max(0) + 0.5)
    axes.plot([low[0], low[0] + SCALE], [low[1], low[1]], color=BLACK, linewidth=2, zorder=3)
    axes.text(low[0] + SCALE / 2, low[1] - 0.1, f"{SCALE} Å", ha="center", va="top", fontsize=8)
    axes.set(xlim=(low[0] - 0.1, high[0]), ylim=(low[1] - 0.1, high[1]), aspect="equal")
    axes.set_axis_off()


def _circle(axes: Axes, place: np.ndarray, radius: float, height: float, **how: Any) -> None:
    axes.add_patch(Circle((place[0], place[1]), radius, zorder=3 + height, **how))


def _draw_cell_and_bonds(axes: Axes, view: View, end: np.ndarray) -> None:
    points, moves = view(view.atoms.positions + end), view(end)
    for edge in view.edges():
        axes.plot(*view(edge).T, color=GREY, linewidth=0.8, zorder=1)
    rank = {k: place for place, k in enumerate(view.shown.tolist())}
    cutoffs = natural_cutoffs(view.atoms, mult=BOND)
    # Each atom has its half of a bond, so that those to periodic images are drawn as well.
    for i, j, bond in zip(*neighbor_list("ijD", view.atoms, cutoffs), strict=True):
        if i in rank:
            half = (view(bond) + moves[j] - moves[i]) / 2
            axes.plot(*np.array([points[i], points[i] + half]).T, color="#cccccc", linewidth=1.6, zorder=2.5 + rank[i])
