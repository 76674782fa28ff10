"""Columns of text that stand below each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


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
