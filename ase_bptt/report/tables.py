"""Tables of evaluations: as text for the terminal, as CSV, and as cells of the HTML page.

The three take their columns from `ase_bptt.report.columns`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from ..evaluation import Evaluation
from ..evaluation.compare import Comparison, check_same
from ..utils import replacing
from . import (
    LABELS,
    Column,
    cell_lines,
    change,
    comparison_sentences,
    count,
    grid,
    number,
    shorten,
)
from .columns import (
    DISTANCES,
    MEASURES,
    NUMBER,
    OF_CELLS,
    OTHERS,
    START,
    STATUS,
    WORD,
    Cell,
    Table,
    values_of_cell,
)

UNIT = "amu^1/2 Å"
ID_WIDTH, LABEL_WIDTH = 18, 8
PAGE_ID_WIDTH, PAGE_LABEL_WIDTH = 40, 16


UNITS = "Delta-Q in amu^1/2 Å; RMSD and largest displacement in Å"


def evaluation_table(evaluation: Evaluation) -> str:
    """A row for each structure, then mean, median and how many are right.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import RelaxationPair, evaluate, load_potential
    >>> found = evaluate(load_potential("emt"), [RelaxationPair(molecule("N2"), molecule("N2"), "N2")])
    >>> print(evaluation_table(found).splitlines()[-1])
    right basin: 1 of 1; space group kept: -
    """
    measures = (START, *DISTANCES, *OTHERS, STATUS)
    columns = [Column("structure", align="<"), *(m.column for m in measures)]
    names = shorten([row.id for row in evaluation.rows], ID_WIDTH)
    rows = [[name, *(m.text(row) for m in measures)] for name, row in zip(names, evaluation.rows, strict=True)]
    foot = [
        ["mean", number(evaluation.mean_unrelaxed, 2), number(evaluation.mean, 2)],
        ["median", "", number(evaluation.median, 2)],
    ]
    last = f"right basin: {count(evaluation, 'basin')}; space group kept: {count(evaluation, 'symmetry')}"
    return "\n".join([f"{UNITS}; force in eV/Å", *grid(columns, rows, foot), last, *_of_cells([evaluation], ("",))])


def table(before: Evaluation, after: Evaluation, labels: tuple[str, str] = LABELS) -> str:
    """A row for each structure in two evaluations, then mean, median and how many are in the right basin.

    Raises
    ------
    ValueError
        Where the two are not of the same structures.
    """
    check_same(before, after)
    heads, legend = _heads(labels)
    delta_q, *others = (m.column for m in DISTANCES)
    tops = (delta_q.top, *(f"{c.top} {c.name}".strip() for c in others))
    columns = [Column("structure", align="<"), Column(START.column.name)]
    columns += [Column(head, top) for top in tops for head in heads]
    columns += [Column(f"{STATUS.column.name} {heads[1]}", align="<")]
    names = shorten([row.id for row in after.rows], ID_WIDTH)
    rows = [
        [name, START.text(b), *(m.text(row) for m in DISTANCES for row in (b, a)), STATUS.text(a)]
        for name, b, a in zip(names, before.rows, after.rows, strict=True)
    ]
    foot = [
        ["mean", number(before.mean_unrelaxed, 2), number(before.mean, 2), number(after.mean, 2)],
        ["median", "", number(before.median, 2), number(after.median, 2)],
    ]
    changes = [change(before.mean, after.mean), change(before.median, after.median)]
    last = f"right basin: {count(before, 'basin')} {labels[0]}, {count(after, 'basin')} {labels[1]}"
    return "\n".join([UNITS, *legend, *grid(columns, rows, foot, changes), last, *_of_cells([before, after], labels)])


def _of_cells(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> list[str]:
    """The figures of cells that moved, and a table with a row for each of them; nothing where all are fixed."""
    if not evaluations[-1].cells_move:
        return []
    moved = [e.by_cell()[1].rows for e in evaluations]
    heads = labels if max(map(len, labels)) <= LABEL_WIDTH else ("(1)", "(2)")
    columns = [Column("cell", align="<")]
    for column in (m.column for m in OF_CELLS):
        top = f"{column.top} {column.name}".strip()
        columns += [column] if len(evaluations) == 1 else [Column(head, top) for head in heads]
    names = shorten([row.id for row in moved[0]], ID_WIDTH)
    rows = [[name, *(m.text(row) for m in OF_CELLS for row in both)] for name, *both in zip(names, *moved, strict=True)]
    return [*cell_lines(evaluations, labels), "", *grid(columns, rows)]


def cells_table(evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str]) -> Table:
    """For the page: a structure whose cell moved a row."""
    moved = [e.by_cell()[1].rows for e in both_of(evaluation, after)]
    names = shorten([row.id for row in moved[0]], PAGE_ID_WIDTH)
    rows = [
        [Cell(name), *(m.cell(row) for m in OF_CELLS for row in both)]
        for name, *both in zip(names, *moved, strict=True)
    ]
    heads = _page_heads([("Structure", WORD)], [(m.column.page, [m.kind] * len(moved)) for m in OF_CELLS], labels)
    return Table("Cells that moved, against the references'", heads, rows, "names")


def structures_table(evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str]) -> Table:
    """For the page: a structure a row."""
    both = both_of(evaluation, after)
    measures = (*DISTANCES, *OTHERS)
    names = shorten([row.id for row in evaluation.rows], PAGE_ID_WIDTH)
    rows = []
    for k, row in enumerate(evaluation.rows):
        below = row.group if row.group != row.id else ""
        cells = [m.cell(e.rows[k]) for m in measures for e in both]
        rows.append([Cell(names[k], below=below), START.cell(row), *cells])
    first = [("Structure", WORD), (START.column.page, START.kind)]
    heads = _page_heads(first, [(m.column.page, [m.kind] * len(both)) for m in measures], labels)
    return Table(f"Delta-Q in {UNIT}; below each name its group", heads, rows, "names")


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
    both = both_of(evaluation, after)
    suffixes = [""] if after is None else [f"_{label}" for label in labels]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        keys = [*(m.key for m in MEASURES), *values_of_cell(evaluation.rows[0])]
        names = [key + suffix for suffix in suffixes for key in keys]
        writer.writerow(["id", "group", "reference_space_group", f"delta_q_{START.key}", *names])
        for k, row in enumerate(evaluation.rows):
            values = [
                value
                for found in (e.rows[k] for e in both)
                for value in (*(getattr(found, m.key) for m in MEASURES), *values_of_cell(found).values())
            ]
            writer.writerow([row.id, row.group, row.reference_space_group, row.unrelaxed, *values])


GROUP = (Column("structures", page="Structures"), Column("start", "mean Delta-Q", page="Start"))
GROUP_ENDS = (Column("end", "mean Delta-Q", page="Delta-Q"), Column("right basin", page="Right basin"))
"""Of each group, the columns that stand once, and those that stand for each evaluation."""


def group_table(before: Evaluation, after: Evaluation | None = None, labels: tuple[str, str] = LABELS) -> str:
    """A row for each group, the farthest first: structures, mean Delta-Q, structures in the right basin."""
    columns = [Column("group", align="<"), *GROUP]
    heads, legend = _heads(labels)
    if after is None:
        legend = []
        columns += GROUP_ENDS
    else:
        delta_q, basin = GROUP_ENDS
        columns += [Column(head, delta_q.top) for head in heads] + [Column("change", align="<")]
        columns += [Column(head, basin.name) for head in heads]
    rows = [[cell.text for cell in row] for row in _group_rows(before, after, ID_WIDTH)]
    return "\n".join([f"Delta-Q in {UNIT}", *legend, *grid(columns, rows)])


def groups_table(evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str]) -> Table:
    """For the page: a group a row, the farthest first."""
    first = [("Group", WORD), *((column.page, NUMBER) for column in GROUP)]
    kinds = [NUMBER] if after is None else [NUMBER, NUMBER]
    delta_q, basin = (column.page for column in GROUP_ENDS)
    heads = _page_heads(first, [(delta_q, kinds), (basin, kinds)], labels, change_of=delta_q)
    caption = f"Mean Delta-Q in {UNIT}, by group, the farthest first"
    return Table(caption, heads, _group_rows(evaluation, after, PAGE_ID_WIDTH), "names")


def _group_rows(before: Evaluation, after: Evaluation | None, width: int) -> list[list[Cell]]:
    groups = sorted_groups(before, after)
    rows = []
    for name, (b, a) in zip(shorten(list(groups), width), groups.values(), strict=True):
        both = both_of(b, a)
        rows.append([
            Cell(name), Cell(str(len(b.rows)), NUMBER), Cell(number(b.mean_unrelaxed, 2), NUMBER),
            *(Cell(number(e.mean, 2), NUMBER) for e in both), *([Cell(change(b.mean, a.mean), WORD)] if a else []),
            *(Cell(count(e, "basin"), NUMBER) for e in both),
        ])  # fmt: skip
    return rows


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
    """A comparison in a few lines, at most 96 columns wide."""
    first, *others = comparison_sentences(comparison, labels)
    lines = [fill(text, 96, initial_indent="  ", subsequent_indent="    ") for text in others]
    return "\n".join([first, *lines])


def both_of(evaluation: Evaluation, after: Evaluation | None) -> list[Evaluation]:
    """One or two evaluations as a list."""
    return [evaluation] if after is None else [evaluation, after]


def _heads(labels: tuple[str, str]) -> tuple[tuple[str, str], list[str]]:
    """What stands above the columns, and a line that explains it where the labels are too long for that."""
    if max(map(len, labels)) <= LABEL_WIDTH:
        return labels, []
    return ("(1)", "(2)"), [f"(1) {labels[0]}; (2) {labels[1]}"]


def _page_heads(
    first: Sequence[tuple[str, str]],
    measures: Sequence[tuple[str, Sequence[str]]],
    labels: tuple[str, str],
    change_of: str = "",
) -> list[list[Cell]]:
    """One row of heads for one evaluation; for two, a head above the labels of each measure."""
    if all(len(kinds) == 1 for _, kinds in measures):
        return [[*(Cell(*head) for head in first), *(Cell(name, kind) for name, (kind,) in measures)]]
    top = [Cell(*head, rows=2) for head in first]
    low: list[Cell] = []
    for name, kinds in measures:
        top.append(Cell(name, span=len(kinds) + (name == change_of)))
        low += [Cell(label, kind) for label, kind in zip(shorten(labels, PAGE_LABEL_WIDTH), kinds, strict=True)]
        low += [Cell("change")] if name == change_of else []
    return [top, low]
