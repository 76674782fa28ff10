"""Tables as text and as CSV."""

from __future__ import annotations

import csv
from pathlib import Path
from textwrap import fill

from ..comparison import Comparison
from ..evaluation import Evaluation
from ..files import replacing
from .grid import Column, grid
from .words import LABELS, change, check_same, comparison_sentences, count, median, number, shorten, symmetry, yes

ID_WIDTH, LABEL_WIDTH = 18, 8
CSV_COLUMNS = (
    "delta_q", "rmsd", "max_displacement", "right_basin", "status", "residual_force", "space_group", "nsteps",
)  # fmt: skip
UNITS = "Delta-Q in amu^1/2 Å; RMSD and largest displacement in Å"


def evaluation_table(evaluation: Evaluation) -> str:
    """A row for each structure, then mean, median and how many are right."""
    columns = [
        Column("structure", align="<"), Column("start", "Delta-Q"), Column("end", "Delta-Q"), Column("RMSD"),
        Column("displ.", "max."), Column("basin", "right"), Column("at ref.", "force"),
        Column("group", "space", "<"), Column("frames"), Column("status", align="<"),
    ]  # fmt: skip
    names = shorten([row.id for row in evaluation.rows], ID_WIDTH)
    rows = [
        [
            name, number(row.unrelaxed, 2), number(row.delta_q, 2), number(row.rmsd, 3),
            number(row.max_displacement, 3), yes(row.right_basin), number(row.residual_force, 3), symmetry(row),
            str(row.nsteps), row.status,
        ]
        for name, row in zip(names, evaluation.rows, strict=True)
    ]  # fmt: skip
    foot = [
        ["mean", number(evaluation.mean_unrelaxed, 2), number(evaluation.mean, 2)],
        ["median", "", number(median(evaluation), 2)],
    ]
    last = f"right basin: {count(evaluation, 'basin')}; space group kept: {count(evaluation, 'symmetry')}"
    return "\n".join([f"{UNITS}; force in eV/Å", *grid(columns, rows, foot), last])


def table(before: Evaluation, after: Evaluation, labels: tuple[str, str] = LABELS) -> str:
    """A row for each structure in two evaluations, then mean, median and how many are in the right basin.

    Raises
    ------
    ValueError
        Where the two are not of the same structures.
    """
    check_same(before, after)
    heads, legend = _heads(labels)
    tops = ("Delta-Q", "RMSD", "max. displ.", "right basin")
    columns = [Column("structure", align="<"), Column("start")]
    columns += [Column(head, top) for top in tops for head in heads]
    columns += [Column(f"status {heads[1]}", align="<")]
    names = shorten([row.id for row in after.rows], ID_WIDTH)
    rows = [
        [
            name, number(b.unrelaxed, 2), *(number(row.delta_q, 2) for row in (b, a)),
            *(number(row.rmsd, 3) for row in (b, a)), *(number(row.max_displacement, 3) for row in (b, a)),
            *(yes(row.right_basin) for row in (b, a)), a.status,
        ]
        for name, b, a in zip(names, before.rows, after.rows, strict=True)
    ]  # fmt: skip
    foot = [
        ["mean", number(before.mean_unrelaxed, 2), number(before.mean, 2), number(after.mean, 2)],
        ["median", "", number(median(before), 2), number(median(after), 2)],
    ]
    said = [change(before.mean, after.mean), change(median(before), median(after))]
    last = f"right basin: {count(before, 'basin')} {labels[0]}, {count(after, 'basin')} {labels[1]}"
    return "\n".join([UNITS, *legend, *grid(columns, rows, foot, said), last])


def group_table(before: Evaluation, after: Evaluation | None = None, labels: tuple[str, str] = LABELS) -> str:
    """A row for each group, the farthest first: structures, mean Delta-Q, structures in the right basin."""
    groups = sorted_groups(before, after)
    columns = [Column("group", align="<"), Column("structures"), Column("start", "mean Delta-Q")]
    heads, legend = _heads(labels)
    if after is None:
        legend = []
        columns += [Column("end", "mean Delta-Q"), Column("right basin")]
    else:
        columns += [Column(head, "mean Delta-Q") for head in heads] + [Column("change", align="<")]
        columns += [Column(head, "right basin") for head in heads]
    names = shorten(list(groups), ID_WIDTH)
    rows = []
    for name, (b, a) in zip(names, groups.values(), strict=True):
        row = [name, str(len(b.rows)), number(b.mean_unrelaxed, 2), number(b.mean, 2)]
        row += [] if a is None else [number(a.mean, 2), change(b.mean, a.mean)]
        rows.append([*row, *(count(e, "basin") for e in (b, a) if e)])
    return "\n".join(["Delta-Q in amu^1/2 Å", *legend, *grid(columns, rows)])


def sorted_groups(
    before: Evaluation, after: Evaluation | None = None
) -> dict[str, tuple[Evaluation, Evaluation | None]]:
    """Each group in one or two evaluations, the one whose mean Delta-Q is largest (at last) first."""
    if after is not None:
        check_same(before, after)
    first, last = before.by_group(), (after or before).by_group()
    # A mean that is not a number is the worst.
    names = sorted(first, key=lambda name: (not last[name].mean < float("inf"), last[name].mean), reverse=True)
    return {name: (first[name], last[name] if after is not None else None) for name in names}


def comparison_text(comparison: Comparison, labels: tuple[str, str] = LABELS) -> str:
    """A comparison in a few lines of plain words."""
    first, *others = comparison_sentences(comparison, labels)
    lines = [fill(text, 96, initial_indent="  ", subsequent_indent="    ") for text in others]
    return "\n".join([first, *lines])


def write_csv(
    path: Path, evaluation: Evaluation, after: Evaluation | None = None, labels: tuple[str, str] = LABELS
) -> None:
    """One row a structure; with two evaluations their columns end in their labels, as delta_q_before.

    Delta-Q in amu^1/2 Å, distances in Å, forces in eV/Å.

    Raises
    ------
    ValueError
        Where the two are not of the same structures.
    """
    if after is not None:
        check_same(evaluation, after)
    columns = [(evaluation, "")] if after is None else [(evaluation, f"_{labels[0]}"), (after, f"_{labels[1]}")]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [name + suffix for _, suffix in columns for name in CSV_COLUMNS]
        writer.writerow(["id", "group", "reference_space_group", "delta_q_unrelaxed", *names])
        for k, row in enumerate(evaluation.rows):
            values = [getattr(e.rows[k], name) for e, _ in columns for name in CSV_COLUMNS]
            writer.writerow([row.id, row.group, row.reference_space_group, row.unrelaxed, *values])


def _heads(labels: tuple[str, str]) -> tuple[tuple[str, str], list[str]]:
    """What stands above the columns, and a line that explains it where the labels are too long for that."""
    if max(map(len, labels)) <= LABEL_WIDTH:
        return labels, []
    return ("(1)", "(2)"), [f"(1) {labels[0]}; (2) {labels[1]}"]
