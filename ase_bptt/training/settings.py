"""How a training relaxes, and on what: what a Trainer takes where nothing is said, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from ..adjoints import Adjoint, Replay, make_adjoint
from ..losses import named_loss
from ..pairs import RelaxationPair
from ..pairs.groups import check_apart, usable
from ..potential import Potential
from ..stability import resolve_step_size
from ..steppers import BFGS, GradientDescent, Stepper, make_stepper
from ..terms import Term, check_terms
from .distributed import together
from .pair_loss import Loss, PairLoss, WarmStarts

MOMENTUM = 0.7
"""Of the default gradient descent: 10 frames go nearly as far as 30 without."""
UNROLLED = 10
"""Frames of an unroll where nothing else is said."""
TO_THE_END = 300
"""Frames at most on the way to a minimum where nothing else is said."""
SAMPLED = 8
"""Training structures by whose stiffness step_size="auto" is set."""


def make_pair_loss(
    potential: Potential,
    stepper: Stepper | str | None,
    adjoint: Adjoint | str | None,
    loss: Loss | str,
    *,
    steps: int | None,
    fmax: float,
    learn: Sequence[str],
    warm: int,
    memory: float | None,
) -> PairLoss:
    """The loss of pairs that these arguments of a Trainer ask for, shared by the processes of the run.

    Raises
    ------
    ValueError
        For names that there are not, and for choices that do not go together.
    """
    chosen = make_adjoint(adjoint) or Replay()
    moved = _default_stepper(chosen) if stepper is None else make_stepper(stepper)
    if learn:
        # What is learnt must not be where the next training begins that is given the same stepper. Parameters that a
        # person has put into it are trained in place, as the potential is.
        moved = copy.deepcopy(moved)
    chosen.check_stepper(moved)
    measured: Loss = named_loss(loss) if isinstance(loss, str) else loss
    if learn:
        _check_learnable(moved, chosen, learn)
        moved.learn(*learn)
    if warm and not chosen.needs_minimum:
        raise ValueError(
            f"Warm starts need an adjoint that ends at the minimum, not {chosen.name!r}: take 'implicit', "
            "'guided' or 'one-step'."
        )
    frames = steps or (TO_THE_END if chosen.needs_minimum else UNROLLED)
    starts = WarmStarts(warm) if warm else None
    return PairLoss(potential, moved, chosen, measured, frames, fmax, starts, together(), memory)


def make_stepper_definite(made: PairLoss, train: Sequence[RelaxationPair]) -> Stepper:
    """Have the pairs relaxed by a stepper whose step size is a number, found on some of them where it is "auto"."""
    some = [p.relaxed for p in train[:: max(1, len(train) // SAMPLED)]]
    made.stepper = resolve_step_size(made.stepper, made.potential, some)
    return made.stepper


def check_data(
    made: PairLoss,
    terms: Sequence[Term],
    train: Sequence[RelaxationPair],
    valid: Sequence[RelaxationPair],
    test: Sequence[RelaxationPair],
) -> None:
    """Raise ValueError or NotImplementedError for pairs that cannot be trained on, or not together."""
    if not train:
        raise ValueError("There are no pairs to train on.")
    check_apart(training=train, validation=valid, test=test)
    if made.warm:
        made.warm.check(train)
    usable(made.potential, [*train, *valid, *test])
    check_terms(terms, train)


def _default_stepper(adjoint: Adjoint) -> Stepper:
    """The paper's map where the gradient goes through its frames, else what finds a minimum soonest."""
    return GradientDescent(momentum=MOMENTUM) if adjoint.through_frames else BFGS()


def _check_learnable(stepper: Stepper, adjoint: Adjoint, names: Sequence[str]) -> None:
    """Raise for numbers of the stepper that would stay where they are, or are no numbers yet."""
    if not adjoint.through_frames:
        raise ValueError(
            f"The adjoint {adjoint.name!r} has no gradient for the numbers of the stepper, so that none can be learnt: "
            "take 'replay' or 'guided'."
        )
    if "step_size" in names and stepper.todict().get("step_size") == "auto":
        raise ValueError(
            "step_size='auto' is found when the training begins and then kept: give it a number in Å^2/eV to learn it."
        )
