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
from ..evaluation.compare import check_same
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
MARGIN, EMPTY = 1.0, 2.5
"""Å around the atoms, and of the empty part of a cell that is drawn."""
BLACK, RED = "#1c1f23", "#b3261e"


def structures_section(
    evaluation: Evaluation,
    after: Evaluation | None = None,
    labels: tuple[str, str] = LABELS,
    pairs: Sequence[RelaxationPair] = (),
) -> Section | None:
    """Pictures of the structures that are farthest from their references, and of the best ones.

    Parameters
    ----------
    evaluation : Evaluation
        The only one, or that before.
    after : Evaluation, optional
        Of the same structures.
    labels : two str
        What the two are called.
    pairs : sequence of RelaxationPair
        Of these structures, in any order.

    Returns
    -------
    Section or None
        None where the ends are not at hand, as after reading an evaluation from its file, or the pairs are not.
    """
    if after is not None:
        check_same(evaluation, after)
    last = after or evaluation
    of = {pair.id: pair for pair in pairs}
    pictures = []
    for k, why in _chosen(evaluation, after) if last.ends else ():
        pair, ends = of.get(last.rows[k].id), []
        for found, label in zip((evaluation, after), labels, strict=True):
            if found is not None and found.ends and math.isfinite(found.rows[k].delta_q):
                ends.append((label, found.ends[k]))
        if pair is not None:
            values = [number(found.rows[k].delta_q, 2) for found in (evaluation, after) if found is not None]
            title = f"{shorten([pair.id], NAME_WIDTH)[0]}\nDelta-Q {' → '.join(values)} {UNIT}"
            pictures.append(_picture(pair, ends, title, why, " to ".join(values)))
    return Section("Some structures", pictures=pictures) if pictures else None


def _chosen(evaluation: Evaluation, after: Evaluation | None) -> list[tuple[int, str]]:
    """The rows to be drawn, each with the reason: the farthest, then those that gained most or are nearest."""
    last = [row.delta_q for row in (after or evaluation).rows]
    finite = [k for k, value in enumerate(last) if math.isfinite(value)]
    worst = sorted(finite, key=lambda k: -last[k])[:EACH]
    rest = [k for k in finite if k not in worst]
    if after is None:
        best = sorted(rest, key=lambda k: last[k])[:EACH]
        return [*((k, "among the farthest from its reference") for k in worst),
                *((k, "among the nearest to its reference") for k in best)]  # fmt: skip
    gains = {k: evaluation.rows[k].delta_q - last[k] for k in rest if math.isfinite(evaluation.rows[k].delta_q)}
    best = sorted(gains, key=lambda k: -gains[k])[:EACH]
    return [*((k, "among the farthest from its reference") for k in worst),
            *((k, "among those whose Delta-Q fell most") for k in best)]  # fmt: skip


def _picture(
    pair: RelaxationPair, ends: Sequence[tuple[str, Atoms]], title: str, why: str, values: str
) -> Picture:
    moves = [shifts(end, pair.relaxed) for _, end in ends]
    named = dict(zip([label for label, _ in ends], moves, strict=True))
    figure, view = overlay(pair.relaxed, shifts(pair.initial, pair.relaxed), named, title)
    n = int((np.linalg.norm(moves[-1], axis=1) > MOVED).sum())
    alt = (
        f"{pair.id}, {why}: {n} of {pair.n_atoms} atoms end more than {MOVED} Å from their place in the reference; "
        f"Delta-Q {values} amu^1/2 Å."
    )
    moved = " Its cell was relaxed; all is drawn in the cell of the reference." if pair.freedom.moves else ""
    caption = (
        f"{pair.id}, {why}. {n} of {pair.n_atoms} atoms end more than {MOVED} Å from their place in the reference; the "
        f"others are pale.{moved}"
    )
    return picture_of(figure, alt, caption)


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
        return low, high

    @property
    def ratio(self) -> float:
        """Height over width, within reason."""
        low, high = self.limits()
        width, height = high - low
        return min(max(height / width, 0.4), 1.2)


def view_of(atoms: Atoms, moves: Sequence[np.ndarray]) -> View:
    """A view in which these displacements are seen, along a cell vector or a principal axis of a molecule.

    Parameters
    ----------
    atoms : Atoms
    moves : sequence of array, shape (n_atoms, 3)
        Displacements from it, Å.
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
    for weight, vectors in ((1.0, np.concatenate(list(moves))), (0.2, positions - positions.mean(0))):
        squares = ((vectors @ axes.T) ** 2).sum(0)
        seen += weight * float(squares[:2].sum() / max(squares.sum(), 1e-12))
    return seen


def overlay(reference: Atoms, initial: np.ndarray, ends: Mapping[str, np.ndarray], title: str) -> tuple[Figure, View]:
    """Initial structure and ends over the reference, and how it is looked at.

    Parameters
    ----------
    reference : Atoms
    initial : array, shape (n_atoms, 3)
        Displacements from the reference, Å.
    ends : mapping of str to array, shape (n_atoms, 3)
        Likewise, by what they are called; the last is drawn as filled discs, one before it as outlines.
    title : str
    """
    *before, end = ends.values()
    view = view_of(reference, [initial, *ends.values()])
    figure = new_figure(WIDTH * view.ratio + 1.2)
    axes = figure.add_subplot()
    draw(axes, view, end, before=before[0] if before else None, initial=initial)
    axes.set_title(title, fontsize=10)
    *outlined, filled = shorten(ends, LABEL_WIDTH)
    handles = [*_elements(view.atoms, filled), _handle("reference", "o", BLACK, "none")]
    handles += [Line2D([], [], color=ORANGE, linestyle=(0, (2, 1)), linewidth=1.4, label=name) for name in outlined]
    handles += [_handle("initial", "x", BLUE, BLUE), _handle(f"reference to {filled}, > {MOVED} Å", r"$\rightarrow$", RED, RED)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if len(filled) > 8 else 3, frameon=False, fontsize=9)
    return figure, view


def _elements(atoms: Atoms, name: str) -> list[Line2D]:
    """Of the legend: a disc for each element."""
    symbols = dict(zip(atoms.symbols, atoms.numbers, strict=True))
    return [_handle(f"{symbol} {name}".strip(), "o", "white", jmol_colors[z]) for symbol, z in symbols.items()]


def _handle(label: str, marker: str, edge: str, face: Any) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, markersize=9, markeredgecolor=edge, markerfacecolor=face,
                  label=label)  # fmt: skip


def draw(
    axes: Axes, view: View, end: np.ndarray, *, before: np.ndarray | None = None, initial: np.ndarray | None = None
) -> None:
    """Draw the structure of a view as outlines, and ends over it.

    Parameters
    ----------
    axes : Axes
    view : View
    end : array, shape (n_atoms, 3)
        Displacements in Å, which end in filled discs.
    before, initial : array, shape (n_atoms, 3), optional
        Those that end in dashed outlines, and in crosses.
    """
    places = view.atoms.positions
    moved = np.linalg.norm(end, axis=1) > MOVED
    shown = moved if before is None else moved | (np.linalg.norm(before, axis=1) > MOVED)
    radii, colours = SIZE * covalent_radii[view.atoms.numbers], jmol_colors[view.atoms.numbers]
    points = {name: view(places + d) for name, d in (("end", end), ("before", before), ("initial", initial)) if d is not None}
    points["reference"] = view(places)
    _draw_cell_and_bonds(axes, view, points["end"])
    for rank, k in enumerate(view.shown):
        paleness = 0.25 * (1 - rank / len(view.shown)) if shown[k] else 0.65
        colour = paleness + (1 - paleness) * colours[k]
        axes.add_patch(Circle(points["end"][k], radii[k], facecolor=colour, edgecolor=GREY, linewidth=0.4, zorder=3 + rank))
        if shown[k]:
            outline = {"fill": False, "zorder": 1000}
            axes.add_patch(Circle(points["reference"][k], radii[k], edgecolor=BLACK, linewidth=1.2, **outline))
            if before is not None:
                axes.add_patch(Circle(points["before"][k], radii[k], edgecolor=ORANGE, linewidth=1.4, linestyle=(0, (2, 1)), **outline))
    if initial is not None:
        far = [k for k in view.shown if shown[k] or np.linalg.norm(initial[k]) > 3 * MOVED]
        axes.scatter(*points["initial"][far].T, marker="x", s=16, linewidths=1.1, color=BLUE, zorder=1001)
    for k in view.shown[moved[view.shown]]:
        axes.annotate("", points["end"][k], points["reference"][k], zorder=1002,
                      arrowprops={"arrowstyle": "-|>", "color": RED, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7})
    low, high = view.limits()
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    axes.set_axis_off()


def _draw_cell_and_bonds(axes: Axes, view: View, points: np.ndarray) -> None:
    for edge in view.edges():
        axes.plot(*view(edge).T, color=GREY, linewidth=0.8, zorder=1)
    rank = {k: place for place, k in enumerate(view.shown.tolist())}
    cutoffs = natural_cutoffs(view.atoms, mult=BOND)
    for i, j, cross in zip(*neighbor_list("ijS", view.atoms, cutoffs), strict=True):
        if i < j and not cross.any() and i in rank and j in rank:
            # Behind both, so that the discs hide its ends.
            axes.plot(*points[[i, j]].T, color="#c4c4c4", linewidth=2, zorder=2.5 + min(rank[i], rank[j]))
