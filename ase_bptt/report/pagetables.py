"""The tables of the page: what stands in which cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..evaluation import Evaluation, Row
from ..result import Status
from .tables import sorted_groups
from .words import change, count, median, number, plural, shorten, symmetry, yes

NUMBER, WORD, WRONG = "number", "", "wrong"
UNIT = "amu^1/2 Å"
ID_WIDTH, LABEL_WIDTH = 40, 16


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
    for (b, a), shown in zip(groups.values(), shorten(list(groups), ID_WIDTH), strict=True):
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
        short = [Cell(label, NUMBER) for label in shorten(labels, LABEL_WIDTH)]
        heads = [
            [Cell("Group", rows=2), Cell("Structures", NUMBER, rows=2), Cell("Start", NUMBER, rows=2),
             Cell("Delta-Q", span=3), Cell("Right basin", span=2)],
            [*short, Cell("change"), *short],
        ]  # fmt: skip
    return Table(caption, heads, rows, "names")


def structures_table(evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str]) -> Table:
    """A structure a row."""
    both = [evaluation] if after is None else [evaluation, after]
    names = shorten([row.id for row in evaluation.rows], ID_WIDTH)
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
        [top, [Cell(label, kind) for _, kind, _ in MEASURES for label in shorten(labels, LABEL_WIDTH)]],
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
