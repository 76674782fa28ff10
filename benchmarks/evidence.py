"""Tables and figures of docs/evidence.rst, from the cells that benchmarks/study.py has run.

    python benchmarks/evidence.py

Writes docs/measured/evidence_*.txt and docs/evidence_*.png. All seeds and folds of a method are pooled; intervals are
95 %, by bootstrap over kinds, so that neither seeds nor rattles of a kind count as independent. Methods are compared
with the default on the structures of the cells that both have. Cells that were not run are counted and named.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from itertools import product

import numpy as np
from methods import METHODS, VARIANTS
from study import BESIDE, CELLS, COMPARED, DEFECTS, EMBEDDED, ON_DFT, Cell, defects, plan

from ase_bptt.datasets import FOLDS
from ase_bptt.evaluation import Evaluation
from ase_bptt.evaluation.compare import Comparison, compare
from ase_bptt.report.plots import before_after, new_figure, save

DOCS = CELLS.parent.parent
MATCHED = 0.25
"""Largest displacement over (V/n)^(1/3) below which the field counts two structures as matched."""
FAR = 4.0
"""amu^1/2 Å: an end farther off than this is in another minimum, or the potential has none at the reference."""
FAMILIES = {
    "native defects and crystals": r"V2?|I_.|crystal",
    "one or two far substituents": r"[A-Za-z]+_ss?",
    "interstitials": r"[A-Z][a-z]?_i",
    "substituents by a vacancy": r"[A-Z][a-z]?V",
    "pairs of nearest neighbours": r".+_nn1",
    "pairs of second neighbours": r".+_nn2",
}
OTHERS = "others"
TRAINED_ON = {"default": "structures, energies, forces", "structures": "structures", "forces": "forces"}
"""What each method of the summary takes from the reference relaxations."""
HEAD = (
    f"{'method':22} {'cells':>7} {'n':>4} {'mean':>6} {'quartiles':>11} {'median':>6} {'geom.':>6} "
    f"{'change of geom.':>18} {'of the mean':>18} {'better':>7} {'tied':>5} {'closer':>7} {'median':>7} "
    f"{'basins':>8} {'matched':>8} {'RMSD':>6} {'force':>6} {'drift':>6}"
)
LEGEND = """\
Delta-Q in amu^1/2 Å by FIRE to 0.02 eV/Å; change of the geometric mean and of the mean against the untuned
potential, with 95 % intervals over kinds; better: share that improved by more than 1 % and 0.005 amu^1/2 Å; closer:
share that ends closer to the reference than it started; median: of the relative improvement; basins: won and lost;
matched: share whose largest displacement is below 0.25 (V/n)^(1/3), and the mean RMSD of those, in that unit; force:
mean absolute error on the reference frames, meV/Å; drift: root mean square change of the forces on other structures,
meV/Å (DFT set only)."""


class Pool:
    """All cells of one method that were run, with the untuned potential on the same structures.

    Parameters
    ----------
    cells : sequence of Cell
        Of one set, potential and method.
    side : str
        "test" or "valid".
    """

    def __init__(self, cells: Sequence[Cell], side: str = "test"):
        self.planned, self.side = len(cells), side
        self.cells = [cell for cell in cells if cell.file.exists()]
        self.found = [json.loads(cell.file.read_text()) for cell in self.cells]
        self.rows = [row for found in self.found for row in found[side]["fire"]]
        self.untuned = [row for cell in self.cells for row in untuned(cell, side)]
        self.force_error = np.mean([found[side]["force_error"] for found in self.found]) if self.found else np.nan
        drifts = [found["drift"]["force"] for found in self.found if found.get("drift")]
        self.drift = np.mean(drifts) if drifts else np.nan

    @property
    def evaluation(self) -> Evaluation:
        """Of the tuned potentials."""
        return evaluation(self.rows)

    @property
    def comparison(self) -> Comparison:
        """Against the untuned potential."""
        return compare(evaluation(self.untuned), self.evaluation)

    def line(self, name: str) -> str:
        """A line of the table."""
        if not self.cells:
            return f"{name:22} {f'0 of {self.planned}':>7}  not run"
        e, c = self.evaluation, self.comparison
        matched = [row["scaled_rmsd"] for row in self.rows if row["scaled_displacement"] < MATCHED]
        low, high = e.quartiles
        return (
            f"{name:22} {f'{len(self.cells)} of {self.planned}':>7} {len(self.rows):>4} {e.mean:>6.2f} "
            f"{f'{low:.2f}-{high:.2f}':>11} {e.median:>6.2f} {e.geometric_mean:>6.2f} {c.geometric_mean!s:>18} "
            f"{c.mean!s:>18} {c.improved:>7.0%} {c.tied / c.n:>5.0%} {e.closer_than_start:>7.0%} "
            f"{c.median_improvement:>+7.0%} {f'+{c.basins_won} -{c.basins_lost}':>8} "
            f"{len(matched) / len(self.rows):>8.0%} "
            f"{np.mean(matched):>6.3f} {1000 * self.force_error:>6.0f} "
            f"{'-' if np.isnan(self.drift) else f'{1000 * self.drift:.0f}':>6}"
        )

    def against(self, other: Pool) -> tuple[int, Comparison | None]:
        """The rows of seeds and folds that both have, by this method against by the other; how many."""
        mine, theirs = ({(c.seed, c.fold): found[p.side]["fire"] for c, found in zip(p.cells, p.found, strict=True)}
                        for p in (self, other))  # fmt: skip
        common = sorted(mine.keys() & theirs.keys())
        rows = [pair for key in common for pair in zip(theirs[key], mine[key], strict=True)]
        return len(rows), compared(rows)[2] if rows else None


def strata(pools: dict[str, Pool]) -> str:
    """What is gained where the untuned potential ends near, and where it ends far off."""
    lines = []
    for name, pool in pools.items():
        if name == "untuned" or not pool.cells:
            continue
        for far in (False, True):
            rows = [(a, b) for a, b in zip(pool.untuned, pool.rows, strict=True) if (a["delta_q"] >= FAR) is far]
            if not rows:
                continue
            before, after, c = compared(rows)
            same = f"; {sum(a['right_basin'] for a, _ in rows)} where the reference itself ends" if far else ""
            lines.append(
                f"{name:22} untuned {'at least' if far else 'below   '} {FAR:g}: {len(rows):>4} rows, geometric mean "
                f"{c.geometric_mean}, mean {before.mean:.2f} to {after.mean:.2f}, {c.improved:.0%} better{same}"
            )
    return "\n".join(lines)


def against_default(pools: dict[str, Pool]) -> str:
    """Each method and the default on the same structures: what their separate intervals cannot tell apart."""
    lines = []
    for name, pool in pools.items():
        n, found = (0, None) if name in ("untuned", "default") else pool.against(pools["default"])
        if found is not None:
            lines.append(
                f"{name:22} against default: {n:>4} rows, geometric mean {found.geometric_mean}, mean {found.mean}, "
                f"{found.improved:.0%} nearer, {1 - found.improved - found.tied / found.n:.0%} farther, basins "
                f"+{found.basins_won} -{found.basins_lost}"
            )
    return "\n".join(lines)


def cost(pools: dict[str, Pool]) -> str:
    """When the cells were run, and the processor time of their trainings."""
    found = [cell for pool in pools.values() for cell in pool.found]
    dates, torches, machines = (sorted({cell[name] for cell in found}) for name in ("date", "torch", "machine"))
    hours = sum(cell["processor_seconds"] for cell in found) / 3600
    return (
        f"{len(found)} cells, {hours:.1f} core hours of training, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
        f"torch {', '.join(torches)}, {', '.join(machines)}"
    )


def by_family(pool: Pool) -> str:
    """What the default gains on each family of defects, over all cells that were run."""
    found: dict[str, list] = {}
    for before, after in zip(pool.untuned, pool.rows, strict=True):
        family = next((name for name, pattern in FAMILIES.items() if re.fullmatch(pattern, before["group"])), OTHERS)
        found.setdefault(family, []).append((before, after))
    lines = []
    for name in filter(found.get, [*FAMILIES, OTHERS]):
        before, after, c = compared(found[name])
        lines.append(
            f"default, {name:28} {len(found[name]):>4} rows, geometric mean {before.geometric_mean:.2f} to "
            f"{after.geometric_mean:.2f}, {c.geometric_mean}, {c.improved:.0%} better"
        )
    return "\n".join(lines)


def compared(rows: Sequence[tuple[dict, dict]]) -> tuple[Evaluation, Evaluation, Comparison]:
    """Rows of the untuned and of the tuned potential, and the one against the other."""
    before, after = (evaluation(side) for side in zip(*rows, strict=True))
    return before, after, compare(before, after)


def untuned(cell: Cell, side: str) -> list[dict]:
    """Rows of the untuned potential on the cell's structures: they do not depend on the seed."""
    found = json.loads(cell._replace(method="untuned", seed=0).file.read_text())
    return found[side]["fire"]


def evaluation(rows: Sequence[dict]) -> Evaluation:
    """As `ase_bptt.evaluation` has it; null was not a number, but for what is said of cells, which are fixed here."""
    blank = {"displacements": (), "space_group": "", "reference_space_group": ""}
    cells = ("scaled_", "volume_error", "cell_strain", "lattice_error")
    keep = [{k: np.nan if v is None else v for k, v in row.items() if not k.startswith(cells)} for row in rows]
    return Evaluation.from_rows([row | blank for row in keep])


def table(title: str, pools: dict[str, Pool]) -> str:
    """A title, a line for each method, near and far structures apart, and the legend."""
    lines = [title, "", HEAD, "-" * len(HEAD), *(pool.line(name) for name, pool in pools.items())]
    defects = by_family(pools["default"]) if pools["default"].cells else ""
    parts = ["\n".join(lines), against_default(pools), strata(pools), defects, LEGEND, cost(pools)]
    return "\n\n".join(filter(None, parts))


def summary(by_potential: dict[str, dict[str, Pool]]) -> str:
    """What each way of training changes for each potential on the embedded set: a line for each that was run."""
    head = (
        f"{'potential':14} {'trained on':30} {'cells':>6} {'n':>4} {'geometric mean':>29} {'mean':>17} "
        f"{'better':>7} {'median':>7} {'basins':>8}"
    )
    lines = [head, "-" * len(head)]
    for potential, found in by_potential.items():
        for name, trained_on in TRAINED_ON.items():
            if (pool := found[name]).cells:
                before, after, c = evaluation(pool.untuned), pool.evaluation, pool.comparison
                change = f"{before.geometric_mean:.2f} to {after.geometric_mean:.2f}, {c.geometric_mean}"
                lines.append(
                    f"{potential:14} {trained_on:30} {len(pool.cells):>6} {len(pool.rows):>4} {change:>29} "
                    f"{c.mean!s:>17} {c.improved:>7.0%} {c.median_improvement:>+7.0%} "
                    f"{f'+{c.basins_won} -{c.basins_lost}':>8}"
                )
    return "\n".join(lines)


def pools(set_: str, potential: str, methods: Sequence[str], side: str = "test") -> dict[str, Pool]:
    """By method."""
    planned = defects(set_) if set_.startswith(DEFECTS) else plan()
    cells = [cell for cell in planned if (cell.set, cell.potential) == (set_, potential)]
    found = {name: Pool([c for c in cells if c.method == name], side) for name in methods}
    return {name: pool for name, pool in found.items() if pool.planned}


def learning_curves(side: str = "test"):
    """Change of the geometric mean against the share of the training kinds, with intervals."""
    figure = new_figure(3.6)
    axes = figure.subplots()
    for name, marker in (("default", "o"), ("structures", "s"), ("forces", "^")):
        shares = {float(v.split(" at ")[1].rstrip("%")): v for v in VARIANTS if v.startswith(f"{name} at ")} | {
            100.0: name
        }
        found = {x: Pool([Cell("surrogate", "mace-si", m, 0, 0)], side) for x, m in shares.items()}
        changes = {x: pool.comparison.geometric_mean for x, pool in found.items() if pool.cells}
        if changes:
            y = np.array([(c.value, c.low, c.high) for c in changes.values()])
            axes.errorbar(
                list(changes), 100 * y[:, 0], 100 * np.abs(y[:, 1:].T - y[:, 0]), marker=marker, capsize=3, label=name
            )
    axes.axhline(0, color="0.6", linewidth=1)
    axes.set_xlabel("share of the training kinds (%)")
    axes.set_ylabel("change of the geometric\nmean of Delta-Q (%)")
    axes.legend()
    return figure


def tables() -> dict[str, str]:
    """By the name of its file, each table of which a cell was run."""
    surrogate = "Surrogate set (reference: 7net-mf-0, not DFT), mace-si"
    variants = pools("surrogate", "mace-si", ["default", *VARIANTS])
    chosen = {
        "surrogate_validation": (f"{surrogate}, validation kinds: what recipes were chosen by",
                                 pools("surrogate", "mace-si", list(METHODS), "valid")),
        "surrogate": (f"{surrogate}, test kinds", pools("surrogate", "mace-si", list(METHODS))),
        "robustness": (f"{surrogate}, test kinds: one setting changed, or a share of the training kinds", variants),
    }  # fmt: skip
    embedded = {}
    for name, potential in product(sorted(folder.name for folder in CELLS.glob(f"{DEFECTS}_*")), ON_DFT):
        found = pools(name, potential, ["untuned", *COMPARED, *BESIDE.get(potential, ())])
        title = f"{name} (DFT), {potential}, held-out kinds of all folds that were run"
        chosen[f"{name}_{potential.replace(':', '-').replace('.', '')}"] = title, found
        if name == EMBEDDED:
            embedded[potential] = found
    run = {name: of for name, of in chosen.items() if any(pool.cells for pool in of[1].values())}
    return {"summary": summary(embedded)} | {name: table(*of) for name, of in run.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    for name, text in tables().items():
        (CELLS.parent / f"evidence_{name}.txt").write_text(text + "\n")
        print(text, end="\n\n")
    shown = Pool([Cell(EMBEDDED, "mace-si", "default", 0, fold) for fold in range(FOLDS)])
    save(before_after(evaluation(shown.untuned), shown.evaluation), DOCS / "before_after.png")
    save(learning_curves(), DOCS / "evidence_learning.png")
    missing = [cell for cell in plan() if not cell.file.exists()]
    text = "\n".join(" ".join(map(str, cell)) for cell in missing) or "none"
    hours = sum(json.loads(f.read_text())["processor_seconds"] for f in CELLS.rglob("*.json")) / 3600
    total = f"{len(plan()) - len(missing)} of {len(plan())} cells run, {hours:.1f} core hours of training"
    (CELLS.parent / "evidence_not_run.txt").write_text(f"{total}. Not run:\n\n{text}\n")
    print(total)


if __name__ == "__main__":
    main()
