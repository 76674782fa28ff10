"""Where the cell moves: the table of docs/evidence.rst, from the cells that benchmarks/study.py has run.

    python benchmarks/study.py run --set pbesol_crystals_45 --potential chgnet    # what has no file yet, fold by fold
    python benchmarks/crystals.py        # writes docs/measured/crystals.txt and docs/evidence_crystals_learning.png

Trains on the compounds of three of five folds (`ase_bptt.datasets.pbesol_crystals`), keeps the epoch that is best on
the fourth, and measures the fifth. "structures" asks only where the relaxation ends (no energy, force or stress of the
reference); "labels" is the Trainer's default, with energies, forces and stresses of the frames beside it; "zero-force"
asks for no force and no stress at the references, without any relaxation, and "squares" does so by their squares and
at its own rate; "stages" does that first, and trains through the relaxation after it; "frames" matches forces and
stresses of all frames, without any relaxation. "stages at 6" is trained on six of the training compounds. Over all
held-out crystals of the folds that were run, each line gives the mean absolute and the median volume error, the median
strain, both with their change against the untuned potential on the same crystals, the shares of crystals whose volume
is better, and worse by more than half a percentage point, and processor time of training, of all folds together. The
figure has the learning curves, with 95 % intervals by bootstrap over compounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
from methods import CURVE
from study import CELLS, Cell, crystals

from ase_bptt.report.plots import new_figure, save

HEAD = (
    f"{'method':16} {'folds':>6} {'n':>4} {'|dV/V| mean':>18} {'median':>8} {'strain':>16} {'better':>7} {'worse':>6} "
    f"{'training':>9}"
)


ALL = 27
"""Where the figure has what was trained on all compounds of the three folds, 25 or 26 of them."""


def errors(rows: Sequence[dict]) -> np.ndarray:
    """Absolute volume errors in %; infinite where the relaxation diverged."""
    return 100 * np.abs([np.inf if row["volume_error"] is None else row["volume_error"] for row in rows])


def strains(rows: Sequence[dict]) -> float:
    """Their median."""
    return float(np.median([np.inf if row["cell_strain"] is None else row["cell_strain"] for row in rows]))


def line(method: str, cells: Sequence[Cell]) -> str:
    """Of one method, over the folds that were run, beside the untuned potential."""
    run = [cell for cell in cells if cell.file.exists() and cell._replace(method="untuned").file.exists()]
    if not run:
        return f"{method:16} {f'0 of {len(cells)}':>6}  not run"
    found = [json.loads(cell.file.read_text()) for cell in run]
    rows = [row for each in found for row in each["test"]["fire"]]
    before = [row for cell in run
              for row in json.loads(cell._replace(method="untuned").file.read_text())["test"]["fire"]]  # fmt: skip
    assert [row["id"] for row in rows] == [row["id"] for row in before]
    now, then = errors(rows), errors(before)
    strain, old = strains(rows), strains(before)
    change = now - then
    seconds = sum(each["processor_seconds"] for each in found)
    return (
        f"{method:16} {f'{len(run)} of {len(cells)}':>6} {len(rows):>4} "
        f"{f'{now.mean():.2f} % ({now.mean() / then.mean() - 1:+.0%})':>18} {f'{np.median(now):.2f} %':>8} "
        f"{f'{strain:.4f} ({strain / old - 1:+.0%})':>16} {np.mean(change < 0):>7.0%} {np.mean(change > 0.5):>6.0%} "
        f"{seconds:>7.0f} s"
    )


def table(potential: str, cells: Sequence[Cell]) -> str:
    """Of one potential, a line for each method of the plan."""
    methods = dict.fromkeys(cell.method for cell in cells)
    lines = [line(name, [cell for cell in cells if cell.method == name]) for name in methods]
    return "\n".join([f"{cells[0].set}, {potential}, held-out compounds", "", HEAD, "-" * len(HEAD), *lines])


def rows_of(potential: str, method: str) -> list[dict]:
    """Of all folds; none where one was not run, for the folds are not alike."""
    cells = [cell for cell in crystals() if (cell.potential, cell.method) == (potential, method)]
    if not all(cell.file.exists() for cell in cells):
        return []
    return [row for cell in cells for row in json.loads(cell.file.read_text())["test"]["fire"]]


def interval(rows: Sequence[dict], measure: Callable[[Sequence[dict]], float]) -> tuple[float, float, float]:
    """A measure, and the 95 % interval of it by bootstrap over compounds."""
    of: dict[str, list[dict]] = {}
    for row in rows:
        of.setdefault(row["group"], []).append(row)
    rng, compounds = np.random.default_rng(0), list(of.values())
    drawn = [
        measure([row for k in rng.integers(len(compounds), size=len(compounds)) for row in compounds[k]])
        for _ in range(1000)
    ]
    return measure(rows), *np.percentile(drawn, (2.5, 97.5))


def learning_curves(potential: str = "chgnet"):
    """Mean volume error and median strain against the number of compounds that were trained on."""
    figure = new_figure(3.2)
    measures = {"mean |dV/V| (%)": lambda rows: errors(rows).mean(), "median strain": strains}
    for axes, (label, measure) in zip(figure.subplots(1, 2), measures.items(), strict=True):
        for k, (name, marker) in enumerate((("structures", "s"), ("stages", "o"))):
            found = {0: "untuned", **{n: f"{name} at {n}" for n in CURVE}, ALL: name}
            points = {n: interval(rows, measure) for n, method in found.items() if (rows := rows_of(potential, method))}
            y = np.array(list(points.values()))
            axes.errorbar(np.array(list(points)) + 0.3 * k, y[:, 0], np.abs(y[:, 1:].T - y[:, 0]), marker=marker,
                          capsize=3, label=name)  # fmt: skip
        axes.set_xlabel("compounds to train on")
        axes.set_xticks([0, *CURVE, ALL], ["0", *map(str, CURVE[:-1]), "", f"{CURVE[-1]}, all"])
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def main() -> None:
    potentials = dict.fromkeys(cell.potential for cell in crystals())
    text = "\n\n".join(table(name, [cell for cell in crystals() if cell.potential == name]) for name in potentials)
    (CELLS.parent / "crystals.txt").write_text(text + "\n")
    save(learning_curves(), CELLS.parent.parent / "evidence_crystals_learning.png")
    print(text)


if __name__ == "__main__":
    main()
