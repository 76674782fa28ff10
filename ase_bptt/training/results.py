"""The results of a fine-tuning run, or of the folds of a cross-validation together, and their files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ..drift import Snapshot
from ..drift.changes import DriftReport, FoldDriftReports
from ..evaluation import BASIN_RULE, Evaluation
from ..evaluation.compare import Comparison, compare
from ..pairs import RelaxationPair
from ..report.drift_report import drift_figure, drift_section
from ..report.page import write_page, write_pictures
from ..report.plots import save
from ..report.tables import write_csv
from ..utils import counted, replacing, without_nan, write_json
from .state import WORSE, without_gain

RESULTS, BEFORE, AFTER, MEASURED = "results.json", "before.json", "after.json", "measured"
SNAPSHOTS = ("snapshot_before.json", "snapshot_after.json")
DRIFT_REPORT, DRIFT_PICTURE = "drift_report.json", "drift_report.png"

CAUTION = "caution"
"""Name of the fact that there are too few kinds of structure."""


@dataclass(eq=False)
class RunResults:
    """Held-out evaluations by FIRE and by BFGS, before and after.

    Attributes
    ----------
    out : Path
        The run folder.
    history : list of dict
        A row for each epoch, as in metrics.csv; empty for a cross-validation.
    seconds : float
    best_epoch : int or None
        The one whose weights were kept; 0 is the untuned potential. Of a cross-validation, the mean over the folds:
        so many epochs train the potential on all pairs.
    folds : int or None
        Of a cross-validation, whose evaluations are those of all folds together.
    facts : dict
        Names and values for the head of the page: potential, settings, versions.
    drift_report : DriftReport, FoldDriftReports or None
        What else has changed in the potential.
    rejected : bool
        Whether the tuned potential was worse on the held-out structures, so that the untuned one is handed back.
    on_all_pairs : int or None
        How many pairs the potential that is handed back was trained on, where these include the ones held out: the
        figures are of another potential, in measured/, or of those of the folds.
    pairs : sequence of RelaxationPair
        Those held out, for the pictures of structures; empty in what was read from a folder.
    """

    out: Path
    before: Evaluation
    after: Evaluation
    before_bfgs: Evaluation
    after_bfgs: Evaluation
    history: list[dict[str, float]]
    seconds: float = 0.0
    best_epoch: int | None = None
    folds: int | None = None
    facts: dict[str, str] = field(default_factory=dict)
    drift_report: DriftReport | FoldDriftReports | None = None
    rejected: bool = False
    on_all_pairs: int | None = None
    pairs: Sequence[RelaxationPair] = field(default=(), repr=False)

    @property
    def kept_as_it_was(self) -> bool:
        """Whether the potential that is handed back is the untuned one."""
        return self.rejected or self.best_epoch == 0

    @property
    def trained_on(self) -> str:
        """On which pairs the potential was trained that is handed back, where the figures are not its own; or empty."""
        if not self.on_all_pairs:
            return ""
        mean = " (the mean of those that the folds kept)" if self.folds else ""
        measured = (
            "of the folds: each pair was measured where it was held out."
            if self.folds
            else f"of the one before, in {self.out / MEASURED}, which has not seen the held-out pairs."
        )
        return (
            f"The potential in {self.out / 'potential'} was trained on all {self.on_all_pairs} pairs, for "
            f"{counted(self.best_epoch or 0, 'epoch')}{mean}. The figures are {measured}"
        )

    @property
    def no_gain(self) -> str:
        """Why the potential that is handed back is the untuned one; or empty."""
        if self.best_epoch == 0:
            return without_gain(self.history)
        return WORSE if self.rejected else ""

    @property
    def epochs(self) -> int:
        """Those that were run."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def comparison(self) -> Comparison:
        """After against before, by FIRE."""
        return compare(self.before, self.after)

    def todict(self) -> dict[str, Any]:
        """The summary that --json prints; a number that is not finite is null."""
        found = {
            "test": summary(self.before, self.after),
            "test_bfgs": summary(self.before_bfgs, self.after_bfgs),
            "comparison": self.comparison.todict(),
            "drift": None if self.drift_report is None else {k: vars(d) for k, d in self.drift_report.drifts.items()},
            "warnings": self.warnings(),
            "checkpoint": str(self.out / "potential"),
            "measured": None if self.folds else str(self.out / (MEASURED if self.on_all_pairs else "potential")),
            "on_all_pairs": self.on_all_pairs,
            "run": str(self.out),
            "folds": self.folds,
            "kept_as_it_was": self.kept_as_it_was,
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "seconds": round(self.seconds, 1),
        }
        return without_nan(found)

    def warnings(self) -> list[str]:
        """Too few kinds, no gain, and what else has changed in the potential, if the tuned one is handed back."""
        found = [self.facts.get(CAUTION, ""), self.no_gain]
        if self.drift_report is not None and not self.kept_as_it_was:
            found += self.drift_report.warnings()
        return [sentence for sentence in found if sentence]

    def write(self) -> None:
        """Write rows, table.csv, pictures and report.html, and last results.json, which marks a complete run."""
        write_rows(self.out / BEFORE, self.before, self.before_bfgs)
        write_rows(self.out / AFTER, self.after, self.after_bfgs)
        if isinstance(self.drift_report, DriftReport):
            self.drift_report.before.write(self.out / SNAPSHOTS[0])
            self.drift_report.after.write(self.out / SNAPSHOTS[1])
        if self.drift_report is not None:
            self.drift_report.write(self.out / DRIFT_REPORT)
            save(drift_figure(self.drift_report), self.out / DRIFT_PICTURE)
        write_csv(self.out / "table.csv", self.before, self.after)
        write_pictures(self.out, self.before, self.after, history=self.history or None, best_epoch=self.best_epoch)
        handed_back = self.no_gain or self.trained_on
        write_page(
            self.out / "report.html",
            title="Cross-validation" if self.folds else "Fine-tuning",
            evaluation=self.before,
            after=self.after,
            comparison=self.comparison,
            history=self.history or None,
            best_epoch=self.best_epoch,
            facts=tuple((self.facts | ({"handed back": handed_back} if handed_back else {})).items()),
            extra=[] if self.drift_report is None else [drift_section(self.drift_report)],
            pairs=self.pairs,
        )
        rows = {"rows_before": self.before.todict()["rows"], "rows_after": self.after.todict()["rows"]}
        write_json(self.out / RESULTS, self.todict() | without_nan(rows) | {"rule": BASIN_RULE, "facts": self.facts})

    @classmethod
    def load(cls, out: Path) -> RunResults:
        """What a finished run wrote."""
        results = json.loads((out / RESULTS).read_text())
        history = []
        report: DriftReport | FoldDriftReports | None
        if not results["folds"]:
            with (out / "metrics.csv").open(newline="") as file:
                history = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        before, before_bfgs = read_rows(out / BEFORE)
        after, after_bfgs = read_rows(out / AFTER)
        if results["folds"]:
            folders = [out / f"fold_{k}" for k in range(results["folds"])]
            there = all((folder / RESULTS).is_file() for folder in folders)
            report = drift_of_folds([cls.load(folder) for folder in folders]) if there else None
        else:
            snapshots = [Snapshot.read(out / name) for name in SNAPSHOTS if (out / name).is_file()]
            report = DriftReport(snapshots[0], snapshots[1], (before, after)) if len(snapshots) == 2 else None
        return cls(
            out,
            before,
            after,
            before_bfgs,
            after_bfgs,
            history,
            results["seconds"],
            best_epoch=results["best_epoch"],
            folds=results["folds"],
            facts=results["facts"],
            drift_report=report,
            rejected=results["kept_as_it_was"] and results["best_epoch"] != 0,
            on_all_pairs=results.get("on_all_pairs"),
        )


def drift_of_folds(folds: Sequence[RunResults]) -> FoldDriftReports | None:
    """The drift reports of all folds; None where one of them has none, as a run of an older release."""
    reports = [fold.drift_report for fold in folds if isinstance(fold.drift_report, DriftReport)]
    return FoldDriftReports(tuple(reports)) if len(reports) == len(folds) else None


def summary(before: Evaluation | None, after: Evaluation) -> dict[str, Any]:
    """The figures that scripts read; those of "before" are null where there is nothing to compare with, and errors of
    volumes are not numbers where no cell moves.
    """
    found: dict[str, Any] = {
        "n": len(after.rows),
        "kinds": len(after.by_group()),
        "mean_unrelaxed": after.mean_unrelaxed,
    }
    same = {name: name for name in ("mean", "median", "basins", "volume_error")}
    for key, name in (same | {"geometric": "geometric_mean"}).items():
        found[f"{key}_before"] = None if before is None else getattr(before, name)
        found[f"{key}_after"] = getattr(after, name)
    gain = None if before is None else compare(before, after)
    found["improved"] = gain and gain.improved
    found["median_improvement"] = gain and gain.median_improvement
    found["interval"] = gain and [gain.geometric_mean.low, gain.geometric_mean.high]
    return found


def write_rows(path: Path, *evaluations: Evaluation) -> None:
    """Keep the rows of evaluations, exactly: NaN stays NaN, which Python's own JSON reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([e.todict()["rows"] for e in evaluations], indent=1) + "\n")


def read_rows(path: Path) -> tuple[Evaluation, ...]:
    """Evaluations that `write_rows` kept."""
    return tuple(Evaluation.from_rows(rows) for rows in json.loads(path.read_text()))


def merge_folds(
    folds: Sequence[RunResults],
    pairs: Sequence[RelaxationPair],
    out: Path,
    *,
    seconds: float,
    facts: Mapping[str, str],
) -> RunResults:
    """The results of all folds together, each pair where it was held out.

    Parameters
    ----------
    folds : sequence of RunResults
    pairs : sequence of RelaxationPair
        Of all folds; their order is that of the rows.
    out : Path
        The run folder that the folds lie in.
    seconds : float
    facts : mapping of str to str
        As for `finetune`.
    """
    merged = RunResults(
        out,
        before=_in_order([fold.before for fold in folds], pairs),
        after=_in_order([fold.after for fold in folds], pairs),
        before_bfgs=_in_order([fold.before_bfgs for fold in folds], pairs),
        after_bfgs=_in_order([fold.after_bfgs for fold in folds], pairs),
        history=[],
        seconds=seconds,
        best_epoch=round(fmean(fold.best_epoch or 0 for fold in folds)),
        folds=len(folds),
        facts=dict(facts) | _learnt_by_folds(folds),
        drift_report=drift_of_folds(folds),
        pairs=pairs,
    )
    merged.rejected = merged.comparison.harmful
    return merged


def _in_order(evaluations: Sequence[Evaluation], pairs: Sequence[RelaxationPair]) -> Evaluation:
    """All folds' rows and ends in one evaluation, in the order of the pairs."""
    place = {pair.id: k for k, pair in enumerate(pairs)}
    rows = [row for e in evaluations for row in e.rows]
    ends = [atoms for e in evaluations for atoms in e.ends]
    order = sorted(range(len(rows)), key=lambda k: place[rows[k].id])
    return Evaluation(tuple(rows[k] for k in order), tuple(ends[k] for k in order) if len(ends) == len(rows) else ())


def _learnt_by_folds(folds: Sequence[RunResults]) -> dict[str, str]:
    said = [f"fold {k}: {fold.facts['learnt']}" for k, fold in enumerate(folds) if "learnt" in fold.facts]
    return {"learnt": "; ".join(said)} if said else {}
