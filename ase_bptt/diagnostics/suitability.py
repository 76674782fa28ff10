"""Whether training through the relaxation suits a potential and its pairs, as data and as text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from ..evaluation import Evaluation, Row
from ..report import cell_lines
from ..stability import step_limit
from ..training.settings import UNROLLED, ZERO_FORCE
from ..utils import without_nan
from .judgement import CLASSES, RETRAIN, YES, Judgement, failed, some, went_farther
from .landscape import MOST_FRAMES, RATTLE, STRONG, ForceError, Minima, Settling

WIDTH = 80
NAMED = ("wrong path", "no minimum", "failed")
"""Classes whose structures are named; the shifted ones are often too many."""
CAREFUL = 0.7
"""Share of the largest stable step that is advised: along the path bonds can be stiffer than at the end."""
FEW_ELSEWHERE = 0.1
"""Share of structures that end in another basin up to which a first stage of zero force is advised."""
MOST_UNROLLED = 40
"""Frames: through more, the gradient says little about which basin is selected."""


@dataclass(frozen=True)
class Suitability:
    """The result of `ase_bptt.diagnose`.

    Attributes
    ----------
    evaluation : Evaluation
        Of the potential as it is, by FIRE.
    classes : tuple of str
        For each row of the evaluation, one of `ase_bptt.diagnostics.judgement.CLASSES`.
    judgement : Judgement
    forces : ForceError or None
        None where no structure carries forces.
    sample : tuple of str
        Ids of the pairs on which the following was measured.
    settling : tuple of Settling
        By the Trainer's gradient descent.
    minima : tuple of Minima
        From rattled starts.
    curvatures : tuple of float
        Largest eigenvalue of the Hessian at each reference, eV/Å^2.
    step_size, momentum : float
        Of the Trainer's gradient descent; the step in Å^2/eV.
    """

    evaluation: Evaluation
    classes: tuple[str, ...]
    judgement: Judgement
    forces: ForceError | None
    sample: tuple[str, ...]
    settling: tuple[Settling, ...]
    minima: tuple[Minima, ...]
    curvatures: tuple[float, ...]
    step_size: float
    momentum: float

    @property
    def verdict(self) -> str:
        """One of "yes", "no: already right", "no: retrain on forces first", "unlikely"."""
        return self.judgement.verdict

    @property
    def wrong_basins(self) -> float:
        """Share of structures that end in another basin than the relaxation from their reference, or fail."""
        return fmean(failed(row) or not row.right_basin for row in self.evaluation.rows)

    @property
    def first(self) -> str | None:
        """The first stage of a training that is advised, "zero-force" where basins are not in question; or None."""
        return ZERO_FORCE if self.verdict == YES and self.wrong_basins <= FEW_ELSEWHERE else None

    @property
    def frames(self) -> float | None:
        """Median number of frames until Delta-Q has settled; None where all diverged."""
        return _median([s.frames for s in self.settling if s.frames is not None])

    @property
    def fire_frames(self) -> float | None:
        """Median number of frames of FIRE to the evaluation's fmax; None where all failed."""
        return _median([row.nsteps for row in self.sound])

    @property
    def step_limit(self) -> float | None:
        """Å^2/eV: above it, gradient descent without momentum diverges in the stiffest of the sample.

        None where nothing is stiff.
        """
        limit = step_limit(max((c for c in self.curvatures if math.isfinite(c)), default=0.0))
        return limit if math.isfinite(limit) else None

    @property
    def sound(self) -> list[Row]:
        """Rows of the relaxations that did not fail: means and medians are over these."""
        return [row for row in self.evaluation.rows if not failed(row)]

    def todict(self) -> dict[str, Any]:
        """As JSON; None for what is missing or not finite."""
        delta_q, unrelaxed = [r.delta_q for r in self.sound], [r.unrelaxed for r in self.evaluation.rows]
        rows = zip(self.evaluation.todict()["rows"], self.classes, strict=True)
        found = {
            **asdict(self.judgement),
            "n": len(self.classes),
            "kinds": len(self.evaluation.by_group()),
            "classes": {name: self.classes.count(name) for name in CLASSES},
            "wrong_basins": self.wrong_basins,
            "first": self.first,
            "mean": fmean(delta_q) if delta_q else None,
            "median": _median(delta_q),
            "mean_unrelaxed": fmean(unrelaxed),
            "median_unrelaxed": _median(unrelaxed),
            "forces": self.forces and asdict(self.forces),
            "frames": self.frames,
            "fire_frames": self.fire_frames,
            "minima_median": _median([m.ends for m in self.minima]),
            "minima_largest": max((m.ends for m in self.minima), default=None),
            "reference_met": sum(m.reference is True for m in self.minima),
            "step_limit": self.step_limit,
            "step_size": self.step_size,
            "momentum": self.momentum,
            "sample": self.sample,
            "settling": [asdict(s) for s in self.settling],
            "minima": [asdict(m) for m in self.minima],
            "curvatures": self.curvatures,
            "rows": [row | {"class": name} for row, name in rows],
        }
        return without_nan(found)

    def text(self) -> str:
        """At most 80 columns wide; the verdict first, then what it rests on."""
        sections = (_verdict(self), _ends(self), _forces(self), _training(self))
        return "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)


def _median(values: list[Any]) -> float | None:
    return median(values) if values else None


def _verdict(d: Suitability) -> Iterator[str]:
    yield f"Will training through the relaxation help? {d.verdict}"
    yield _wrapped(d.judgement.reason)
    for caution in d.judgement.cautions:
        yield _wrapped(caution, "! ")
    yield _wrapped("An estimate, not a promise; this measures it: ase-bptt train ... --folds 5")


def _ends(d: Suitability) -> Iterator[str]:
    rows = d.evaluation.rows
    kinds = len(d.evaluation.by_group())
    yield f"Where its relaxations end (structures: {len(rows)}, kinds: {kinds}; FIRE to 0.02 eV/Å)"
    for name, meaning in CLASSES.items():
        yield f"{d.classes.count(name):5}  {name:11} {meaning}"
        ids = [row.id for row, c in zip(rows, d.classes, strict=True) if c == name]
        if name in NAMED and ids:
            yield _wrapped(some(ids, 6), " " * 19)
    if d.sound:
        unrelaxed, delta_q = [r.unrelaxed for r in rows], [r.delta_q for r in d.sound]
        yield "  Delta-Q to the reference, amu^1/2 Å   mean  median"
        yield f"    before relaxing                   {fmean(unrelaxed):6.2f}  {median(unrelaxed):6.2f}"
        yield f"    after                             {fmean(delta_q):6.2f}  {median(delta_q):6.2f}"
    for line in cell_lines([d.evaluation]):
        yield _wrapped(line.strip())
    yield f"  in another basin than the reference's: {100 * d.wrong_basins:.0f} %"
    yield f"  farther from the reference than they started: {sum(map(went_farther, rows))} of {len(rows)}"


def _forces(d: Suitability) -> Iterator[str]:
    f = d.forces
    if f is None:
        yield "Forces: the files hold none to compare with"
        return
    yield "Forces compared with the files, eV/Å      structures   error   mean  cosine"
    yield f"  {'all':38} {f.frames:11} {f.error:7.3f} {f.reference:6.3f}"
    if f.strong:
        label = f"of these, with one above {STRONG:g}"
        yield f"  {label:38} {f.strong:11} {f.strong_error:7.3f} {f.strong_reference:6.3f} {f.cosine:7.2f}"
    else:
        yield f"  none is above {STRONG:g}: their directions cannot be compared"
    yield "  (mean absolute error; mean absolute force of the reference)"


def _training(d: Suitability) -> Iterator[str]:
    # Advice on settings is of no use where the potential must first be retrained.
    if not d.sample or d.verdict == RETRAIN:
        return
    yield f"For training, from {len(d.sample)} of the structures"
    yield from _frames(d)
    yield from _step(d)
    yield from _basins(d)
    if d.first:
        yield _item(
            "--first",
            f"hardly any structure ends in another basin: {d.first} costs little and may bring much.",
        )


def _frames(d: Suitability) -> Iterator[str]:
    found = [s.frames for s in d.settling if s.frames is not None]
    diverged = len(d.settling) - len(found)
    slow = sum(s.frames is not None and not s.finished for s in d.settling)
    if d.frames is not None:
        needed = max(1, min(round(d.frames), MOST_UNROLLED))
        enough = f"the default of {UNROLLED} is enough"
        advice = enough if needed <= UNROLLED else f"try {needed} (the default is {UNROLLED})"
        yield _item(
            "--steps",
            f"its gradient descent has settled after {d.frames:.0f} frames (median; {min(found)} to {max(found)}): "
            f"{advice}. FIRE takes {d.fire_frames or 0:.0f} to 0.02 eV/Å.",
        )
    if slow:
        yield _item("", f"{slow} still had forces after {MOST_FRAMES} frames.")
    if diverged:
        yield _item(
            "--step-size",
            f"gradient descent diverges from {diverged} of {len(d.settling)} starts: give a smaller one.",
            "! ",
        )


def _step(d: Suitability) -> Iterator[str]:
    limit = d.step_limit
    if limit is None:
        return
    bound = f"stable below 2/lambda_max = {limit:.3g} Å^2/eV"
    if d.momentum:
        bound += f", or {(1 + d.momentum) * limit:.3g} with momentum {d.momentum:g}"
    if d.step_size <= limit:
        yield _item("--step-size", f"{bound}; the default is {d.step_size:g}.")
    else:
        advice = f"give {CAREFUL * limit:.2g}, and more --steps"
        yield _item("--step-size", f"{bound}: the default of {d.step_size:g} is too long, {advice}.", "! ")


def _basins(d: Suitability) -> Iterator[str]:
    if not d.minima:
        return
    ends = [m.ends for m in d.minima]
    known = [m.reference for m in d.minima if m.reference is not None]
    met = ""
    if known:
        met = (
            f"; of the {len(known)} structures that have a minimum near their reference, {sum(known)} reach it from "
            "one of these starts"
        )
    yield _item(
        "minima", f"{median(ends):g} (median; {max(ends)} at most) are reached from starts rattled by {RATTLE} Å{met}."
    )


def _item(name: str, text: str, mark: str = "  ") -> str:
    return _filled(text, f"{mark}{name:13} ", " " * 16)


def _wrapped(text: str, mark: str = "  ") -> str:
    return _filled(text, mark, " " * len(mark))


def _filled(text: str, first: str, others: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
