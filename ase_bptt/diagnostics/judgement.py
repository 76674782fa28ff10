"""Classes of relaxations by where they end, and the verdict on the suitability of a training that follows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from ..evaluation import Row
from ..evaluation.row import farthest, spacing
from ..iterated_map import Status
from ..losses import SAME_END
from ..pairs import RelaxationPair
from .landscape import LEFT, ForceError, reference_forces

RIGHT = 0.05
"""Å at the farthest atom: relaxations by different codes and settings agree to about this."""
SOFT = 1.0
"""eV/Å^2, a small curvature: a reference with a residual force f may lie up to f / SOFT from its minimum."""
ENOUGH = 0.95
"""Share of right ends above which there is nothing to train on: validation could not resolve the rest."""
FEW = 5
"""Pairs below which each one decides; with more, all but one right is enough."""
SMALL = 0.3
"""amu^1/2 Å: a median Delta-Q below this is small."""
SMALL_SHARE = 0.2
"""A median Delta-Q below this share of that of the starts is small, too: large cells have a large one."""
ALIGNED = 0.5
"""Cosine between forces, over all components: below, they deviate by more than 60 degrees."""
REACHABLE = 0.25
"""Share of the wrong ends that training must be able to correct for it to be worthwhile."""
KINDS = 3
"""Groups that training, validation and test need; fewer wrong ones hardly show a pattern that can be learnt."""
CLASSES = {
    "right": f"ends within {RIGHT} Å of the reference (more if it has forces)",
    "shifted": "finds the minimum near the reference, which is displaced",
    "wrong path": "has a minimum near the reference, but reaches another one",
    "no minimum": f"has no minimum within {LEFT} Å of the reference",
    "failed": "forces not finite, or energy rising",
}
"""What each class means for the potential's relaxation."""
REACHED = ("shifted", "wrong path")
"""The classes that training through the relaxation can correct."""
NEARER = ("right", "shifted")
"""The classes of structures that relax towards their reference, if they end nearer to it than they started."""
YES, RIGHT_ALREADY, RETRAIN, UNLIKELY = "yes", "no: already right", "no: retrain on forces first", "unlikely"


def classify(row: Row, pair: RelaxationPair) -> str:
    """The class of a relaxation, one of `CLASSES`."""
    if failed(row):
        return "failed"
    strain = row.cell_strain or 0.0
    if max(row.max_displacement, strain * spacing(pair.relaxed)) <= allowance(pair):
        return "right"
    # Also where both relaxations end in one basin: so far from the reference, it is not the reference's.
    if not row.reference_moves < LEFT:
        return "no minimum"
    return "shifted" if row.right_basin else "wrong path"


def failed(row: Row) -> bool:
    """Whether the end of a relaxation is meaningless."""
    return row.status == Status.DIVERGED.value or not math.isfinite(row.delta_q)


def allowance(pair: RelaxationPair) -> float:
    """Å by which a right end may differ: `RIGHT`, or more where the reference has residual forces."""
    forces = reference_forces(pair.relaxed)
    residual = 0.0 if forces is None else float(np.linalg.norm(forces, axis=1).max())
    # Beyond SAME_END it would count as another basin.
    return min(max(RIGHT, residual / SOFT), SAME_END)


def went_farther(row: Row) -> bool:
    """Whether the relaxation ended farther from the reference than it started."""
    return failed(row) or row.delta_q > row.unrelaxed


@dataclass(frozen=True)
class Judgement:
    """A verdict (`YES`, `RIGHT_ALREADY`, `RETRAIN` or `UNLIKELY`), the reason, and cautions."""

    verdict: str
    reason: str
    cautions: tuple[str, ...]


def judge(
    rows: Sequence[Row], classes: Sequence[str], pairs: Sequence[RelaxationPair], forces: ForceError | None
) -> Judgement:
    """Judge by where relaxations end, and by the errors of forces where they are known."""
    verdict, reason = _verdict(rows, classes, forces)
    return Judgement(verdict, reason, tuple(_cautions(rows, classes, pairs, forces, verdict)))


def _verdict(rows: Sequence[Row], classes: Sequence[str], forces: ForceError | None) -> tuple[str, str]:
    wrong = len(rows) - classes.count("right")
    reached = sum(classes.count(name) for name in REACHED)
    spared = max(int((1 - ENOUGH) * len(rows)), 1 if len(rows) >= FEW else 0)
    if wrong <= spared and (_is_small(rows) or not reached):
        return RIGHT_ALREADY, _already_right(rows, classes)
    if disagreement := _wrong_forces(rows, classes, forces):
        return RETRAIN, disagreement
    if reached and reached >= REACHABLE * wrong:
        return YES, _within_reach(rows, classes)
    return UNLIKELY, _out_of_reach(rows, classes)


def _is_small(rows: Sequence[Row]) -> bool:
    sound = [row for row in rows if not failed(row)]
    return median(r.delta_q for r in sound) <= max(SMALL, SMALL_SHARE * median(r.unrelaxed for r in sound))


def _forces_disagree(forces: ForceError | None) -> bool:
    """By the strong forces alone: in relaxed structures those of the reference are noise."""
    if forces is None or forces.cosine is None or forces.strong_error is None or forces.strong_reference is None:
        return False
    # Written such that forces that are not finite disagree.
    return not (forces.cosine >= ALIGNED and forces.strong_error <= forces.strong_reference)


def _wrong_forces(rows: Sequence[Row], classes: Sequence[str], forces: ForceError | None) -> str:
    """The reason where forces are wrong in most places, else empty."""
    n = len(rows)
    # Near a displaced minimum forces may point elsewhere, and yet structures relax towards it.
    nearer = sum(c in NEARER and not went_farther(row) for row, c in zip(rows, classes, strict=True))
    if forces is not None and forces.strong:
        if not _forces_disagree(forces) or 2 * nearer > n:
            return ""
        return (
            f"Its forces have a cosine of {forces.cosine:.2f} with the reference's and a mean absolute error of "
            f"{forces.strong_error:.2f} eV/Å, where the reference's mean is {forces.strong_reference:.2f}. "
            "Fit it to forces first: along wrong forces little is learnt from a relaxation."
        )
    farther = sum(went_farther(row) for row in rows)
    left = sum(name in ("no minimum", "failed") for name in classes)
    if not (2 * farther > n and 2 * left > n):
        return ""
    return (
        f"{farther} of {n} structures end farther from the reference than they started, and {left} references move "
        f"by more than {LEFT} Å or fail: its forces are wrong in most places. Fit it to energies and forces first."
    )


def _already_right(rows: Sequence[Row], classes: Sequence[str]) -> str:
    n, right = len(rows), classes.count("right")
    others = [f"{row.id} ({name})" for row, name in zip(rows, classes, strict=True) if name != "right"]
    rest = f" The others, {some(others)}, are too few to train on and to measure a gain with." if others else ""
    middle = median(row.delta_q for row in rows if not failed(row))
    return f"{right} of {n} end at their reference already, with a median Delta-Q of {middle:.2f} amu^1/2 Å.{rest}"


def _within_reach(rows: Sequence[Row], classes: Sequence[str]) -> str:
    wrong = len(rows) - classes.count("right")
    counts = {how: classes.count(name) for name, how in zip(REACHED, ("displaced", "missed"), strict=True)}
    how = " or ".join(f"{word} ({count})" for word, count in counts.items() if count)
    sums = {name: sum(r.delta_q for r, c in zip(rows, classes, strict=True) if c == name) for name in CLASSES}
    finite = sum(value for name, value in sums.items() if name != "failed")
    n = len(rows) - classes.count("failed")
    best = (finite - sum(sums[name] for name in REACHED)) / n
    return (
        f"{wrong} of {len(rows)} structures end away from their reference, {sum(counts.values())} of them within reach "
        f"of training: the potential has a minimum near the reference, but it is {how}. With all of these corrected, "
        f"the mean Delta-Q would fall from {finite / n:.2f} to {best:.2f} amu^1/2 Å: a bound, of which training "
        "reaches a part."
    )


def _out_of_reach(rows: Sequence[Row], classes: Sequence[str]) -> str:
    wrong = len(rows) - classes.count("right")
    absent, broken = classes.count("no minimum"), classes.count("failed")
    failures = f", and {broken} fail" if broken else ""
    return (
        f"{wrong} of {len(rows)} structures end away from their reference; for {absent} of them the potential has no "
        f"minimum within {LEFT} Å of it{failures}. Training through the relaxation moves minima; it seldom creates "
        "them. Fit it to forces around the references first, or start from another potential."
    )


def _cautions(
    rows: Sequence[Row],
    classes: Sequence[str],
    pairs: Sequence[RelaxationPair],
    forces: ForceError | None,
    verdict: str,
) -> Iterator[str]:
    n = len(rows)
    if n < FEW:
        yield f"The verdict rests on {n} pair{'s' if n > 1 else ''} only: take it as a hint."
    kinds = {row.group or row.id for row in rows}
    wanting = {row.group or row.id for row, name in zip(rows, classes, strict=True) if name in REACHED}
    if len(kinds) < KINDS:
        yield f"Kinds of structure: {len(kinds)}; ase-bptt train needs {KINDS}, to train, validate and test on."
    elif verdict == YES and len(wanting) < KINDS:
        yield f"Those within reach are of few kinds ({some(sorted(wanting))}): other kinds may gain nothing from it."
    near = sum(farthest(pair.initial, pair.relaxed) <= RIGHT for pair in pairs)
    if 2 * near > n:
        yield f"{near} of {n} starts are within {RIGHT} Å of the reference: such pairs say little about a relaxation."
    other = sum(r.delta_q for r, c in zip(rows, classes, strict=True) if c in ("wrong path", "no minimum"))
    total = sum(row.delta_q for row in rows if not failed(row))
    if verdict == YES and 2 * other > total:
        yield (
            f"{100 * other / total:.0f} % of the summed Delta-Q is in other minima, where one structure that ends "
            "elsewhere can reverse the change of the mean: judge by the median and by the rows, too."
        )
    stopped = sum(row.status == Status.OUT_OF_STEPS.value for row in rows)
    if stopped:
        yield f"{stopped} of {n} relaxations have not converged: where they end is not certain."
    if forces is None or forces.cosine is None:
        return
    if forces.cosine < -ALIGNED:
        yield f"A cosine of {forces.cosine:.2f} points to a wrong sign: check the forces in the files."
    elif verdict != RETRAIN and _forces_disagree(forces):
        yield (
            f"Its forces disagree with those in the files (cosine {forces.cosine:.2f}, mean absolute error "
            f"{forces.strong_error:.2f} eV/Å where their mean is {forces.strong_reference:.2f}), although most of its "
            "relaxations end nearer to the reference: check the units in the files."
        )


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
