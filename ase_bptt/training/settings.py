"""What the keywords of a Trainer mean: their defaults, and which of them go together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..adjoints import Adjoint, Replay, make_adjoint
from ..losses import named_loss
from ..result import Relaxation
from ..steppers import BFGS, GradientDescent, Stepper, make_stepper
from ..structures import Structures
from ..utils import check_positive

Loss = Callable[[Relaxation, Structures], Tensor]
"""``loss(relaxation, reference) -> (n,)``"""

MOMENTUM = 0.7
"""Default of gradient descent in training: 10 frames go nearly as far as 30 without."""
UNROLLED = 10
"""Default number of frames of an unroll."""
TO_THE_END = 300
"""Default limit of frames on the way to a minimum."""
LEARNING_RATES = ((500_000, 2e-3), (math.inf, 1e-3))
"""Numbers of weights, and the learning rate for potentials with at most so many."""
ZERO_FORCE, PASSES = "zero-force", 5
"""The first stage of a training that needs no relaxation, and its passes over the pairs in an epoch: five gradients
cost less than one through an unroll of ten frames."""
EPOCHS = 6
"""Default number of epochs through the relaxation."""
FIRST = 8
"""Default number of epochs of a first stage."""
NUMBERS = (
    "lr", "steps", "fmax", "batch_size", "memory", "clip", "patience", "interpolate", "rattle", "seed",
    "warm_start_every", "learn", "first", "rates",
)  # fmt: skip
"""Keywords of a Trainer that are plain numbers and names: the fields of the classes below, but for three objects."""


@dataclass(frozen=True)
class RelaxationSettings:
    """How pairs are relaxed in training, and how the distance to the references is measured; as for `Trainer`."""

    stepper: Stepper
    adjoint: Adjoint
    loss: Loss
    steps: int
    fmax: float
    warm_start_every: int
    learn: list[str]
    memory: float | None
    first: str | None = None

    @classmethod
    def resolve(
        cls,
        stepper: Stepper | str | None,
        adjoint: Adjoint | str | None,
        loss: Loss | str,
        *,
        steps: int | None,
        fmax: float,
        warm_start_every: int,
        learn: Sequence[str] | str,
        memory: float | None,
        first: str | None = None,
    ) -> RelaxationSettings:
        """Settings from keywords, with objects for names and defaults for None.

        Raises
        ------
        ValueError
            For unknown names, for numbers that are not positive, and for keywords that do not go together.
        """
        check_positive(steps=steps, memory=memory, fmax=fmax, warm_start_every=warm_start_every or None)
        first_stage(first)
        names = [learn] if isinstance(learn, str) else list(learn)
        chosen = make_adjoint(adjoint) or Replay()
        rule = _default_stepper(chosen) if stepper is None else make_stepper(stepper)
        if names:
            # A training must not change the stepper that the next one is given. Parameters that the user has put into
            # it are trained in place, as the potential is.
            rule = copy.deepcopy(rule)
        chosen.check_stepper(rule)
        measured: Loss = named_loss(loss) if isinstance(loss, str) else loss
        if names:
            _check_learnable(rule, chosen, names)
            rule.learn(*names)
        if warm_start_every and not chosen.needs_minimum:
            raise ValueError(
                f"Warm starts need an adjoint that ends at the minimum, not {chosen.name!r}: take 'implicit', "
                "'guided' or 'one-step'."
            )
        frames = steps or (TO_THE_END if chosen.needs_minimum else UNROLLED)
        return cls(rule, chosen, measured, frames, fmax, warm_start_every, names, memory, first)


@dataclass(frozen=True)
class OptimizerSettings:
    """Learning rates, the limit on the norm of the gradient, and when to stop early; as for `Trainer`."""

    lr: float
    rates: Mapping[str, float]
    clip: float
    patience: int | None

    @classmethod
    def resolve(
        cls, potential: nn.Module, lr: float | None, rates: Mapping[str, float], clip: float, patience: int | None
    ) -> OptimizerSettings:
        """Settings from keywords; without a learning rate that of `LEARNING_RATES`.

        What suits a small potential ruins one with many weights.
        """
        n = sum(parameter.numel() for parameter in potential.parameters())
        default = next(rate for most, rate in LEARNING_RATES if n <= most)
        return cls(default if lr is None else lr, dict(rates), clip, patience)

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, clip=self.clip, patience=self.patience)


@dataclass(frozen=True)
class SamplingSettings:
    """How the pairs of an epoch are drawn: batches, order, and augmentation of the starts; as for `Trainer`."""

    batch_size: int
    interpolate: float
    rattle: float
    seed: int

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size)
        if not (0 <= self.interpolate <= 1 and 0 <= self.rattle < math.inf):
            raise ValueError(
                f"interpolate is a share of the starts, from 0 to 1, and rattle a length in Å, 0 or more; got "
                f"{self.interpolate} and {self.rattle}."
            )


def first_stage(given: str | None) -> int:
    """Epochs of the first stage of a training, from "zero-force" or "zero-force:N"; 0 for None.

    >>> first_stage("zero-force:20")
    20
    """
    if given is None:
        return 0
    name, _, number = given.lower().partition(":")
    if name != ZERO_FORCE or not (number or "1").isdecimal() or number == "0":
        raise ValueError(f"A first stage is '{ZERO_FORCE}', or '{ZERO_FORCE}:N' with N epochs; got {given!r}.")
    return int(number or FIRST)


def _default_stepper(adjoint: Adjoint) -> Stepper:
    """The paper's map where the gradient goes through its frames, else what finds a minimum soonest."""
    return GradientDescent(momentum=MOMENTUM) if adjoint.through_frames else BFGS()


def _check_learnable(stepper: Stepper, adjoint: Adjoint, names: Sequence[str]) -> None:
    """Raise for hyperparameters that would get no gradient, or have no value yet."""
    if not adjoint.through_frames:
        raise ValueError(
            f"The adjoint {adjoint.name!r} has no gradient for the hyperparameters of the stepper, so they cannot be "
            "learnt: take 'replay' or 'guided'."
        )
    if "step_size" in names and stepper.todict().get("step_size") == "auto":
        raise ValueError(
            "step_size='auto' is found when the training begins and then kept: give it a number in Å^2/eV to learn it."
        )
