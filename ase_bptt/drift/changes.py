"""The drift report: two snapshots of a potential compared, for one run and for the folds of a cross-validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..evaluation import Evaluation
from ..pairs import RelaxationPair
from ..potential import Potential
from ..terms.probes import KINDS, LARGEST_FORCE
from ..utils import without_nan, write_json
from . import ProbeResult, Snapshot, take_snapshot
from .curves import ShortRangeInstability, short_range_instability

NEARER, DEEPER, GROWN = 0.05, 0.5, 0.1
"""Å, eV and share: an instability has grown if it begins so much farther out or its barrier is so much lower."""
OUT_OF_REACH = 10.0
"""eV: a barrier that no relaxation crosses."""
STIFFER = 0.2
"""Share by which a bulk modulus may change without a warning."""


@dataclass(frozen=True)
class Drift:
    """How far two potentials are apart on some probes.

    Attributes
    ----------
    n : int
        Probes on which the first finds no force above `LARGEST_FORCE`, and the second finite forces.
    force, energy : float
        Root mean square of the change of a force's component in eV/Å, and of an energy in eV per atom.
    largest : float
        Largest change of the force on an atom, eV/Å.
    size : float
        Root mean square of a force's component before, eV/Å.
    """

    n: int
    force: float
    energy: float
    largest: float
    size: float


@dataclass(frozen=True, eq=False)
class DriftReport:
    """Two snapshots compared; `held_out` are the evaluations of held-out pairs, where there are any."""

    before: Snapshot
    after: Snapshot
    held_out: tuple[Evaluation, Evaluation] | None = None

    def __post_init__(self) -> None:
        names = [[(a.kind, a.name) for a in side.probes] for side in (self.before, self.after)]
        if names[0] != names[1] or self.before.crystals.keys() != self.after.crystals.keys():
            raise ValueError(
                "Only snapshots of the same probes can be compared: take both with the same pairs, size and seed."
            )

    def drift(self, kind: str | None = None) -> Drift:
        """Over all probes, or those of a kind; NaN where there are none."""
        rows = [
            (b, a)
            for b, a in zip(self.before.probes, self.after.probes, strict=True)
            if kind in (None, b.kind) and _sound(b) and _finite(a)
        ]
        if not rows:
            return Drift(0, math.nan, math.nan, math.nan, math.nan)
        first, last = (np.concatenate([np.array(row[k].forces) for row in rows]) for k in (0, 1))
        energy = np.array([(a.energy - b.energy) / len(b.forces) for b, a in rows])
        largest = float(np.linalg.norm(last - first, axis=1).max())
        return Drift(len(rows), _rms(last - first), _rms(energy), largest, _rms(first))

    @property
    def drifts(self) -> dict[str, Drift]:
        """By kind of probe, those that there are, and "all"."""
        found = {kind: self.drift(kind) for kind in KINDS}
        return {kind: drift for kind, drift in found.items() if drift.n} | {"all": self.drift()}

    @property
    def instabilities(self) -> dict[str, tuple[ShortRangeInstability | None, ShortRangeInstability | None]]:
        """The short-range instability of each dimer, before and after; None where there is none."""
        return {
            name: (short_range_instability(curve), short_range_instability(self.after.dimers[name], curve))
            for name, curve in self.before.dimers.items()
        }

    @property
    def force_errors(self) -> tuple[float, float] | None:
        """Mean absolute error of the forces on held-out frames, before and after, eV/Å; None without such frames."""
        before, after = self.before.force_error, self.after.force_error
        return None if before is None or after is None else (before, after)

    def warnings(self) -> list[str]:
        """A sentence for each instability that has appeared or grown, and each crystal that is another one now."""
        found = [_sentence(name, b, a) for name, (b, a) in self.instabilities.items() if a and _worse(b, a)]
        for name, b in self.before.crystals.items():
            if math.isfinite(b.lattice_constant) and not math.isfinite(self.after.crystals[name].lattice_constant):
                found.append(f"{name}: the crystal no longer has a minimum of the energy where it had one before.")
        found += _softened(self.crystals)
        lost = sum(_sound(b) and not _finite(a) for b, a in zip(self.before.probes, self.after.probes, strict=True))
        if lost:
            found.append(f"On {lost} of {len(self.before.probes)} probes energies or forces are no longer finite.")
        return found

    def to_json(self) -> dict[str, Any]:
        """All figures, as JSON: null where a number is not finite."""
        crystals = {
            name: {"lattice_constant": [b.lattice_constant, a.lattice_constant],
                   "bulk_modulus": [b.bulk_modulus, a.bulk_modulus]}
            for name, (b, a) in self.crystals.items()
        }  # fmt: skip
        instabilities = self.instabilities
        dimers = {
            name: {"distances": list(curve.distances), "before": list(curve.energies),
                   "after": list(self.after.dimers[name].energies),
                   "instabilities": [None if found is None else vars(found) for found in instabilities[name]]}
            for name, curve in self.before.dimers.items()
        }  # fmt: skip
        held_out = None if self.held_out is None else {
            name: [getattr(e, name) for e in self.held_out] for name in ("mean", "median", "geometric_mean", "basins")
        }  # fmt: skip
        found = {
            "drift": {kind: vars(drift) for kind, drift in self.drifts.items()},
            "crystals": crystals,
            "dimers": dimers,
            "force_error": self.force_errors,
            "held_out": held_out,
            "warnings": self.warnings(),
        }
        return without_nan(found)

    def write(self, path: str | Path) -> None:
        """Write `to_json` as a file."""
        write_json(Path(path), self.to_json())

    @property
    def crystals(self) -> dict[str, tuple[Any, Any]]:
        """Lattice constant and bulk modulus of each crystal, before and after."""
        return {name: (b, self.after.crystals[name]) for name, b in self.before.crystals.items()}


def _finite(answer: ProbeResult) -> bool:
    return math.isfinite(answer.energy) and bool(np.isfinite(answer.forces).all())


def _sound(answer: ProbeResult) -> bool:
    return _finite(answer) and float(np.linalg.norm(answer.forces, axis=1).max()) < LARGEST_FORCE


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _worse(before: ShortRangeInstability | None, after: ShortRangeInstability) -> bool:
    if after.barrier > OUT_OF_REACH:
        return False
    if before is None:
        return True
    if after.depth < before.depth:
        return False
    lower = after.barrier < min(before.barrier - DEEPER, (1 - GROWN) * before.barrier)
    farther = after.distance > max(before.distance + NEARER, (1 + GROWN) * before.distance)
    return lower or farther or after.depth > max(before.depth + DEEPER, (1 + GROWN) * before.depth)


def _softened(crystals: dict[str, tuple[Any, Any]]) -> list[str]:
    """A sentence on all crystals whose bulk modulus has changed much, if there are any."""
    moduli = {name: (b.bulk_modulus, a.bulk_modulus) for name, (b, a) in crystals.items()}
    # Without a modulus, before or after, the comparison is false.
    changed = [
        f"{name} by {100 * (a / b - 1):+.0f} % (from {b:.0f} to {a:.0f} GPa)"
        for name, (b, a) in moduli.items()
        if abs(a / b - 1) > STIFFER
    ]
    return changed and [
        f"The bulk modulus has changed by more than a fifth: {', '.join(changed)}. Where elastic or thermal properties "
        "matter, compute them with the untuned potential, or train with --teacher, which keeps them at a cost."
    ]


def _sentence(name: str, before: ShortRangeInstability | None, after: ShortRangeInstability) -> str:
    how = (
        f"below {after.distance:.2f} Å the energy falls by {after.depth:.1f} eV, behind a barrier of "
        f"{after.barrier:.1f} eV"
    )
    if before is None:
        return f"{name}: a short-range instability has appeared: {how}; before, it rose all the way."
    return (
        f"{name}: a short-range instability has grown: {how} (before: {before.distance:.2f} Å, {before.depth:.1f} eV "
        f"and {before.barrier:.1f} eV)."
    )


@dataclass(frozen=True, eq=False)
class FoldDriftReports:
    """The drift reports of the folds, all of which started from one potential."""

    folds: tuple[DriftReport, ...]

    def of_folds(self, kind: str) -> dict[int, Drift]:
        """By fold, where it has probes of this kind; "all" for all of them."""
        found = {k: report.drifts.get(kind) for k, report in enumerate(self.folds)}
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
        kinds = dict.fromkeys(kind for report in self.folds for kind in report.drifts)
        found = {kind: self.drift(kind) for kind in sorted(kinds, key="all".__eq__)}
        return {kind: drift for kind, drift in found.items() if drift.n or kind == "all"}

    def worst(self, kind: str = "all") -> tuple[int, Drift] | None:
        """The fold whose forces have changed most, counted from 0; None without probes."""
        return max(self.of_folds(kind).items(), key=lambda found: found[1].force, default=None)

    def stretches(self) -> Iterator[tuple[float, str, int]]:
        """Relative change of each lattice constant, with the crystal's name and the fold."""
        for k, report in enumerate(self.folds):
            for name, (before, after) in report.crystals.items():
                share = after.lattice_constant / before.lattice_constant - 1
                if math.isfinite(share):
                    yield share, name, k

    def warnings(self) -> list[str]:
        """Those of each fold, with its number."""
        return [f"Fold {k}: {warning}" for k, report in enumerate(self.folds) for warning in report.warnings()]

    def to_json(self) -> dict[str, Any]:
        """Means, the worst fold of each kind, and the report of each fold; null where a number is not finite."""
        worst = {kind: self.worst(kind) for kind in self.drifts}
        return without_nan(
            {
                "drift": {kind: vars(drift) for kind, drift in self.drifts.items()},
                "worst_fold": {kind: found and found[0] for kind, found in worst.items()},
                "warnings": self.warnings(),
                "folds": [report.to_json() for report in self.folds],
            }
        )

    def write(self, path: str | Path) -> None:
        """Write `to_json` as a file."""
        write_json(Path(path), self.to_json())


def drift_report(
    before: Potential,
    after: Potential,
    pairs: Sequence[RelaxationPair] = (),
    *,
    held_out: tuple[Evaluation, Evaluation] | None = None,
    size: int = 24,
) -> DriftReport:
    """Compare two potentials by snapshots of both.

    Parameters
    ----------
    before, after : Potential
        Of the same elements, the pretrained one first.
    pairs : sequence of RelaxationPair
        As for `take_snapshot`; best those that were not trained on.
    held_out : two Evaluations, optional
        Of the same held-out pairs by each.
    size : int
        Probes of each kind.

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.drift.changes import drift_report
    >>> before, after = load_potential("emt"), load_potential("emt")
    >>> after.s0.data *= 1.02
    >>> report = drift_report(before, after, size=2)
    >>> print(f"crystals: forces changed by {report.drift('crystals').force:.2f} eV/Å")
    crystals: forces changed by 0.33 eV/Å
    >>> report.warnings()
    []
    """
    return DriftReport(take_snapshot(before, pairs, size=size), take_snapshot(after, pairs, size=size), held_out)
