"""Tables as text."""

from __future__ import annotations

from ..evaluation import Evaluation


def table(before: Evaluation, after: Evaluation) -> str:
    """A row for each held-out structure, before and after; then mean, median and basins."""
    width = max(len("structure"), *(len(row.id) for row in after.rows))
    head = (
        f"{'':{width}}            Delta-Q (amu^1/2 Å)        RMSD (Å)     max. displ. (Å)   right basin   status\n"
        f"{'structure':{width}}   unrelaxed  before   after   before  after   before  after   before after   after"
    )
    lines = [head, "-" * len(head.splitlines()[1])]
    for b, a in zip(before.rows, after.rows, strict=True):
        lines.append(
            f"{a.id:{width}}   {b.unrelaxed:9.2f} {b.delta_q:7.2f} {a.delta_q:7.2f}   {b.rmsd:6.3f} {a.rmsd:6.3f}   "
            f"{b.max_displacement:6.3f} {a.max_displacement:6.3f}   {_yes(b.right_basin):>6} "
            f"{_yes(a.right_basin):>5}   {a.status}"
        )
    lines.append(lines[1])
    lines.append(
        f"{'mean':{width}}   {before.mean_unrelaxed:9.2f} {before.mean:7.2f} {after.mean:7.2f}   "
        f"{change(before.mean, after.mean)}"
    )
    lines.append(
        f"{'median':{width}}   {'':9} {before.median:7.2f} {after.median:7.2f}   {change(before.median, after.median)}"
    )
    right = [sum(row.right_basin for row in e.rows) for e in (before, after)]
    lines.append(f"right basins: {right[0]} of {len(before.rows)} before, {right[1]} after")
    return "\n".join(lines)


def change(before: float, after: float) -> str:
    """The change in per cent, in words."""
    if before == 0:
        return ""
    percent = 100 * (after - before) / before
    return f"{abs(percent):.0f} % {'lower' if percent < 0 else 'higher'}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
