"""Whether training through the relaxation can help a potential on given pairs, measured before any training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..cells.strained import Strained
from ..evaluation import Evaluation, Row, evaluate
from ..pairs import RelaxationPair
from ..potential import Potential
from ..stability import largest_curvature
from ..steppers import GradientDescent
from ..training.settings import MOMENTUM
from .judgement import classify, judge
from .landscape import force_error, minima, settling
from .suitability import Suitability

AT_ONCE = 8
"""Pairs evaluated between two reports of progress."""
Progress = Callable[[int, int, str], None]


def diagnose(
    potential: Potential,
    pairs: Sequence[RelaxationPair],
    *,
    seed: int = 0,
    sample: int = 8,
    rattles: int = 4,
    progress: Progress | None = None,
) -> Suitability:
    """Measure whether training through the relaxation can help this potential on these pairs.

    Nothing is trained; neither weights nor structures are changed.

    Parameters
    ----------
    potential : Potential
    pairs : list of RelaxationPair
        All pairs: nothing is held out here.
    seed : int
        Of the sample and of the rattling.
    sample : int
        Pairs, of as many groups as possible, on which the slower measurements are made.
    rattles : int
        Rattled starts of each pair of the sample.
    progress : callable, optional
        ``progress(done, total, what)``, called after each part of a task; every task is counted by itself.

    Raises
    ------
    ValueError
        Where there are no pairs.
    NotImplementedError
        For constraints and elements that the potential does not know.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import RelaxationPair, diagnose, load_potential
    >>> stretched = molecule("N2")
    >>> stretched.set_distance(0, 1, 1.3)
    >>> found = diagnose(load_potential("morse"), [RelaxationPair(stretched, molecule("N2"), "N2", "N2")])
    >>> print(found.text().splitlines()[0])
    Will training through the relaxation help? yes
    """
    if not pairs:
        raise ValueError("There are no pairs to diagnose the potential on.")
    progress = progress or (lambda done, total, what: None)
    evaluation = _evaluate(potential, pairs, progress)
    classes = tuple(classify(row, pair) for row, pair in zip(evaluation.rows, pairs, strict=True))
    forces = force_error(potential, pairs, report=_about(progress, "comparing forces"))
    chosen = spread(pairs, sample, seed)
    stepper = GradientDescent(momentum=MOMENTUM)
    return Suitability(
        evaluation=evaluation,
        classes=classes,
        judgement=judge(evaluation.rows, classes, pairs, forces),
        forces=forces,
        sample=tuple(pair.id for pair in chosen),
        settling=tuple(settling(potential, chosen, stepper, report=_about(progress, "descending as in training"))),
        minima=tuple(
            minima(potential, chosen, rattles=rattles, seed=seed, report=_about(progress, "relaxing rattled starts"))
        ),
        curvatures=tuple(_curvatures(potential, chosen, seed, progress)),
        step_size=float(stepper.step_size),
        momentum=float(stepper.momentum),
    )


def _about(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(done, total, what)


def _evaluate(potential: Potential, pairs: Sequence[RelaxationPair], progress: Progress) -> Evaluation:
    rows: list[Row] = []
    for first in range(0, len(pairs), AT_ONCE):
        rows += evaluate(potential, pairs[first : first + AT_ONCE]).rows
        progress(len(rows), len(pairs), "relaxing from starts and references")
    return Evaluation(tuple(rows))


def _curvatures(
    potential: Potential, pairs: Sequence[RelaxationPair], seed: int, progress: Progress
) -> Iterator[float]:
    for k, pair in enumerate(pairs):
        reference = potential.batch([pair.relaxed])
        if pair.freedom.moves:
            # As gradient descent moves it: cell rows count, scaled such that their curvature is like that of atoms.
            reference = Strained.of(reference, [pair.freedom], balanced=True)
        yield largest_curvature(potential, reference, seed=seed)
        progress(k + 1, len(pairs), "finding the stiffest direction")


def spread(pairs: Sequence[RelaxationPair], size: int, seed: int) -> list[RelaxationPair]:
    """Some pairs at random, one of each group before a second of any, in their original order."""
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    seen: dict[str, int] = {}
    rank = {}
    for place, k in enumerate(order):
        group = pairs[k].group
        rank[k] = (seen.get(group, 0), place)
        seen[group] = rank[k][0] + 1
    return [pairs[k] for k in sorted(sorted(rank, key=rank.__getitem__)[:size])]
