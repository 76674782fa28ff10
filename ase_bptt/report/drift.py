"""The drift report as text, picture and section of the page, for one run and for the folds of a cross-validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..drift.changes import Drift, DriftReport, FoldDriftReports
from . import LABELS, Column, change, grid, number
from .page import Section, picture_of
from .plots import BLUE, GREY, ORANGE, new_figure
from .tables import NUMBER, Cell, Table

TITLE = "What else has changed"
WIDTH = 80
KIND_NAMES = {"structures": "rattled structures", "crystals": "crystals", "molecules": "molecules", "all": "all"}
DRIFT = "Change of forces and energies on rattled structures, crystals and molecules (root mean square)"
DRIFT_HEADS = ("Probes", "Number", "Force (eV/Å)", "of its size", "Largest (eV/Å)", "Energy (meV/atom)")
CRYSTALS = "Lattice constants (Å) and bulk moduli (GPa)"
MOST_DIMERS = 6
RISE, FALL = 12.0, 3.0
"""eV: how far above and below the well a dimer's curve is drawn."""


def drift_figure(report: DriftReport | FoldDriftReports) -> Figure:
    """Drift of the forces, and for one run lattice constants and dimers, too; `report.plots.save` writes it."""
    return _figure(report) if isinstance(report, DriftReport) else _fold_figure(report)


def drift_section(report: DriftReport | FoldDriftReports) -> Section:
    """The report as a part of the HTML page."""
    return _section(report) if isinstance(report, DriftReport) else _fold_section(report)


def drift_text(changes: DriftReport) -> str:
    """Tables and sentences, at most 80 columns wide."""
    columns = [Column("probes", align="<"), Column("n"), Column("eV/Å", "force"), Column("of size", "force"),
               Column("eV/Å", "largest"), Column("meV/atom", "energy")]  # fmt: skip
    rows = [_drift_row(kind, drift) for kind, drift in changes.drifts.items()]
    lines = [fill(f"{DRIFT}:", WIDTH), *grid(columns, rows)]
    if changes.crystals:
        tops = ("lattice constant (Å)", "bulk modulus (GPa)")
        columns = [Column("crystal", align="<")]
        columns += [Column(head, top) for top in tops for head in (*LABELS, "change")]
        lines += ["", *grid(columns, [_crystal_row(changes, name) for name in changes.crystals])]
    lines += ["", *(fill(said, WIDTH, subsequent_indent="  ") for said in sentences(changes))]
    return "\n".join(lines)


def sentences(changes: DriftReport) -> list[str]:
    """What the tables do not say: warnings first, then dimers and held-out structures."""
    warnings = changes.warnings()
    found = [f"Warning: {said}" for said in warnings]
    holes = changes.holes()
    if holes:
        open_before = [name for name, (b, _) in holes.items() if b]
        had = f" Holes before already: {', '.join(open_before)}." if open_before else ""
        opened = sum(bool(a) and not b for b, a in holes.values())
        verdict = f"holes have opened in {opened}" if opened else "no hole has opened at short range"
        found.append(f"Dimers ({', '.join(holes)}): {verdict}.{had}")
    if changes.held_out is not None:
        before, after = changes.held_out
        said = change(before.mean, after.mean)
        found.append(
            f"Held out: mean Delta-Q {number(before.mean, 2)} before, {number(after.mean, 2)} after"
            f"{f' ({said})' if said else ''}, in amu^1/2 Å, over {len(after.rows)} structures; right basins "
            f"{100 * before.basins:.0f} % before, {100 * after.basins:.0f} % after."
        )
    return found


def _section(changes: DriftReport) -> Section:
    """The card as a part of the page."""
    lead = (
        "Fine-tuning on one kind of structures may spoil others. Both potentials were asked for forces and energies on "
        "structures, crystals and molecules that were rattled, none of which was trained on as it is here, for "
        "lattice constants and bulk moduli, and for pairs of atoms that are pushed together."
    )
    heads = [Cell(DRIFT_HEADS[0]), *(Cell(head, NUMBER) for head in DRIFT_HEADS[1:])]
    rows = [_cells(_drift_row(kind, drift)) for kind, drift in changes.drifts.items()]
    tables = [Table(DRIFT, [heads], rows)]
    if changes.crystals:
        short = [Cell(label, NUMBER) for label in (*LABELS, "change")]
        top = [Cell("Crystal", rows=2), Cell("Lattice constant", span=3), Cell("Bulk modulus", span=3)]
        rows = [_cells(_crystal_row(changes, name)) for name in changes.crystals]
        tables.append(Table(CRYSTALS, [top, [*short, *short]], rows))
    alt = f"Bars of the change of forces by kind of probe: {_spoken(changes)}; lattice constants; energies of dimers."
    caption = (
        "Above, how far forces have moved, by kind of probe, and the change of each lattice constant. Below, the "
        "energy of two atoms at short range, grey and dashed before, blue after: it must rise to the left. An orange "
        "point marks where a hole begins."
    )
    return Section(TITLE, [lead, *sentences(changes)], tables, [picture_of(_figure(changes), alt, caption)])


def _figure(changes: DriftReport) -> Figure:
    """Drift of the forces by kind, change of the lattice constants, and up to six dimers, those with holes first."""
    drifts = {KIND_NAMES[kind]: drift.force for kind, drift in changes.drifts.items() if drift.n}
    constants = {
        name: 100 * (a.lattice_constant / b.lattice_constant - 1)
        for name, (b, a) in changes.crystals.items()
        if math.isfinite(a.lattice_constant) and math.isfinite(b.lattice_constant)
    }
    holes = changes.holes()
    dimers = sorted(holes, key=lambda name: holes[name][1] is None)[:MOST_DIMERS]
    lines = -(-len(dimers) // 2)
    heights = [0.5 + 0.25 * max(1, len(drifts)), 0.5 + 0.22 * max(1, len(constants)), *[1.5] * lines]
    figure = new_figure(sum(heights))
    spec = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    _bars(figure.add_subplot(spec[0, :]), drifts, "change of the force (eV/Å)")
    _bars(figure.add_subplot(spec[1, :]), constants, "change of the lattice constant (%)")
    for k, name in enumerate(dimers):
        _curves(figure.add_subplot(spec[2 + k // 2, k % 2]), changes, name)
    for axes in figure.axes[2:][-2:]:
        axes.set_xlabel("distance (Å)", fontsize=9)
    return figure


def _bars(axes: Axes, found: dict[str, float], label: str) -> None:
    axes.barh(range(len(found)), list(found.values()), 0.6, color=BLUE)
    axes.set_yticks(range(len(found)), list(found), fontsize=9)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)


def _curves(axes: Axes, changes: DriftReport, name: str) -> None:
    sides = ((changes.before, GREY, "--"), (changes.after, BLUE, "-"))
    wells = []
    for side, colour, style in sides:
        curve = side.dimers[name]
        energies = np.array(curve.energies)
        energies[~np.isfinite(energies)] = np.nan
        # Both from the energy of the two atoms farthest apart, for each has its own zero.
        shifted = energies - (energies[-1] if np.isfinite(energies[-1]) else 0.0)
        wells.append(min([0.0, *shifted[len(shifted) // 5 :][np.isfinite(shifted[len(shifted) // 5 :])]]))
        axes.plot(curve.distances, shifted, style, color=colour, linewidth=1.3)
    found = changes.holes()[name][1]
    if found is not None:
        curve = changes.after.dimers[name]
        k = int(np.abs(np.array(curve.distances) - found.distance).argmin())
        axes.plot([curve.distances[k]], [min(shifted[k], min(wells) + RISE)], "o", color=ORANGE, markersize=5)
    axes.set_ylim(min(wells) - FALL, min(wells) + RISE)
    axes.set_title(f"{name} (eV)", fontsize=9, loc="left")
    axes.tick_params(labelsize=8)


def _drift_row(kind: str, drift: Drift) -> list[str]:
    share = f"{100 * drift.force / drift.size:.0f} %" if drift.size > 0 else ""
    return [
        KIND_NAMES[kind], str(drift.n), number(drift.force, 3), share, number(drift.largest, 2),
        number(1000 * drift.energy, 1),
    ]  # fmt: skip


def _crystal_row(changes: DriftReport, name: str) -> list[str]:
    before, after = changes.crystals[name]
    row = [name]
    for attribute, digits, most in (("lattice_constant", 3, 2), ("bulk_modulus", 1, 0)):
        b, a = (getattr(side, attribute) for side in (before, after))
        share = 100 * (a / b - 1) if b else math.nan
        row += [number(b, digits), number(a, digits), f"{share:+.{most}f} %" if math.isfinite(share) else "-"]
    return row


def _cells(row: Sequence[str]) -> list[Cell]:
    return [Cell(row[0]), *(Cell(text, NUMBER) for text in row[1:])]


def _spoken(changes: DriftReport) -> str:
    return ", ".join(f"{KIND_NAMES[kind]} {number(d.force, 3)} eV/Å" for kind, d in changes.drifts.items())


HEADS = ("Probes", "Number", "Force (eV/Å)", "of its size", "Worst fold (eV/Å)", "Largest (eV/Å)", "Energy (meV/atom)")


def _fold_section(changes: FoldDriftReports) -> Section:
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
    picture = picture_of(_fold_figure(changes), alt, caption)
    return Section(TITLE, [lead, *fold_sentences(changes)], [Table(DRIFT, [heads], rows)], [picture])


def fold_sentences(changes: FoldDriftReports) -> list[str]:
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


def _fold_figure(changes: FoldDriftReports) -> Figure:
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


def _row(changes: FoldDriftReports, kind: str) -> list[str]:
    drift, worst = changes.drift(kind), changes.worst(kind)
    return [
        str(drift.n), number(drift.force, 3), f"{100 * drift.force / drift.size:.0f} %" if drift.size > 0 else "",
        f"{number(worst[1].force, 3)} (fold {worst[0]})" if worst else "-", number(drift.largest, 2),
        number(1000 * drift.energy, 1),
    ]  # fmt: skip
