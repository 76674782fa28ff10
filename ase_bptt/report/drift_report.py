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
from .columns import NUMBER, Cell, Table
from .document import Section, picture_of
from .plots import BLUE, GREY, ORANGE, new_figure

TITLE = "What else has changed"
WIDTH = 80
KIND_NAMES = {"structures": "rattled structures", "crystals": "crystals", "molecules": "molecules", "all": "all"}
DRIFT = "Change of forces and energies on rattled structures, crystals and molecules (root mean square)"
DRIFT_COLUMNS = (
    Column("probes", align="<", page="Probes"), Column("n", page="Number"),
    Column("eV/Å", "force", page="Force (eV/Å)"), Column("of size", "force", page="of its size"),
    Column("eV/Å", "largest", page="Largest (eV/Å)"), Column("meV/atom", "energy", page="Energy (meV/atom)"),
)  # fmt: skip
WORST_FOLD = 4, "Worst fold (eV/Å)"
"""Among the columns for folds: where it stands, and its head on the page."""
CRYSTALS = "Lattice constants (Å) and bulk moduli (GPa)"
CRYSTAL_COLUMNS = (
    Column("crystal", align="<", page="Crystal"), Column("lattice constant (Å)", page="Lattice constant"),
    Column("bulk modulus (GPa)", page="Bulk modulus"),
)  # fmt: skip
"""The first stands once; the others stand above the values before and after and their change."""
MOST_DIMERS = 6
RISE, FALL = 12.0, 3.0
"""eV: how far above and below the minimum a dimer's curve is drawn."""


def drift_figure(report: DriftReport | FoldDriftReports) -> Figure:
    """Drift of the forces, and for one run lattice constants and dimers, too; `report.plots.save` writes it.

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.drift.changes import drift_report
    >>> figure = drift_figure(drift_report(load_potential("emt"), load_potential("emt"), size=2))
    >>> figure.axes[0].get_xlabel()
    'change of the force (eV/Å)'
    """
    return _figure(report) if isinstance(report, DriftReport) else _fold_figure(report)


def drift_section(report: DriftReport | FoldDriftReports) -> Section:
    """The report as a section of the HTML page.

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.drift.changes import drift_report
    >>> drift_section(drift_report(load_potential("emt"), load_potential("emt"), size=2)).name
    'What else has changed'
    """
    return _section(report) if isinstance(report, DriftReport) else _fold_section(report)


def drift_text(report: DriftReport) -> str:
    """Tables and sentences, at most 80 columns wide.

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.drift.changes import drift_report
    >>> report = drift_report(load_potential("emt"), load_potential("emt"), size=2)
    >>> print(drift_text(report).splitlines()[-1].strip())
    short-range instability has appeared. Unstable before already: C-C.
    """
    rows = [_drift_row(kind, drift) for kind, drift in report.drifts.items()]
    lines = [fill(f"{DRIFT}:", WIDTH), *grid(DRIFT_COLUMNS, rows)]
    if report.crystals:
        first, *others = CRYSTAL_COLUMNS
        columns = [first, *(Column(head, column.name) for column in others for head in (*LABELS, "change"))]
        lines += ["", *grid(columns, [_crystal_row(report, name) for name in report.crystals])]
    lines += [
        "",
        *(fill(sentence, WIDTH, subsequent_indent="  ", break_on_hyphens=False) for sentence in sentences(report)),
    ]
    return "\n".join(lines)


def sentences(report: DriftReport) -> list[str]:
    """What the tables do not show: warnings first, then dimers and held-out structures."""
    found = [f"Warning: {warning}" for warning in report.warnings()]
    instabilities = report.instabilities
    if instabilities:
        unstable = [name for name, (before, _) in instabilities.items() if before]
        new = [name for name, (before, after) in instabilities.items() if after and not before]
        appeared = f"short-range instabilities have appeared in {len(new)}"
        verdict = appeared if new else "no short-range instability has appeared"
        had = f" Unstable before already: {', '.join(unstable)}." if unstable else ""
        found.append(f"Dimers ({', '.join(instabilities)}): {verdict}.{had}")
    if report.held_out is not None:
        before, after = report.held_out
        means = ", ".join(
            f"{name} {number(b, 2)} before, {number(a, 2)} after{f' ({changed})' if (changed := change(b, a)) else ''}"
            for name, b, a in (
                ("geometric mean", before.geometric_mean, after.geometric_mean),
                ("median", before.median, after.median),
                ("mean", before.mean, after.mean),
            )
        )
        found.append(
            f"Held out, Delta-Q in amu^1/2 Å over {len(after.rows)} structures: {means}; right basins "
            f"{100 * before.basins:.0f} % before, {100 * after.basins:.0f} % after."
        )
    return [*found, *force_sentences(report)]


def force_sentences(report: DriftReport | FoldDriftReports) -> list[str]:
    """The error of the forces on held-out frames, and why it may rise beside better structures."""
    reports = (report,) if isinstance(report, DriftReport) else report.folds
    errors = [r.force_errors for r in reports if r.force_errors is not None]
    if not errors:
        return []
    before, after = (fmean(pair[k] for pair in errors) for k in (0, 1))
    held_out = [r.held_out for r in reports if r.held_out is not None]
    gain = sum(len(b.rows) * math.log(b.geometric_mean / a.geometric_mean) for b, a in held_out)
    said = f"Forces on held-out frames: mean absolute error {number(before, 3)} eV/Å before, {number(after, 3)} after."
    if after > before and gain > 0:
        said += (
            " It rises although the structures are better, which is no contradiction: training through the relaxation "
            "rewards the structure in which it ends, and forces elsewhere may become less accurate. Where forces "
            "themselves matter, as in molecular dynamics, give --reference a larger weight."
        )
    return [said]


def _section(report: DriftReport) -> Section:
    lead = (
        "Fine-tuning on one kind of structures may make a potential worse elsewhere. Both potentials were evaluated on "
        "rattled structures, crystals and molecules, none of which was trained on in this form; for both, lattice "
        "constants and bulk moduli were computed, and the energies of pairs of atoms at short distances."
    )
    rows = [_cells(_drift_row(kind, drift)) for kind, drift in report.drifts.items()]
    tables = [Table(DRIFT, [_cells([column.page for column in DRIFT_COLUMNS])], rows)]
    if report.crystals:
        short = [Cell(label, NUMBER) for label in (*LABELS, "change")]
        first, *others = CRYSTAL_COLUMNS
        top = [Cell(first.page, rows=2), *(Cell(column.page, span=len(short)) for column in others)]
        rows = [_cells(_crystal_row(report, name)) for name in report.crystals]
        tables.append(Table(CRYSTALS, [top, short * len(others)], rows))
    alt = f"Bars of the change of forces by kind of probe: {_forces(report)}; lattice constants; energies of dimers."
    caption = (
        "Above, the change of the forces by kind of probe, and of each lattice constant. Below, the energy of two "
        "atoms at short range, grey and dashed before, blue after: it must rise to the left. An orange point marks "
        "where a short-range instability begins."
    )
    return Section(TITLE, [lead, *sentences(report)], tables, [picture_of(_figure(report), alt, caption)])


def _figure(report: DriftReport) -> Figure:
    """Drift of the forces by kind, change of the lattice constants, and up to six dimers, unstable ones first."""
    drifts = {KIND_NAMES[kind]: drift.force for kind, drift in report.drifts.items() if drift.n}
    constants = {
        name: 100 * (a.lattice_constant / b.lattice_constant - 1)
        for name, (b, a) in report.crystals.items()
        if math.isfinite(a.lattice_constant) and math.isfinite(b.lattice_constant)
    }
    instabilities = report.instabilities
    dimers = sorted(instabilities, key=lambda name: instabilities[name][1] is None)[:MOST_DIMERS]
    lines = -(-len(dimers) // 2)
    heights = [0.5 + 0.25 * max(1, len(drifts)), 0.5 + 0.22 * max(1, len(constants)), *[1.5] * lines]
    figure = new_figure(sum(heights))
    spec = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    _bars(figure.add_subplot(spec[0, :]), drifts, "change of the force (eV/Å)")
    _bars(figure.add_subplot(spec[1, :]), constants, "change of the lattice constant (%)")
    for k, name in enumerate(dimers):
        _curves(figure.add_subplot(spec[2 + k // 2, k % 2]), report, name)
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


def _curves(axes: Axes, report: DriftReport, name: str) -> None:
    minima = []
    for side, colour, style in ((report.before, GREY, "--"), (report.after, BLUE, "-")):
        curve = side.dimers[name]
        energies = np.array(curve.energies)
        energies[~np.isfinite(energies)] = np.nan
        # Both from the energy at the largest distance, for each potential has its own zero.
        shifted = energies - (energies[-1] if np.isfinite(energies[-1]) else 0.0)
        outer = shifted[len(shifted) // 5 :]
        minima.append(min([0.0, *outer[np.isfinite(outer)]]))
        axes.plot(curve.distances, shifted, style, color=colour, linewidth=1.3)
    found = report.instabilities[name][1]
    if found is not None:
        k = int(np.abs(np.array(curve.distances) - found.distance).argmin())
        axes.plot([curve.distances[k]], [min(shifted[k], min(minima) + RISE)], "o", color=ORANGE, markersize=5)
    axes.set_ylim(min(minima) - FALL, min(minima) + RISE)
    axes.set_title(f"{name} (eV)", fontsize=9, loc="left")
    axes.tick_params(labelsize=8)


def _drift_row(kind: str, drift: Drift) -> list[str]:
    share = f"{100 * drift.force / drift.size:.0f} %" if drift.size > 0 else ""
    return [
        KIND_NAMES[kind], str(drift.n), number(drift.force, 3), share, number(drift.largest, 2),
        number(1000 * drift.energy, 1),
    ]  # fmt: skip


def _crystal_row(report: DriftReport, name: str) -> list[str]:
    before, after = report.crystals[name]
    row = [name]
    for attribute, digits, most in (("lattice_constant", 3, 2), ("bulk_modulus", 1, 0)):
        b, a = (getattr(side, attribute) for side in (before, after))
        share = 100 * (a / b - 1) if b else math.nan
        row += [number(b, digits), number(a, digits), f"{share:+.{most}f} %" if math.isfinite(share) else "-"]
    return row


def _cells(row: Sequence[str]) -> list[Cell]:
    return [Cell(row[0]), *(Cell(text, NUMBER) for text in row[1:])]


def _forces(report: DriftReport | FoldDriftReports) -> str:
    """The change of forces by kind of probe, in words."""
    return ", ".join(f"{KIND_NAMES[kind]} {number(d.force, 3)} eV/Å" for kind, d in report.drifts.items())


def _fold_section(report: FoldDriftReports) -> Section:
    lead = (
        "Each fold tuned a potential of its own, and has a drift report of its own. Here are means over the folds, "
        "with the fold whose forces have changed most, counted from 0, and the largest change of the force on an atom."
    )
    place, head = WORST_FOLD
    heads = [column.page for column in DRIFT_COLUMNS]
    heads.insert(place, head)
    rows = [_cells(_fold_row(report, kind)) for kind in report.drifts]
    alt = f"Bars of the change of forces by kind of probe, means over the folds: {_forces(report)}; a point a fold."
    caption = "The change of the forces, by kind of probe: a bar for the mean over the folds, a point for each fold."
    picture = picture_of(_fold_figure(report), alt, caption)
    return Section(TITLE, [lead, *fold_sentences(report)], [Table(DRIFT, [_cells(heads)], rows)], [picture])


def fold_sentences(report: FoldDriftReports) -> list[str]:
    """What the table does not show: warnings first, then lattice constants."""
    found = [f"Warning: {warning}" for warning in report.warnings()]
    stretches = list(report.stretches())
    if stretches:
        mean = fmean(abs(share) for share, *_ in stretches)
        most, name, fold = max(stretches, key=lambda stretch: abs(stretch[0]))
        found.append(
            f"Lattice constants have changed by {100 * mean:.2f} % on average, and most by {100 * most:+.2f} % "
            f"({name}, fold {fold})."
        )
    return [*found, *force_sentences(report)]


def _fold_figure(report: FoldDriftReports) -> Figure:
    """Drift of the forces by kind: the mean over the folds, and each fold."""
    means = {KIND_NAMES[kind]: drift.force for kind, drift in report.drifts.items() if drift.n}
    figure = new_figure(1.0 + 0.35 * max(1, len(means)))
    axes = figure.add_subplot()
    _bars(axes, means, "change of the force (eV/Å), each fold and their mean")
    for k, kind in enumerate(kind for kind, drift in report.drifts.items() if drift.n):
        forces = [drift.force for drift in report.of_folds(kind).values()]
        axes.plot(forces, [k] * len(forces), "o", color=ORANGE, markersize=4)
    return figure


def _fold_row(report: FoldDriftReports, kind: str) -> list[str]:
    row, worst = _drift_row(kind, report.drift(kind)), report.worst(kind)
    row.insert(WORST_FOLD[0], f"{number(worst[1].force, 3)} (fold {worst[0]})" if worst else "-")
    return row
