"""Tables of evaluations, for the terminal, as CSV and for the page."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from textwrap import fill

from ..evaluation import Evaluation, Row
from ..evaluation.compare import Comparison
from ..iterated_map import Status
from ..utils import replacing
from . import LABELS, change, check_same, comparison_sentences, count, median, number, plural, shorten, symmetry, yes


@dataclass(frozen=True)
class Column:
    """A column's name, its alignment, and what stands above it and above its neighbours that say the same."""

    name: str
    top: str = ""
    align: str = ">"


def grid(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    foot: Sequence[Sequence[str]] = (),
    remarks: Sequence[str] = (),
) -> list[str]:
    """Lines of a table: its head, its rows, and a foot whose rows may end early, with a remark each."""
    gaps = [0] + [1 if b.top and b.top == a.top else 2 for a, b in pairwise(columns)]
    widths = [_width(k, columns[k].name, [*rows, *foot]) for k in range(len(columns))]
    tops = ""
    for first, last in _spans(columns):
        top = columns[first].top
        room = sum(widths[first:last]) + sum(gaps[first + 1 : last])
        for extra in range(len(top) - room):
            widths[first + extra % (last - first)] += 1
        align = "^" if last - first > 1 else columns[first].align
        tops += " " * gaps[first] + f"{top:{align}{max(room, len(top))}}"

    def line(cells: Sequence[str]) -> str:
        return "".join(
            " " * gap + f"{cell:{column.align}{width}}"
            for cell, gap, column, width in zip(cells, gaps, columns, widths)
        )

    head = line([column.name for column in columns])
    rule = "-" * len(head)
    lines = [tops, head, rule, *map(line, rows)]
    if foot:
        remarks = [*remarks, *[""] * (len(foot) - len(remarks))]
        lines += [rule, *(f"{line(cells)}  {remark}" for cells, remark in zip(foot, remarks))]
    return [text.rstrip() for text in lines if text.strip()]


def _width(k: int, name: str, rows: Sequence[Sequence[str]]) -> int:
    return max([len(name), *(len(row[k]) for row in rows if k < len(row))])


def _spans(columns: Sequence[Column]) -> list[tuple[int, int]]:
    """First and one past last of each run of columns below the same top."""
    starts = [k for k, c in enumerate(columns) if k == 0 or not c.top or c.top != columns[k - 1].top]
    return list(zip(starts, [*starts[1:], len(columns)]))


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


NUMBER, WORD, WRONG = "number", "", "wrong"
UNIT = "amu^1/2 Å"
PAGE_ID_WIDTH, PAGE_LABEL_WIDTH = 40, 16


@dataclass(frozen=True)
class Cell:
    """Text, how it is set, small text below it; for heads also how many columns and rows it spans."""

    text: str
    kind: str = ""
    below: str = ""
    span: int = 1
    rows: int = 1


@dataclass(frozen=True)
class Table:
    """A caption, rows of heads, rows of cells of which the first names the row, and a class."""

    caption: str
    heads: Sequence[Sequence[Cell]]
    rows: Sequence[Sequence[Cell]]
    kind: str = ""


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Names and values."""
    return Table("Potential, settings, versions", [], [[Cell(name), Cell(value)] for name, value in facts], "facts")


def summary_table(evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str]) -> Table:
    """A measure a row; the values of one or two evaluations and the change."""
    both = [evaluation] if after is None else [evaluation, after]
    measures: list[tuple[str, Callable[[Evaluation], float], int]] = [
        (f"Mean Delta-Q ({UNIT})", lambda e: e.mean, 2),
        (f"Median Delta-Q ({UNIT})", median, 2),
        ("Mean force at the reference (eV/Å)", lambda e: fmean(row.residual_force for row in e.rows), 3),
    ]
    rows = [[Cell(f"Mean Delta-Q of the starts ({UNIT})"),
             *(Cell(number(e.mean_unrelaxed, 2), NUMBER) for e in both), Cell("")]]  # fmt: skip
    for name, measure, digits in measures:
        values = [measure(e) for e in both]
        said = change(values[0], values[1]) if after is not None else ""
        rows.append([Cell(name), *(Cell(number(v, digits), NUMBER) for v in values), Cell(said)])
    counts: list[tuple[str, Callable[[Evaluation], str]]] = [
        ("In the right basin", lambda e: count(e, "basin")),
        ("Space group of the reference kept", lambda e: count(e, "symmetry")),
        ("Converged", lambda e: f"{sum(_converged(row) for row in e.rows)} of {len(e.rows)}"),
    ]
    rows += [[Cell(name), *(Cell(said(e), NUMBER) for e in both), Cell("")] for name, said in counts]
    if after is None:
        heads = [Cell("Measure"), Cell("Value", NUMBER)]
        rows = [row[:-1] for row in rows]
    else:
        heads = [Cell("Measure"), *(Cell(label, NUMBER) for label in labels), Cell("Change")]
    sizes = f"{plural(len(evaluation.rows), 'structure')} in {plural(len(evaluation.by_group()), 'group')}"
    return Table(sizes, [heads], rows)


def groups_table(evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str]) -> Table:
    """A group a row, the farthest first."""
    groups = sorted_groups(evaluation, after)
    rows = []
    for (b, a), shown in zip(groups.values(), shorten(list(groups), PAGE_ID_WIDTH), strict=True):
        both = [b] if a is None else [b, a]
        rows.append([
            Cell(shown), Cell(str(len(b.rows)), NUMBER), Cell(number(b.mean_unrelaxed, 2), NUMBER),
            *(Cell(number(e.mean, 2), NUMBER) for e in both), *([Cell(change(b.mean, a.mean), WORD)] if a else []),
            *(Cell(count(e, "basin"), NUMBER) for e in both),
        ])  # fmt: skip
    caption = f"Mean Delta-Q in {UNIT}, by group, the farthest first"
    if after is None:
        heads = [[Cell("Group"), *(Cell(t, NUMBER) for t in ("Structures", "Start", "Delta-Q", "Right basin"))]]
    else:
        short = [Cell(label, NUMBER) for label in shorten(labels, PAGE_LABEL_WIDTH)]
        heads = [
            [Cell("Group", rows=2), Cell("Structures", NUMBER, rows=2), Cell("Start", NUMBER, rows=2),
             Cell("Delta-Q", span=3), Cell("Right basin", span=2)],
            [*short, Cell("change"), *short],
        ]  # fmt: skip
    return Table(caption, heads, rows, "names")


def structures_table(evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str]) -> Table:
    """A structure a row."""
    both = [evaluation] if after is None else [evaluation, after]
    names = shorten([row.id for row in evaluation.rows], PAGE_ID_WIDTH)
    rows = []
    for k, row in enumerate(evaluation.rows):
        cells = [measure(e.rows[k]) for _, _, measure in MEASURES for e in both]
        below = row.group if row.group != row.id else ""
        rows.append([Cell(names[k], below=below), Cell(number(row.unrelaxed, 2), NUMBER), *cells])
    caption = f"Delta-Q in {UNIT}; below each name its group"
    if after is None:
        heads = [Cell("Structure"), Cell("Start", NUMBER), *(Cell(name, kind) for name, kind, _ in MEASURES)]
        return Table(caption, [heads], rows, "names")
    top = [Cell("Structure", rows=2), Cell("Start", NUMBER, rows=2), *(Cell(name, span=2) for name, _, _ in MEASURES)]
    return Table(
        caption,
        [top, [Cell(label, kind) for _, kind, _ in MEASURES for label in shorten(labels, PAGE_LABEL_WIDTH)]],
        rows,
        "names",
    )


def _converged(row: Row) -> bool:
    return row.status == Status.CONVERGED.value


def _symmetry(row: Row) -> Cell:
    return Cell(symmetry(row), WORD if row.symmetry_kept else WRONG)


def _frames(row: Row) -> Cell:
    return Cell(str(row.nsteps), NUMBER) if _converged(row) else Cell(str(row.nsteps), f"{NUMBER} wrong", row.status)


MEASURES: tuple[tuple[str, str, Callable[[Row], Cell]], ...] = (
    ("Delta-Q", NUMBER, lambda row: Cell(number(row.delta_q, 2), NUMBER)),
    ("RMSD (Å)", NUMBER, lambda row: Cell(number(row.rmsd, 3), NUMBER)),
    ("Largest displacement (Å)", NUMBER, lambda row: Cell(number(row.max_displacement, 3), NUMBER)),
    ("Right basin", WORD, lambda row: Cell(yes(row.right_basin), WORD if row.right_basin else WRONG)),
    ("Force at the reference (eV/Å)", NUMBER, lambda row: Cell(number(row.residual_force, 3), NUMBER)),
    ("Space group", WORD, _symmetry),
    ("Frames", NUMBER, _frames),
)
"""Of each structure: the head of its column, how it is set, and the cell."""
