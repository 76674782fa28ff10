"""A diagnosis for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from statistics import fmean, median

from ..training.trainer import UNROLLED
from .classes import CLASSES, went_farther
from .findings import Findings
from .judgement import RETRAIN, some
from .labels import STRONG
from .landscape import MOST_FRAMES, RATTLE

WIDTH = 80
NAMED = ("wrong path", "no minimum", "failed")
"""Classes whose structures are named: what is shifted is often most of them."""
CAREFUL = 0.7
"""Share of the largest stable step that is advised: elsewhere on the way bonds can be stiffer."""
MOST_UNROLLED = 40
"""Frames: beyond, the gradient tells little of which basin is chosen."""


def diagnosis_text(found: Findings) -> str:
    """The verdict first, then what it rests on; 80 columns."""
    sections = (_verdict(found), _ends(found), _forces(found), _training(found))
    return "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)


def _verdict(d: Findings) -> Iterator[str]:
    yield f"Will training through the relaxation help? {d.verdict}"
    yield _wrapped(d.judgement.reason)
    for caution in d.judgement.cautions:
        yield _wrapped(caution, "! ")
    yield _wrapped("An estimate, not a promise; this measures it: ase-bptt train ... --folds 5")


def _ends(d: Findings) -> Iterator[str]:
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
    yield f"  in another basin than the reference's: {100 * d.wrong_basins:.0f} %"
    yield f"  farther from the reference than they began: {sum(map(went_farther, rows))} of {len(rows)}"


def _forces(d: Findings) -> Iterator[str]:
    f = d.forces
    if f is None:
        yield "Forces: the structures carry none to compare with"
        return
    yield "Forces beside those in the files, eV/Å    structures   error   mean  cosine"
    yield f"  {'all':38} {f.frames:11} {f.error:7.3f} {f.reference:6.3f}"
    if f.strong:
        label = f"of these, with one above {STRONG:g}"
        yield f"  {label:38} {f.strong:11} {f.strong_error:7.3f} {f.strong_reference:6.3f} {f.cosine:7.2f}"
    else:
        yield f"  none is above {STRONG:g}: their direction tells nothing"
    yield "  (mean absolute error; mean absolute force of the reference)"


def _training(d: Findings) -> Iterator[str]:
    # Settings are of no use to who should not train yet.
    if not d.sample or d.verdict == RETRAIN:
        return
    yield f"For training, from {len(d.sample)} of the structures"
    yield from _frames(d)
    yield from _step(d)
    yield from _basins(d)


def _frames(d: Findings) -> Iterator[str]:
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


def _step(d: Findings) -> Iterator[str]:
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


def _basins(d: Findings) -> Iterator[str]:
    if not d.minima:
        return
    ends = [m.ends for m in d.minima]
    known = [m.reference for m in d.minima if m.reference is not None]
    met = f"; the one near the reference is met by {sum(known)} of the {len(known)} that have it" if known else ""
    yield _item("minima", f"{median(ends):g} (median; {max(ends)} at most) from starts rattled by {RATTLE} Å{met}.")


def _item(name: str, text: str, mark: str = "  ") -> str:
    return _filled(text, f"{mark}{name:13} ", " " * 16)


def _wrapped(text: str, mark: str = "  ") -> str:
    return _filled(text, mark, " " * len(mark))


def _filled(text: str, first: str, others: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
