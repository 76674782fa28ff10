"""From a potential and split pairs to a run folder: train, and measure before and after."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import report
from .evaluation import BASIN_RULE, Evaluation, evaluate
from .files import replacing
from .pairs import RelaxationPair
from .potential import Potential
from .trainer import Trainer

COLUMNS = ("delta_q", "rmsd", "max_displacement", "right_basin", "status")


@dataclass(eq=False)
class Outcome:
    """What a fine-tuning run found on its held-out pairs, relaxed by FIRE and again by BFGS."""

    out: Path
    before: Evaluation
    after: Evaluation
    before_bfgs: Evaluation
    after_bfgs: Evaluation
    history: list[dict[str, float]]
    seconds: float

    def todict(self) -> dict[str, Any]:
        """The summary that --json prints; a number that is not finite is null."""
        found = {
            "test": _summary(self.before, self.after) | {"mean_unrelaxed": self.before.mean_unrelaxed},
            "test_bfgs": _summary(self.before_bfgs, self.after_bfgs),
            "checkpoint": str(self.out / "potential"),
            "run": str(self.out),
            "epochs": len(self.history),
            "seconds": round(self.seconds, 1),
        }
        return without_nan(found)


def finetune(
    trainer: Trainer,
    splits: dict[str, list[RelaxationPair]],
    out: Path,
    *,
    epochs: int,
) -> Outcome:
    """Train on "train", choose on "valid", measure on "test"; write the run folder.

    Parameters
    ----------
    trainer : Trainer
        New or resumed, with ``out`` as its run folder.
    splits : dict of "train", "valid" and "test" to pairs
    out : Path
    epochs : int

    What the untuned potential gives is measured first and kept in before.json, for a run that is
    stopped and resumed.
    """
    began = time.monotonic()
    train, valid, test = (splits[name] for name in ("train", "valid", "test"))
    trainer.check(train, valid, test, epochs=epochs)
    before, before_bfgs = _before(trainer, test, out / "before.json")
    trainer.fit(train, valid, epochs=epochs)
    trainer.save(out / "potential")
    after, after_bfgs = _measure(trainer.potential, test)
    seconds = time.monotonic() - began
    outcome = Outcome(out, before, after, before_bfgs, after_bfgs, trainer.history, seconds)
    _write(outcome)
    return outcome


def _before(trainer: Trainer, test: Sequence[RelaxationPair], file: Path) -> tuple[Evaluation, Evaluation]:
    if trainer.epoch > 0:
        if not file.is_file():
            raise ValueError(f"There is no {file} to compare with: only a run that ase-bptt began can be resumed so.")
        one, other = json.loads(file.read_text())
        return Evaluation.from_rows(one), Evaluation.from_rows(other)
    found = _measure(trainer.potential, test)
    out = file.parent
    out.mkdir(parents=True, exist_ok=True)
    with replacing(file) as path:
        path.write_text(json.dumps([evaluation.todict()["rows"] for evaluation in found], indent=1) + "\n")
    return found


def without_nan(value: Any) -> Any:
    """The same with None for every number that is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measure(potential: Potential, test: Sequence[RelaxationPair]) -> tuple[Evaluation, Evaluation]:
    return evaluate(potential, test), evaluate(potential, test, stepper="bfgs")


def _summary(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    return {
        "n": len(after.rows),
        "kinds": len({row.group for row in after.rows}),
        "mean_before": before.mean,
        "mean_after": after.mean,
        "median_before": before.median,
        "median_after": after.median,
        "basins_before": before.basins,
        "basins_after": after.basins,
    }


def _write(outcome: Outcome) -> None:
    out = outcome.out
    with replacing(out / "results.json") as path:
        rows = {"rows_before": outcome.before.todict()["rows"], "rows_after": outcome.after.todict()["rows"]}
        found = outcome.todict() | without_nan(rows) | {"rule": BASIN_RULE}
        path.write_text(json.dumps(found, indent=1) + "\n")
    with replacing(out / "table.csv") as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [f"{c}_{when}" for when in ("before", "after") for c in COLUMNS]
        writer.writerow(["id", "group", "delta_q_unrelaxed", *names])
        for b, a in zip(outcome.before.rows, outcome.after.rows, strict=True):
            values = [getattr(row, c) for row in (b, a) for c in COLUMNS]
            writer.writerow([b.id, b.group, b.unrelaxed, *values])
    report.plot_before_after(outcome.before, outcome.after, out / "before_after.png")
    report.plot_learning_curve(outcome.history, out / "learning_curve.png")
