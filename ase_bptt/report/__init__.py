"""How results are shown: the words, numbers and text columns that tables, plots and pages share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import PurePosixPath

from ase.spacegroup import Spacegroup

from ..evaluation import Evaluation, Row
from ..evaluation.compare import LEVEL, Change, Comparison

LABELS = ("before", "after")
NONE = "-"
MANY = 10
"""A value that has grown by this factor is given as a multiple, not in per cent."""


def number(value: float | None, digits: int) -> str:
    """With so many decimals; a dash where it is not finite, and nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if math.isfinite(value) else NONE


def yes(value: bool) -> str:
    """As "yes" or "no"."""
    return "yes" if value else "no"


def change(before: float, after: float) -> str:
    """The change in per cent, in words; empty where it is not defined."""
    if before == 0 or not math.isfinite(before) or not math.isfinite(after):
        return ""
    return _percent((after - before) / before)


def _percent(value: float) -> str:
    if value == 0:
        return "unchanged"
    if value >= MANY - 1:
        return f"{1 + value:.0f} times as high"
    amount = "less than 1 %" if abs(value) < 0.005 else f"{100 * abs(value):.0f} %"
    return f"{amount} {'lower' if value < 0 else 'higher'}"


def symmetry(row: Row) -> str:
    """Whether the end has the reference's space group, as "kept", "lost: P1" or "other: P-43m".

    "lost" where the end has fewer rotations and reflections than the reference; a dash where the
    reference is not a crystal.
    """
    if not row.reference_space_group:
        return NONE
    if row.symmetry_kept:
        return "kept"
    fewer = _order(row.space_group) < _order(row.reference_space_group)
    return f"{'lost' if fewer else 'other'}: {row.space_group.split(' (')[0] or 'none'}"


@lru_cache(maxsize=256)
def _order(space_group: str) -> int:
    """Rotations and reflections in the point group of "Fd-3m (227)"."""
    found = re.search(r"\((\d+)\)$", space_group)
    if not found:
        return 0
    rotations, _ = Spacegroup(int(found[1])).get_op()
    return len({rotation.tobytes() for rotation in rotations})


def count(evaluation: Evaluation, what: str) -> str:
    """As "9 of 10": how many are in the right "basin", or keep the "symmetry" of their reference."""
    if what == "basin":
        return f"{sum(row.right_basin for row in evaluation.rows)} of {len(evaluation.rows)}"
    crystals = [row for row in evaluation.rows if row.reference_space_group]
    return f"{sum(row.symmetry_kept for row in crystals)} of {len(crystals)}" if crystals else NONE


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Without a leading folder that is common to all, and cut to a width.

    Cut on the left or, where they would not stay distinct, on the right or in the middle; where that is not enough
    either, they stay wider.
    """
    parts = [PurePosixPath(name).parts[:-1] for name in names]
    common = 0
    while len(names) > 1 and all(len(p) > common for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    names = [str(PurePosixPath(*PurePosixPath(name).parts[common:])) if common else name for name in names]
    for wide in range(width, max(map(len, names), default=width) + 1):
        for left in (0, wide - 1, wide // 2):
            cut = [_cut(name, wide, left) for name in names]
            if len(set(cut)) == len(set(names)):
                return cut
    return list(names)


def _cut(name: str, width: int, left: int) -> str:
    return name if len(name) <= width else name[:left] + "…" + name[len(name) - (width - left - 1) :]


def plural(n: int, noun: str) -> str:
    """As "1 group" or "2 groups"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def headline(evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str], unit: str) -> str:
    """The result in a sentence or two."""
    n = plural(len(evaluation.rows), "structure")
    basins = count(evaluation, "basin")
    if after is None:
        return (
            f"After relaxation {n} lie at a mean Delta-Q of {number(evaluation.mean, 2)} {unit} from the reference "
            f"(unrelaxed: {number(evaluation.mean_unrelaxed, 2)}). {basins} are in the right basin."
        )
    said = change(evaluation.mean, after.mean)
    said = f", {said}" if said else ""
    first, last = (number(e.mean, 2) if math.isfinite(e.mean) else "not finite" for e in (evaluation, after))
    return (
        f"Mean Delta-Q to the reference over {n}, in {unit}: {first} ({labels[0]}), {last} ({labels[1]}){said}. "
        f"In the right basin: {basins} ({labels[0]}), {count(after, 'basin')} ({labels[1]})."
    )


def comparison_sentences(comparison: Comparison, labels: tuple[str, str] = LABELS) -> list[str]:
    """The findings of a comparison, a line each."""
    c = comparison
    return [
        f"From {labels[0]} to {labels[1]}, over {plural(c.n, 'structure')} in {plural(c.groups, 'group')}:",
        f"Mean Delta-Q: {_interval(c.mean, c.groups)}.",
        f"Geometric mean of Delta-Q, in which each structure counts alike: {_interval(c.geometric_mean, c.groups)}.",
        _test(c),
        f"Better (by more than 1 % and 0.005 amu^1/2 Å): {c.better} of {c.n}; worse: {c.worse}."
        + (
            f" Median over structures: {_percent(-c.median_improvement)}."
            if math.isfinite(c.median_improvement)
            else ""
        ),
        f"Right basin: {c.basins_won} won, {c.basins_lost} lost.",
        *(
            [
                f"Volume nearer the reference's (by more than 0.1 %): {c.cells_better} of {c.cells} whose cells moved; "
                f"farther: {c.cells_worse}."
            ]
            if c.cells
            else []
        ),
        *([f"Left out of means and test: {plural(c.left_out, 'structure')} that diverged."] if c.left_out else []),
    ]


def _interval(found: Change, groups: int) -> str:
    if not math.isfinite(found.value):
        return "no change can be computed"
    said = _percent(found.value)
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return f"{said} ({'one group, so there is' if groups == 1 else 'there is'} no interval)"
    reach = f"{100 * found.low:+.0f} to {100 * found.high:+.0f} %"
    chance = ", which includes no change" if found.low <= 0 <= found.high else ""
    return f"{said} ({100 * LEVEL:.0f} % interval {reach}{chance})"


def _test(comparison: Comparison) -> str:
    p, groups = comparison.p_value, comparison.groups
    if not math.isfinite(p):
        return "Wilcoxon's signed-rank test over groups: not possible."
    said = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    sentence = f"Wilcoxon's signed-rank test over {plural(groups, 'group')}: {said}"
    # Two-sided: all groups change the same way in 2 of 2^groups cases.
    least = 2 / 2**groups
    if least >= 1 - LEVEL:
        sentence += f"; with so few groups it cannot fall below {min(least, 1):.2g}, whatever the change"
    return sentence + "."


@dataclass(frozen=True)
class Column:
    """A column's head in the terminal (two lines, of which neighbours may share the upper one) and on the page."""

    name: str
    top: str = ""
    align: str = ">"
    page: str = ""


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


def cell_lines(evaluations: Sequence[Evaluation], labels: Sequence[str] = ("",)) -> list[str]:
    """How far the cells that moved are from the references', and fixed ones apart; nothing where all are fixed."""
    if not evaluations[-1].cells_move:
        return []
    fixed, moved = zip(*(e.by_cell() for e in evaluations), strict=True)

    def said(of: Sequence[Evaluation], text: Callable[[Evaluation], str]) -> str:
        return ", ".join(f"{text(e)} {label}".strip() for e, label in zip(of, labels, strict=True))

    lines = [
        f"cells that moved ({len(moved[-1].rows)}): mean absolute volume error "
        f"{said(moved, lambda e: f'{100 * e.volume_error:.2f} %')}; "
        f"median strain {said(moved, lambda e: f'{e.cell_strain:.4f}')}",
        f"  mean absolute error of a, b, c {said(moved, lambda e: f'{e.lattice_errors[0]:.3f} Å')}; "
        f"of the angles {said(moved, lambda e: f'{e.lattice_errors[1]:.2f}°')}; "
        f"median RMSD / (V/n)^(1/3) {said(moved, lambda e: f'{e.scaled_rmsd:.4f}')}; "
        f"in the reference's space group {said(moved, lambda e: count(e, 'symmetry'))}",
    ]
    if fixed[-1].rows:
        for name, of in (("moved", moved), ("fixed", fixed)):
            lines.append(
                f"cell {name} ({len(of[-1].rows)}): mean Delta-Q {said(of, lambda e: number(e.mean, 2))}; "
                f"right basin {said(of, lambda e: count(e, 'basin'))}"
            )
    return lines
