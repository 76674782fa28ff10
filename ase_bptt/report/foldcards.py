"""The card of a cross-validation: means over its folds, as a picture and as a part of the page."""

from __future__ import annotations

from statistics import fmean

from matplotlib.figure import Figure

from ..guard.folds import FoldChanges
from .cards import DRIFT, KIND_NAMES, TITLE
from .figures import BLUE, GREY, ORANGE, new_figure
from .page import Section
from .pagetables import NUMBER, Cell, Table
from .pictures import picture_of
from .words import number

HEADS = ("Probes", "Number", "Force (eV/Å)", "of its size", "Worst fold (eV/Å)", "Largest (eV/Å)", "Energy (meV/atom)")


def fold_section(changes: FoldChanges) -> Section:
    """The folds' cards as a part of the page."""
    lead = (
        "Each fold tuned a potential of its own, and has a card of its own. Here are means over the folds, with the "
        "fold whose forces have moved farthest, counted from 0, and the largest change of the force on an atom."
    )
    heads = [Cell(HEADS[0]), *(Cell(head, NUMBER) for head in HEADS[1:])]
    rows = [[Cell(KIND_NAMES[kind]), *(Cell(text, NUMBER) for text in _row(changes, kind))] for kind in changes.drifts]
    spoken = ", ".join(f"{KIND_NAMES[kind]} {number(d.force, 3)} eV/Å" for kind, d in changes.drifts.items())
    alt = f"Bars of the change of forces by kind of probe, means over the folds: {spoken}; a point for each fold."
    caption = "How far forces have moved, by kind of probe: a bar for the mean over the folds, a point for each fold."
    picture = picture_of(fold_figure(changes), alt, caption)
    return Section(TITLE, [lead, *fold_sentences(changes)], [Table(DRIFT, [heads], rows)], [picture])


def fold_sentences(changes: FoldChanges) -> list[str]:
    """What the table does not say: warnings first, then lattice constants."""
    found = [f"Warning: {said}" for said in changes.warnings()]
    stretches = list(changes.stretches())
    if stretches:
        mean = fmean(abs(share) for share, *_ in stretches)
        most, name, fold = max(stretches, key=lambda stretch: abs(stretch[0]))
        found.append(
            f"Lattice constants have changed by {100 * mean:.2f} % in the mean, and most by {100 * most:+.2f} % "
            f"({name}, fold {fold})."
        )
    return found


def fold_figure(changes: FoldChanges) -> Figure:
    """Drift of the forces by kind: the mean over the folds, and each fold."""
    kinds = [kind for kind, drift in changes.drifts.items() if drift.n]
    figure = new_figure(1.0 + 0.35 * max(1, len(kinds)))
    axes = figure.add_subplot()
    axes.barh(range(len(kinds)), [changes.drift(kind).force for kind in kinds], 0.6, color=BLUE)
    for k, kind in enumerate(kinds):
        forces = [drift.force for drift in changes.of_folds(kind).values()]
        axes.plot(forces, [k] * len(forces), "o", color=ORANGE, markersize=4)
    axes.set_yticks(range(len(kinds)), [KIND_NAMES[kind] for kind in kinds], fontsize=9)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("change of the force (eV/Å), each fold and their mean", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    return figure


def _row(changes: FoldChanges, kind: str) -> list[str]:
    drift, worst = changes.drift(kind), changes.worst(kind)
    return [
        str(drift.n), number(drift.force, 3), f"{100 * drift.force / drift.size:.0f} %" if drift.size > 0 else "",
        f"{number(worst[1].force, 3)} (fold {worst[0]})" if worst else "-", number(drift.largest, 2),
        number(1000 * drift.energy, 1),
    ]  # fmt: skip
