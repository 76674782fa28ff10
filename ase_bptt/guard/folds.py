"""What has changed in each fold of a cross-validation, as one: means over the folds, and the worst."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..files import without_nan, write_json
from .changes import Changes, Drift


@dataclass(frozen=True, eq=False)
class FoldChanges:
    """The changes of each fold, all of which began with one potential."""

    folds: tuple[Changes, ...]

    def of_folds(self, kind: str) -> dict[int, Drift]:
        """By fold, where it has probes of this kind; "all" for all of them."""
        found = {k: changes.drifts.get(kind) for k, changes in enumerate(self.folds)}
        return {k: drift for k, drift in found.items() if drift is not None and drift.n}

    def drift(self, kind: str = "all") -> Drift:
        """Means over the folds, but for the number of probes, which is of all, and the largest of all folds."""
        drifts = self.of_folds(kind).values()
        if not drifts:
            return Drift(0, math.nan, math.nan, math.nan, math.nan)
        force, energy, size = (fmean(getattr(d, name) for d in drifts) for name in ("force", "energy", "size"))
        return Drift(sum(d.n for d in drifts), force, energy, max(d.largest for d in drifts), size)

    @property
    def drifts(self) -> dict[str, Drift]:
        """By kind of probe, those that there are, and "all"."""
        kinds = dict.fromkeys(kind for changes in self.folds for kind in changes.drifts)
        found = {kind: self.drift(kind) for kind in sorted(kinds, key="all".__eq__)}
        return {kind: drift for kind, drift in found.items() if drift.n or kind == "all"}

    def worst(self, kind: str = "all") -> tuple[int, Drift] | None:
        """The fold whose forces have moved farthest, counted from 0; None without probes."""
        return max(self.of_folds(kind).items(), key=lambda found: found[1].force, default=None)

    def stretches(self) -> Iterator[tuple[float, str, int]]:
        """Relative change of each lattice constant, with the crystal's name and the fold."""
        for k, changes in enumerate(self.folds):
            for name, (before, after) in changes.crystals.items():
                share = after.lattice_constant / before.lattice_constant - 1
                if math.isfinite(share):
                    yield share, name, k

    def warnings(self) -> list[str]:
        """Those of each fold, with its number."""
        return [f"Fold {k}: {said}" for k, changes in enumerate(self.folds) for said in changes.warnings()]

    def to_json(self) -> dict[str, Any]:
        """Means, the worst fold of each kind, and all that is known of each fold; null where a number is not finite."""
        worst = {kind: self.worst(kind) for kind in self.drifts}
        return without_nan(
            {
                "drift": {kind: vars(drift) for kind, drift in self.drifts.items()},
                "worst_fold": {kind: found and found[0] for kind, found in worst.items()},
                "warnings": self.warnings(),
                "folds": [changes.to_json() for changes in self.folds],
            }
        )

    def write(self, path: str | Path) -> None:
        """Write `to_json` as a file."""
        write_json(Path(path), self.to_json())
